"""Where one pass over RAM ends and the next begins: the stream does not say, the order of its pages does."""

import operator
from collections.abc import Sequence

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

    def take(self, block_index: int, starts: Sequence[int], ends: Sequence[int]) -> None:
        """Runs of pages of one block, in the stream's order: where in the block each starts and ends."""
        went_back = block_index < self._block or (block_index == self._block and starts[0] < self._end)
        if went_back or not self.count:
            self.count += 1
        self.count += sum(map(operator.gt, ends, starts[1:]))
        self._block, self._end = block_index, ends[-1]
