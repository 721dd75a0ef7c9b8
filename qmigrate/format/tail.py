"""Where a section of unknown length ends.

A FULL section has no length.  With the description it is decoded, and the footer proves it.  Without one, all
chains of plausible sections that use every byte are found: one is taken; where several agree nowhere, the span
between is left undecoded with both readings named; with none, the error is at the furthest place reached.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from qmigrate.errors import StreamError
from qmigrate.format.candidates import Candidates, Item
from qmigrate.format.vmdesc import Description

__all__ = ["Chooser", "Tail", "read_tail"]

_MOST_NAMED: Final = 4  # sections of a reading, in the reason that names it


@dataclass(frozen=True, slots=True)
class Tail:
    """``items`` from the start to ``end``; ``error`` where no reading uses every byte."""

    items: list[Item]
    end: int
    error: StreamError | None = None


class Chooser(Protocol):
    """Finds a description for a stream that has none, by the sections that are in it."""

    def choose(self, read: Callable[[Description | None], Tail], machine_type: str | None) -> Tail:
        """The best of what ``read`` makes of the tail under each description that may fit, or under None."""


def read_tail(
    data: bytes,
    *,
    base: int,
    footers: bool | None,
    description: Description | None,
    package: bool,
    foreign: bool = False,
) -> Tail:
    """The sections (and, in a package, commands) at the front of ``data``, which stands at ``base``.

    ``footers`` says whether sections have them, None where that is not known.  A ``foreign`` description is another
    stream's: what is optional in a section is then told by the bytes.

    A package ends with its last byte; other tails with EOF, which is left for the caller.
    """
    return _Chains(Candidates(data, base, footers, description, package, foreign)).result()


@dataclass(slots=True)
class _Chains:
    """All chains of plausible pieces, as a graph: places, and the items that lead from one to the next."""

    candidates: Candidates
    edges: dict[int, list[Item]] = field(default_factory=dict)
    ways_on: dict[int, bool] = field(default_factory=dict)
    repeated: frozenset[int] = frozenset()

    def result(self) -> Tail:
        self._find()
        self.ways_on = self._ways_to_end()
        if self.candidates.has_given_up or not self.ways_on[0]:
            return self._failure()
        self.repeated = self._repeated_ids()
        items: list[Item] = []
        at = 0
        while self.edges[at]:
            good = self._good(at)
            items.append(good[0] if len(good) == 1 else self._ambiguous(at))
            at = items[-1].end
        return Tail(items, at)

    def _find(self) -> None:
        """Find every place that can be reached, and what may stand there."""
        waiting = [0]
        while waiting:
            at = waiting.pop()
            if at in self.edges:
                continue
            self.edges[at] = [] if self.candidates.is_end(at) else list(self.candidates.items_at(at))
            waiting.extend(item.end for item in self.edges[at])

    def _ways_to_end(self) -> dict[int, bool]:
        ways: dict[int, bool] = {}
        for at in sorted(self.edges, reverse=True):
            ways[at] = self.candidates.is_end(at) or any(ways[item.end] for item in self.edges[at])
        return ways

    def _repeated_ids(self) -> frozenset[int]:
        """Section ids that several headers have: one of these is none, as an id is there once in a stream."""
        seen: set[int] = set()
        repeated: set[int] = set()
        for at, items in self.edges.items():
            if self.ways_on[at] and items and (header := items[0].header) is not None:
                (repeated if header.section_id in seen else seen).add(header.section_id)
        return frozenset(repeated)

    def _ambiguous(self, at: int) -> Item:
        """One piece from here to the first place that all readings share."""
        end = self._meeting_place(at)
        one, other = [self._reading(item, end) for item in self._good(at)[:2]]
        return Item(at, end, reason=f"there are two readings: {one}; or {other}")

    def _good(self, at: int) -> list[Item]:
        """The items that lead to the end, without those that another makes needless."""
        good = [item for item in self.edges[at] if self.ways_on[item.end]]
        if self.candidates.footers is not False or len(good) < 2:
            return good
        # Without footers a section may go on over whatever stands in it, so the nearest opening counts, and
        # only what cannot be true together with it is another reading.
        nearest = good[0].end
        opened = self.edges[nearest][0] if self.edges[nearest] else None
        if opened is None or opened.header is None:
            return good[:1]
        rivals = [item for item in good[1:] if item.end < opened.body]
        if opened.header.section_id in self.repeated:
            rivals += [item for item in good[1:] if item.end >= opened.body][:1]
        return [good[0], *rivals]

    def _meeting_place(self, at: int) -> int:
        """The first place through which every way from here leads; where ways end apart, the last of their ends."""
        waiting = sorted({item.end for item in self._good(at)})
        seen = set(waiting)
        some_ended = False
        while True:
            place = heapq.heappop(waiting)
            following = self._good(place)
            if not waiting and not (some_ended and following):
                return place
            some_ended = some_ended or not following
            for item in following:
                if item.end not in seen:
                    seen.add(item.end)
                    heapq.heappush(waiting, item.end)

    def _reading(self, item: Item, end: int) -> str:
        """The sections from ``item`` to ``end``, with the first way on at each place."""
        named: list[str] = []
        while item.end <= end and len(named) <= _MOST_NAMED:
            if item.header is not None:
                named.append(f"{item.header.idstr} to {self.candidates.base + item.end:#x}")
            following = self._good(item.end)
            if not following:
                break
            item = following[0]
        if len(named) > _MOST_NAMED:
            named[_MOST_NAMED:] = ["more"]
        return " + ".join(named)

    def _failure(self) -> Tail:
        """No chain uses every byte: what leads to the furthest place is given, and what is wrong there."""
        came_by: dict[int, Item] = {}
        for at in sorted(self.edges):
            for item in self.edges[at]:
                came_by.setdefault(item.end, item)
        furthest = max(self.edges)
        items: list[Item] = []
        at = furthest
        while at:
            items.append(came_by[at])
            at = items[-1].begin
        return Tail(items[::-1], furthest, self.candidates.fault_at(furthest))
