"""When the guest changes sides: the switch to postcopy, and what is done before any switchover."""

import asyncio
from typing import Final

from qmigrate.events import Decided
from qmigrate.operations.course import Course
from qmigrate.operations.policy import AfterSeconds, History, why_switch

__all__ = ["Switchover"]

LOOKS_EVERY_S: Final = 1.0


class Switchover:
    """Both are done once, the hook while the guest is stopped."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._continued = False

    @property
    def due(self) -> str | None:
        """The reason to switch to postcopy now, or None."""
        course = self._course
        if course.switch_sent or course.cancelling:
            return None
        return why_switch(course.plan.postcopy, History(course.elapsed_s, course.source.passes.starts))

    async def switch(self, reason: str) -> None:
        """To postcopy."""
        course = self._course
        course.tell(Decided(decision="switch", reason=reason))
        course.switch_sent = True
        await course.source.execute("migrate-start-postcopy")

    @property
    def next_look_s(self) -> float:
        """How long to wait for news before the clock is looked at."""
        course = self._course
        seconds = LOOKS_EVERY_S
        if not course.switch_sent:
            for policy in course.plan.postcopy:
                if isinstance(policy, AfterSeconds):
                    seconds = min(seconds, max(0.0, policy.seconds - course.elapsed_s))
        return seconds

    async def prepare(self) -> None:
        """The source waits in pre-switchover: run the hook, and let it go on; or cancel, if the hook fails."""
        course = self._course
        if self._continued or course.cancelling:
            return
        self._continued = True
        if course.plan.before_switchover is not None:
            try:
                async with asyncio.timeout(course.plan.hook_timeout_s):
                    await course.plan.before_switchover()
            except Exception as exc:  # whatever a hook may raise: the guest is not to stay stopped for it
                await course.cancel(f"the hook before the switchover failed: {exc or type(exc).__name__}")
                return
        course.tell(Decided(decision="continue", reason="what comes before the switchover is done"))
        await course.source.execute("migrate-continue", {"state": "pre-switchover"})
