"""Where each page of RAM is: absent, zero, at an offset in the input, or at one in a spill file.

Made by one pass over a migration, whatever way its RAM travelled; the last copy of a page wins.  A page that stands in
the input as it is, is left there; one that does not (xbzrle, compressed, from a pipe, a packed input, a recording or a
further channel) goes into a spill file, which has no name and ends with its owner.

An entry has eight bytes, of which nothing is used before a page is read: no claim of a length takes memory.
"""

import mmap
import os
import struct
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import TracebackType
from typing import IO, TYPE_CHECKING, Final, NamedTuple, Self

from qmigrate.errors import StreamError, UnsupportedError
from qmigrate.format.command import DiscardRange, PostcopyRamDiscard
from qmigrate.format.entry import Entry, RamPage
from qmigrate.format.mapped_ram import MappedBlock, MappedPages
from qmigrate.format.ram import BlockList, Pages, RamBlock, RamFlag
from qmigrate.format.stretch import Stretch

if TYPE_CHECKING:
    from qmigrate.format.multifd_pages import PageDecoder

__all__ = ["Kind", "PageIndex", "Placed"]

_PAGE: Final = int(RamFlag.PAGE)
_ZERO: Final = int(RamFlag.ZERO)
_CONTINUE: Final = int(RamFlag.CONTINUE)
_HEAD: Final = struct.Struct(">Q")
_ZERO_RECORD: Final = struct.Struct(">QB")
_KIND_BITS: Final = 3
_KIND_MASK: Final = (1 << _KIND_BITS) - 1
_MOST_BUFFERS: Final = 1024  # IOV_MAX on Linux
_COUNTED_AT_ONCE: Final = 1 << 14
_LAZILY: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which mmap names since 3.13


class Kind:
    """What an entry of the index is; its other bits are an offset in bytes."""

    ABSENT: Final = 0
    ZERO: Final = 1
    RECORD: Final = 2  # in the input, behind the word of its record
    PLACED: Final = 3  # in the input, at its place: mapped-ram
    SPILLED: Final = 4


class Placed(NamedTuple):
    """Pages of one kind, one after the other in the block and in their file; ``offset`` is the first one's."""

    kind: int
    page: int
    page_count: int
    offset: int


