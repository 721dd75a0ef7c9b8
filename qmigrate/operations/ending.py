"""How a migration ended: when both sides have come to rest, what they say last, and why it failed."""

import asyncio
from collections.abc import Mapping
from typing import Final

from qmigrate.errors import QemuDiedError, QmpTimeoutError
from qmigrate.events import Side
from qmigrate.operations.watch import Watched
from qmigrate.operations.whereabouts import Reach, View, ask
from qmigrate.qmp.migration import FINAL_STATUSES
from qmigrate.qmp.postcopy import PAUSED

__all__ = ["at_rest", "last_views", "why"]

BLOCKED_AFTER_S: Final = 2.0
"""A destination that is paused and answers nothing for so long waits for a page."""


def at_rest(source: Watched, destination: Watched) -> bool:
    """Will neither side change any more by itself?  A destination that nobody has come to yet is at rest."""
    rest = (*FINAL_STATUSES, PAUSED)
    return (source.failure is not None or source.status in rest) and (
        destination.failure is not None or destination.status in (*rest, "none", "setup")
    )


async def last_views(source: Watched, destination: Watched, *, timeout_s: float) -> dict[Side, View]:
    """Both sides, asked.  For a destination whose main loop waits for a page speaks what it said last."""
    may_wait = destination.failure is None and PAUSED in (source.status, destination.status)
    here, there = await asyncio.gather(
        ask(source.session, timeout_s=timeout_s),
        ask(destination.session, timeout_s=min(BLOCKED_AFTER_S, timeout_s) if may_wait else timeout_s),
    )
    if may_wait and there.reach is Reach.SILENT and destination.took_over:
        said = "it waits for a page that is missing, and answers nothing"
        there = View(Reach.ANSWERS, destination.run_state, destination.running, destination.status, error=said)
    return {Side.SOURCE: here, Side.DESTINATION: there}


def why(phase: str, reason: str, sides: Mapping[Side, Watched], views: Mapping[Side, View]) -> str:
    """Which side, in which phase, in QEMU's own words; the side that failed first comes first."""
    said = [f"in {phase}: {reason}"] if reason else []
    troubled = [each for each in sides.values() if each.troubled_s is not None]
    for each in sorted(troubled, key=_causes_first):
        own = each.failure.message if each.failure is not None else views[each.side].error
        said.append(f"{each.side}, in {phase}: {own or 'the migration failed'}")
    for side, view in views.items():
        if view.answers and view.error and not any(view.error in each for each in said):
            said.append(f"{side} says: {view.error}")
    return "; ".join(said) or f"in {phase}: it ended"


def _causes_first(watched: Watched) -> tuple[int, float]:
    """A QEMU that was killed, or is silent, did not fail because of the other side; else the first one did."""
    failure = watched.failure
    if isinstance(failure, QemuDiedError) and (failure.exit_status or 0) < 0:
        rank = 0
    elif isinstance(failure, QmpTimeoutError):
        rank = 1
    else:
        rank = 2
    return rank, watched.troubled_s or 0.0
