"""Where one pass over RAM ends and the next begins: the stream does not say, the order of its pages does."""

from collections.abc import Sequence
from itertools import pairwise

__all__ = ["PassCounter"]


class PassCounter:
    """A pass goes through the blocks in the list's order, and through each from its start: a page at or before
    the last one opens the next pass.
    """

    def __init__(self) -> None:
        self.count = 0
        """How many passes have begun."""
        self._block = -1
        self._end = 0

    def take(self, block_index: int, intervals: Sequence[tuple[int, int]]) -> None:
        """Pages of one block, in the stream's order: (start, end) in the block."""
        went_back = block_index < self._block or (block_index == self._block and intervals[0][0] < self._end)
        if went_back or not self.count:
            self.count += 1
        self.count += sum([before > start for (_, before), (start, _) in pairwise(intervals)])
        self._block, self._end = block_index, intervals[-1][1]