class PageIndex:
    """The pages of each block.  Closes its spill file; ``descriptor`` is the input's, which stays open.

    ``descriptor`` is None where the input can't be read again at any place: then all pages are spilled.
    ``base``: where in the file the stream begins, in bytes.
    """

    def __init__(self, descriptor: int | None, *, base: int = 0) -> None:
        self.page_size = 4096
        self.blocks: dict[str, RamBlock] = {}
        self._descriptor = descriptor
        self._base = base
        self._entries: dict[str, memoryview] = {}
        self._spill: IO[bytes] | None = None
        self._spilled = 0
        self._decoders: dict[int, PageDecoder] = {}
        self._stamp = self._stamped()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._spill is not None:
            self._spill.close()
            self._spill = None

    # -- making it

    def take(self, entry: Entry) -> None:
        """Another entry of the migration, in its order.  Raises ``StreamError`` where a page's data is damaged."""
        match entry.record:
            case BlockList(blocks=blocks):
                for block in blocks:
                    self._add(block)
            case MappedBlock(block=block):
                self._add(block)
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
                memory = mmap.mmap(-1, 8 * -(-length // self.page_size), flags=_LAZILY)
            except (OSError, OverflowError, ValueError) as exc:
                raise UnsupportedError(
                    f"its {length:#x} bytes are more than can be indexed here", trail=("ram", block)
                ) from exc
            entries = self._entries[block] = memoryview(memory).cast("Q")
        return entries

    def _pages(self, pages: Pages, entry: Entry) -> None:
        entries, page_size = self._of(pages.block), pages.page_size
        if pages.fill:
            self._filled(pages)
        elif not self._stays_there(entry):
            self._spill_records(pages, entry)
        elif isinstance(pages.runs, Stretch) and not pages.named:
            self._stretch(pages.runs, entries)
        else:
            name = 1 + len(pages.block.encode("utf-8", "surrogateescape")) if pages.named else 0
            for offset, flag, start, count in pages.runs:
                first = start // page_size
                if flag == _ZERO:
                    entries[first : first + count] = array("Q", [Kind.ZERO]) * count
                else:
                    self._place(entries, Placed(Kind.RECORD, first, count, offset + 8 + name), 8 + page_size)
                name = 0  # only the first record of all can have one

    def _place(self, entries: memoryview, placed: Placed, stride: int) -> None:
        begin = (placed.offset + (0 if placed.kind == Kind.SPILLED else self._base)) << _KIND_BITS | placed.kind
        step = stride << _KIND_BITS
        entries[placed.page : placed.page + placed.page_count] = array(
            "Q", range(begin, begin + step * placed.page_count, step)
        )

    def _stretch(self, stretch: Stretch, entries: memoryview) -> None:
        page_size, normal = stretch.page_size, _PAGE | _CONTINUE
        shift, mask = page_size.bit_length() - 1, page_size - 1
        at = (stretch.offset + self._base + 8) << _KIND_BITS | Kind.RECORD
        step, short = (8 + page_size) << _KIND_BITS, 9 << _KIND_BITS
        for number in stretch.numbers:
            if number & mask == normal:
                entries[number >> shift] = at
                at += step
            else:
                entries[number >> shift] = Kind.ZERO
                at += short

    def _stays_there(self, entry: Entry) -> bool:
        return self._descriptor is not None and not entry.channel

    def _mapped(self, pages: MappedPages, entry: Entry) -> None:
        entries, page_size = self._of(pages.block), pages.page_size
        for offset, flag, start, count in pages.runs:
            first = start // page_size
            if flag != _PAGE:
                entries[first : first + count] = array("Q", [Kind.ZERO]) * count
            elif self._stays_there(entry):
                self._place(entries, Placed(Kind.PLACED, first, count, offset), page_size)
            else:
                at = offset - entry.offset
                self._spill_pages(pages.block, first, entry.view[at : at + count * page_size])

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
        from qmigrate.format.multifd import PagePacket
        from qmigrate.format.multifd_channel import packet_entry
        from qmigrate.format.multifd_pages import PageDecoder

        packet = entry.record
        if not isinstance(packet, PagePacket) or not packet.runs:
            return
        decoder = self._decoders.setdefault(entry.channel, PageDecoder())
        contents = memoryview(decoder.contents(packet_entry(entry, packet)))
        self.page_size = packet.page_size
        entries = self._of(packet.header.block)
        for at, flag, start, count in packet.runs:
            first = start // packet.page_size
            if flag == _PAGE:
                self._spill_pages(packet.header.block, first, contents[at : at + count * packet.page_size])
            else:
                entries[first : first + count] = array("Q", [Kind.ZERO]) * count

    def _spill_pages(self, block: str, first: int, contents: memoryview) -> None:
        """Append them; a page whose earlier copy is there too takes its place again."""
        if self._spill is None:
            self._spill = tempfile.TemporaryFile(prefix="qmigrate-")  # noqa: SIM115 - closed by close()
        entries, page_size = self._of(block), self.page_size
        count = len(contents) // page_size
        if count == 1 and entries[first] & _KIND_MASK == Kind.SPILLED:
            _write_all(self._spill.fileno(), contents, entries[first] >> _KIND_BITS)
            return
        _write_all(self._spill.fileno(), contents, self._spilled)
        self._place(entries, Placed(Kind.SPILLED, first, count, self._spilled), page_size)
        self._spilled += len(contents)

    # -- asking it

    def absent(self, block: str) -> int:
        """How many of its pages have not come."""
        entries = self._of(block)
        return sum(
            entries[at : at + _COUNTED_AT_ONCE].tolist().count(Kind.ABSENT)
            for at in range(0, len(entries), _COUNTED_AT_ONCE)
        )

    def runs(self, block: str, first: int, count: int) -> Iterator[Placed]:
        """Where these pages are, in their order."""
        entries = self._of(block)
        page, end = first, first + count
        while page < end:
            entry = entries[page]
            kind, step = entry & _KIND_MASK, self._step(entry & _KIND_MASK)
            following, expected = page + 1, entry + step
            while following < end and entries[following] == expected:
                following += 1
                expected += step
            yield Placed(kind, page, following - page, entry >> _KIND_BITS)
            page = following

    def _step(self, kind: int) -> int:
        """By how much the entry of a page differs from that of the page before, where they stand side by side."""
        if kind in (Kind.ABSENT, Kind.ZERO):
            return 0
        return (self.page_size + (8 if kind == Kind.RECORD else 0)) << _KIND_BITS

    def contents(self, block: str, page: int) -> bytes:
        """One page; zeros where it is absent.  Raises ``StreamError``."""
        records = self.records(block, page, 1)
        return bytes(records[8:]) if len(records) == 8 + self.page_size else bytes(self.page_size)

    def records(self, block: str, first: int, count: int) -> bytearray:
        """These pages as page records that continue their block, in order; an absent page as zero.

        Raises ``StreamError`` where the input is no longer what was indexed: of a record its word is compared, of any
        page the file's size and time.
        """
        self.check()
        runs = list(self.runs(block, first, count))
        out = bytearray(sum(run.page_count * self._record_bytes(run.kind) for run in runs))
        view, at = memoryview(out), 0
        for run in runs:
            length = run.page_count * self._record_bytes(run.kind)
            self._read(block, run, view[at : at + length])
            at += length
        return out

    def _record_bytes(self, kind: int) -> int:
        return 9 if kind in (Kind.ABSENT, Kind.ZERO) else 8 + self.page_size

    def _read(self, block: str, run: Placed, into: memoryview) -> None:
        page_size = self.page_size
        start = run.page * page_size
        if run.kind in (Kind.ABSENT, Kind.ZERO):
            pack = _ZERO_RECORD.pack_into
            for index in range(run.page_count):
                pack(into, 9 * index, start + index * page_size | _ZERO | _CONTINUE, 0)
            return
        if run.kind == Kind.RECORD:
            self._read_records(block, run, into)
            return
        descriptor = self._spill.fileno() if run.kind == Kind.SPILLED and self._spill else self._descriptor
        stride = 8 + page_size
        for begin in range(0, run.page_count, _MOST_BUFFERS):
            pages = range(begin, min(begin + _MOST_BUFFERS, run.page_count))
            buffers = [into[at * stride + 8 : (at + 1) * stride] for at in pages]
            self._read_exactly(descriptor, buffers, run.offset + begin * page_size, block)
        for index in range(run.page_count):
            _HEAD.pack_into(into, index * stride, start + index * page_size | _PAGE | _CONTINUE)

    def _read_records(self, block: str, run: Placed, into: memoryview) -> None:
        """They stand in the input as they go out; only the first may have another head, with the block's name."""
        page_size, start = self.page_size, run.page * self.page_size
        self._read_exactly(self._descriptor, [into], run.offset - 8, block)
        words = _words(page_size, run.page_count).unpack(into)
        expected = start | _PAGE | _CONTINUE
        if words[0] != expected:
            self._check_named(block, run, expected & ~_CONTINUE)
            _HEAD.pack_into(into, 0, expected)
        if words[1:] != tuple(range(expected + page_size, expected + page_size * run.page_count, page_size)):
            raise StreamError("the pages are no longer where they were", offset=run.offset, trail=("ram", block))

    def _check_named(self, block: str, run: Placed, word: int) -> None:
        name = block.encode("utf-8", "surrogateescape")
        expected = _HEAD.pack(word) + bytes([len(name)]) + name
        head = bytearray(len(expected))
        self._read_exactly(self._descriptor, [memoryview(head)], run.offset - len(expected), block)
        if head != expected:
            raise StreamError("the page is no longer where it was", offset=run.offset, trail=("ram", block))

    def _read_exactly(self, descriptor: int | None, buffers: list[memoryview], offset: int, block: str) -> None:
        assert descriptor is not None, "what is in the input was indexed because it can be read again"
        wanted = sum(map(len, buffers))
        try:
            found = os.preadv(descriptor, buffers, offset)
        except OSError as exc:
            raise StreamError(f"the input can't be read: {exc.strerror}", offset=offset, trail=("ram", block)) from exc
        if found != wanted:
            raise StreamError(
                f"the input gives {found} bytes here, expected {wanted}", offset=offset, trail=("ram", block)
            )

    # -- is it still the same input

    def _stamped(self) -> tuple[int, int] | None:
        if self._descriptor is None:
            return None
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def check(self) -> None:
        """Raises ``StreamError`` where the input was changed since."""
        if self._stamp != self._stamped():
            raise StreamError("the input was changed since its pages were indexed")


@lru_cache(maxsize=4096)
def _words(page_size: int, count: int) -> struct.Struct:
    """The words of so many page records that stand side by side."""
    return struct.Struct(">" + f"Q{page_size}x" * count)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
