"""Which pages are here: the destination's map, shared by the processes that work on it.

S13 of the postcopy design.  Three states, one a host page, and four transitions:

    missing    not received, not requested        missing   -> received    an ordinary page came
    requested  not received, requested            requested -> received    a page that somebody waits for came
    received   received                           missing   -> requested   somebody touched it
                                                  received  -> missing     a discard, before LISTEN only

The 2014 text leaves open how two threads update both maps.  Here each map has bytes of its own, one a host page, and
a byte has one writer or writers that write the same value: ``requested`` is written by the pager only, ``received``
by whoever's COPY succeeded.  So nothing is locked, and no update is lost.  What is both counts as received: it is the
third column of the text's table with the request still on record, which a recovery looks at.

Two races remain, both harmless.  A page may be requested just after it came: the source, for which it is no longer
dirty, does not answer.  And it may be placed twice, from two channels: the kernel says EEXIST to the second.
"""

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from typing import Final, NamedTuple

__all__ = ["BlockPages", "PageMap", "PageState"]

_NO: Final = 0
_YES: Final = 1
_PIECE: Final = 1 << 20  # pages looked at together


class PageState(Enum):
    """Of a host page."""

    MISSING = "missing"
    REQUESTED = "requested"
    RECEIVED = "received"


class BlockPages(NamedTuple):
    """A block as its pages: lengths in bytes; ``first`` is the number of its first page in the map."""

    name: str
    length: int
    page_size: int
    first: int

    @property
    def page_count(self) -> int:
        return -(-self.length // self.page_size)


class PageMap:
    """The map over ``buffer``, which holds ``bytes_needed(blocks)`` bytes, all 0 at first; processes may share it.

    ``next_data(at)``: where from byte ``at`` on there may be anything but zeros, if the buffer is a sparse file.  A
    block may claim 64 TiB: looking at all of its map would fill the holes, 16 GiB of them.
    """

    def __init__(
        self,
        blocks: Sequence[BlockPages],
        buffer: bytearray | mmap.mmap,
        *,
        next_data: Callable[[int], int] = int,
    ) -> None:
        self.blocks = tuple(blocks)
        self._buffer = buffer
        self._next_data = next_data
        self._page_count = sum(block.page_count for block in blocks)

    @staticmethod
    def numbered(blocks: Iterable[tuple[str, int, int]]) -> tuple[BlockPages, ...]:
        """Blocks as (name, length, page size), each given the number of its first page."""
        numbered: list[BlockPages] = []
        first = 0
        for name, length, page_size in blocks:
            numbered.append(BlockPages(name, length, page_size, first))
            first += numbered[-1].page_count
        return tuple(numbered)

    @staticmethod
    def bytes_needed(blocks: Iterable[BlockPages]) -> int:
        """Two bytes a host page."""
        return 2 * sum(block.page_count for block in blocks)

    def _page(self, block: int, start: int) -> int:
        pages = self.blocks[block]
        return pages.first + start // pages.page_size

    # -- what is

    def state(self, block: int, start: int) -> PageState:
        """Of the host page at this byte offset."""
        page = self._page(block, start)
        if self._buffer[page]:
            return PageState.RECEIVED
        return PageState.REQUESTED if self._buffer[self._page_count + page] else PageState.MISSING

    def is_received(self, block: int, start: int) -> bool:
        return bool(self._buffer[self._page(block, start)])

    def was_requested(self, block: int, start: int) -> bool:
        """Was it ever asked for, whether it has come or not?"""
        return bool(self._buffer[self._page_count + self._page(block, start)])

    def any_received(self, block: int, start: int, length: int) -> bool:
        """Is any page there of those that this range touches?"""
        first, last = self._page(block, start), self._page(block, start + length - 1)
        return self._buffer.find(b"\1", first, last + 1) >= 0

    def received_count(self, block: int) -> int:
        """Host pages."""
        pages = self.blocks[block]
        return sum(piece.count(_YES) for _, piece in self._pieces(0, pages))

    @property
    def missing_count(self) -> int:
        """Host pages of all blocks that have not come."""
        return sum(block.page_count - self.received_count(number) for number, block in enumerate(self.blocks))

    def bitmap(self, block: int, target_page_size: int) -> bytes:
        """Bit k is target page k, as RECV_BITMAP has it: whole u64 words, all bits of a host page equal.

        migration/ram.c: ramblock_recv_bitmap_send()
        """
        pages = self.blocks[block]
        bits = 0
        for at, piece in self._pieces(0, pages):
            # Byte strings of 0 and 1, last page first, read as a number to the base 2.
            digits = piece[::-1].translate(_DIGITS)
            bits |= int(digits or b"0", 2) << at
        per_host_page = max(pages.page_size // target_page_size, 1)
        target_count = -(-pages.length // target_page_size)
        if per_host_page > 1:
            bits = _widened(bits, pages.page_count, per_host_page) & ((1 << target_count) - 1)
        return bits.to_bytes(-(-target_count // 64) * 8, "little")

    def requested_missing(self) -> Iterator[tuple[int, int]]:
        """(block, start) of each page that was asked for and has not come: what a recovery asks for again."""
        for number, block in enumerate(self.blocks):
            for first, piece in self._pieces(1, block):
                at = -1
                while (at := piece.find(_YES, at + 1)) >= 0:
                    if not self._buffer[block.first + first + at]:
                        yield number, (first + at) * block.page_size

    def requested_in(self, block: int, start: int, length: int) -> Iterator[int]:
        """The byte offsets of those pages in this range that were ever asked for."""
        pages = self.blocks[block]
        at = self._page_count + self._page(block, start)
        end = self._page_count + self._page(block, start + length - 1) + 1
        while (at := self._buffer.find(b"\1", at, end)) >= 0:
            yield (at - self._page_count - pages.first) * pages.page_size
            at += 1

    def _pieces(self, half: int, pages: BlockPages) -> Iterator[tuple[int, bytes]]:
        """Of the block's bytes in one of the maps, each piece with its first page; those known to be 0 are left out."""
        base = half * self._page_count + pages.first
        at = 0
        while (at := max(self._next_data(base + at) - base, at)) < pages.page_count:
            upto = min(at + _PIECE, pages.page_count)
            yield at, bytes(self._buffer[base + at : base + upto])
            at = upto

    # -- what happens

    def receive(self, block: int, start: int, length: int) -> None:
        """Pages that touch this range have come.  By whoever put them in place."""
        first, last = self._page(block, start), self._page(block, start + length - 1)
        self._buffer[first : last + 1] = b"\1" * (last + 1 - first)

    def request(self, block: int, start: int) -> bool:
        """Somebody waits for this page.  True where it must be asked for now.  By the pager only.

        False: it is here already, or was asked for before.
        """
        page = self._page(block, start)
        if self._buffer[page] or self._buffer[self._page_count + page]:
            return False
        self._buffer[self._page_count + page] = _YES
        return True

    def discard(self, block: int, start: int, length: int) -> int:
        """Forget whole host pages; how many of them were here.  Before LISTEN only, by the listener."""
        pages = self.blocks[block]
        first, end = self._page(block, start), self._page(block, start) + -(-length // pages.page_size)
        had = 0
        for at in range(first, end, _PIECE):
            upto = min(at + _PIECE, end)
            had += bytes(self._buffer[at:upto]).count(_YES)
            self._buffer[at:upto] = bytes(upto - at)
        return had


_DIGITS: Final = bytes([ord("0"), ord("1"), *[ord("1")] * 254])


def _widened(bits: int, count: int, factor: int) -> int:
    """Each of ``count`` bits ``factor`` times."""
    digits = bin(bits)[2:].zfill(count)
    return int("".join(digit * factor for digit in digits), 2)
