"""Told of a saved guest while it is served: what happens when, how far it is, how long answers take, its end."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from qmigrate.value import Value

__all__ = ["Answered", "Counts", "End", "Ended", "Moment"]

_NS_A_US: Final = 1000


class Moment(Enum):
    """What is told when it happens."""

    CONNECTED = "connected"
    INDEXED = "where all pages are is known"
    SWITCHED = "the package is sent"
    LOADED = "the devices are loaded"
    FIRST_REQUEST = "the first page is asked for"
    FIRST_ANSWER = "the first page that was asked for is sent"
    SIGN = "the first page is asked for since the guest runs"
    FILLED = "all pages are sent"
    RESUMED = "it goes on after a broken connection"


class End(Enum):
    """How serving ended."""

    DONE = "done"
    BROKEN = "the connection broke"
    REFUSED = "the destination failed"
    STOPPED = "told to stop"
    UNREADABLE = "the input can't be served on"


class Ended(Value):
    """``reason`` in words, empty where all went well."""

    end: End
    reason: str = ""


@dataclass
class Answered:
    """How long answers took: ``counts[i]`` from 2^i up to 2^(i+1) µs, from REQ_PAGES read to the page sent.

    ``fine[i]``: i µs, the last one longer.
    """

    counts: list[int] = field(default_factory=lambda: [0] * 32)
    fine: list[int] = field(default_factory=lambda: [0] * 1024, repr=False)
    total_ns: int = 0
    longest_ns: int = 0

    @property
    def median_us(self) -> int | None:
        """Half of them took no longer; None where there was none, or it is a millisecond or more."""
        half, total = (sum(self.fine) + 1) // 2, 0
        for waited_us, count in enumerate(self.fine[:-1]):
            total += count
            if total >= half > 0:
                return waited_us
        return None

    def add(self, waited_ns: int) -> None:
        self.counts[min((waited_ns // _NS_A_US or 1).bit_length() - 1, 31)] += 1
        self.fine[min(waited_ns // _NS_A_US, len(self.fine) - 1)] += 1
        self.total_ns += waited_ns
        self.longest_ns = max(self.longest_ns, waited_ns)


@dataclass
class Counts:
    """How far it is: ``pages`` and ``requested`` are target pages, of ``total``; ``requests`` are messages."""

    total: int = 0
    pages: int = 0
    requested: int = 0
    requests: int = 0
    sent_bytes: int = 0
