"""Pages that no SYNC orders: the same page over two channels of one migration, in one epoch.

Between multifd channels, and between them and main, only SYNC says what came first.  QEMU 5.2 and 7.2 queue the last
page of a packet again now and then, when its channel is done before they look; 10.0 and 11.1 were not seen to.  Either
copy may be the later.  Both are the same, or else the guest has written to the page, which is sent again in a later
epoch: a whole migration leaves nothing in doubt.

migration/multifd.c: multifd_queue_page(), multifd_send_sync_main(), multifd_recv_sync_main()
"""

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import TypeAlias

from qmigrate.capture.seen import SeenPages

__all__ = ["Epochs"]

Intervals: TypeAlias = Sequence[tuple[int, int]]


class Epochs:
    """The pages of one epoch, each channel's in one piece after those of the others.

    Most pages are new to the migration, so not in this epoch either: which there are is made out at the first that is
    not.
    """

    def __init__(self) -> None:
        self._epoch = 0
        self._channel = 0
        self._own: list[tuple[str, array[int]]] = []
        self._waiting: list[tuple[str, array[int]]] = []
        self._others: dict[str, SeenPages] = {}

    def take(
        self, channel: int, epoch: int, block: str, intervals: Intervals, page_size: int, *, again: int
    ) -> Sequence[int]:
        """Pages (start, end), in bytes, that this channel has in this epoch; the numbers of those of them that another
        has in it as well.

        ``again``: how many of them came before, whenever.  A channel's own copies have an order: the last counts.
        """
        if epoch != self._epoch:
            self._epoch, self._channel = epoch, channel
            self._own, self._waiting, self._others = [], [], {}
        elif channel != self._channel:
            self._channel = channel
            self._waiting += self._own
            self._own = []
        self._own.append((block, array("Q", chain.from_iterable(intervals))))
        if not again or not (self._waiting or self._others):
            return ()
        for name, flat in self._waiting:
            self._others.setdefault(name, SeenPages()).add_intervals(zip(flat[::2], flat[1::2], strict=True), page_size)
        self._waiting = []
        others = self._others.get(block)
        if others is None:
            return ()
        spans = [range(start // page_size, end // page_size) for start, end in _apart(intervals)]
        return [page for span in spans for page in span if page in others]


def _apart(intervals: Intervals) -> Intervals:
    """In order, with nothing in common."""
    if len(intervals) == 1:
        return intervals
    apart: list[tuple[int, int]] = []
    reached = 0
    for start, end in sorted(intervals):
        if end > reached:
            apart.append((max(start, reached), end))
            reached = end
    return apart
