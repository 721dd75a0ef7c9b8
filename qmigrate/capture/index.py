"""Where each page of RAM is: absent, zero, at an offset in the input, or at one in a spill file.

Made by one pass over a migration, whatever way its RAM travelled; the last copy of a page wins.  A page that stands in
one of the inputs as it is, and in one piece, is left there; one that does not (xbzrle, compressed, from a pipe or a
packed input, cut where a piece of a recording ends) goes into a spill file, which has no name and ends with its owner.
"""

import mmap
import os
import re
import tempfile
from array import array
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Final

from qmigrate.capture.kind import ENTRY_BYTES, FILE_SHIFT, KIND_BITS, OFFSET_MASK, Kind
from qmigrate.capture.placed import Placed, PlacedPages, lazy_entries
from qmigrate.capture.places import Channels, Input
from qmigrate.errors import UnsupportedError
from qmigrate.format.command import DiscardRange, PostcopyRamDiscard
from qmigrate.format.entry import Entry, RamPage
from qmigrate.format.mapped_ram import MappedBitmap, MappedBlock, MappedPages
from qmigrate.format.ram import BlockList, Pages, RamBlock, RamFlag
from qmigrate.format.stretch import Stretch

if TYPE_CHECKING:
    from qmigrate.format.multifd import PagePacket
    from qmigrate.format.multifd_pages import PageDecoder

__all__ = ["Kind", "PageIndex", "Placed"]

_PAGE: Final = int(RamFlag.PAGE)
_ZERO: Final = int(RamFlag.ZERO)
_CONTINUE: Final = int(RamFlag.CONTINUE)
_KIND_BITS: Final = KIND_BITS
_KIND_MASK: Final = (1 << _KIND_BITS) - 1
_HUGE: Final = 1 << 22  # pages
_BITS_AT_ONCE: Final = 1 << 13
_ONES: Final = re.compile("1+")


