"""A migration that came in to a stand-in destination, as it went: made from its events and how it ended.

Times are microseconds; on the axis they count from the source's first connection.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from qmigrate import events
from qmigrate.analysis.latency import Latency, latency_in
from qmigrate.analysis.timeline import Moment, Phase, Stretch
from qmigrate.events import LiveEvent

__all__ = ["WAITED", "Rate", "ReceiveResult", "Reception", "Sample", "Waited", "reception"]

WAITED: Final = ("touchers", "package", "requests", "preempt")
"""What was waited for, in the order in which it is told: see ``events.Latency``."""

_SHORTEST_RATE_US: Final = 100_000
_STILL: Final = frozenset({"paused", "recovering", "ended", "failed"})  # phases in which no pages come


@dataclass(frozen=True, kw_only=True)
class ReceiveResult:
    """The end.  ``exit_code`` as for every live command: 0 as asked, 3 the guest is the source's, 6 lost.

    ``place``: where the guest is: ``none`` (no source came), ``source``, ``here`` (all was received), ``lost``.
    """

    exit_code: int
    message: str
    place: str = "none"
    is_postcopy: bool = False
    numbers: Mapping[str, int] = field(default_factory=dict)
    phases: Sequence[tuple[str, int]] = ()
    """Each phase with the time when it began, in microseconds since 1970."""

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    def plain(self) -> dict[str, Any]:
        """As JSON has it, the last of the events."""
        return {
            "event": "finished",
            "exit_code": self.exit_code,
            "message": self.message,
            "place": self.place,
            "postcopy": self.is_postcopy,
            "numbers": dict(self.numbers),
            "phases": [{"phase": phase, "time_us": at} for phase, at in self.phases],
        }


@dataclass(frozen=True)
class Sample:
    """How far it had come at one time."""

    at_us: int
    numbers: Mapping[str, int]


@dataclass(frozen=True)
class Rate(Stretch):
    """Bytes a second between two samples."""

    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Waited:
    """How long pages took."""

    latency: Latency
    mean_us: float
    longest_us: float


@dataclass(frozen=True, kw_only=True)
class Reception:
    """The whole.  ``zero_us`` is the axis' zero, microseconds since 1970; ``length_us`` is its end."""

    uri: str
    result: ReceiveResult
    zero_us: int
    length_us: int
    phases: Sequence[Phase]
    samples: Sequence[Sample]
    waited: Mapping[str, Waited]
    blocks: Sequence[tuple[str, int, int]]
    channels: Sequence[str]
    moments: Sequence[Moment]

    @property
    def received_bytes(self) -> int:
        return self.result.numbers.get("received_bytes", 0)

    @property
    def receiving_us(self) -> int:
        """For how long pages could come: from the first connection to the last phase's begin, but for pauses."""
        return sum(each.length_us for each in self.phases if each.status not in _STILL)

    @property
    def bytes_per_s(self) -> float | None:
        """The throughput over all that time; None where there was none."""
        return 1e6 * self.received_bytes / self.receiving_us if self.receiving_us and self.received_bytes else None

    def rates(self, limit: int) -> list[Rate]:
        """What came between samples: of many samples as many as ``limit``."""
        least_us = max(min(_SHORTEST_RATE_US, self.length_us // 50), self.length_us // max(limit, 1), 1)
        picked = [Sample(0, {"received_bytes": 0})] if self.samples else []
        for sample in self.samples:
            if sample.at_us - picked[-1].at_us >= least_us:
                picked.append(sample)
        if len(picked) > 1:  # what came after the last of them is part of its stretch: so all is counted
            picked[-1] = self.samples[-1]
        return [
            Rate(before.at_us, after.at_us, _came(before, after) / ((after.at_us - before.at_us) / 1e6))
            for before, after in pairwise(picked)
        ]


def _came(before: Sample, after: Sample) -> int:
    return max(after.numbers.get("received_bytes", 0) - before.numbers.get("received_bytes", 0), 0)


def reception(told: Iterable[LiveEvent], result: ReceiveResult) -> Reception:
    """From what was reported, in the order in which it was."""
    told = list(told)
    zero_us = _zero(told)
    moments = sorted((Moment(each.time_us - zero_us, each) for each in told), key=lambda each: each.at_us)
    length_us = max([each.at_us for each in moments], default=0)
    return Reception(
        uri=next((each.uri for each in told if isinstance(each, events.Listening)), ""),
        result=result,
        zero_us=zero_us,
        length_us=length_us,
        phases=list(_phases(result, zero_us, length_us)),
        samples=list(_samples(moments)),
        waited={each.where: _waited(each) for each in told if isinstance(each, events.Latency)},  # the last of each
        blocks=next((each.blocks for each in told if isinstance(each, events.BlocksCame)), ()),
        channels=[each.kind for each in told if isinstance(each, events.ChannelCame)],
        moments=moments,
    )


def _zero(told: Sequence[LiveEvent]) -> int:
    first = next((each for each in told if isinstance(each, events.ChannelCame)), None)
    return first.time_us if first is not None else min((each.time_us for each in told), default=0)


def _phases(result: ReceiveResult, zero_us: int, length_us: int) -> Iterator[Phase]:
    begins = [(phase, max(at - zero_us, 0)) for phase, at in result.phases]
    ends = [*(at for _, at in begins[1:]), length_us]
    for (phase, begin_us), end_us in zip(begins, ends, strict=False):  # where there is none, there is one end more
        yield Phase(begin_us, max(begin_us, end_us), phase)


def _samples(moments: Iterable[Moment]) -> Iterator[Sample]:
    for each in moments:
        event = each.event
        if isinstance(event, events.Received) and each.at_us >= 0:
            yield Sample(each.at_us, event.numbers)


def _waited(event: events.Latency) -> Waited:
    latency = latency_in({"postcopy-latency-dist": list(event.counts)})
    return Waited(latency=latency, mean_us=event.mean_us, longest_us=event.longest_us)
