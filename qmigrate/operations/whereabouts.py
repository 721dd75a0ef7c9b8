"""Where is the guest?  Both sides are asked; what they answer together is one place.

Neither side knows alone: a source that has `failed` may run the guest while the destination does, too, and one
that has `completed` may have sent it to a QEMU that died.
"""

import asyncio
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from qmigrate import exit_codes
from qmigrate.errors import QemuDiedError, QmpConnectError, QmpError, QmpTimeoutError
from qmigrate.qmp.migration import FINAL_STATUSES, query
from qmigrate.qmp.postcopy import PAUSED, is_postcopy
from qmigrate.qmp.session import Address, Session
from qmigrate.value import Value

__all__ = ["Place", "Reach", "View", "Whereabouts", "ask", "locate", "receives"]

INCOMING: Final = "inmigrate"
"""The run state of a QEMU that has not taken over yet."""

_NOBODY: Final = (ConnectionRefusedError, FileNotFoundError)


class Place(StrEnum):
    """Where a guest is."""

    SOURCE = "source"
    DESTINATION = "destination"
    PAUSED = "paused"  # its memory is on both sides, and can be brought together
    LOST = "lost"
    BOTH = "both"  # it runs twice
    UNKNOWN = "unknown"


EXIT_CODES: Final[Mapping[Place, int]] = {
    Place.SOURCE: exit_codes.AT_SOURCE,
    Place.DESTINATION: exit_codes.AT_DESTINATION,
    Place.PAUSED: exit_codes.PAUSED,
    Place.LOST: exit_codes.LOST,
    Place.BOTH: exit_codes.UNKNOWN,
    Place.UNKNOWN: exit_codes.UNKNOWN,
}
"""What a command ends with when not all went as asked."""


class Reach(StrEnum):
    """Does a QEMU answer?"""

    ANSWERS = "answers"
    SILENT = "silent"  # its monitor is there; it hangs, or its main loop waits for something
    UNREACHABLE = "unreachable"  # it may live
    DEAD = "dead"


class View(Value):
    """One side, as it says itself.  ``error`` is its own reason, or why it can't be asked."""

    reach: Reach
    run_state: str = ""
    running: bool = False
    status: str = "none"
    error: str = ""
    info: Mapping[str, Any] | None = None

    @property
    def answers(self) -> bool:
        return self.reach is Reach.ANSWERS

    @property
    def dead(self) -> bool:
        return self.reach is Reach.DEAD

    @property
    def took_over(self) -> bool:
        """Has a destination the guest's devices, so that it runs or could?"""
        return self.answers and self.run_state not in (INCOMING, "")

    @property
    def receives(self) -> bool:
        """Is it, as it says, a destination whose migration is not over?"""
        return self.answers and receives(self.run_state, self.status, self.info or {})

    def __str__(self) -> str:
        if not self.answers:
            return f"{'is gone' if self.dead else 'does not answer'} ({self.error})"
        return f"says {self.run_state}, migration {self.status}"


class Whereabouts(Value):
    """``running`` is None where it is not known; ``sentence`` says it in full, ``advice`` what to do."""

    place: Place
    running: bool | None
    sentence: str
    advice: str = ""


def receives(run_state: str, status: str, info: Mapping[str, Any]) -> bool:
    """Is this a destination?  One that has taken over tells of no memory, but where it listens."""
    under_way = status not in (*FINAL_STATUSES, "none")
    return run_state == INCOMING or (under_way and "socket-address" in info and "ram" not in info)


async def ask(session: Session, *, timeout_s: float) -> View:
    """Ask one QEMU, over a new connection where the old one is broken."""
    try:
        return await _ask(session, timeout_s)
    except QmpTimeoutError as exc:
        return View(Reach.SILENT, error=exc.message)
    except QmpError as exc:
        if isinstance(exc, QemuDiedError) and exc.exit_status is not None:
            return View(Reach.DEAD, error=exc.message)
        return await _ask_again(session, exc, timeout_s)


async def ask_at(address: Address, *, timeout_s: float) -> View:
    """Ask the QEMU whose QMP is there."""
    try:
        session = await Session.open(address, timeout_s=timeout_s)
    except QmpConnectError as exc:
        return View(_reach(exc), error=exc.message)
    try:
        return await ask(session, timeout_s=timeout_s)
    finally:
        await session.close()


def _reach(error: QmpConnectError) -> Reach:
    nobody = isinstance(getattr(error.__cause__, "exc", None), _NOBODY)
    return Reach.DEAD if nobody else Reach.UNREACHABLE


async def _ask_again(session: Session, error: QmpError, timeout_s: float) -> View:
    try:
        fresh = await session.again(timeout_s=timeout_s)
    except QmpConnectError as exc:
        return View(_reach(exc), error=f"{error.message}; then: {exc.message}")
    if fresh is None:
        return View(Reach.UNREACHABLE, error=error.message)
    try:
        return await _ask(fresh, timeout_s)
    except QmpError as exc:
        return View(Reach.SILENT, error=exc.message)
    finally:
        await fresh.close()


async def _ask(session: Session, timeout_s: float) -> View:
    state, info = await asyncio.gather(
        session.execute("query-status", timeout_s=timeout_s), query(session, timeout_s=timeout_s)
    )
    return View(
        Reach.ANSWERS,
        run_state=str(state.get("status", "")),
        running=bool(state.get("running")),
        status=str(info["status"]),
        error=str(info.get("error-desc", "")),
        info=info,
    )


