"""Which pages of a block have been seen, so that those sent again can be counted.

Memory follows what was seen, never a block's length, which a hostile stream may claim to be anything.
"""

from typing import Final

__all__ = ["SeenPages"]

_CHUNK: Final = 512  # pages
_ONES: Final = b"\1" * _CHUNK


class SeenPages:
    """A byte a page, in chunks that exist once a page of theirs was seen."""

    def __init__(self) -> None:
        self._chunks: dict[int, bytearray] = {}
        self.count = 0
        """How many different pages were seen."""

    def add(self, first: int, count: int) -> int:
        """Mark ``count`` pages from page number ``first`` on; how many of them had been marked before."""
        again = 0
        chunk_number, at = divmod(first, _CHUNK)
        left = count
        while left:
            step = min(left, _CHUNK - at)
            chunk = self._chunks.get(chunk_number)
            if chunk is None:
                chunk = self._chunks[chunk_number] = bytearray(_CHUNK)
            elif step == 1:
                again += chunk[at]
            else:
                again += chunk.count(1, at, at + step)
            if step == 1:
                chunk[at] = 1
            else:
                chunk[at : at + step] = _ONES[:step]
            left -= step
            chunk_number, at = chunk_number + 1, 0
        self.count += count - again
        return again
