"""The driver: looks at both sides after every piece of news, and does the next thing.

It looks at what is, not at what has just happened, so it does not matter in which order news come, whether they
are heard or asked for, and whether somebody else had a hand in it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from typing import Final

from qmigrate.errors import QmpCommandError, QmpError, RefusedError
from qmigrate.events import Decided, LiveEvent, OnEvent, Side, Troubled
from qmigrate.operations.ending import BLOCKED_AFTER_S, at_rest, last_views, why
from qmigrate.operations.hazards import danger_of_another_resume, release_of
from qmigrate.operations.plan import Plan
from qmigrate.operations.policy import AfterPass, AfterSeconds, History, IfStuck, why_switch
from qmigrate.operations.prepare import Prepared, default_uri, prepare
from qmigrate.operations.recover import Recoveries, bring_back, heard, pause_both, pause_one, until
from qmigrate.operations.result import MigrationResult, Outcome
from qmigrate.operations.watch import Watched
from qmigrate.operations.whereabouts import Place, locate
from qmigrate.qmp.features import Features
from qmigrate.qmp.migration import FINAL_STATUSES
from qmigrate.qmp.postcopy import PAUSED, is_postcopy
from qmigrate.qmp.session import Session

__all__ = ["Driver"]

SETTLES_WITHIN_S: Final = 5.0
FOLLOWS_WITHIN_S: Final = 2.0
LOOKS_EVERY_S: Final = 1.0

SOURCE, DESTINATION = Side.SOURCE, Side.DESTINATION


class _Ended(Exception):
    """The driving is over.  ``reason`` is our own; empty where QEMU's words say it all."""

    def __init__(self, outcome: Outcome, reason: str = "") -> None:
        self.outcome = outcome
        self.reason = reason
        super().__init__(reason)


