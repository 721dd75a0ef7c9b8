"""How a migration ends: both sides come to rest, say their last, and it is said why, and where the guest is."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from qmigrate.errors import QemuDiedError, QmpError, QmpTimeoutError
from qmigrate.events import Side
from qmigrate.operations.course import Course, Ended
from qmigrate.operations.plan import BLOCKTIME
from qmigrate.operations.recover import Recoveries, until
from qmigrate.operations.result import MigrationResult, Outcome
from qmigrate.operations.watch import Watched, progress
from qmigrate.operations.whereabouts import Place, Reach, View, ask, locate
from qmigrate.qmp.migration import FINAL_STATUSES, query
from qmigrate.qmp.postcopy import PAUSED

__all__ = ["BLOCKED_AFTER_S", "complete", "conclude", "settle"]

COMPLETED: Final = "completed"
SETTLES_WITHIN_S: Final = 5.0
FOLLOWS_WITHIN_S: Final = 2.0

BLOCKED_AFTER_S: Final = 2.0
"""A destination that is paused and answers nothing for so long waits for a page."""


async def complete(course: Course) -> Ended:
    """The source is done: is the destination?"""
    destination = course.destination

    def done() -> bool:
        return (
            destination.failure is not None
            or destination.status == "failed"
            or (destination.took_over and destination.status == "completed")
        )

    await until(done, course.news, [destination], course.plan.answer_timeout_s)
    if destination.failure is not None or destination.status != "completed":
        return Ended(Outcome.FAILED, "" if destination.failure else f"the destination is {destination.status}")
    return Ended(Outcome.COMPLETED)


async def settle(course: Course) -> bool:
    """Something failed.  Let both sides come to rest, and keep the guest on the source while that can be.

    True: what failed was the destination, because somebody else had the source cancel.
    """
    source, destination = course.source, course.destination

    def rest() -> bool:
        return at_rest(source, destination)

    patience_s = min(SETTLES_WITHIN_S if source.failure is None else FOLLOWS_WITHIN_S, course.plan.answer_timeout_s)
    await until(rest, course.news, [source, destination], patience_s)
    if source.status == "cancelled" and not course.cancelling:
        return True
    if not rest() and source.failure is None and source.status not in FINAL_STATUSES and not course.switched:
        with suppress(QmpError):
            await course.cancel("so that the guest stays on the source")
            await until(rest, course.news, [source], patience_s)
    return False


async def conclude(
    course: Course, ended: Ended, phase: str, recoveries: Recoveries, *, interrupted: bool
) -> MigrationResult:
    """Ask both sides, and say how it ended.  ``phase``: in which it did.

    Where nothing went wrong and both have said by events that it is over, there is nothing to ask but the last numbers.
    """
    smooth = ended.outcome is Outcome.COMPLETED and not recoveries.count and not interrupted and not course.cancelling
    views = (await told_views(course) if smooth else None) or await last_views(course)
    guest = locate(views[Side.SOURCE], views[Side.DESTINATION])
    outcome, reason = ended.outcome, ended.reason
    if outcome is Outcome.COMPLETED and guest.place is not Place.DESTINATION:
        outcome, reason = Outcome.FAILED, "both sides said that it was complete"
    if outcome is Outcome.COMPLETED:
        message = _summary(course, recoveries)
    elif outcome is Outcome.CANCELLED:
        message = f"in {phase}: {reason}"  # what the destination says of it is no news
    else:
        message = why(phase, reason, course.sides, views)
    result = MigrationResult(
        outcome=outcome,
        guest=guest,
        message=message,
        switched=course.went_into_postcopy,
        recoveries=recoveries.count,
        total_s=course.elapsed_s,
        views=views,
        events=course.events,
    )
    for side, view in views.items():  # the last numbers of all: what precopy stopped the guest for, and more
        if view.info is not None:
            course.tell(progress(side, view.info, course.sides[side].passes.completed))
    course.tell(result.finished())
    return result


def _summary(course: Course, recoveries: Recoveries) -> str:
    how = "with postcopy" if course.went_into_postcopy else "by precopy"
    if not course.went_into_postcopy and course.switch_sent:
        how = "by precopy: it was already complete when the switch to postcopy came, which then changes nothing"
    elif not course.went_into_postcopy and course.plan.postcopy:
        how = "by precopy: it was already complete before the switch to postcopy was due"
    return f"migrated {how}{recoveries.summary}"


def at_rest(source: Watched, destination: Watched) -> bool:
    """Will neither side change any more by itself?  A destination that nobody has come to yet is at rest."""
    rest = (*FINAL_STATUSES, PAUSED)
    return (source.failure is not None or source.status in rest) and (
        destination.failure is not None or destination.status in (*rest, "none", "setup")
    )


async def told_views(course: Course) -> dict[Side, View] | None:
    """Both sides, as their events have it; None where those leave anything open."""
    source, destination = course.source, course.destination

    def all_told() -> bool:
        return source.said(COMPLETED, running=False) and destination.said(COMPLETED, running=True)

    if not all_told():
        return None
    try:
        numbers, numbers_there = await asyncio.gather(
            query(source.session, timeout_s=course.plan.answer_timeout_s), _numbers_there(course)
        )
    except QmpError:
        return None
    if not all_told() or numbers["status"] != COMPLETED or numbers_there["status"] != COMPLETED:
        return None
    return {
        side: View(Reach.ANSWERS, watched.run_state, watched.running, COMPLETED, info=info)
        for side, watched, info in ((source.side, source, numbers), (destination.side, destination, numbers_there))
    }


async def _numbers_there(course: Course) -> dict[str, Any]:
    """A destination that is done tells no numbers but how long pages took, if it measured that."""
    features = course.features.get(Side.DESTINATION)
    if features is not None and not features.capabilities.get(BLOCKTIME) and not course.plan.measures:
        return {"status": COMPLETED}
    return await query(course.destination.session, timeout_s=course.plan.answer_timeout_s)


async def last_views(course: Course) -> dict[Side, View]:
    """Both sides, asked.  For a destination whose main loop waits for a page speaks what it said last."""
    source, destination, timeout_s = course.source, course.destination, course.plan.answer_timeout_s
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
