"""Ctrl-C, or a program that means the same: precopy is cancelled; after the switch nothing is ever killed."""

from typing import Final

from qmigrate.events import Decided
from qmigrate.operations.course import Course, Ended
from qmigrate.operations.recover import pause_one, until
from qmigrate.operations.result import Outcome
from qmigrate.qmp.migration import FINAL_STATUSES
from qmigrate.qmp.postcopy import left_bytes

__all__ = ["Interruption"]

EXPLANATION: Final = (
    "the guest is on both sides now, and ending anything would lose it. The migration goes on. Once more Ctrl-C "
    "pauses it (`qmigrate recover SRC DST` resumes); a third time leaves it to itself"
)


class Interruption:
    """How often we were interrupted, and what comes of it."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._count = self._handled = 0

    def happen(self) -> None:
        """Interrupt; may be called by a signal handler of the event loop."""
        self._count += 1
        self._course.news.set()

    @property
    def happened(self) -> bool:
        return self._count > 0

    @property
    def pending(self) -> bool:
        """Is there one that nothing came of yet?"""
        return self._count > self._handled

    async def handle(self) -> None:
        """Cancel; after the switch explain, then pause, then leave it alone."""
        self._handled += 1
        course = self._course
        if not course.switched:
            await course.source.ask_status()  # somebody else may have switched it
        if not course.switched:
            await course.cancel("interrupted")
        elif self._handled == 1:
            course.tell(Decided(decision="leave", reason=EXPLANATION))
        elif self._handled == 2:
            course.tell(Decided(decision="pause", reason="interrupted again"))
            source = course.source

            def may_or_is_over() -> bool:
                return self._may_pause or source.status in FINAL_STATUSES

            await until(may_or_is_over, course.news, list(course.sides.values()), course.plan.answer_timeout_s)
            await source.ask_status()
            if self._may_pause:
                await pause_one(source)
        else:
            raise Ended(Outcome.LEFT, "interrupted: it goes on without us")

    @property
    def _may_pause(self) -> bool:
        """Are both past the point before which a broken connection loses the guest, and not at the very end?

        See ``attached.race``.
        """
        source = self._course.source
        took_over = self._course.destination.took_over
        return took_over and source.status == "postcopy-active" and left_bytes(source.info) != 0
