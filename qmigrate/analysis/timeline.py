"""A migration as it went, on one time axis: what each side was when, and the numbers on the way.

Made from events alone, whoever reports them: a driver, or a relay that listens in.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from qmigrate.analysis.clock import Clock, clock_of
from qmigrate.analysis.latency import Latency, latency_in, number
from qmigrate.events import (
    Began,
    Finished,
    GuestChanged,
    LiveEvent,
    PassBegan,
    Progressed,
    Side,
    SideFound,
    StatusChanged,
)

__all__ = ["Moment", "Pass", "Phase", "Rate", "Sample", "SideLine", "Stop", "Stretch", "Timeline", "timeline"]

SHORTEST_RATE_US: Final = 100_000
"""QEMU limits its rate in steps of a tenth of a second: what it sends in less says little."""


@dataclass(frozen=True)
class Stretch:
    """A part of the axis, in microseconds from its zero."""

    begin_us: int
    end_us: int

    @property
    def length_us(self) -> int:
        return self.end_us - self.begin_us


@dataclass(frozen=True)
class Phase(Stretch):
    """For how long a side had this status.  ``heard``: it said so; else it was found by asking, a little late."""

    status: str
    heard: bool = True


@dataclass(frozen=True)
class Stop(Stretch):
    """The guest ran nowhere.  ``resumed_on``: the side where it went on; None where it did not."""

    resumed_on: Side | None


@dataclass(frozen=True)
class Pass:
    """QEMU announced a new pass over memory; the number is QEMU's, which may leave some out."""

    at_us: int
    number: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The source's numbers at one time.  What QEMU did not tell is None."""

    at_us: int
    status: str
    remaining_bytes: int | None = None
    transferred_bytes: int | None = None
    total_bytes: int | None = None
    dirty_bytes_per_s: int | None = None
    sent_bytes_per_s: int | None = None
    page_requests: int | None = None
    expected_downtime_ms: int | None = None

    @property
    def looks_for_dirt(self) -> bool:
        """Is the dirty rate one of now?  After the guest has left QEMU goes on to tell the last that it had."""
        return self.status != "completed" and not self.status.startswith("postcopy-")


@dataclass(frozen=True)
class Rate(Stretch):
    """What went on between two samples, a second.  The dirty rate is the one that QEMU told at the end."""

    sent_bytes_per_s: float | None
    dirty_bytes_per_s: int | None


@dataclass(frozen=True)
class Moment:
    """An event, at its place on the axis."""

    at_us: int
    event: LiveEvent


