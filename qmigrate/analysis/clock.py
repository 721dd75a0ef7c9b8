"""How far the clock of a QEMU's host is from ours.

Two hosts have two clocks.  QEMU stamps its events by its own; we know when they came.  An event comes late, never
early, so the one that came soonest after its stamp tells best how far that clock is from ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qmigrate.events import LiveEvent, Progressed, Side

__all__ = ["Clock", "clock_of"]

DELAY_US: Final = 20_000
"""An event may come so late on a busy host.  A clock that is no further away than this is taken to be ours."""

EARLY_US: Final = 2_000
"""An event may seem to come so early where clocks are the same, or kept so by NTP."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A side's clock.  ``offset_us`` was added to its stamps to make them ours; it may be wrong by ``error_us``.

    ``stamp_count`` 0: QEMU stamped nothing, all times are those at which we heard of it.
    """

    offset_us: int = 0
    error_us: int = 0
    stamp_count: int = 0


def clock_of(side: Side, events: Sequence[LiveEvent]) -> Clock:
    """The clock of this side, from all that was reported."""
    late = [each.time_us - each.qemu_us for each in events if each.side is side and each.qemu_us is not None]
    if not late:
        return Clock()
    asked = [each for each in events if isinstance(each, Progressed) and each.side is side]
    round_trips = [each.round_trip_us for each in asked if each.round_trip_us is not None]
    round_trip_us = min(round_trips, default=0)
    soonest_us = min(late)
    if -EARLY_US <= soonest_us <= round_trip_us + DELAY_US:
        return Clock(error_us=abs(soonest_us), stamp_count=len(late))
    # One way takes somewhat between nothing and the whole of the round trip.
    half_us = round_trip_us // 2
    error_us = half_us if round_trips else DELAY_US
    return Clock(offset_us=soonest_us - half_us, error_us=error_us, stamp_count=len(late))
