"""A postcopy is paused because its connection broke: bring it back, as often as the plan allows, or leave it so."""

from qmigrate.events import Troubled
from qmigrate.operations.course import Course, Ended
from qmigrate.operations.hazards import danger_of_another_resume, release_of
from qmigrate.operations.interruption import Interruption
from qmigrate.operations.recover import Attempt, Recoveries, bring_back, pause_both, until
from qmigrate.operations.result import Outcome
from qmigrate.qmp.postcopy import PAUSED

__all__ = ["Mending"]


class Mending:
    """``recoveries`` counts.  Raises Ended where it stays as it is."""

    def __init__(self, course: Course, interruption: Interruption) -> None:
        self._course = course
        self._interruption = interruption
        self.recoveries = Recoveries(course.plan.recoveries)

    async def mend(self) -> None:
        """At least one side is paused: one attempt.  After an interruption it is to stay so."""
        course, recoveries, interruption = self._course, self.recoveries, self._interruption
        if interruption.happened or recoveries.exhausted:
            await pause_both(course.sides, course.news)
            reason = "interrupted, and paused as asked" if interruption.happened else recoveries.why
            raise Ended(Outcome.PAUSED, reason)
        course.is_recovering = True
        if not await pause_both(course.sides, course.news):
            self._not_both_paused()
            return
        if await until(lambda: interruption.happened, course.news, [], recoveries.delay_s):
            return
        attempt = await self._attempt()
        recoveries.tried(attempt.trouble)
        if not attempt.trouble:
            course.is_recovering = False
            return
        course.tell(Troubled(message=attempt.trouble))
        if not attempt.connected and not course.plan.force:
            danger = danger_of_another_resume(release_of(course.source.session.greeting))
            if danger:
                raise Ended(Outcome.PAUSED, f"{recoveries.why}; {danger} (--force does it all the same)")

    def _not_both_paused(self) -> None:
        source, destination = self._course.source, self._course.destination
        if source.failure or destination.failure or not destination.took_over:
            raise Ended(Outcome.FAILED)
        if PAUSED in (source.status, destination.status):
            raise Ended(Outcome.FAILED, "only one side is paused, and the other does not follow")
        # it went on, or came to an end, while we looked

    async def _attempt(self) -> Attempt:
        course, plan = self._course, self._course.plan
        uri = plan.recover_uri or plan.uri or course.uri
        listen = plan.recover_listen or plan.listen or uri
        course.tell(self.recoveries.begin(uri))
        return await bring_back(
            course.sides,
            course.news,
            uri=uri,
            listen=listen,
            connect_timeout_s=plan.connect_timeout_s,
        )