class Driver:
    """One migration from its preparation to its end.  Use ``migrate()`` or ``recover()`` unless you interrupt."""

    def __init__(self, source: Session, destination: Session, plan: Plan, on_event: OnEvent | None = None) -> None:
        self.plan = plan
        self.events: list[LiveEvent] = []
        self._on_event = on_event
        self._news = asyncio.Event()
        self._sides = {
            side: Watched(side, session, self._tell, self._news, answer_timeout_s=plan.answer_timeout_s)
            for side, session in ((SOURCE, source), (DESTINATION, destination))
        }
        self._source, self._destination = self._sides[SOURCE], self._sides[DESTINATION]
        self._destination.may_block = lambda: self.switched
        self._source.counts_passes = any(isinstance(each, AfterPass | IfStuck) for each in plan.postcopy)
        self._features: Mapping[Side, Features] = {}
        self._uri = ""
        self._guest_ran = True
        self._began_s = time.monotonic()
        self._started = False
        self._switch_sent = False
        self._continued = False
        self._cancelling = ""
        self._cancelling_s = 0.0
        self._recoveries = Recoveries(plan.recoveries)
        self._is_recovering = False
        self._interrupts = self._interrupts_handled = 0

    # ---- for its user ----

    async def migrate(self) -> MigrationResult:
        """From the preparation to the end.  Raises RefusedError where nothing has begun."""
        prepared = await prepare(self._sides, self.plan)
        self._take(prepared)
        return await self._drive(self._start)

    async def recover(self) -> MigrationResult:
        """Bring back a postcopy that is paused, whoever began it."""
        self._started = self._switch_sent = True
        source, destination = self._source, self._destination
        features, _, _ = await asyncio.gather(
            Features.of(source.session, timeout_s=source.answer_timeout_s), source.ask(), self._ask_patiently()
        )
        self._features = {SOURCE: features}
        if source.status != "completed" and not is_postcopy(source.status):
            raise RefusedError(f"source: there is no postcopy to bring back (status: {source.status})")
        if not destination.took_over and not destination.silence:
            raise RefusedError("destination: it has not taken over, so there is nothing to bring back")
        self._uri = self.plan.uri or self.plan.recover_uri or default_uri(destination)
        return await self._drive(self._nothing)

    async def _ask_patiently(self) -> None:
        """Ask a destination that may wait for a page, so that its main loop answers nothing."""
        try:
            async with asyncio.timeout(min(BLOCKED_AFTER_S, self.plan.answer_timeout_s)):
                await self._destination.ask()
        except TimeoutError:
            self._destination.silence = "no answer"

    def interrupt(self) -> None:
        """As Ctrl-C: cancels precopy; after the switch it explains, then pauses, then leaves it alone."""
        self._interrupts += 1
        self._news.set()

    @property
    def started(self) -> bool:
        """Has anything begun?"""
        return self._started

    @property
    def phase(self) -> str:
        """In a word, for messages."""
        if not self._started:
            return "preparation"
        if self._is_recovering:
            return "recovery"
        if self._source.status == "completed":
            return "completion"
        if is_postcopy(self._source.status) or is_postcopy(self._destination.status):
            return "postcopy" if self._destination.took_over else "switchover"
        return "switchover" if self._source.status in ("device", "pre-switchover") else "precopy"

    @property
    def switched(self) -> bool:
        """Is there, or may there be, a guest split over both sides?"""
        both = (self._source, self._destination)
        return self._switch_sent or any(is_postcopy(status) for each in both for status in each.history)

    # ---- from the start to the end ----

    def _take(self, prepared: Prepared) -> None:
        self._features = prepared.features
        self._uri = prepared.uri
        self._guest_ran = prepared.guest_ran

    def _tell(self, event: LiveEvent) -> None:
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)

    async def _start(self) -> None:
        self._began_s = time.monotonic()
        try:
            self._started = True
            await self._source.execute("migrate", self._features[SOURCE].place("migrate", self._uri))
        except QmpCommandError as exc:
            raise _Ended(Outcome.FAILED, f"source: {exc.message}") from exc

    async def _nothing(self) -> None:
        """There is nothing to start: it is under way."""

    async def _drive(self, start: Callable[[], Awaitable[None]]) -> MigrationResult:
        phase = ""
        async with AsyncExitStack() as stack:
            for each in self._sides.values():
                await stack.enter_async_context(each.watching())
            try:
                try:
                    await start()
                    while True:
                        await self._step()
                        await heard(self._news, self._next_look_s())
                except QmpCommandError as exc:
                    raise _Ended(Outcome.FAILED, str(exc)) from exc
                except QmpError as exc:  # a side is gone: it has its failure
                    raise _Ended(Outcome.FAILED) from exc
            except _Ended as exc:
                ended, phase = exc, self.phase
                if ended.outcome is Outcome.FAILED and await self._settle():
                    ended = _Ended(Outcome.CANCELLED, SOMEBODY)
            except asyncio.CancelledError:
                await asyncio.shield(self._give_up())
                raise
        return await self._conclude(ended, phase)

    async def _step(self) -> None:
        source, destination = self._source, self._destination
        if self._is_cancelling:
            return  # that the destination fails of it, or goes, says nothing
        if source.status == "cancelled":
            raise _Ended(Outcome.CANCELLED, self._cancelling or SOMEBODY)
        if source.failure is not None or destination.failure is not None:
            raise _Ended(Outcome.FAILED, self._cancelling)
        if source.status == "completed":
            await self._complete()
        if "failed" in (source.status, destination.status):
            raise _Ended(Outcome.FAILED, self._cancelling)
        if self._interrupts > self._interrupts_handled:
            await self._interrupted()
        if PAUSED in (source.status, destination.status):
            await self._paused()
        elif source.status == "pre-switchover":
            await self._before_switchover()
        elif reason := self._why_switch():
            await self._switch(reason)
        await self._look_at_clock()

    def _next_look_s(self) -> float:
        seconds = LOOKS_EVERY_S
        if not self._switch_sent:
            for policy in self.plan.postcopy:
                if isinstance(policy, AfterSeconds):
                    seconds = min(seconds, max(0.0, policy.seconds - self._elapsed_s))
        return seconds

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    @property
    def _is_cancelling(self) -> bool:
        """Was it told to cancel, and has not done so yet?"""
        source = self._source
        if not self._cancelling or source.failure is not None or source.status in FINAL_STATUSES:
            return False
        if time.monotonic() - self._cancelling_s > self.plan.answer_timeout_s:
            raise _Ended(Outcome.FAILED, f"{self._cancelling}; the source does not cancel, it is {source.status}")
        return True

    # ---- the switch ----

    def _why_switch(self) -> str | None:
        if self._switch_sent or self._cancelling:
            return None
        return why_switch(self.plan.postcopy, History(self._elapsed_s, self._source.passes.starts))

    async def _switch(self, reason: str) -> None:
        self._tell(Decided(decision="switch", reason=reason))
        self._switch_sent = True
        await self._source.execute("migrate-start-postcopy")

    async def _before_switchover(self) -> None:
        if self._continued or self._cancelling:
            return
        self._continued = True
        if self.plan.before_switchover is not None:
            try:
                async with asyncio.timeout(self.plan.hook_timeout_s):
                    await self.plan.before_switchover()
            except Exception as exc:  # whatever a hook may raise: the guest is not to stay stopped for it
                await self._cancel(f"the hook before the switchover failed: {exc or type(exc).__name__}")
                return
        self._tell(Decided(decision="continue", reason="what comes before the switchover is done"))
        await self._source.execute("migrate-continue", {"state": "pre-switchover"})

    # ---- the end ----

    async def _complete(self) -> None:
        """The source is done: is the destination?"""
        destination = self._destination

        def done() -> bool:
            return (
                destination.failure is not None
                or destination.status == "failed"
                or (destination.took_over and destination.status == "completed")
            )

        await until(done, self._news, [destination], self.plan.answer_timeout_s)
        if destination.failure is not None or destination.status != "completed":
            raise _Ended(Outcome.FAILED, "" if destination.failure else f"the destination is {destination.status}")
        raise _Ended(Outcome.COMPLETED)

    async def _settle(self) -> bool:
        """Something failed.  Let both sides come to rest, and keep the guest on the source while that can be.

        True: what failed was the destination, because somebody else had the source cancel.
        """
        source, destination = self._source, self._destination

        def rest() -> bool:
            return at_rest(source, destination)

        patience_s = min(SETTLES_WITHIN_S if source.failure is None else FOLLOWS_WITHIN_S, self.plan.answer_timeout_s)
        await until(rest, self._news, [source, destination], patience_s)
        if source.status == "cancelled" and not self._cancelling:
            return True
        if not rest() and source.failure is None and source.status not in FINAL_STATUSES and not self.switched:
            with suppress(QmpError):
                await self._cancel("so that the guest stays on the source")
                await until(rest, self._news, [source], patience_s)
        return False

    async def _give_up(self) -> None:
        """Our task is cancelled: precopy is, too; postcopy goes on without us."""
        if self._started and not self.switched and self._source.failure is None:
            with suppress(QmpError):
                await self._source.execute("migrate_cancel")

    async def _conclude(self, ended: _Ended, phase: str) -> MigrationResult:
        views = await last_views(self._source, self._destination, timeout_s=self.plan.answer_timeout_s)
        guest = locate(views[SOURCE], views[DESTINATION])
        outcome, reason = ended.outcome, ended.reason
        if outcome is Outcome.COMPLETED and guest.place is not Place.DESTINATION:
            outcome, reason = Outcome.FAILED, "both sides said that it was complete"
        if outcome is Outcome.COMPLETED:
            message = self._summary()
        elif outcome is Outcome.CANCELLED:
            message = f"in {phase}: {reason}"  # what the destination says of it is no news
        else:
            message = why(phase, reason, self._sides, views)
        result = MigrationResult(
            outcome=outcome,
            guest=guest,
            message=message,
            switched=self._went_into_postcopy,
            recoveries=self._recoveries.count,
            total_s=self._elapsed_s,
            views=views,
            events=self.events,
        )
        self._tell(result.finished())
        return result

    @property
    def _went_into_postcopy(self) -> bool:
        return any(is_postcopy(status) for status in self._source.history)

    def _summary(self) -> str:
        how = "with postcopy" if self._went_into_postcopy else "by precopy"
        if not self._went_into_postcopy and self._switch_sent:
            how = "by precopy: it was already complete when the switch to postcopy came, which then changes nothing"
        elif not self._went_into_postcopy and self.plan.postcopy:
            how = "by precopy: it was already complete before the switch to postcopy was due"
        return f"migrated {how}{self._recoveries.summary}"

    # ---- pauses ----

    async def _paused(self) -> None:
        """The connection of a postcopy broke."""
        recoveries = self._recoveries
        if self._interrupts or recoveries.exhausted:
            await pause_both(self._sides, self._news)
            raise _Ended(Outcome.PAUSED, "interrupted, and paused as asked" if self._interrupts else recoveries.why)
        self._is_recovering = True
        if not await pause_both(self._sides, self._news):
            if self._source.failure or self._destination.failure or not self._destination.took_over:
                raise _Ended(Outcome.FAILED)
            if PAUSED not in (self._source.status, self._destination.status):
                return  # it went on, or came to an end, while we looked
            raise _Ended(Outcome.FAILED, "only one side is paused, and the other does not follow")
        if await until(lambda: self._interrupts > 0, self._news, [], recoveries.delay_s):
            return
        uri = self.plan.recover_uri or self.plan.uri or self._uri
        listen = self.plan.recover_listen or self.plan.listen or uri
        self._tell(recoveries.begin(uri))
        attempt = await bring_back(
            self._sides,
            self._features,
            self._news,
            uri=uri,
            listen=listen,
            connect_timeout_s=self.plan.connect_timeout_s,
        )
        recoveries.tried(attempt.trouble)
        if not attempt.trouble:
            self._is_recovering = False
            return
        self._tell(Troubled(message=attempt.trouble))
        if not attempt.connected and not self.plan.force:
            danger = danger_of_another_resume(release_of(self._source.session.greeting))
            if danger:
                raise _Ended(Outcome.PAUSED, f"{recoveries.why}; {danger} (--force does it all the same)")

    # ---- interruptions ----

    async def _interrupted(self) -> None:
        self._interrupts_handled += 1
        if not self.switched:
            await self._source.ask_status()  # somebody else may have switched it
        if not self.switched:
            await self._cancel("interrupted")
        elif self._interrupts_handled == 1:
            self._tell(Decided(decision="leave", reason=EXPLANATION))
        elif self._interrupts_handled == 2:
            self._tell(Decided(decision="pause", reason="interrupted again"))
            both = list(self._sides.values())
            await until(lambda: self._may_pause, self._news, both, self.plan.answer_timeout_s)
            if self._may_pause:
                await pause_one(self._source)
        else:
            raise _Ended(Outcome.LEFT, "interrupted: it goes on without us")

    @property
    def _may_pause(self) -> bool:
        """Are both past the point before which a broken connection loses the guest?"""
        return self._destination.took_over and self._source.status == "postcopy-active"

    async def _cancel(self, reason: str) -> None:
        if self._cancelling:
            return
        self._cancelling, self._cancelling_s = reason, time.monotonic()
        self._tell(Decided(decision="cancel", reason=reason))
        await self._source.execute("migrate_cancel")
        self._source.poll_soon()

    # ---- time-outs ----

    async def _look_at_clock(self) -> None:
        plan = self.plan
        quiet_s = time.monotonic() - max(self._source.last_sign_s, self._began_s)
        if quiet_s > plan.stall_timeout_s:
            silent = (
                f", and the destination is silent ({self._destination.silence})" if self._destination.silence else ""
            )
            reason = f"nothing has moved for {plan.stall_timeout_s:g} s{silent}"
        elif plan.timeout_s is not None and self._elapsed_s > plan.timeout_s and not self.switched:
            reason = f"not done after {plan.timeout_s:g} s"
        else:
            return
        if self.switched:
            raise _Ended(Outcome.FAILED, reason)
        await self._cancel(reason)


SOMEBODY: Final = "somebody else cancelled it"
EXPLANATION: Final = (
    "the guest is on both sides now, and ending anything would lose it. The migration goes on. Once more Ctrl-C "
    "pauses it (`qmigrate recover SRC DST` resumes); a third time leaves it to itself"
)
