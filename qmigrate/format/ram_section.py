"""The inside of the ``ram`` section, read as it comes: the block list, then records until EOS.

Plain pages are read as runs by ``pages``, all else by the declarations in ``ram``.

migration/ram.c: ram_load_precopy(), parse_ramblocks()
"""

from collections.abc import Generator, Iterator, Sequence
from copy import copy
from operator import itemgetter
from typing import Final, Self

from qmigrate.errors import StreamError, UnsupportedError
from qmigrate.format import pages
from qmigrate.format.command import PageSizes
from qmigrate.format.entry import Entry, RamPage, Step, StreamRecord
from qmigrate.format.feed import Feed
from qmigrate.format.mapped_ram import (
    Gap,
    MappedBitmap,
    MappedBlock,
    MappedPages,
    MappedRamHeader,
    MappedSpan,
    check_header,
    is_zero,
    read_mapped,
)
from qmigrate.format.page_size import SMALLEST_PAGE, find_page_size
from qmigrate.format.ram import (
    PAGE_KINDS,
    BlockList,
    BlockListHeader,
    PageRun,
    Pages,
    RamBlock,
    RamBlockHead,
    RamFlag,
    RamRecord,
    RamWord,
)
from qmigrate.format.stretch import intervals_of

__all__ = ["RamSection"]

_LONGEST_BLOCK_LIST: Final = 1 << 20  # bytes: a guest has tens of blocks
_PIECE: Final = 1 << 16  # bytes of a bitmap or a gap that are one record
_END: Final = itemgetter(1)  # of an interval
_COMMON: Final = {
    marker.build(page_size=4096): marker
    for marker in (
        RamRecord(word=RamWord(0, int(flag)), block=None, body=None) for flag in (RamFlag.EOS, RamFlag.MULTIFD_FLUSH)
    )
}
"""Markers that come often, by their bytes: to read one by its declaration takes 25 times as long."""
_PLAIN_PAGE: Final = int(RamFlag.PAGE | RamFlag.CONTINUE)


