"""The driver: looks at both sides after every piece of news, and does the next thing.

It looks at what is, not at what has just happened, so it does not matter in which order news come, whether they
are heard or asked for, and whether somebody else had a hand in it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Final

from qmigrate.errors import QmpCommandError, QmpError, RefusedError
from qmigrate.events import Decided, LiveEvent, OnEvent, Side
from qmigrate.operations.addresses import check, default_uri
from qmigrate.operations.course import Course, Ended
from qmigrate.operations.ending import BLOCKED_AFTER_S, complete, conclude, settle
from qmigrate.operations.interruption import Interruption
from qmigrate.operations.mending import Mending
from qmigrate.operations.plan import Plan, measures_blocktime
from qmigrate.operations.policy import IfStuck
from qmigrate.operations.prepare import prepare
from qmigrate.operations.recover import heard
from qmigrate.operations.result import MigrationResult, Outcome
from qmigrate.operations.switchover import Switchover
from qmigrate.operations.telling import tell_where
from qmigrate.operations.whereabouts import receives
from qmigrate.qmp.postcopy import PAUSED, is_postcopy
from qmigrate.qmp.session import Session

__all__ = ["Driver"]

MEASURES: Final = "the destination measures how long the guest waits for pages (postcopy-blocktime)"
SOMEBODY: Final = "somebody else cancelled it"


class Driver:
    """One migration from its preparation to its end.  Use ``migrate()`` or ``recover()`` unless you interrupt."""

    def __init__(self, source: Session, destination: Session, plan: Plan, on_event: OnEvent | None = None) -> None:
        self.plan = plan
        self._course = Course(source, destination, plan, on_event)
        self._switchover = Switchover(self._course)
        self._interruption = Interruption(self._course)
        self._mending = Mending(self._course, self._interruption)

    # ---- for its user ----

    async def migrate(self) -> MigrationResult:
        """From the preparation to the end.  Raises RefusedError where nothing has begun."""
        course = self._course
        prepared = await prepare(course.sides, self.plan)
        course.features, course.uri = prepared.features, prepared.uri
        if any(isinstance(each, IfStuck) for each in self.plan.postcopy):
            await course.source.ask_downtime_limit()
        course.tell_beginning("migrate")
        if measures_blocktime(self.plan, prepared.features[Side.DESTINATION]):
            course.tell(Decided(decision="measure", reason=MEASURES))
        return await self._drive(self._start)

    async def recover(self) -> MigrationResult:
        """Bring back a postcopy that is paused, whoever began it."""
        course = self._course
        check(self.plan.uri, self.plan.listen, self.plan.recover_uri, self.plan.recover_listen)
        course.started = course.switch_sent = True
        source, destination = course.source, course.destination
        await asyncio.gather(source.ask(), self._ask_patiently())
        if receives(source.run_state, source.status, source.info):
            raise RefusedError("source: it receives the guest itself; the source comes first, then the destination")
        if source.status != "completed" and not is_postcopy(source.status):
            raise RefusedError(f"source: there is no postcopy to bring back (status: {source.status})")
        if not destination.took_over and not destination.silence:
            raise RefusedError("destination: it has not taken over, so there is nothing to bring back")
        course.uri = self.plan.uri or self.plan.recover_uri or default_uri(destination)
        course.tell_beginning("recover")
        return await self._drive(self._nothing)

    async def _ask_patiently(self) -> None:
        """Ask a destination that may wait for a page, so that its main loop answers nothing."""
        try:
            async with asyncio.timeout(min(BLOCKED_AFTER_S, self.plan.answer_timeout_s)):
                await self._course.destination.ask()
        except TimeoutError:
            self._course.destination.silence = "no answer"

    def interrupt(self) -> None:
        """As Ctrl-C: cancels precopy; after the switch it explains, then pauses, then leaves it alone."""
        self._interruption.happen()

    @property
    def events(self) -> list[LiveEvent]:
        """All that was told so far."""
        return self._course.events

    @property
    def started(self) -> bool:
        """Has anything begun?"""
        return self._course.started

    @property
    def phase(self) -> str:
        """In a word, for messages."""
        return self._course.phase

    @property
    def switched(self) -> bool:
        """Is there, or may there be, a guest split over both sides?"""
        return self._course.switched

    # ---- from the start to the end ----

    async def _start(self) -> None:
        course = self._course
        course.began_s = time.monotonic()
        course.started = True
        try:
            await tell_where(course.source, "migrate", course.uri)
        except QmpCommandError as exc:
            raise Ended(Outcome.FAILED, f"source: {exc.message}") from exc

    async def _nothing(self) -> None:
        """There is nothing to start: it is under way."""

    async def _drive(self, start: Callable[[], Awaitable[None]]) -> MigrationResult:
        course, phase = self._course, ""
        async with AsyncExitStack() as stack:
            for each in course.sides.values():
                await stack.enter_async_context(each.watching())
            try:
                await self._go(start)
            except Ended as exc:
                ended, phase = exc, course.phase
                if ended.outcome is Outcome.FAILED and await settle(course):
                    ended = Ended(Outcome.CANCELLED, SOMEBODY)
            except asyncio.CancelledError:
                await asyncio.shield(course.give_up())
                raise
        return await conclude(course, ended, phase, self._mending.recoveries, interrupted=self._interruption.happened)

    async def _go(self, start: Callable[[], Awaitable[None]]) -> None:
        """Step by step, until Ended is raised."""
        try:
            await start()
            while True:
                await self._step()
                await heard(self._course.news, self._switchover.next_look_s)
        except QmpCommandError as exc:
            raise Ended(Outcome.FAILED, str(exc)) from exc
        except QmpError as exc:  # a side is gone: it has its failure
            raise Ended(Outcome.FAILED) from exc

    async def _step(self) -> None:
        course = self._course
        source, destination = course.source, course.destination
        if course.is_cancelling:
            return  # that the destination fails of it, or goes, says nothing
        if source.status == "cancelled":
            raise Ended(Outcome.CANCELLED, course.cancelling or SOMEBODY)
        if source.failure is not None or destination.failure is not None:
            raise Ended(Outcome.FAILED, course.cancelling)
        if source.status == "completed":
            raise await complete(course)
        if "failed" in (source.status, destination.status):
            raise Ended(Outcome.FAILED, course.cancelling)
        if self._interruption.pending:
            await self._interruption.handle()
        if PAUSED in (source.status, destination.status):
            await self._mending.mend()
        elif source.status == "pre-switchover":
            await self._switchover.prepare()
        elif reason := self._switchover.due:
            await self._switchover.switch(reason)
        await self._look_at_clock()

    async def _look_at_clock(self) -> None:
        plan, course = self.plan, self._course
        quiet_s = time.monotonic() - max(course.source.last_sign_s, course.began_s)
        if quiet_s > plan.stall_timeout_s:
            silence = course.destination.silence
            silent = f", and the destination is silent ({silence})" if silence else ""
            reason = f"nothing has moved for {plan.stall_timeout_s:g} s{silent}"
        elif plan.timeout_s is not None and course.elapsed_s > plan.timeout_s and not course.switched:
            reason = f"not done after {plan.timeout_s:g} s"
        else:
            return
        if course.switched:
            raise Ended(Outcome.FAILED, reason)
        await course.cancel(reason)
