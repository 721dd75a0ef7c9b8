"""Which pages of a block have been seen, so that those sent again can be counted.

Memory follows what was seen, never a block's length, which a hostile stream may claim to be anything.
"""

from collections.abc import Iterable
from typing import Final

from qmigrate.format.ram import PageRun

__all__ = ["SeenPages"]

_CHUNK_BITS: Final = 9
_CHUNK: Final = 1 << _CHUNK_BITS  # pages
_ONES: Final = b"\1" * _CHUNK


class SeenPages:
    """A byte a page, in chunks that exist once a page of theirs was seen."""

    def __init__(self) -> None:
        self._chunks: dict[int, bytearray] = {}
        self.count = 0
        """How many different pages were seen."""

    def add_runs(self, runs: Iterable[PageRun], page_size: int) -> int:
        """Mark the pages of all ``runs``; how many of them had been marked before."""
        again = total = 0
        chunks = self._chunks
        shift = page_size.bit_length() - 1
        for _, _, start, count in runs:
            first = start >> shift
            chunk_number, at = first >> _CHUNK_BITS, first & _CHUNK - 1
            if at + count > _CHUNK:
                again += self._mark(first, count)
            else:
                chunk = chunks.get(chunk_number)
                if chunk is None:
                    chunk = chunks[chunk_number] = bytearray(_CHUNK)
                if count == 1:
                    again += chunk[at]
                    chunk[at] = 1
                else:
                    again += chunk.count(1, at, at + count)
                    chunk[at : at + count] = _ONES[:count]
            total += count
        self.count += total - again
        return again

    def add(self, first: int, count: int) -> int:
        """Mark ``count`` pages from page number ``first`` on; how many of them had been marked before."""
        again = self._mark(first, count)
        self.count += count - again
        return again

    def _mark(self, first: int, count: int) -> int:
        again = 0
        chunk_number, at = divmod(first, _CHUNK)
        left = count
        while left:
            step = min(left, _CHUNK - at)
            chunk = self._chunks.get(chunk_number)
            if chunk is None:
                chunk = self._chunks[chunk_number] = bytearray(_CHUNK)
            again += chunk.count(1, at, at + step)
            chunk[at : at + step] = _ONES[:step]
            left -= step
            chunk_number, at = chunk_number + 1, 0
        return again