class RamSection:
    """What the section remembers from part to part: its blocks, and the one that pages continue.

    ``page_size`` is the target's, in bytes, ``is_known`` where that is more than a guess; ``advised`` what ADVISE
    said before, None without one.  ``reads_mapped``: see ``Walker``.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        page_size: int,
        is_known: bool,
        capabilities: frozenset[str],
        advised: PageSizes | None,
        reads_mapped: bool = True,
    ) -> None:
        self.feed = feed
        self.page_size = page_size
        self.page_size_is_known = is_known
        self.capabilities = capabilities
        self.advised = advised
        self.reads_mapped = reads_mapped
        self.blocks: dict[str, int] = {}
        self.block: str | None = None
        self._is_at_record = False

    def forget_block(self) -> None:
        """A source names the block again, after the switch and on a new connection."""
        self.block = None

    def over(self, feed: Feed) -> Self:
        """The same section, which goes on over another connection; this one may still wait for the end of its own."""
        section = copy(self)
        section.feed = feed
        section.forget_block()
        section._is_at_record = False
        return section

    def block_list(self) -> Step:
        trail = ("ram", "block list")
        start = self.feed.offset
        head, at = yield from self.feed.ahead(BlockListHeader, 0, trail)
        below = (self.page_size if self.page_size_is_known else SMALLEST_PAGE) - 1
        total = head.word & ~below
        if head.word & below != RamFlag.MEM_SIZE:
            raise StreamError(
                f"found flags {head.word & below:#x}, expected MEM_SIZE 0x4",
                offset=start,
                trail=trail,
            )
        if self.is_mapped:
            yield self._consume(head, at)
            yield from self._mapped_blocks(total, trail)
            return
        blocks: dict[str, RamBlock] = {}
        left = total
        while left:
            block, at = yield from self._listed_block(at, left, trail)
            if block.name in blocks:
                raise StreamError(f"{block.name} is listed twice", offset=start, trail=trail)
            if at > _LONGEST_BLOCK_LIST:
                raise UnsupportedError(
                    f"the list is longer than {_LONGEST_BLOCK_LIST} bytes", offset=start, trail=trail
                )
            blocks[block.name] = block
            left -= block.used_length
        # Not before all are known: pages on other channels are held to them, whatever becomes of this one.
        self.blocks.update((name, block.used_length) for name, block in blocks.items())  # others hold it too
        yield self._consume(BlockList(total=total, blocks=tuple(blocks.values())), at)

    @property
    def is_mapped(self) -> bool:
        """Has each page a place of its own in the file?"""
        return "mapped-ram" in self.capabilities

    def _mapped_blocks(self, left: int, trail: Sequence[str]) -> Step:
        """The list of a mapped-ram file: each block's entry is followed by its bitmap and its pages."""
        base: int | None = None
        while left:
            start = self.feed.offset
            block, at = yield from self._listed_block(0, left, trail)
            if block.name in self.blocks:
                raise StreamError(f"{block.name} is listed twice", offset=start, trail=trail)
            header, at = yield from self.feed.ahead(MappedRamHeader, at, trail)
            mapped = MappedBlock(block=block, header=header)
            left -= block.used_length
            if mapped.is_left_out:
                check_header(mapped, end=start + at, trail=trail)
                self.blocks[block.name] = block.used_length
                self.page_size, self.page_size_is_known = header.page_size, True
                yield self._consume(mapped, at)
                continue
            span = MappedSpan.of(mapped, end=start + at, base=base, trail=trail)
            base, self.page_size, self.page_size_is_known = span.base, span.page_size, True
            self.blocks[block.name] = block.used_length
            yield self._consume(mapped, at)
            bits = bytearray()
            yield from self._bitmap(block.name, span, bits)
            yield from self._gap(span.pages - self.feed.offset, ("ram", block.name))
            yield from self._mapped_pages(block.name, span, bits)

    def _bitmap(self, name: str, span: MappedSpan, bits: bytearray) -> Step:
        """The bitmap in pieces, collected in ``bits``."""
        for at in range(0, span.bitmap_length, _PIECE):
            length = min(_PIECE, span.bitmap_length - at)
            yield from self.feed.need(length, ("ram", name, "bitmap"))
            piece = self.feed.view(length)
            bits += piece
            value = int.from_bytes(piece, "little")
            yield self._consume(MappedBitmap(block=name, first_page=at * 8, length=length, bits=value), length)

    def _gap(self, left: int, trail: Sequence[str]) -> Step:
        while left:
            length = min(_PIECE, left)
            yield from self.feed.need(length, trail)
            piece = self.feed.view(length)
            yield self._consume(Gap(length=length, data=None if is_zero(piece) else bytes(piece)), length)
            left -= length

    def _mapped_pages(self, name: str, span: MappedSpan, bits: bytearray) -> Step:
        page = 0
        while page < span.page_count:
            yield from self.feed.need(span.page_size, ("ram", name))
            count = min(len(self.feed) // span.page_size, span.page_count - page)
            length = count * span.page_size
            pages = MappedPages(name, span.page_size, ())
            if self.reads_mapped:
                pages = read_mapped(name, self.feed.view(length), bits, page, span.page_size, self.feed.offset)
            yield self._consume(pages, length)
            page += count

    def _listed_block(self, at: int, left: int, trail: Sequence[str]) -> Generator[None, None, tuple[RamBlock, int]]:
        head, after = yield from self.feed.ahead(RamBlockHead, at, trail)
        if head.used_length > left:
            raise StreamError(
                f"{head.name} has {head.used_length:#x} bytes, {left:#x} of the total are left",
                offset=self.feed.offset + after - 8,
                trail=trail,
            )
        if not head.name:
            raise StreamError("a block without a name", offset=self.feed.offset + at, trail=trail)
        page_size = address = None
        is_last = head.used_length == left
        # Postcopy, which the word is for, is refused together with mapped-ram.
        if not self.is_mapped and (yield from self._has_page_size(after, is_last)):
            page_size = int.from_bytes(self.feed.view(after + 8)[after:])
            after += 8
        if "x-ignore-shared" in self.capabilities:
            yield from self.feed.need(after + 8, trail)
            address = int.from_bytes(self.feed.view(after + 8)[after:])
            after += 8
        block = RamBlock(name=head.name, used_length=head.used_length, page_size=page_size, address=address)
        return block, after

    def _has_page_size(self, at: int, is_last: bool) -> Generator[None, None, bool]:
        """Does a page-size word follow?  It is a power of two and a bit of ADVISE's summary.

        A snapshot (savevm) taken with postcopy-ram on has the words and no ADVISE.
        With x-ignore-shared an address that looks like one may stand there: then a name (its length is never
        0) or, after the last block, a marker follows it at once, and no second word.
        """
        if self.advised is None and (yield from self.feed.byte(at)) != 0:
            return False
        yield from self.feed.need(at + 8, ("ram", "block list"))
        word = int.from_bytes(self.feed.view(at + 8)[at:])
        if not word or word & (word - 1) or word < self.page_size:
            return False
        if not word & self.advised.summary if self.advised is not None else word <= max(self.page_size, 4096):
            return False
        if "x-ignore-shared" not in self.capabilities:
            return True
        yield from self.feed.need(at + 16, ("ram", "block list"))
        following = self.feed.view(at + 16)[at + 8 :]
        if is_last:
            return int.from_bytes(following) not in (RamFlag.EOS, RamFlag.HOOK, RamFlag.MULTIFD_FLUSH)
        return following[0] == 0

    def records(self, *, until_end: bool = False) -> Step:
        """Records until EOS.  Plain pages are read as runs, all else by the declaration.

        ``until_end``: the stream may end without it, as the preempt channel does since 8.0.
        """
        feed = self.feed
        if not self.page_size_is_known and self.blocks and (yield from self._has_pages()):
            self.page_size = yield from find_page_size(feed, self.blocks, self.page_size)
            self.page_size_is_known = True
        self._is_at_record = True
        try:
            yield from self._records(until_end=until_end)
        finally:
            self._is_at_record = False

    def plain_pages(self) -> Entry | None:
        """All plain pages at hand, taken ahead of ``records()``, which goes on behind them.

        None where none stand here, or one of them lies outside its block: ``records()`` says what is here then.  For
        who must be fast: those pages come as one stretch, by two calls, and nothing is resumed.
        """
        if not self._is_at_record or self.block is None:
            return None
        feed, page_size = self.feed, self.page_size
        stretch = pages.gather(*feed.buffer, offset=feed.offset, page_size=page_size)
        if not stretch or self._first_outside(stretch, self.blocks[self.block], page_size) is not None:
            return None
        return self._consume(Pages(self.block, False, page_size, 0, stretch), stretch.length)

    @property
    def has_less_than_a_page(self) -> bool:
        """Is nothing at hand but, perhaps, the beginning of a record that needs more bytes to be read?"""
        return self._is_at_record and (len(self.feed) < 8 or self._is_cut_page())

    def _records(self, *, until_end: bool) -> Step:
        feed = self.feed
        page_size = self.page_size
        while True:
            if until_end and not len(feed) and not (yield from feed.more()):
                return
            buffer, begin, end = feed.buffer
            if self.block is not None:
                runs, position = pages.scan(buffer, begin, end, offset=feed.offset, page_size=page_size)
                if runs:
                    yield from self._inside(Pages(self.block, False, page_size, 0, runs), position - begin)
                    continue
                if self._is_cut_page() and (yield from feed.more()):
                    continue
            if (marker := _COMMON.get(bytes(feed.view(8)))) is not None:
                yield self._consume(marker, 8)
                if marker.word.flags == RamFlag.EOS:
                    return
                continue
            if (named := self._named_page()) is not None:
                self.block, start, length = named
                run = PageRun(feed.offset, int(RamFlag.PAGE), start, 1)
                yield from self._inside(Pages(self.block, True, page_size, 0, (run,)), length)
                continue
            trail = ("ram",) if self.block is None else ("ram", self.block)
            record, length = yield from feed.record(RamRecord, trail, page_size=page_size)
            if record.word.kind in PAGE_KINDS:
                yield from self._page(record, length, trail)
                continue
            yield self._consume(record, length)
            if record.word.flags == RamFlag.EOS:
                return

    def _named_page(self) -> tuple[str, int, int] | None:
        """Block, start and length of the record at hand, if that is all of a NORMAL page with the name of a block.

        In postcopy there are hundreds; to read one by its declaration takes 0.1 ms.  All else is left to that.
        """
        head = self.feed.view(9 + 255)
        if len(head) < 9 or int.from_bytes(head[:8]) & (self.page_size - 1) != RamFlag.PAGE:
            return None
        end = 9 + head[8]
        block = bytes(head[9:end]).decode("utf-8", "surrogateescape")
        if block not in self.blocks or len(self.feed) < end + self.page_size:
            return None
        return block, int.from_bytes(head[:8]) - RamFlag.PAGE, end + self.page_size

    def _has_pages(self) -> Generator[None, None, bool]:
        """Does anything but EOS stand here?"""
        yield from self.feed.need(8, ("ram",))
        return int.from_bytes(self.feed.view(8)) != RamFlag.EOS

    def _is_cut_page(self) -> bool:
        """Is a plain page at hand, but not all of it?  Then it is worth to wait and read it as a run."""
        head = self.feed.view(8)
        return len(head) == 8 and head[7] == _PLAIN_PAGE and len(self.feed) < 8 + self.page_size

    def _page(self, record: RamRecord, length: int, trail: Sequence[str]) -> Iterator[Entry]:
        """One page record by itself: named, not zero-filled, a delta, or cut by the window's end."""
        named = record.block is not None
        if record.block is not None:
            if record.block not in self.blocks:
                raise StreamError(
                    f"a page of the block {record.block!r}, which the block list does not have",
                    offset=self.feed.offset + 8,
                    trail=("ram",),
                )
            self.block = record.block
        if self.block is None:
            raise StreamError(
                "the first page continues a block, and none was named", offset=self.feed.offset, trail=trail
            )
        kind = record.word.kind
        run = PageRun(self.feed.offset, kind, record.word.start, 1)
        fill = getattr(record.body, "fill", 0)
        batch = Pages(self.block, named, self.page_size, fill, (run,))
        yield from self._inside(
            batch,
            length,
            batch if kind in (RamFlag.PAGE, RamFlag.ZERO) else RamPage(self.block, self.page_size, record),
        )

    def _inside(self, batch: Pages, length: int, record: Pages | RamPage | None = None) -> Iterator[Entry]:
        """The batch, or ``record`` in its place.

        Raises ``StreamError`` where a page lies behind its block's end, once those before it are given.
        """
        block_length, page_size = self.blocks[batch.block], batch.page_size
        index = self._first_outside(batch.runs, block_length, page_size)
        if index is None:
            yield self._consume(record or batch, length)
            return
        offset, flag, start, _ = batch.runs[index]
        inside = max(block_length - start, 0) // page_size
        offset_outside = offset + inside * batch.record_bytes(flag)
        good = [*batch.runs[:index], *([PageRun(offset, flag, start, inside)] if inside else [])]
        if good:
            yield self._consume(batch._replace(runs=good), offset_outside - self.feed.offset)
        raise StreamError(
            f"page at {start + inside * page_size:#x}, the block ends at {block_length:#x}",
            offset=offset_outside,
            trail=("ram", batch.block),
        )

    @staticmethod
    def _first_outside(runs: Sequence[PageRun], block_length: int, page_size: int) -> int | None:
        """Which run is the first that reaches beyond the block's end."""
        if max(map(_END, intervals_of(runs, page_size))) <= block_length:
            return None
        ends = (start + count * page_size for _, _, start, count in runs)
        return next((index for index, end in enumerate(ends) if end > block_length), None)

    def _consume(self, record: StreamRecord, length: int) -> Entry:
        entry = Entry(self.feed.offset, length, record, self.feed.view(length))
        self.feed.skip(length)
        return entry
