"""Page requests of a postcopy, and their answers: how long each took, as it was seen on the wire."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qmigrate.analysis.latency import Bucket
from qmigrate.capture.seen import SeenPages

__all__ = ["PageRequest", "Requests"]

_BUCKETS = 34  # the last begins at 2^33 microseconds, more than two hours


@dataclass(slots=True)
class PageRequest:
    """The destination asked for ``length`` bytes of ``block``.  Times in nanoseconds from the recording's start.

    ``answered_ns`` is when the last of it passed, ``answered_on`` the connection that brought it.  ``on_way``:
    all of it had passed already, request and answer crossed.  Neither: it was not answered.
    """

    block: str
    start: int
    length: int
    asked_ns: int
    connection: int
    answered_ns: int | None = None
    answered_on: int | None = None
    on_way: bool = False

    @property
    def delay_ns(self) -> int | None:
        return None if self.answered_ns is None else self.answered_ns - self.asked_ns


@dataclass(slots=True)
class _Awaited:
    request: PageRequest
    pages: set[int]  # where in the block those begin that have not come


class Requests:
    """Matches requests with the pages that pass after them.  Both are to be told in the order of their times."""

    def __init__(self) -> None:
        self.count = self.answered = self.on_way = self.repeated = 0
        self.longest_ns = 0
        self._buckets = [0] * _BUCKETS
        self._block: dict[int, str] = {}  # by connection
        self._awaited: dict[str, dict[int, list[_Awaited]]] = {}
        self._sent: dict[str, SeenPages] = {}

    @property
    def unanswered(self) -> int:
        """How many have no answer so far."""
        return self.count - self.answered - self.on_way

    @property
    def histogram(self) -> list[Bucket]:
        """Answered requests by their delay: bucket N from 2^N to below 2^(N+1) µs, the first from 0.

        From the first that holds any to the last.
        """
        filled = [index for index, count in enumerate(self._buckets) if count]
        last = len(self._buckets) - 1
        return [
            Bucket(1 << index if index else 0, None if index == last else 2 << index, self._buckets[index])
            for index in range(filled[0], filled[-1] + 1)
        ] if filled else []  # fmt: skip

    def resumed(self) -> None:
        """A connection broke: what was on its way may be lost, and is asked for and sent again."""
        self._sent.clear()

    def asked(
        self, block: str | None, start: int, length: int, *, at_ns: int, connection: int, page_size: int
    ) -> PageRequest | None:
        """A request; without a block in that of the one before it.  None where there was none before."""
        block = self._block.get(connection) if block is None else block
        if block is None:
            return None
        self._block[connection] = block
        request = PageRequest(block, start, length, at_ns, connection)
        self.count += 1
        # A host page of many target pages is sent in order: when its first and its last have come, all have.
        pages = {start, max(start, start + (length - 1) // page_size * page_size)}
        sent = self._sent.get(block)
        missing = {page for page in pages if sent is None or page // page_size not in sent}
        if not missing:
            request.on_way = True
            self.on_way += 1
            return request
        awaited = _Awaited(request, missing)
        waiting = self._awaited.setdefault(block, {})
        if any(page in waiting for page in missing):
            self.repeated += 1
        for page in missing:
            waiting.setdefault(page, []).append(awaited)
        return request

    def passed(
        self, block: str, intervals: Iterable[tuple[int, int]], *, at_ns: int, connection: int, page_size: int
    ) -> Iterator[PageRequest]:
        """Pages passed on, as (start, end) in the block; the requests that this answers."""
        intervals = list(intervals)
        self._sent.setdefault(block, SeenPages()).add_intervals(intervals, page_size)
        waiting = self._awaited.get(block)
        for start, end in intervals if waiting else ():
            assert waiting is not None
            pages: Iterable[int] = range(start, end, page_size)
            if (end - start) // page_size > len(waiting):
                pages = sorted(page for page in waiting if start <= page < end)
            for page in pages:
                for awaited in waiting.pop(page, ()):
                    awaited.pages.discard(page)
                    if not awaited.pages:
                        yield self._answer(awaited.request, at_ns, connection)

    def _answer(self, request: PageRequest, at_ns: int, connection: int) -> PageRequest:
        request.answered_ns, request.answered_on = at_ns, connection
        self.answered += 1
        delay_ns = max(at_ns - request.asked_ns, 0)
        self.longest_ns = max(self.longest_ns, delay_ns)
        self._buckets[min(max((delay_ns // 1000).bit_length() - 1, 0), _BUCKETS - 1)] += 1
        return request