class PageIndex(PlacedPages):
    """The index of a migration while it is read.  Closes its spill file; the inputs stay open.

    ``descriptor`` is that of a stream in a file, where it begins at ``base``, in bytes; None of one whose bytes can't
    be read again at any place.  ``channels``: where there is more than one stream in one file.  ``spill``: an empty
    file, which it closes, for what does not stand in an input; else it makes one.  ``by_bitmaps``: of mapped-ram the
    bitmaps come alone, and say where pages are; else the runs of pages do.
    """

    def __init__(
        self,
        descriptor: int | None,
        *,
        base: int = 0,
        channels: Channels | None = None,
        spill: IO[bytes] | None = None,
        by_bitmaps: bool = False,
    ) -> None:
        if channels is None:
            channels = Channels(inputs=(None if descriptor is None else Input.of(descriptor),))
        if any(each is not None and each.length > OFFSET_MASK for each in channels.inputs):
            raise UnsupportedError("a file of 512 TiB or more, which can't be indexed here")
        super().__init__(channels.inputs, spill=spill)
        self._is_plain = descriptor is not None
        self._places = channels.places
        self._by_bitmaps = by_bitmaps
        self._mapped_at = 0  # where the pages of the latest block begin in the stream
        self._base = base
        self._spilled = 0
        self._decoders: dict[int, PageDecoder] = {}
        self._memory: dict[str, mmap.mmap] = {}  # that of the entries

    @property
    def spilled(self) -> int:
        return self._spilled

    def noted(self, block: str) -> list[tuple[int, int]]:
        if len(self._of(block)) < _HUGE:
            return super().noted(block)
        from qmigrate.capture.touched import touched

        return [(begin // ENTRY_BYTES, end // ENTRY_BYTES) for begin, end in touched(self._memory[block])]

    # -- making it

    def take(self, entry: Entry) -> None:
        """Another entry of the migration, in its order.  Raises ``StreamError`` where a page's data is damaged."""
        record = entry.record
        match record:
            case BlockList(blocks=blocks):
                for block in blocks:
                    self._add(block)
            case MappedBlock(block=block, header=header):
                self._add(block)
                self.page_size = header.page_size
                self._mapped_at = entry.offset + entry.length + header.pages_offset - header.bitmap_offset
            case MappedBitmap() if self._by_bitmaps:
                self._bitmap(record)
            case Pages() as pages:
                self.page_size = pages.page_size
                self._pages(pages, entry)
            case MappedPages() as mapped:
                self.page_size = mapped.page_size
                self._mapped(mapped, entry)
            case RamPage() as page:
                self.page_size = page.page_size
                self._encoded(page, entry)
            case PostcopyRamDiscard(block=name, ranges=ranges):
                self._discard(name, ranges)
            case _ if entry.channel:
                self._of_channel(entry)

    def _add(self, block: RamBlock) -> None:
        self.blocks[block.name] = block

    def _of(self, block: str) -> memoryview:
        """The entries of a block; made at its first page, whose length is known then.  Raises ``StreamError``."""
        entries = self._entries.get(block)
        if entries is None:
            length = self.blocks[block].used_length
            try:
                memory = lazy_entries(-(-length // self.page_size))
            except OSError as exc:
                raise UnsupportedError(
                    f"its {length:#x} bytes are more than can be indexed here", trail=("ram", block)
                ) from exc
            entries = self._entries[block] = memoryview(memory).cast("Q")
            self._memory[block] = memory
        return entries

    def _pages(self, pages: Pages, entry: Entry) -> None:
        entries, page_size = self._of(pages.block), pages.page_size
        if pages.fill:
            self._filled(pages)
        elif entry.channel in self._places:
            self._records(pages, entry)
        elif not self._stays_there(entry):
            self._spill_records(pages, entry)
        elif isinstance(pages.runs, Stretch) and not pages.named:
            self._stretch(pages.runs, entries)
        else:
            name = 1 + len(pages.block.encode("utf-8", "surrogateescape")) if pages.named else 0
            for offset, flag, start, count in pages.runs:
                kind, length = (Kind.ZERO, 1) if flag == _ZERO else (Kind.RECORD, page_size)
                self._place(entries, Placed(kind, start // page_size, count, offset + 8 + name), 8 + length)
                name = 0  # only the first record of all can have one

    def _place(self, entries: memoryview, placed: Placed, stride: int) -> None:
        offset = placed.offset + (0 if placed.kind == Kind.SPILLED else self._base)
        begin = placed.file << FILE_SHIFT | offset << _KIND_BITS | placed.kind
        step = stride << _KIND_BITS
        entries[placed.page : placed.page + placed.page_count] = array(
            "Q", range(begin, begin + step * placed.page_count, step)
        )

    def _stretch(self, stretch: Stretch, entries: memoryview) -> None:
        page_size, normal = stretch.page_size, _PAGE | _CONTINUE
        shift, mask = page_size.bit_length() - 1, page_size - 1
        at = (stretch.offset + self._base + 8) << _KIND_BITS
        step, short = (8 + page_size) << _KIND_BITS, 9 << _KIND_BITS
        for number in stretch.numbers:
            if number & mask == normal:
                entries[number >> shift] = at + Kind.RECORD
                at += step
            else:
                entries[number >> shift] = at + Kind.ZERO
                at += short

    def _stays_there(self, entry: Entry) -> bool:
        return self._is_plain and not entry.channel

    # -- of channels that stand in a file, in pieces or not

    def _records(self, pages: Pages, entry: Entry) -> None:
        if isinstance(pages.runs, Stretch) and not pages.named:
            self._stretch_in_pieces(pages.block, pages.runs, entry)
            return
        name = 1 + len(pages.block.encode("utf-8", "surrogateescape")) if pages.named else 0
        for offset, flag, start, count in pages.runs:
            kind = Kind.ZERO if flag == _ZERO else Kind.RECORD
            self._stand(pages.block, Placed(kind, start // pages.page_size, count, offset + 8 + name), entry, name)
            name = 0  # only the first record of all can have one

    def _stretch_in_pieces(self, block: str, stretch: Stretch, entry: Entry) -> None:
        """As ``_stretch``, and what is cut as ``_stand``, which does the same run by run."""
        file, places = self._places[entry.channel]
        entries, page_size, normal = self._of(block), stretch.page_size, _PAGE | _CONTINUE
        shift, mask = page_size.bit_length() - 1, page_size - 1
        at = end = stretch.offset  # in the channel
        above = 0  # an entry without its kind, if `at` were 0
        for number in stretch.numbers:
            is_normal = number & mask == normal
            after = at + (8 + page_size if is_normal else 9)
            if after > end:
                place, room = places.find(at)
                end, above = at + room, (file << FILE_SHIFT) + (place - at + 8 << _KIND_BITS)
            if after <= end:
                entries[number >> shift] = above + (at << _KIND_BITS) + (Kind.RECORD if is_normal else Kind.ZERO)
            else:
                kind = Kind.RECORD if is_normal else Kind.ZERO
                self._stand(block, Placed(kind, number >> shift, 1, at + 8), entry)
            at = after

    def _stand(self, block: str, placed: Placed, entry: Entry, name: int = 0) -> None:
        """Pages whose places in their channel these are, each behind its word where it is a record.

        Those that are whole in a piece, with their word (and before the first of all so many bytes of a ``name``), stay
        there; the others are spilled.
        """
        file, places = self._places[entry.channel]
        entries = self._of(block)
        kind, page, left, at, _ = placed
        word = 0 if kind == Kind.PLACED else 8
        length = 1 if kind == Kind.ZERO else self.page_size
        while left:
            begin = at - word - name
            place, room = places.find(begin)
            whole = min(left, (room - name) // (word + length))
            if whole > 0:
                offset = place + word + name
                self._place(entries, Placed(kind, page, whole, offset, file), word + length)
            elif kind == Kind.ZERO:
                entries[page] = Kind.ZERO
            else:
                contents = at - entry.offset
                self._spill_pages(block, page, entry.view[contents : contents + length])
            whole = max(whole, 1)
            page, left, at, name = page + whole, left - whole, at + whole * (word + length), 0

    def _mapped(self, pages: MappedPages, entry: Entry) -> None:
        entries, page_size = self._of(pages.block), pages.page_size
        for offset, flag, start, count in pages.runs:
            first = start // page_size
            if flag != _PAGE:
                entries[first : first + count] = array("Q", [Kind.ZERO]) * count
            elif entry.channel in self._places:
                self._stand(pages.block, Placed(Kind.PLACED, first, count, offset), entry)
            elif self._stays_there(entry):
                self._place(entries, Placed(Kind.PLACED, first, count, offset), page_size)
            else:
                at = offset - entry.offset
                self._spill_pages(pages.block, first, entry.view[at : at + count * page_size])

    def _bitmap(self, bitmap: MappedBitmap) -> None:
        """The same, of a piece of a bitmap: some thousand pages at once, as most of a guest may have no contents."""
        entries, page_size = self._of(bitmap.block), self.page_size
        end = min(bitmap.first_page + 8 * bitmap.length, len(entries))
        entries[bitmap.first_page : end] = array("Q", [Kind.ZERO]) * (end - bitmap.first_page)
        bits, step = bitmap.build(), page_size << _KIND_BITS
        for first in range(bitmap.first_page, end, _BITS_AT_ONCE):
            at = (first - bitmap.first_page) // 8
            word = int.from_bytes(bits[at : at + _BITS_AT_ONCE // 8], "little")
            if not word:
                continue
            count = min(_BITS_AT_ONCE, end - first)
            begin = (self._base + self._mapped_at + first * page_size) << _KIND_BITS | Kind.PLACED
            places = memoryview(array("Q", range(begin, begin + step * count, step)))
            for found in _ONES.finditer(format(word, f"0{count}b")[::-1], 0, count):
                one, other = found.span()
                entries[first + one : first + other] = places[one:other]

    def _filled(self, pages: Pages) -> None:
        """ZERO pages of another byte: no QEMU writes them, and 5.2 reads them."""
        for _, flag, start, count in pages.runs:
            contents = bytes([pages.fill]) * (count * pages.page_size)
            assert flag == _ZERO
            self._spill_pages(pages.block, start // pages.page_size, memoryview(contents))

    def _spill_records(self, pages: Pages, entry: Entry) -> None:
        page_size, entries = pages.page_size, self._of(pages.block)
        at = 1 + len(pages.block.encode("utf-8", "surrogateescape")) if pages.named else 0
        for _, flag, start, count in pages.runs:
            for page in range(start // page_size, start // page_size + count):
                at += 8
                if flag == _PAGE:
                    self._spill_pages(pages.block, page, entry.view[at : at + page_size])
                    at += page_size
                else:
                    entries[page] = Kind.ZERO
                    at += 1

    def _discard(self, name: str, ranges: Sequence[DiscardRange]) -> None:
        """What was sent before the switch is stale.  It comes again, but maybe on a channel that we lack."""
        if name not in self._entries:  # none of its pages has come
            return
        entries, page_size = self._of(name), self.page_size
        for each in ranges:
            first = min(each.start // page_size, len(entries))
            count = min(-(-each.length // page_size), len(entries) - first)
            entries[first : first + count] = array("Q", [Kind.ABSENT]) * count

    def _encoded(self, page: RamPage, entry: Entry) -> None:
        from qmigrate.format.encoded import page_after  # few streams have such pages

        number = page.record.word.start // page.page_size
        before = self.contents(page.block, number)
        self._spill_pages(page.block, number, memoryview(page_after(page, before, offset=entry.offset)))

    def _of_channel(self, entry: Entry) -> None:
        """A packet of multifd, its pages as they are or compressed."""
        from qmigrate.format.multifd import Compression, PagePacket
        from qmigrate.format.multifd_channel import packet_entry
        from qmigrate.format.multifd_pages import PageDecoder

        packet = entry.record
        if not isinstance(packet, PagePacket) or not packet.runs:
            return
        self.page_size = packet.page_size
        if packet.header.compression is Compression.NOCOMP and entry.channel in self._places:
            self._packet(packet, entry)
            return
        decoder = self._decoders.setdefault(entry.channel, PageDecoder())
        contents = memoryview(decoder.contents(packet_entry(entry, packet)))
        entries = self._of(packet.header.block)
        for at, flag, start, count in packet.runs:
            first = start // packet.page_size
            if flag == _PAGE:
                self._spill_pages(packet.header.block, first, contents[at : at + count * packet.page_size])
            else:
                entries[first : first + count] = array("Q", [Kind.ZERO]) * count

    def _packet(self, packet: "PagePacket", entry: Entry) -> None:
        """Its pages, which stand as they are: in one piece mostly, or in as many as its data is cut into."""
        from qmigrate.format.multifd import header_length

        begin, page_size = entry.offset + header_length(packet.page_size), packet.page_size
        block, (file, places) = packet.header.block, self._places[entry.channel]
        entries, step = self._of(block), page_size << _KIND_BITS
        above = end = 0  # an entry, if `at` were 0; where the piece ends, from `begin` on
        for at, flag, start, count in packet.runs:
            first, after = start // page_size, at + count * page_size
            if flag != _PAGE:
                entries[first : first + count] = array("Q", [Kind.ZERO]) * count
                continue
            if after > end:
                place, room = places.find(begin + at)
                end, above = at + room, (file << FILE_SHIFT) + (place - at << _KIND_BITS) + Kind.PLACED
            placed = above + (at << _KIND_BITS)
            if after > end:
                self._stand(block, Placed(Kind.PLACED, first, count, begin + at), entry)
            elif count == 1:
                entries[first] = placed
            else:
                entries[first : first + count] = array("Q", range(placed, placed + step * count, step))

    def _spill_pages(self, block: str, first: int, contents: memoryview) -> None:
        """Append them; a page whose earlier copy is there too takes its place again."""
        if self._spill is None:
            self._spill = tempfile.TemporaryFile(prefix="qmigrate-")  # noqa: SIM115 - closed by close()
        entries, page_size = self._of(block), self.page_size
        count = len(contents) // page_size
        if count == 1 and entries[first] & _KIND_MASK == Kind.SPILLED:
            _write_all(self._spill.fileno(), contents, entries[first] >> _KIND_BITS & OFFSET_MASK)
            return
        _write_all(self._spill.fileno(), contents, self._spilled)
        self._place(entries, Placed(Kind.SPILLED, first, count, self._spilled), page_size)
        self._spilled += len(contents)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Into a spill file.  Raises ``OSError``, which names the folder that it is in."""
    while len(data):
        try:
            count = os.pwrite(descriptor, data, offset)
        except OSError as exc:
            own_name = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115 - one that is gone: the folder is not
            exc.filename = own_name.rpartition("/")[0]
            raise
        data, offset = data[count:], offset + count