def locate(source: View, destination: View) -> Whereabouts:
    """Where the guest is, from what both sides say.  A pure function: its table is tested row by row."""
    if source.running and destination.running:
        return Whereabouts(
            Place.BOTH,
            True,
            "The guest runs on BOTH sides.",
            "Stop one of them at once (QMP `stop`): both write to the same disks. The destination's memory is "
            "incomplete unless its migration has completed.",
        )
    if source.running:
        if source.status in (*FINAL_STATUSES, "none"):
            return Whereabouts(Place.SOURCE, True, "The guest runs on the source.")
        if is_postcopy(source.status):  # 5.2 and 7.2 say so before they stop the guest
            return Whereabouts(
                Place.SOURCE,
                True,
                f"The guest runs on the source, and is about to leave it ({source.status}).",
                "Look again: `qmigrate status SRC DST`.",
            )
        return Whereabouts(
            Place.SOURCE,
            True,
            f"The guest runs on the source, and its migration is still under way ({source.status}).",
            "Look with `qmigrate status SRC DST`, end it with `qmigrate cancel SRC`.",
        )
    if destination.took_over:
        return _taken_over(source, destination)
    return _not_taken_over(source, destination)


def _taken_over(source: View, destination: View) -> Whereabouts:
    running = destination.running
    runs = "runs" if running else "is stopped"
    # Any other word may be said in postcopy, too: `active` by 5.2 and 7.2, `setup` before a recovery, `failed`.
    if destination.status in ("completed", "none"):
        return Whereabouts(Place.DESTINATION, running, f"The guest {runs} on the destination, with all of its memory.")
    if source.dead:
        return Whereabouts(
            Place.LOST,
            running,
            "The guest is lost: it had switched to the destination, and the source died with memory that was not "
            "sent yet. What still runs on the destination will hang at the first such page.",
            "Start it anew from its disks.",
        )
    if not source.answers:
        return Whereabouts(
            Place.DESTINATION,
            running,
            f"The guest {runs} on the destination; some of its memory is still on the source, which does not answer.",
            f"Do not end the source. When it answers again: {_RECOVER}",
        )
    if PAUSED in (source.status, destination.status) and is_postcopy(source.status):
        return Whereabouts(
            Place.PAUSED,
            running,
            "The migration is paused: the guest is on the destination, some of its memory still on the source. It "
            "runs until it needs a page that is missing.",
            f"Bring it back: {_RECOVER}",
        )
    if is_postcopy(source.status):
        return Whereabouts(
            Place.DESTINATION,
            running,
            f"The guest {runs} on the destination; the rest of its memory is on its way.",
            "The migration goes on by itself. Look with `qmigrate status SRC DST`.",
        )
    if source.status == "completed":
        return Whereabouts(
            Place.DESTINATION, running, f"The guest {runs} on the destination; the source has sent all of its memory."
        )
    if source.status not in FINAL_STATUSES | {"none"}:
        return Whereabouts(
            Place.DESTINATION,
            running,
            f"The guest {runs} on the destination; its migration is still under way ({source.status}).",
            "Look again: `qmigrate status SRC DST`.",
        )
    return Whereabouts(
        Place.LOST,
        running,
        f"The guest is lost: it had switched to the destination, and the source gave up ({source.status}) with "
        "memory that was not sent yet.",
        "Start it anew from its disks.",
    )


def _not_taken_over(source: View, destination: View) -> Whereabouts:
    if not source.answers:
        return _without_a_source(source, destination)
    if is_postcopy(source.status):
        if source.status == PAUSED and destination.reach is Reach.SILENT:
            return Whereabouts(
                Place.PAUSED,
                None,
                "The migration is paused: the source holds what memory was not sent. The destination does not answer, "
                "as one that waits for a missing page may not.",
                f"Bring it back: {_RECOVER}",
            )
        if destination.dead:
            return Whereabouts(
                Place.LOST,
                False,
                "The guest is lost: it had switched to the destination, which died.",
                "Start it anew from its disks.",
            )
        if destination.answers and destination.status == "failed":
            return Whereabouts(
                Place.LOST,
                False,
                "The guest is lost: it was on its way when the destination failed, and the source can't take it back.",
                "Start it anew from its disks.",
            )
        return _unknown("The guest has left the source; the destination has not said that it took over.")
    if source.status == "completed":
        if destination.answers or destination.dead:
            return Whereabouts(
                Place.SOURCE,
                False,
                "The guest is whole on the source, and stopped: all was sent, but the destination did not take over.",
                "If the destination never ran it, run it on the source again: QMP `cont`.",
            )
        return _unknown("All was sent; whether the destination took over is not known.")
    return Whereabouts(Place.SOURCE, False, "The guest is on the source, and stopped.", "QMP `cont` runs it.")


def _without_a_source(source: View, destination: View) -> Whereabouts:
    if not source.dead:
        return _unknown("The guest was on the source when that last answered.")
    if destination.answers:
        return Whereabouts(
            Place.LOST, False, "The guest is lost: the source died with it.", "Start it anew from its disks."
        )
    if destination.dead:
        return Whereabouts(
            Place.LOST, False, "The guest is lost: both QEMUs are gone.", "Start it anew from its disks."
        )
    return _unknown("The source is gone, and the destination does not answer.")


def _unknown(sentence: str) -> Whereabouts:
    return Whereabouts(
        Place.UNKNOWN,
        None,
        f"Where the guest is can't be said. {sentence}",
        "Let nothing start it anew before both sides were asked: `qmigrate status SRC DST`.",
    )


_RECOVER: Final = "`qmigrate recover SRC DST`."
