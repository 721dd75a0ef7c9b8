"""The guest's stand-in: who reads and writes memory in a pattern, and measures how long each page made it wait.

Patterns give places for ever (a recorded trace once); a ``Toucher`` is a thread that touches them until it is
told to stop.  Each page that was missing counts in a histogram with the buckets of QEMU's ``postcopy-latency-dist``:
bucket i holds what took from 2^i up to 2^(i+1) µs, the first also what took less.
"""

import ctypes
import random
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final, NamedTuple

from qmigrate.uffd.memory import touch

__all__ = ["PATTERNS", "Histogram", "Place", "Toucher", "Workload", "places"]

BUCKETS: Final = 24  # as QEMU 11.1 has them: 1 µs to 8 s and more
PATTERNS: Final = ("sequential", "random", "zipf", "working-set")
_WORKING_SHARE: Final = 0.1  # of all pages
_WORKING_TOUCHES: Final = 0.9  # of all touches
_TOUCHED_BYTES: Final = 8


class Place(NamedTuple):
    """A page: the block's number, and its byte offset there; ``is_write`` of a trace says what was done."""

    block: int
    start: int
    is_write: bool = False


@dataclass
class Histogram:
    """Durations in buckets, and what a mean needs."""

    counts: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    total_ns: int = 0
    longest_ns: int = 0

    def add(self, duration_ns: int) -> None:
        """Count one."""
        bucket = min(max(duration_ns // 1000, 1).bit_length() - 1, BUCKETS - 1)
        self.counts[bucket] += 1
        self.total_ns += duration_ns
        self.longest_ns = max(self.longest_ns, duration_ns)

    def join(self, other: "Histogram") -> None:
        """Add what another one has counted."""
        self.counts = [ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)]
        self.total_ns += other.total_ns
        self.longest_ns = max(self.longest_ns, other.longest_ns)

    @property
    def count(self) -> int:
        return sum(self.counts)

    def median_bucket(self) -> int | None:
        """The bucket in which the middle one lies; None where nothing was counted."""
        if not self.count:
            return None
        return bisect_right(list(accumulate(self.counts)), (self.count - 1) // 2)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one toucher does.  ``rate`` in touches a second, None: as fast as it can; ``writes`` is a share.

    ``trace``: exactly these, once, instead of a pattern.
    """

    pattern: str = "random"
    writes: float = 0.0
    rate: float | None = None
    seed: int = 0
    trace: tuple[Place, ...] = ()


def places(workload: Workload, sizes: Sequence[tuple[int, int]]) -> Iterator[Place]:
    """Where to touch, one after the other.  ``sizes``: (length, page size) of each block, in bytes.

    Without end, unless it is a trace or there is no page at all; the same for the same seed.
    """
    if workload.trace:
        yield from workload.trace
        return
    counts = list(accumulate(length // page_size for length, page_size in sizes))
    total = counts[-1] if counts else 0
    if not total:
        return
    for page in _numbers(workload, total):
        block = bisect_right(counts, page)
        yield Place(block, (page - (counts[block - 1] if block else 0)) * sizes[block][1])


def _numbers(workload: Workload, total: int) -> Iterator[int]:
    chance = random.Random(workload.seed)
    first = chance.randrange(total)
    match workload.pattern:
        case "sequential":
            while True:
                yield from range(total)
        case "random":
            while True:
                yield chance.randrange(total)
        case "zipf":
            # The page of rank r with a chance of about 1/r; ranks are spread over memory by a stride.
            stride = _coprime(total, chance)
            while True:
                rank = min(int((total + 1) ** chance.random()), total) - 1
                yield (first + rank * stride) % total
        case "working-set":
            share = max(int(total * _WORKING_SHARE), 1)
            while True:
                is_inside = chance.random() < _WORKING_TOUCHES
                yield (first + chance.randrange(share)) % total if is_inside else chance.randrange(total)
        case other:
            raise ValueError(f"{other!r} is no pattern: expected one of {', '.join(PATTERNS)}")


def _coprime(total: int, chance: random.Random) -> int:
    from math import gcd

    while True:
        stride = chance.randrange(total) | 1
        if gcd(stride, total) == 1:
            return stride


class Toucher(threading.Thread):
    """Touches guest memory until it is stopped, or its trace ends.

    ``addresses`` says where each block lies in this process; ``is_missing(place)`` is asked before each touch, as
    only what was missing is timed.  A thread that sleeps in a fault ends with the process at the latest: it is a
    daemon.
    """

    def __init__(
        self,
        workload: Workload,
        addresses: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        is_missing: Callable[[Place], bool],
        *,
        name: str = "toucher",
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.workload = workload
        self.histogram = Histogram()
        self.touches = 0
        self.writes = 0
        self._addresses = tuple(addresses)
        self._sizes = tuple(sizes)
        self._is_missing = is_missing
        self._stopped = threading.Event()

    def stop(self) -> None:
        """It ends after the touch that it is at."""
        self._stopped.set()

    def run(self) -> None:
        chance = random.Random(self.workload.seed + 1)
        scratch = ctypes.create_string_buffer(_TOUCHED_BYTES)
        began = time.monotonic()
        for place in places(self.workload, self._sizes):
            if self._stopped.is_set() or self._is_too_early(began):
                return
            is_write = place.is_write or chance.random() < self.workload.writes
            self._touch(place, ctypes.addressof(scratch), is_write)

    def _is_too_early(self, began: float) -> bool:
        """Wait until the rate allows the next touch; True where it was stopped meanwhile."""
        if self.workload.rate is None:
            return False
        left = began + self.touches / self.workload.rate - time.monotonic()
        return left > 0 and self._stopped.wait(left)

    def _touch(self, place: Place, scratch: int, write: bool) -> None:
        address = self._addresses[place.block] + place.start
        if write:  # a write alone would make every touched page's first bytes what scratch happens to hold
            ctypes.memset(scratch, self.touches & 0xFF, _TOUCHED_BYTES)
        was_missing = self._is_missing(place)
        began = time.perf_counter_ns()
        touch(address, scratch, _TOUCHED_BYTES, write=write)
        if was_missing:
            self.histogram.add(time.perf_counter_ns() - began)
        self.touches += 1
        self.writes += write
