"""What became of one restore of a saved guest, on one axis of time: for a page, or whoever else tells of it.

Times are microseconds after the beginning.  What was asked for and sent is counted by slices, all of one length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qmigrate.analysis.latency import Bucket, Latency
from qmigrate.events import GuestChanged, LiveEvent, StatusChanged, Troubled

__all__ = ["RestoreStory", "Row", "Stretch", "latency_of", "phases_of", "runs_of", "troubles_of"]


@dataclass(frozen=True)
class Stretch:
    """From when to when, and what."""

    begin_us: int
    end_us: int
    what: str


@dataclass(frozen=True)
class Row:
    """Something that happened, in words."""

    at_us: int
    side: str
    words: str


@dataclass(frozen=True, kw_only=True)
class RestoreStory:
    """``way``: ``lazily``, ``eagerly`` or ``taken over``; ``exit_code`` as the command ends with.

    ``moments`` by name; ``page_size`` in bytes, of the ``total`` pages, of which ``pages`` were sent.
    """

    file: str
    way: str
    exit_code: int
    message: str
    began_us: int = 0
    length_us: int = 0
    version: str = ""
    moments: Mapping[str, int] = field(default_factory=dict)
    phases: Sequence[Stretch] = ()
    runs: Sequence[Stretch] = ()
    page_size: int = 4096
    total: int = 0
    pages: int = 0
    requested: int = 0
    requests: int = 0
    sent_bytes: int = 0
    recoveries: int = 0
    latency: Latency = field(default_factory=Latency)
    mean_us: float | None = None
    longest_us: float | None = None
    slice_us: int = 1000
    requests_in: Sequence[int] = ()
    pages_in: Sequence[int] = ()
    bytes_in: Sequence[int] = ()
    troubles: Sequence[Row] = ()
    rows: Sequence[Row] = ()
    facts: Sequence[tuple[str, str]] = ()


def phases_of(events: Sequence[LiveEvent], zero_us: int, end_us: int) -> list[Stretch]:
    """The destination's statuses; one that it ends with has the length 0."""
    said = [(each.time_us - zero_us, each.status) for each in events if isinstance(each, StatusChanged)]
    ends = [at_us for at_us, _ in said[1:]] + [end_us]
    return [Stretch(max(at_us, 0), max(end, 0), what) for (at_us, what), end in zip(said, ends, strict=True)]


def runs_of(events: Sequence[LiveEvent], zero_us: int, end_us: int) -> list[Stretch]:
    """When the guest ran there, by the destination's word."""
    runs: list[Stretch] = []
    began: int | None = None
    for each in events:
        if not isinstance(each, GuestChanged):
            continue
        if each.running and began is None:
            began = each.time_us - zero_us
        elif not each.running and began is not None:
            runs.append(Stretch(began, each.time_us - zero_us, "runs"))
            began = None
    return runs if began is None else [*runs, Stretch(began, max(end_us, began), "runs")]


def troubles_of(events: Sequence[LiveEvent], zero_us: int) -> list[Row]:
    """What was said to be wrong."""
    return [
        Row(each.time_us - zero_us, str(each.side or ""), each.message) for each in events if isinstance(each, Troubled)
    ]


def latency_of(counts: Sequence[int]) -> Latency:
    """Of answers: ``counts[i]`` took from 2^i to below 2^(i+1) microseconds, the first less, too, the last more."""
    last = len(counts) - 1
    return Latency(
        buckets=[
            Bucket(1 << index if index else 0, None if index == last else 2 << index, count)
            for index, count in enumerate(counts)
        ]
    )
