"""Steps in a migration that is under way, also one that another tool began.

Such a QEMU may say nothing by events: the capability `events` can't be turned on any more.  So it is asked.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from qmigrate.errors import QmpCommandError, QmpError, QmpTimeoutError, RefusedError
from qmigrate.operations.whereabouts import INCOMING, View, ask
from qmigrate.qmp import postcopy
from qmigrate.qmp.features import Features
from qmigrate.qmp.migration import FINAL_STATUSES
from qmigrate.qmp.postcopy import PAUSED, is_postcopy, left_bytes
from qmigrate.qmp.session import Session

__all__ = ["Done", "cancel", "pause", "race", "start_postcopy"]

POLL_S: Final = 0.02
SURE_AFTER_S: Final = 1.0


@dataclass(frozen=True)
class Done:
    """What was done, and what the source says of itself afterwards."""

    message: str
    view: View


async def start_postcopy(source: Session, *, timeout_s: float = 30.0) -> Done:
    """Switch to postcopy.  A migration that is complete already, or has switched, is left as it is."""
    view = await _source(source, timeout_s)
    if view.status == "completed":
        return Done("already complete: there is nothing to switch", view)
    if is_postcopy(view.status):
        return Done("it is in postcopy already", view)
    _under_way(view)
    features = await Features.of(source, timeout_s=timeout_s, with_schema=False)
    if features.postcopy is None:
        raise RefusedError("this QEMU can't do postcopy")
    if not features.capabilities[features.postcopy]:
        raise RefusedError(f"{features.postcopy} is off: it can only be turned on before a migration begins")
    await postcopy.switch(source, timeout_s=timeout_s)
    view = await _until(source, lambda view: is_postcopy(view.status) or view.status in FINAL_STATUSES, timeout_s)
    if view.status == "completed":
        return Done("it was complete before the switch, which then changes nothing", view)
    if view.status in FINAL_STATUSES:
        raise QmpCommandError(view.error or view.status, command="migrate", error_class=view.status)
    return Done("switched to postcopy", view)


_TOO_LATE: Final = "already complete: there is nothing to pause"


async def pause(
    source: Session, destination: Session | None = None, *, force: bool = False, timeout_s: float = 30.0
) -> Done:
    """Break the connection of a postcopy, so that it can be resumed elsewhere.

    Refused while a pause could lose the guest; the destination, where it is given, is waited for.
    """
    view = await _source(source, timeout_s)
    if view.status == PAUSED:
        return Done("it is paused already", view)
    if view.status == "completed":
        raise RefusedError(_TOO_LATE)
    if not is_postcopy(view.status):
        _under_way(view)
        raise RefusedError(f"only postcopy can be paused, and this is {view.status}: `qmigrate cancel` ends it")
    if not force:
        reason = await _race(source, destination, timeout_s)
        if reason:
            raise RefusedError(f"{reason} (--force does it all the same)")
    try:
        await postcopy.pause(source, timeout_s=timeout_s)
    except QmpCommandError:
        view = await ask(source, timeout_s=timeout_s)
        if view.status == "completed":
            return Done("it was complete before the pause", view)
        raise
    view = await _until(source, lambda view: view.status in (PAUSED, *FINAL_STATUSES), timeout_s)
    if view.status == "completed":
        return Done("it was complete before the pause", view)
    if view.status != PAUSED:
        reason = f"{view.error or view.status}; the guest may run on both sides: ask `qmigrate status SRC DST`"
        raise QmpCommandError(reason, command="migrate-pause", error_class=view.status)
    return Done("paused; `qmigrate recover SRC DST` resumes it", view)


async def cancel(source: Session, *, timeout_s: float = 30.0) -> Done:
    """End precopy and leave the guest on the source.  Refused in postcopy: it would lose the guest."""
    view = await _source(source, timeout_s)
    if is_postcopy(view.status):
        raise RefusedError(
            f"it is in postcopy ({view.status}): the guest is on both sides, and cancelling would lose it. "
            "`qmigrate pause SRC DST` pauses"
        )
    if view.status == "completed":
        raise RefusedError("already complete: the guest has left, there is nothing to cancel")
    if view.status == "cancelled":
        return Done("it is cancelled already", view)
    _under_way(view)
    await source.execute("migrate_cancel", timeout_s=timeout_s)
    view = await _until(source, lambda view: view.status in FINAL_STATUSES, timeout_s)
    if view.status == "completed":
        raise RefusedError("it was complete before it could be cancelled: the guest has left")
    return Done("cancelled; the guest stays on the source", view)


def race(
    status: str, statuses: frozenset[str], active_s: float, destination_state: str | None, left: int | None = None
) -> str:
    """Why a pause now could lose the guest; empty if it can't.

    Until the destination runs the guest (RUN) a broken connection is final for it.  A source of QEMU 5.2 or 7.2
    says `postcopy-active` before it has sent the devices, one of 10.0 when it has; one that knows
    `postcopy-device` says it when the destination has loaded them, which is just before RUN.
    ``destination_state`` is the destination's run state, None where it can't be asked.  ``left``: bytes that the
    source has not sent: when that is nothing, a broken connection is no pause for it, but a failure, and it runs the
    guest again.  One of 11.1 looks whether it may leave ``postcopy-device`` after each 64 host pages or so: of huge
    pages that is late, or no sooner than when all has been sent.
    """
    if status != "postcopy-active":
        return f"the source is in {status}: the destination has not taken over yet"
    if left == 0:
        return "all has been sent: broken now, the source may run the guest again, which runs on the destination"
    if destination_state is not None:
        return "the destination has not taken over yet" if destination_state == INCOMING else ""
    if "postcopy-device" in statuses and active_s >= SURE_AFTER_S:
        return ""
    return (
        "this source can't tell whether the destination has taken over, and to pause before that loses the guest: "
        "give the destination's address too, so that it can be asked"
    )


async def _race(source: Session, destination: Session | None, timeout_s: float) -> str:
    """Ask for a while, if waiting can help."""
    features = await Features.of(source, timeout_s=timeout_s)
    statuses = features.statuses
    began = time.monotonic()
    while True:
        view = await ask(source, timeout_s=timeout_s)
        if view.status == "completed":
            raise RefusedError(_TOO_LATE)
        state = None
        if destination is not None:
            there = await ask(destination, timeout_s=timeout_s)
            if not there.answers:
                return f"the destination {there}"
            state = there.run_state
        waited_s = time.monotonic() - began
        reason = race(view.status, statuses, waited_s, state, left_bytes(view.info or {}))
        can_help = state is not None or "postcopy-device" in statuses
        if not reason or not can_help or not is_postcopy(view.status) or waited_s > timeout_s:
            return reason
        await asyncio.sleep(POLL_S)


async def _source(source: Session, timeout_s: float) -> View:
    """What it says, if it is a source at all.  Errors are its session's."""
    state = await source.execute("query-status", timeout_s=timeout_s)
    if state.get("status") == INCOMING:
        raise RefusedError("this QEMU waits for a guest: it is the destination, and this is told to the source")
    view = await ask(source, timeout_s=timeout_s)
    if view.receives:
        raise RefusedError("this QEMU receives the guest: it is the destination, and this is told to the source")
    return view


def _under_way(view: View) -> None:
    if view.status in FINAL_STATUSES | {"none"}:
        raise RefusedError(f"no migration is under way (status: {view.status})")


async def _until(session: Session, condition: Callable[[View], bool], timeout_s: float) -> View:
    deadline = time.monotonic() + timeout_s
    while not condition(view := await ask(session, timeout_s=timeout_s)):
        if not view.answers:
            raise QmpError(view.error, address=session.address)
        if time.monotonic() > deadline:
            raise QmpTimeoutError(f"still {view.status} after {timeout_s:g} s", address=session.address)
        await asyncio.sleep(POLL_S)
    return view
