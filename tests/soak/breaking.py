"""Kills and cuts in every phase of a migration; and whether it is true what is said of it afterwards.

That is looked up, not believed: where the guest is said to go on, it has to; what is said to be recoverable is
recovered.
"""

import asyncio
import json
import os
import random
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from qmigrate import events
from qmigrate.errors import QmigrateError, QmpError, RefusedError
from qmigrate.events import LiveEvent, Side
from qmigrate.operations import attached
from qmigrate.operations.migrate import migrate, recover
from qmigrate.operations.plan import Plan
from qmigrate.operations.policy import AtOnce
from qmigrate.operations.result import MigrationResult, Outcome
from qmigrate.operations.whereabouts import Place, ask, locate
from qmigrate.qmp import migration
from qmigrate.qmp.postcopy import is_postcopy
from qmigrate.qmp.session import Session
from tests.live.broken import broken_pair, broken_plan
from tests.live.command import started
from tests.live.pair import SLOW, Pair, pair
from tests.live.versions import Qemu

__all__ = ["CUTS", "PHASES", "cut_data", "cut_qmp", "kill"]

KIB: Final = 1 << 10
PHASES: Final = ("setup", "precopy", "switch", "postcopy", "late", "paused", "recovering", "completed")
PRECOPY: Final = ("setup", "precopy")
BROKEN: Final = ("paused", "recovering")
"""Phases that are reached only when the connection has been cut."""
CUTS: Final = 20


class Trigger:
    """Acts once, when a migration is in this phase."""

    def __init__(self, phase: str, act: Callable[[], None], rng: random.Random) -> None:
        self.phase = phase
        self.act = act
        self.acted = False
        self._sent: int | None = None
        self._late_after = rng.randrange(64, 4096) * KIB

    def __call__(self, event: LiveEvent) -> None:
        if not self.acted and self._is_time(event):
            self.acted = True
            self.act()

    def _is_time(self, event: LiveEvent) -> bool:
        at_source = event.side is Side.SOURCE
        took_over = isinstance(event, events.GuestChanged) and event.side is Side.DESTINATION and event.running
        match self.phase:
            case "setup" | "completed":
                return isinstance(event, events.StatusChanged) and at_source and event.status == self.phase
            case "precopy":
                return isinstance(event, events.Progressed) and at_source and bool(event.transferred_bytes)
            case "switch":
                return isinstance(event, events.GuestChanged) and at_source and not event.running
            case "postcopy":
                return took_over
            case "late":
                if took_over:
                    self._sent = -1
                if isinstance(event, events.Progressed) and at_source and self._sent is not None:
                    sent = event.transferred_bytes or 0
                    self._sent = sent if self._sent < 0 else self._sent
                    return sent >= self._sent + self._late_after
                return False
            case _:
                status = "postcopy-paused" if self.phase == "paused" else "postcopy-recover"
                return isinstance(event, events.StatusChanged) and at_source and event.status.startswith(status)


def _slow(both: Pair, phase: str, **wishes: Any) -> Plan:
    limits = {"bandwidth": SLOW, "postcopy_bandwidth": 2 * SLOW, "downtime_limit_ms": 1}
    patience = {"answer_timeout_s": 3.0, "stall_timeout_s": 10.0, "connect_timeout_s": 3.0}
    policy = [] if phase in PRECOPY else [AtOnce()]
    return Plan(**{"uri": both.uri, "postcopy": policy, **limits, **patience, **wishes})


