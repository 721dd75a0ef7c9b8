"""What the story of a recording is made of: its connections, its phases, moments, and how much had passed by when."""

from dataclasses import dataclass, field
from typing import Any, Final

from qmigrate.format.channel import Channel, ChannelKind

__all__ = ["ChannelStory", "Flow", "Moment", "Phase"]

_MOST_SAMPLES: Final = 2000


class Flow:
    """How many bytes had passed by when: (time in ns, forward, return), a few thousand samples at most."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, int, int]] = []
        self.forward = self.back = 0
        self._every_ns = 1_000_000

    def add(self, time_ns: int, length: int, *, is_forward: bool) -> None:
        """So many bytes more.  Times may not go back."""
        if is_forward:
            self.forward += length
        else:
            self.back += length
        sample = (time_ns, self.forward, self.back)
        if len(self.samples) > 1 and time_ns - self.samples[-2][0] < self._every_ns:
            self.samples[-1] = sample
            return
        self.samples.append(sample)
        if len(self.samples) > _MOST_SAMPLES:
            self._every_ns *= 2
            self.samples = [*self.samples[::2], *self.samples[-1:]]


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened on a connection.  ``time_ns`` counts from the recording's start.

    ``direction`` is forward, return, or empty where it is about the connection itself.
    """

    time_ns: int
    connection: int
    direction: str
    name: str
    details: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        head = {"time_ns": self.time_ns, "connection": self.connection}
        way = {"direction": self.direction} if self.direction else {}
        return {**head, **way, "name": self.name, **self.details}


@dataclass(slots=True)
class ChannelStory:
    """A connection, and what it turned out to be.  ``back`` is None where nothing came back."""

    number: int
    peer: str
    opened_ns: int
    forward: Channel
    back: Channel | None = None
    closed_ns: int | None = None
    forward_bytes: int = 0
    return_bytes: int = 0
    error: str = ""
    faults: list[str] = field(default_factory=list)
    """Where the bytes of a direction stopped making sense, or were broken off."""

    @property
    def is_main(self) -> bool:
        return self.forward.kind in (ChannelKind.MAIN, ChannelKind.RESUMED)


@dataclass(slots=True)
class Phase:
    """A stretch of the migration, as the channels show it; ``end_ns`` is None while it lasts."""

    name: str
    begin_ns: int
    end_ns: int | None = None
