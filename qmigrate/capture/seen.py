"""Which pages of a block have been seen, so that those sent again can be counted.

Memory follows what was seen, never a block's length, which a hostile stream may claim to be anything: a bit a page
where pages lie together, at most some bytes a page where they lie far apart.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

__all__ = ["SeenPages"]

_CHUNK_BITS: Final = 13
_CHUNK: Final = 1 << _CHUNK_BITS  # pages
_MANY: Final = 128  # pages of a chunk: from there on a bit for each page of it takes no more than their numbers
_LONGEST_SHELF: Final = 1024  # numbers


class SeenPages:
    """A bit a page, in chunks that exist once many pages of theirs were seen; the others by their numbers."""

    def __init__(self) -> None:
        self._chunks: dict[int, bytearray] = {}
        self._few = _Numbers()
        self.count = 0
        """How many different pages were seen."""

    def add_intervals(self, intervals: Iterable[tuple[int, int]], page_size: int) -> int:
        """Mark the pages of (start, end), in bytes; how many of them had been marked before."""
        shift = page_size.bit_length() - 1
        return sum([self.add(start >> shift, (end - start) >> shift) for start, end in intervals])

    def add(self, first: int, count: int) -> int:
        """Mark ``count`` pages from page number ``first`` on; how many of them had been marked before."""
        again, page, end = 0, first, first + count
        while page < end:
            number = page >> _CHUNK_BITS
            after = min(end, (number + 1) << _CHUNK_BITS)
            chunk = self._chunks.get(number)
            if chunk is None and after - page >= _MANY:
                chunk = self._chunk(number)
            if chunk is None:
                again += self._mark_few(page, after)
            else:
                again += _mark(chunk, page & _CHUNK - 1, after - page)
            page = after
        self.count += count - again
        return again

    def __contains__(self, page: int) -> bool:
        """Was this page seen?"""
        chunk = self._chunks.get(page >> _CHUNK_BITS)
        if chunk is None:
            return page in self._few
        at = page & _CHUNK - 1
        return bool(chunk[at >> 3] >> (at & 7) & 1)

    def within(self, ranges: Iterable[Sequence[int]]) -> int:
        """How many pages were seen of these (first, end), which are in order and have none in common."""
        numbers = sorted(self._chunks)
        found = 0
        for first, end in ranges:
            found += self._few.within(first, end)
            for index in range(bisect_left(numbers, first >> _CHUNK_BITS), len(numbers)):
                number = numbers[index]
                begin = number << _CHUNK_BITS
                if begin >= end:
                    break
                bits = int.from_bytes(self._chunks[number], "little") >> max(first - begin, 0)
                found += (bits & (1 << end - max(first, begin)) - 1 if end - begin < _CHUNK else bits).bit_count()
        return found

    def _mark_few(self, page: int, end: int) -> int:
        again = sum([self._few.add(each) for each in range(page, end)])
        for number in self._few.crowded:
            self._chunk(number)
        self._few.crowded.clear()
        return again

    def _chunk(self, number: int) -> bytearray:
        """From now on a bit for each page of this chunk."""
        chunk = self._chunks[number] = bytearray(_CHUNK // 8)
        for page in self._few.take(number << _CHUNK_BITS, (number + 1) << _CHUNK_BITS):
            _mark(chunk, page & _CHUNK - 1, 1)
        return chunk


def _mark(chunk: bytearray, at: int, count: int) -> int:
    """Set ``count`` bits; how many of them were set."""
    begin, end = at >> 3, (at + count + 7) >> 3
    mask = ((1 << count) - 1) << (at & 7)
    bits = int.from_bytes(chunk[begin:end], "little")
    chunk[begin:end] = (bits | mask).to_bytes(end - begin, "little")
    return (bits & mask).bit_count()


class _Numbers:
    """A sorted set of page numbers, eight bytes each: shelves of at most so many, in order."""

    def __init__(self) -> None:
        self._shelves: list[array[int]] = [array("Q")]
        self._firsts: list[int] = [0]  # no number of a shelf is less
        self.crowded: list[int] = []
        """Chunks with many pages here, noticed when a shelf was full."""

    def add(self, page: int) -> bool:
        """Put it in; was it there before?"""
        index = bisect_right(self._firsts, page) - 1
        shelf = self._shelves[index]
        at = bisect_left(shelf, page)
        if at < len(shelf) and shelf[at] == page:
            return True
        shelf.insert(at, page)
        if len(shelf) > _LONGEST_SHELF:
            half = _LONGEST_SHELF // 2
            self._shelves[index : index + 1] = [shelf[:half], shelf[half:]]
            self._firsts.insert(index + 1, shelf[half])
            counts = Counter([each >> _CHUNK_BITS for each in shelf])
            self.crowded += [number for number, count in counts.items() if count >= _MANY]
        return False

    def __contains__(self, page: int) -> bool:
        shelf = self._shelves[bisect_right(self._firsts, page) - 1]
        at = bisect_left(shelf, page)
        return at < len(shelf) and shelf[at] == page

    def within(self, first: int, end: int) -> int:
        """How many numbers there are from ``first`` up to ``end``."""
        found = 0
        for index in range(bisect_right(self._firsts, first) - 1, bisect_left(self._firsts, end, lo=1)):
            shelf = self._shelves[index]
            found += bisect_left(shelf, end) - bisect_left(shelf, first)
        return found

    def take(self, first: int, end: int) -> list[int]:
        """Take out all numbers from ``first`` up to ``end``."""
        taken: list[int] = []
        index = bisect_right(self._firsts, first) - 1
        while index < len(self._shelves) and (not index or self._firsts[index] < end):
            shelf = self._shelves[index]
            begin, after = bisect_left(shelf, first), bisect_left(shelf, end)
            taken += shelf[begin:after]
            del shelf[begin:after]
            index += 1
        return taken