def kill(qemu: Qemu, phase: str, victim: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(rng: random.Random, folder: Path) -> str:
        if victim == "us":
            async with pair(qemu, folder) as both:
                return await (_kill_recovery(both, rng) if phase == "recovering" else _kill_us(both, phase, rng))
        cuts = [64 * KIB] if phase in BROKEN else []
        async with broken_pair(qemu, folder, cuts) as (both, cutter):
            act = both.source.kill if victim == "source" else both.destination.kill
            trigger = Trigger(phase, act, rng)

            def heard(event: LiveEvent) -> None:
                cutter.heard(event)
                trigger(event)

            plan = _slow(both, phase, listen=both.uri, uri=f"unix:{folder / 'relay'}", recoveries=2)
            result = await migrate(*both.sessions, plan, on_event=heard)
            if (victim, phase, result.exit_code) == ("destination", "completed", 0):
                # Both sides had completed, and SIGKILL takes its time: it was true when it was said.
                assert await both.destination.wait(timeout_s=10) == -signal.SIGKILL
                return "it answered once more before it died"
            return await _truth(both, result, trigger)

    return run


def cut_qmp(qemu: Qemu, phase: str, side: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(rng: random.Random, folder: Path) -> str:
        cuts = [64 * KIB] if phase in BROKEN else []
        async with broken_pair(qemu, folder, cuts) as (both, cutter):
            source, destination = both.addresses
            async with Session.connect(source) as one, Session.connect(destination) as two:
                trigger = Trigger(phase, (one if side == "source" else two)._client.abort, rng)

                def heard(event: LiveEvent) -> None:
                    cutter.heard(event)
                    trigger(event)

                plan = _slow(both, phase, listen=both.uri, uri=f"unix:{folder / 'relay'}", recoveries=2)
                result = await migrate(one, two, plan, on_event=heard)
            return await _truth(both, result, trigger)

    return run


def cut_data(qemu: Qemu, number: int) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(rng: random.Random, folder: Path) -> str:
        step = 6144 // CUTS
        moments = [(64 + number * step + rng.randrange(step)) * KIB]
        async with broken_pair(qemu, folder, moments) as (both, cutter):
            result = await migrate(*both.sessions, broken_plan(both), on_event=cutter.heard)
            assert result.exit_code == 0, f"cut after {moments}: {result.message}"
            assert result.recoveries == cutter.cuts
            await both.assert_guest_goes_on()
            return "" if cutter.cuts else "over before the cut"

    return run


async def _kill_us(both: Pair, phase: str, rng: random.Random) -> str:
    """`qmigrate migrate` in a process of its own is killed; what it left behind can be taken up."""
    words = ["migrate", *both.addresses, "--uri", both.uri, "--ndjson", "--bandwidth", "4M", "--downtime-limit", "1"]
    words += [] if phase in PRECOPY else ["--postcopy", "--postcopy-bandwidth", "8M"]
    process = await started(*words)
    trigger = Trigger("late" if phase == "paused" else phase, lambda: os.kill(process.pid, signal.SIGKILL), rng)
    assert process.stdout is not None
    async for line in process.stdout:
        if (event := _event(json.loads(line))) is not None and not trigger.acted:
            trigger(event)
    await process.wait()
    source, destination = both.sessions
    view = await ask(source, timeout_s=10)
    if phase == "paused" and is_postcopy(view.status):
        try:
            await attached.pause(source, destination)
        except RefusedError:  # between our question and its
            assert (await ask(source, timeout_s=10)).status == "completed"
            await both.assert_guest_goes_on()
            return "complete before it could be paused"
        again = Plan(uri=f"unix:{both.folder / 'again'}", recoveries=3, answer_timeout_s=15)
        assert (await recover(source, destination, again)).exit_code == 0
    elif phase in PRECOPY:
        await migration.wait_until(source, "active", timeout_s=15)
        await attached.cancel(source)
        await both.assert_guest_stayed()
        return ""
    else:
        await migration.wait_until(source, "completed", timeout_s=60)
    await both.assert_guest_goes_on()
    return "" if trigger.acted else "over before the kill"


async def _kill_recovery(both: Pair, rng: random.Random) -> str:
    """`qmigrate recover` is killed after it has said so many lines; another one takes it up."""
    migrating = asyncio.ensure_future(migrate(*both.sessions, _slow(both, "late")))
    while not migrating.done():
        try:
            await attached.pause(*both.sessions)
            break
        except QmigrateError:  # not in postcopy yet
            await asyncio.sleep(0.01)
    result = await migrating
    assert result.outcome is Outcome.PAUSED, result.message
    await both.hurry()
    again = f"unix:{both.folder / 'again'}"
    process = await started("recover", *both.addresses, "--uri", again, "--ndjson")
    lines = rng.randrange(1, 12)
    assert process.stdout is not None
    async for _ in process.stdout:
        lines -= 1
        if not lines:
            process.kill()
    await process.wait()
    recovered = await recover(*both.sessions, Plan(uri=again, recoveries=3, answer_timeout_s=15))
    assert recovered.exit_code == 0, recovered.message
    await both.assert_guest_goes_on()
    return "over before the kill" if lines > 0 else ""


def _event(plain: dict[str, Any]) -> LiveEvent | None:
    """Of what --ndjson printed, as much as a trigger looks at."""
    side = Side(plain["side"]) if plain["side"] else None
    match plain["event"]:
        case "progressed":
            sent = plain["transferred_bytes"]
            return events.Progressed(side=side, status=plain["status"], transferred_bytes=sent)
        case "guest-changed":
            return events.GuestChanged(side=side, running=plain["running"])
        case "status-changed":
            return events.StatusChanged(side=side, status=plain["status"])
    return None


async def _truth(both: Pair, result: MigrationResult, trigger: Trigger) -> str:
    """Is it true what the result says?"""
    note = "" if trigger.acted else "over before it"
    said = f"{result.place} (exit {result.exit_code}): {result.message}"
    alive = both.source.exit_status is None, both.destination.exit_status is None
    try:
        match result.place:
            case Place.SOURCE if result.guest.running:
                await both.assert_guest_stayed()
            case Place.SOURCE:
                assert alive[0]
                await both.source.session.execute("cont", timeout_s=5)
                await both.assert_guest_stayed()
                note += " stopped on the source, and ran again by cont"
            case Place.DESTINATION:
                await _let_it_end(both)
                await both.assert_guest_goes_on()
            case Place.PAUSED:
                again = Plan(uri=both.uri, recoveries=3, answer_timeout_s=15)
                recovered = await recover(*both.sessions, again)
                assert recovered.exit_code == 0, recovered.message
                await both.assert_guest_goes_on()
            case Place.LOST:
                assert alive != (True, True), "both QEMUs live, and the guest is said to be lost"
                if alive[0]:
                    view = await ask(both.source.session, timeout_s=5)
                    assert not view.running, "the guest is said to be lost, and runs on the source"
            case Place.BOTH:
                views = [await ask(each, timeout_s=5) for each in both.sessions]
                assert [view.running for view in views] == [True, True]
                note += " split brain: hazard 2"
            case _:
                note += await _unknown(both)
    except (AssertionError, QmpError) as exc:
        raise AssertionError(f"said: {said}; but: {exc}") from exc
    both.kill()
    return note.strip()


async def _let_it_end(both: Pair) -> None:
    """A migration that goes on without us."""
    view = await ask(both.source.session, timeout_s=5)
    if view.answers and is_postcopy(view.status):
        await migration.wait_until(both.source.session, "completed", timeout_s=60)


async def _unknown(both: Pair) -> str:
    views = [await ask(each, timeout_s=5) for each in both.sessions]
    found = locate(*views)
    assert found.place is not Place.BOTH
    return f" said unknown, a little later it is {found.place}"