@dataclass(frozen=True, kw_only=True)
class SideLine:
    """All that was seen of one side.  ``statistics``: its last answer to ``query-migrate``."""

    side: Side
    address: str = ""
    version: str = ""
    clock: Clock = field(default_factory=Clock)
    phases: Sequence[Phase] = ()
    runs: Sequence[Stretch] = ()
    statistics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The whole.  ``zero_us`` is the axis' zero by our clock, microseconds since 1970; ``length_us`` is its end."""

    zero_us: int
    length_us: int
    began: Began | None
    finished: Finished | None
    sides: Mapping[Side, SideLine]
    samples: Sequence[Sample]
    passes: Sequence[Pass]
    stops: Sequence[Stop]
    latency: Latency
    moments: Sequence[Moment]

    @property
    def last(self) -> Sample | None:
        return self.samples[-1] if self.samples else None

    @property
    def downtime_ms(self) -> int | None:
        """QEMU's own count, of the source."""
        return number(self.sides[Side.SOURCE].statistics.get("downtime"))

    def rates(self, limit: int = 500) -> list[Rate]:
        """What was sent and dirtied between samples: of many samples as many as ``limit``."""
        least_us = max(min(SHORTEST_RATE_US, self.length_us // 50), self.length_us // max(limit, 1), 1)
        picked: list[Sample] = []
        for sample in self.samples:
            if not picked or sample.at_us - picked[-1].at_us >= least_us:
                picked.append(sample)
        if len(picked) > 1:  # what came after the last of them is part of its stretch: so all is counted
            picked[-1] = self.samples[-1]
        return [_rate(before, after) for before, after in pairwise(picked)]

    def thinned(self, limit: int = 500) -> list[Sample]:
        """The samples, or of many about so many: the largest remainder of each stretch, and its last."""
        if len(self.samples) <= limit:
            return list(self.samples)
        step = -(-2 * len(self.samples) // limit)
        picked: list[Sample] = []
        for at in range(0, len(self.samples), step):
            lot = self.samples[at : at + step]
            largest = max(lot, key=lambda each: each.remaining_bytes or 0)
            picked += [largest] if largest is lot[-1] else [largest, lot[-1]]
        return picked


def timeline(events: Iterable[LiveEvent]) -> Timeline:
    """From what was reported, in the order in which it was.  No events make an empty axis."""
    events = list(events)
    began = next((each for each in events if isinstance(each, Began)), None)
    finished = next((each for each in reversed(events) if isinstance(each, Finished)), None)
    zero_us = began.time_us if began else min((each.time_us for each in events), default=0)
    clocks = {side: clock_of(side, events) for side in Side}
    moments = list(_placed(events, clocks, zero_us))
    length_us = max([each.at_us for each in moments], default=0)
    sides = {side: _side_line(side, moments, clocks[side], length_us, began) for side in Side}
    return Timeline(
        zero_us=zero_us,
        length_us=length_us,
        began=began,
        finished=finished,
        sides=sides,
        samples=list(_samples(moments)),
        passes=[Pass(each.at_us, each.event.number) for each in moments if isinstance(each.event, PassBegan)],
        stops=list(_stops(sides)),
        latency=latency_in(sides[Side.DESTINATION].statistics),
        moments=sorted(moments, key=lambda each: each.at_us),
    )


# ---- placing ----


def _placed(events: Sequence[LiveEvent], clocks: Mapping[Side, Clock], zero_us: int) -> Iterator[Moment]:
    """Each event at its time by our clock; those of one side stay in their order."""
    latest: dict[Side, int] = {}
    for event in events:
        at_us = event.time_us
        if event.side is not None and event.qemu_us is not None:
            at_us = min(at_us, event.qemu_us + clocks[event.side].offset_us)
            # Only what QEMU says is in its own order: what we ask or send comes between as it may.
            at_us = latest[event.side] = max(at_us, latest.get(event.side, at_us))
        yield Moment(at_us - zero_us, event)


# ---- sides ----


def _side_line(side: Side, moments: Sequence[Moment], clock: Clock, length_us: int, began: Began | None) -> SideLine:
    own = [each for each in moments if each.event.side is side]
    found = next((each.event for each in own if isinstance(each.event, SideFound)), None)
    answers = [each.event.data for each in own if isinstance(each.event, Progressed)]
    return SideLine(
        side=side,
        address=found.address if found else "",
        version=found.version if found else "",
        clock=clock,
        phases=list(_phases(own, length_us, recovering=began is not None and began.operation == "recover")),
        runs=list(_runs(own, length_us, running=found is not None and found.run_state == "running")),
        statistics=answers[-1] if answers else {},
    )


def _phases(own: Sequence[Moment], length_us: int, *, recovering: bool) -> Iterator[Phase]:
    changes = [(each.at_us, each.event) for each in own if isinstance(each.event, StatusChanged)]
    if not recovering:  # what an earlier migration left behind
        changes = [(at_us, event) for at_us, event in changes if at_us >= 0]
    ends = [*(at_us for at_us, _ in changes[1:]), length_us]
    for (at_us, event), end_us in zip(changes, ends, strict=False):  # where there is no change, there is one end more
        if end_us >= 0:
            yield Phase(max(at_us, 0), max(end_us, at_us), event.status, event.heard)


def _runs(own: Sequence[Moment], length_us: int, *, running: bool) -> Iterator[Stretch]:
    since_us = 0
    for each in own:
        if not isinstance(each.event, GuestChanged) or each.event.running == running:
            continue
        at_us = max(each.at_us, 0)
        if running:
            yield Stretch(since_us, at_us)
        running, since_us = each.event.running, at_us
    if running:
        yield Stretch(since_us, max(length_us, since_us))


def _stops(sides: Mapping[Side, SideLine]) -> Iterator[Stop]:
    """The gaps between the stretches in which it ran on either side."""
    runs = sorted((run.begin_us, run.end_us, side) for side, line in sides.items() for run in line.runs)
    if not runs:
        return
    end_us = runs[0][1]
    for begin_us, until_us, side in runs[1:]:
        if begin_us > end_us:
            yield Stop(end_us, begin_us, side)
        end_us = max(end_us, until_us)
    last_us = max((phase.end_us for line in sides.values() for phase in line.phases), default=end_us)
    if last_us > end_us:
        yield Stop(end_us, last_us, None)


# ---- numbers ----


def _samples(moments: Iterable[Moment]) -> Iterator[Sample]:
    latest_us = 0
    for each in moments:
        event = each.event
        if not isinstance(event, Progressed) or event.side is not Side.SOURCE or each.at_us < latest_us:
            continue
        if event.transferred_bytes is None and event.remaining_bytes is None:
            continue
        latest_us = each.at_us
        yield Sample(
            at_us=each.at_us,
            status=event.status,
            remaining_bytes=event.remaining_bytes,
            transferred_bytes=event.transferred_bytes,
            total_bytes=event.total_bytes,
            dirty_bytes_per_s=event.dirty_bytes_per_s,
            sent_bytes_per_s=event.sent_bytes_per_s,
            page_requests=event.page_requests,
            expected_downtime_ms=event.expected_downtime_ms,
        )


def _rate(before: Sample, after: Sample) -> Rate:
    seconds = (after.at_us - before.at_us) / 1e6
    return Rate(
        before.at_us,
        after.at_us,
        _a_second(before.transferred_bytes, after.transferred_bytes, seconds),
        after.dirty_bytes_per_s if after.looks_for_dirt else None,
    )


def _a_second(before: int | None, after: int | None, seconds: float) -> float | None:
    if before is None or after is None or after < before:  # it began to count anew
        return None
    return (after - before) / seconds
