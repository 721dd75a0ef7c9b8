"""The queue of faults: what a thread sleeps on, as a place in a block.

The handler's process must have no other busy Python thread: one that computes delays each fault by up to 5 ms,
the interpreter's switch interval.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qmigrate.uffd.userfault import Userfaultfd

__all__ = ["FaultQueue", "Missing", "Range"]


class Range(NamedTuple):
    """A mapping that is registered: ``address`` in the process that touches, ``page_size`` its host pages'."""

    address: int
    length: int
    page_size: int


class Missing(NamedTuple):
    """A page that somebody waits for: the block's number, and the page's ``start`` in it, in bytes."""

    block: int
    start: int
    is_write: bool


class FaultQueue:
    """The faults of one userfaultfd, placed in ``ranges``, which are numbered in the order in which they came."""

    def __init__(self, faults: Userfaultfd, ranges: Sequence[Range]) -> None:
        self.userfaultfd = faults
        self.ranges = tuple(ranges)
        self._order = sorted(range(len(ranges)), key=lambda number: ranges[number].address)
        self._addresses = [ranges[number].address for number in self._order]

    def fileno(self) -> int:
        return self.userfaultfd.fileno()

    def missing(self) -> Iterator[Missing]:
        """What waits now, in the kernel's order; does not wait itself."""
        for fault in self.userfaultfd.faults():
            found = self.find(fault.address)
            if found is not None:
                yield Missing(*found, fault.is_write)

    def find(self, address: int) -> tuple[int, int] | None:
        """The block's number and the start of the host page; None where nothing is registered."""
        at = bisect_right(self._addresses, address) - 1
        if at < 0:
            return None
        number = self._order[at]
        base, length, page_size = self.ranges[number]
        start = address - base
        return None if start >= length else (number, start - start % page_size)
