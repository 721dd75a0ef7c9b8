"""When to switch from precopy to postcopy.  Rules only: they are told what was seen, and do nothing.

Passes.  QEMU copies all memory once, then what was written meanwhile, and so on.  A pass is over when QEMU has
announced a new look at what is dirty (MIGRATION_PASS) *and* as much was sent as was left when the pass began.
The first alone would do, but QEMU 11.1 looks anew, and says so, many times within what is really one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from qmigrate.value import Value

__all__ = [
    "AfterPass",
    "AfterSeconds",
    "AtOnce",
    "History",
    "IfStuck",
    "PassCounter",
    "PassStart",
    "Policy",
    "why_switch",
]

SHRINKS_BY: Final = 0.1
"""A pass that leaves this share less than the one before it had to send is one that gets on."""


class AtOnce(Value):
    """As soon as the migration has begun."""


class AfterPass(Value):
    """When so many passes over memory are over; the first copies all of it."""

    count: int


class AfterSeconds(Value):
    """When it has gone on for so long."""

    seconds: float


class IfStuck(Value):
    """When precopy will not end by itself.

    It is stuck when, in two passes following on each other (the first of all is not looked at, since it sends
    everything), what was left at the beginning of the later one

    - is more than can be sent within the downtime that is allowed (else QEMU ends it now), and
    - did not shrink by a tenth against the beginning of the earlier one, or the guest dirtied memory at least as
      fast as it was sent during both.
    """


Policy: TypeAlias = AtOnce | AfterPass | AfterSeconds | IfStuck


class PassStart(Value):
    """What QEMU said when a pass began.  ``left_bytes``: to be sent in it; the rates are bytes a second."""

    left_bytes: int
    dirty_bytes_per_s: int
    sent_bytes_per_s: int
    page_count_sent: int = 0
    downtime_limit_ms: int = 300

    @classmethod
    def of(cls, info: dict[str, Any], downtime_limit_ms: int) -> "PassStart":
        """From an answer to ``query-migrate``."""
        ram = info.get("ram", {})
        return cls(
            left_bytes=ram.get("remaining", 0),
            dirty_bytes_per_s=ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096),
            sent_bytes_per_s=int(ram.get("mbps", 0) * 125_000),
            page_count_sent=pages_sent(info),
            downtime_limit_ms=downtime_limit_ms,
        )


def pages_sent(info: dict[str, Any]) -> int:
    """How many pages have gone, in whatever way."""
    ram = info.get("ram", {})
    return int(ram.get("normal", 0) + ram.get("duplicate", 0) + info.get("xbzrle-cache", {}).get("pages", 0))


@dataclass
class PassCounter:
    """Finds out which of QEMU's announcements are the beginning of a pass.  ``starts`` are those."""

    starts: list[PassStart] = field(default_factory=list)

    @property
    def completed(self) -> int:
        return max(0, len(self.starts) - 1)

    def announced(self, start: PassStart, *, page_size: int = 4096, counts_pages: bool = True) -> bool:
        """QEMU looked at what is dirty; ``start`` is what it said then.  Did a pass begin with it?

        ``counts_pages`` is False where pages go in ways that no counter shows (xbzrle): then the word of QEMU
        has to do.
        """
        if self.starts and counts_pages:
            last = self.starts[-1]
            sent_bytes = (start.page_count_sent - last.page_count_sent) * page_size
            if sent_bytes < last.left_bytes:
                return False
        self.starts.append(start)
        return True


class History(Value):
    """What was seen of a migration: for how long it has gone on, and its passes."""

    seconds: float
    starts: Sequence[PassStart] = ()

    @property
    def completed_passes(self) -> int:
        return max(0, len(self.starts) - 1)


def why_switch(policies: Sequence[Policy], history: History) -> str | None:
    """The reason to switch now, or None.  The first of several policies that says so decides."""
    for policy in policies:
        reason = _why(policy, history)
        if reason is not None:
            return reason
    return None


def _why(policy: Policy, history: History) -> str | None:
    match policy:
        case AtOnce():
            return "at once, as asked"
        case AfterPass(count) if history.completed_passes >= count:
            return "a pass is over" if count == 1 else f"{count} passes are over"
        case AfterSeconds(seconds) if history.seconds >= seconds:
            return f"it has gone on for {seconds:g} s"
        case IfStuck() if is_stuck(history.starts):
            was, left = history.starts[-2].left_bytes, history.starts[-1].left_bytes
            return f"precopy does not get on: {was} bytes were left, and a pass later {left}"
    return None


def is_stuck(starts: Sequence[PassStart]) -> bool:
    """The rule of IfStuck."""
    if len(starts) < 3:  # of all memory, then two to compare
        return False
    before, now = starts[-2:]
    if now.left_bytes * 1000 <= now.sent_bytes_per_s * now.downtime_limit_ms:
        return False
    shrank = now.left_bytes <= before.left_bytes * (1 - SHRINKS_BY)
    outrun = all(0 < each.sent_bytes_per_s <= each.dirty_bytes_per_s for each in (before, now))
    return outrun or not shrank
