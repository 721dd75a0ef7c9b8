"""The course of one migration: both sides, the plan, what was decided so far, and what is told of it.

What decides (`switchover`, `interruption`, `mending`) and what ends it (`ending`) share it; `drive` asks them in turn.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress

from qmigrate.errors import QmpError
from qmigrate.events import Began, Decided, LiveEvent, OnEvent, Side
from qmigrate.operations.plan import Plan
from qmigrate.operations.policy import AfterPass, IfStuck
from qmigrate.operations.result import Outcome
from qmigrate.operations.watch import Watched
from qmigrate.qmp.features import Features
from qmigrate.qmp.migration import FINAL_STATUSES
from qmigrate.qmp.postcopy import is_postcopy
from qmigrate.qmp.session import Session

__all__ = ["Course", "Ended"]

SOURCE, DESTINATION = Side.SOURCE, Side.DESTINATION


class Ended(Exception):
    """It is over.  ``reason`` is our own; empty where QEMU's words say it all."""

    def __init__(self, outcome: Outcome, reason: str = "") -> None:
        self.outcome = outcome
        self.reason = reason
        super().__init__(reason)


class Course:
    """What all parts of the driver know.  ``news`` is set at every change of a side, and by an interruption."""

    def __init__(self, source: Session, destination: Session, plan: Plan, on_event: OnEvent | None) -> None:
        self.plan = plan
        self.events: list[LiveEvent] = []
        self.news = asyncio.Event()
        self.sides = {
            side: Watched(side, session, self.tell, self.news, answer_timeout_s=plan.answer_timeout_s)
            for side, session in ((SOURCE, source), (DESTINATION, destination))
        }
        self.source, self.destination = self.sides[SOURCE], self.sides[DESTINATION]
        self.destination.may_block = lambda: self.switched
        self.source.counts_passes = any(isinstance(each, AfterPass | IfStuck) for each in plan.postcopy)
        for each in self.sides.values():
            each.looks_closely = plan.closely
        self.features: Mapping[Side, Features] = {}
        self.uri = ""
        self.started = False
        self.switch_sent = False
        self.is_recovering = False
        self.cancelling = ""
        self._cancelling_s = 0.0
        self.began_s = time.monotonic()
        self._on_event = on_event

    # ---- what is told ----

    def tell(self, event: LiveEvent) -> None:
        """To whoever listens; and it is kept for the result."""
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)

    def tell_beginning(self, operation: str) -> None:
        """Who is there, and what is about to be done."""
        for each in self.sides.values():
            self.tell(each.found())
        self.tell(Began(operation=operation, uri=self.uri, plan=self.plan.plain()))

    # ---- where it stands ----

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began_s

    @property
    def phase(self) -> str:
        """In a word, for messages."""
        if not self.started:
            return "preparation"
        if self.is_recovering:
            return "recovery"
        if self.source.status == "completed":
            return "completion"
        if is_postcopy(self.source.status) or is_postcopy(self.destination.status):
            return "postcopy" if self.destination.took_over else "switchover"
        return "switchover" if self.source.status in ("device", "pre-switchover") else "precopy"

    @property
    def switched(self) -> bool:
        """Is there, or may there be, a guest split over both sides?"""
        both = (self.source, self.destination)
        return self.switch_sent or any(is_postcopy(status) for each in both for status in each.history)

    @property
    def went_into_postcopy(self) -> bool:
        return any(is_postcopy(status) for status in self.source.history)

    # ---- the way out of precopy ----

    async def cancel(self, reason: str) -> None:
        """Have the source cancel, once."""
        if self.cancelling:
            return
        self.cancelling, self._cancelling_s = reason, time.monotonic()
        self.tell(Decided(decision="cancel", reason=reason))
        await self.source.execute("migrate_cancel")
        self.source.poll_soon()

    @property
    def is_cancelling(self) -> bool:
        """Was it told to cancel, and has not done so yet?  Raises Ended when it takes too long."""
        source = self.source
        if not self.cancelling or source.failure is not None or source.status in FINAL_STATUSES:
            return False
        if time.monotonic() - self._cancelling_s > self.plan.answer_timeout_s:
            raise Ended(Outcome.FAILED, f"{self.cancelling}; the source does not cancel, it is {source.status}")
        return True

    async def give_up(self) -> None:
        """Our task is cancelled: precopy is, too; postcopy goes on without us."""
        if self.started and not self.switched and self.source.failure is None:
            with suppress(QmpError):
                await self.source.execute("migrate_cancel")
