"""How long a guest waited for its pages in postcopy, as the destination measured it.

QEMU measures it with the capability ``postcopy-blocktime``: since 3.0 for how long CPUs waited, since 10.1 how many
requests took how long, too (the members whose names hold ``latency``, which QEMU calls unstable).  Units differ:
what is called blocktime is in milliseconds, latencies are in nanoseconds, and the distribution is by microseconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["Bucket", "Latency", "latency_in", "number"]

MOST: Final = 64
"""More buckets than that, or more CPUs than 64 times as many, no QEMU has."""


@dataclass(frozen=True)
class Bucket:
    """So many requests took at least ``begin_us`` and less than ``end_us``, which is None for the last: no limit."""

    begin_us: int
    end_us: int | None
    count: int


@dataclass(frozen=True, kw_only=True)
class Latency:
    """What is known; empty and None where QEMU did not tell.

    ``blocktime_ms``: for how long all CPUs waited at once; ``vcpu_blocktime_ms``: each CPU.  ``mean_ns`` is QEMU's
    own mean of the time that a requested page took.
    """

    buckets: Sequence[Bucket] = ()
    mean_ns: int | None = None
    blocktime_ms: int | None = None
    vcpu_blocktime_ms: Sequence[int] = ()
    vcpu_mean_ns: Sequence[int] = ()

    @property
    def known(self) -> bool:
        return bool(self.buckets) or self.blocktime_ms is not None

    @property
    def count(self) -> int:
        """How many requests are in the distribution."""
        return sum(each.count for each in self.buckets)

    @property
    def mean_fits(self) -> bool:
        """Could QEMU's mean be that of its distribution?  In 11.1 it was seen not to be: then trust the latter."""
        if self.mean_ns is None or not self.count:
            return True
        least_us = sum(each.begin_us * each.count for each in self.buckets) / self.count
        most_us = sum((each.end_us or 0) * each.count for each in self.buckets) / self.count
        unbound = any(each.count and each.end_us is None for each in self.buckets)
        return self.mean_ns >= 1000 * least_us and (unbound or self.mean_ns <= 1000 * most_us)

    def percentile(self, share: float) -> Bucket | None:
        """The bucket in which so much of all (0 to 1) is reached; None where there is none."""
        seen, wanted = 0, share * self.count
        for each in self.buckets:
            seen += each.count
            if each.count and seen >= wanted:
                return each
        return None


def latency_in(answer: Mapping[str, Any]) -> Latency:
    """What a destination's answer to ``query-migrate`` says of it.  What is of no use is left out."""
    return Latency(
        buckets=_buckets(_numbers(answer.get("postcopy-latency-dist"), MOST)),
        mean_ns=number(answer.get("postcopy-latency")),
        blocktime_ms=number(answer.get("postcopy-blocktime")),
        vcpu_blocktime_ms=_numbers(answer.get("postcopy-vcpu-blocktime"), MOST * MOST),
        vcpu_mean_ns=_numbers(answer.get("postcopy-vcpu-latency"), MOST * MOST),
    )


def _buckets(counts: Sequence[int]) -> list[Bucket]:
    """Bucket N counts from 2^N to below 2^(N+1) microseconds; the first takes what was faster, too, the last what
    was slower (migration/postcopy-ram.c: blocktime_latency_account()).
    """
    last = len(counts) - 1
    return [
        Bucket(1 << index if index else 0, None if index == last else 2 << index, count)
        for index, count in enumerate(counts)
    ]


def _numbers(value: Any, most: int) -> list[int]:
    """A list of numbers, or an empty one: part of it would tell wrong things."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) > most:
        return []
    numbers = [number(each) for each in value]
    return [] if None in numbers else [each for each in numbers if each is not None]


def number(value: Any) -> int | None:
    """A number that QEMU can mean: whole, from 0, in 64 bits; else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64 else None
