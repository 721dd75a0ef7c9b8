"""What live parts report while they work: timed events, the same for a person, a script and a report.

An event says when it came to us (``time_us``), when QEMU says that it happened (``qemu_us``, by the clock of the
host that QEMU runs on), and which side it is about.  What QEMU said is passed through as data, whole: a status or
a field that is not known here is still there.  ``plain()`` is the same for JSON, with the ``event``'s name.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from enum import StrEnum
from typing import Any, Final, TypeAlias, dataclass_transform

from qmigrate.value import Value

__all__ = [
    "Began",
    "BlocksCame",
    "ChannelCame",
    "CommandSent",
    "Decided",
    "Finished",
    "GuestChanged",
    "Latency",
    "Listening",
    "LiveEvent",
    "NotSaved",
    "OnEvent",
    "PassBegan",
    "Paused",
    "Progressed",
    "QemuSaid",
    "Received",
    "Recovering",
    "Side",
    "SideFound",
    "StatusChanged",
    "Troubled",
]


class Side(StrEnum):
    """One of the two ends of a migration."""

    SOURCE = "source"
    DESTINATION = "destination"

    @property
    def other(self) -> "Side":
        return Side.DESTINATION if self is Side.SOURCE else Side.SOURCE


def _now_us() -> int:
    return time.time_ns() // 1000


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
class LiveEvent(Value):
    """Something that happened.  Both times are microseconds since 1970; ``qemu_us`` is None where QEMU gave none."""

    side: Side | None = None
    time_us: int = field(default_factory=_now_us)
    qemu_us: int | None = None

    @property
    def name(self) -> str:
        """``status-changed`` for StatusChanged."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", type(self).__name__).lower()

    def plain(self) -> dict[str, Any]:
        """As JSON has it: the event's name first, then its fields."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {"event": self.name, **{key: _plain(value) for key, value in values.items()}}


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


_OF_ALL: Final = frozenset(each.name for each in fields(LiveEvent))
OnEvent: TypeAlias = Callable[[LiveEvent], None]


class SideFound(LiveEvent):
    """Who is there, before anything begins.  ``version`` is QEMU's own, empty where it gave none."""

    address: str
    version: str
    run_state: str
    status: str


class Began(LiveEvent):
    """All is prepared.  ``operation``: ``migrate`` or ``recover``; ``plan``: what of it is not as by default."""

    operation: str
    uri: str
    plan: Mapping[str, Any] = field(default_factory=dict)


class StatusChanged(LiveEvent):
    """The status of the migration on one side, in QEMU's word.  ``heard``: by an event; else by asking."""

    status: str
    heard: bool = True


class PassBegan(LiveEvent):
    """QEMU's MIGRATION_PASS.  ``number`` is QEMU's; ``completed`` counts the passes that are over."""

    number: int
    completed: int


class GuestChanged(LiveEvent):
    """The guest was stopped or runs on this side."""

    running: bool


class QemuSaid(LiveEvent):
    """Any other event of QEMU."""

    qemu_event: str
    data: Mapping[str, Any]


class Progressed(LiveEvent):
    """How far it has come.  ``data`` is QEMU's whole answer; the fields are what most want of it.

    What QEMU did not tell is None.  ``round_trip_us``: from our question to its answer.
    """

    status: str
    remaining_bytes: int | None = None
    transferred_bytes: int | None = None
    total_bytes: int | None = None
    dirty_bytes_per_s: int | None = None
    sent_bytes_per_s: int | None = None
    passes: int = 0
    page_requests: int | None = None
    downtime_ms: int | None = None
    expected_downtime_ms: int | None = None
    round_trip_us: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


class CommandSent(LiveEvent):
    """We tell this side's QEMU to do something.  Questions are not reported."""

    command: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Decided(LiveEvent):
    """What we do next, and why: ``switch``, ``continue``, ``cancel``, ``pause``, ``leave``."""

    decision: str
    reason: str


class Recovering(LiveEvent):
    """A paused postcopy is being brought back.  ``limit`` is None when there is none."""

    attempt: int
    limit: int | None
    uri: str


class Troubled(LiveEvent):
    """Something went wrong on this side; what follows shows what it means."""

    message: str


class Finished(LiveEvent):
    """The end: what became of it, and where the guest is.  ``sentence`` says the latter in full."""

    outcome: str
    place: str
    running: bool | None
    message: str
    advice: str
    exit_code: int
    sentence: str = ""
    switched: bool = False
    recoveries: int = 0


# ---- of a stand-in destination


class Listening(LiveEvent):
    """A source may come now; ``uri`` has the port that was taken, ``control`` is the control socket's path."""

    uri: str
    control: str


class ChannelCame(LiveEvent):
    """A connection said what it is: ``main``, ``multifd``, ``resumed``, ``pages`` (preempt)."""

    kind: str


class BlocksCame(LiveEvent):
    """The source's RAM: each block's name, length and page size here, in bytes."""

    blocks: Sequence[tuple[str, int, int]]


class Received(LiveEvent):
    """How far it has come: target pages by kind, those of the preempt channel too; the rest are host pages.

    ``duplicates`` were there already when they came, ``requested`` were asked for, of ``faults``.
    """

    received_bytes: int = 0
    normal: int = 0
    zero: int = 0
    duplicates: int = 0
    discarded: int = 0
    requested: int = 0
    faults: int = 0
    preempt: int = 0
    touches: int = 0
    writes: int = 0

    @property
    def numbers(self) -> dict[str, int]:
        """All of them, by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _OF_ALL}


class Latency(LiveEvent):
    """How long pages took so far: ``counts[i]`` from 2^i up to 2^(i+1) µs, as QEMU's postcopy-latency-dist.

    ``where``: ``touchers``, ``package``: from the touch of a missing page until it was read; ``requests``,
    ``preempt``: from REQ_PAGES until the page was in place, by the channel that it came on.
    """

    where: str
    counts: Sequence[int]
    mean_us: float
    longest_us: float


class Paused(LiveEvent):
    """The connection broke in postcopy.  The guest's memory is kept; who asks at ``control`` brings it back."""

    reason: str
    control: str


class NotSaved(LiveEvent):
    """All has come by postcopy, and could not be saved: this memory is the only copy.  Ask at ``control``."""

    reason: str
    control: str
