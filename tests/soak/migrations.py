"""Long runs of real migrations: all pairs of versions, kills and cuts in every phase, many hops.

A unit is one migration, or one journey of many.  It passes when the guest goes on without a page lost or stale,
or, where it can't, when what was said of it is true: that is looked up, not believed.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qmigrate.operations import attached
from qmigrate.operations.migrate import migrate
from qmigrate.operations.plan import Hook, Plan
from qmigrate.operations.policy import AfterPass, AfterSeconds
from qmigrate.operations.result import Outcome
from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.live.broken import broken_pair, broken_plan
from tests.live.credentials import NAME, credentials
from tests.live.pair import AT_ONCE, SLOW, SMALL, Pair, pair
from tests.live.versions import Qemu, installed, named
from tests.soak.breaking import CUTS, PHASES, cut_data, cut_qmp, kill

# Source, destination, a machine type that both have.
PAIRS: Final = (
    ("5.2", "5.2", "pc-q35-5.2"),
    ("7.2", "7.2", "pc-q35-7.2"),
    ("10.0", "10.0", "pc-q35-10.0"),
    ("11.1", "11.1", "pc-q35-11.1"),
    ("5.2", "7.2", "pc-q35-5.2"),
    ("7.2", "10.0", "pc-q35-7.2"),
    ("7.2", "11.1", "pc-q35-7.2"),
    ("10.0", "11.1", "pc-q35-10.0"),
)
WAYS: Final = (
    *("precopy", "at-once", "after-pass", "completed-before", "preempt", "multifd", "cancel", "recover"),
    *("xbzrle", "hook", "tcp", "tls", "tls-postcopy"),
)
VICTIMS: Final = ("source", "destination", "us")


@dataclass(frozen=True)
class Unit:
    """What a soak does once.  ``run`` raises when it fails; it may return what is worth a note."""

    name: str
    run: Callable[[random.Random, Path], Awaitable[str]]


def units() -> Iterator[Unit]:
    """All, in the order of the issue; a soak shuffles them."""
    for source, destination, machine in PAIRS:
        if named(source) is None or named(destination) is None:
            continue
        for way in WAYS:
            yield Unit(f"matrix {source}→{destination} {way}", _matrix(source, destination, machine, way))
    for qemu in installed():
        for phase in PHASES:
            for victim in VICTIMS:
                yield Unit(f"kill {victim} in {phase} {qemu.name}", kill(qemu, phase, victim))
            for side in ("source", "destination"):
                yield Unit(f"cut QMP of {side} in {phase} {qemu.name}", cut_qmp(qemu, phase, side))
        for number in range(CUTS):
            yield Unit(f"cut data {number} {qemu.name}", cut_data(qemu, number))
        yield Unit(f"50 hops {qemu.name}", _hops(qemu, 50))


# ---- the matrix --------------------------------------------------------------------------------------------


def _matrix(source: str, destination: str, machine: str, way: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(_: random.Random, folder: Path) -> str:
        one, two = named(source), named(destination)
        assert one is not None
        if way == "recover":
            async with broken_pair(one, folder, [512 << 10], destination=two, machine=machine) as (both, cutter):
                result = await migrate(*both.sessions, broken_plan(both), on_event=cutter.heard)
                assert (result.exit_code, result.recoveries) == (0, 1), result.message
                await both.assert_guest_goes_on()
            return ""
        more = credentials(folder) if way.startswith("tls") else {}
        async with pair(one, folder, destination=two, machine=machine, **more) as both:
            return await _way(both, way)

    return run


async def _way(both: Pair, way: str) -> str:
    plans: dict[str, Mapping[str, Any]] = {
        "precopy": {},
        "at-once": AT_ONCE,
        "after-pass": {**AT_ONCE, "postcopy": [AfterPass(1)], "bandwidth": 2 * SLOW},
        "completed-before": {"postcopy": [AfterSeconds(3600)]},
        "preempt": {"preempt": True, **AT_ONCE},
        "multifd": {"multifd": 2},
        "cancel": {"bandwidth": SLOW, "downtime_limit_ms": 1},
        "xbzrle": {"xbzrle": True},
        "hook": {"before_switchover": _look_at(both), **AT_ONCE},
        "tcp": {"uri": "tcp:127.0.0.1:0", **AT_ONCE},
        "tls": TLS,
        "tls-postcopy": {**TLS, **AT_ONCE},
    }
    if way == "preempt":
        for session in both.sessions:
            if "postcopy-preempt" not in await migration.capabilities(session):
                return "no preempt there"
    plan = Plan(**{"uri": both.uri, "answer_timeout_s": 15, "stall_timeout_s": 30, **plans[way]})
    if way == "cancel":
        task = asyncio.ensure_future(migrate(*both.sessions, plan))
        await migration.wait_until(both.source.session, "active", timeout_s=15)
        await attached.cancel(both.source.session)
        result = await task
        assert (result.outcome, result.exit_code) == (Outcome.CANCELLED, 3), result.message
        await both.assert_guest_stayed()
        return ""
    result = await migrate(*both.sessions, plan)
    assert result.exit_code == 0, result.message
    assert result.switched == (bool(plan.postcopy) and way != "completed-before"), result.message
    await both.assert_guest_goes_on()
    return ""


TLS: Final[Mapping[str, Any]] = {
    **{"uri": "tcp:127.0.0.1:0", "tls_hostname": NAME},
    **{"tls_creds": "tls-source", "destination_tls_creds": "tls-destination"},
}


def _look_at(both: Pair) -> Hook:
    async def hook() -> None:
        assert (await migration.query(both.source.session))["status"] == "pre-switchover"

    return hook


# ---- a long journey ----------------------------------------------------------------------------------------


def _hops(qemu: Qemu, count: int) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(rng: random.Random, folder: Path) -> str:
        await journey(qemu, folder, count, rng)
        return ""

    return run


async def journey(qemu: Qemu, folder: Path, count: int, rng: random.Random) -> None:
    """One guest, so many hops, by precopy and postcopy as it comes; it goes on after the last, and counts on."""

    async def start(number: int) -> tuple[Machine, Path]:
        said = folder / f"console-{number}"
        incoming = ["-incoming", "defer"] if number else []
        machine = Machine(qemu.path, [*SMALL.arguments(console=said), *incoming], name=f"hop {number}")
        await machine.start()
        return machine, said

    here, said = await start(0)
    try:
        await console.wait_for_passes(said, 1)
        for number in range(1, count + 1):
            there, said = await start(number)
            try:
                way: dict[str, Any] = rng.choice([{}, dict(AT_ONCE)])
                plan = Plan(uri=f"unix:{folder / 'hop'}", answer_timeout_s=15, **({"bandwidth": 1 << 40} | way))
                result = await migrate(here.session, there.session, plan)
                assert result.exit_code == 0, f"hop {number}: {result.message}"
            finally:
                gone, here = here, there
                gone.kill()
                await gone.close()
            await console.wait_for_passes(said, 1)
        await console.assert_goes_on(said)
    finally:
        await here.close()
