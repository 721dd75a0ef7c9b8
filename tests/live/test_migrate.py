"""Real migrations between two real QEMUs of every version that is installed, as ``migrate()`` drives them.

Our guest goes on afterwards, which it does only if no page was lost or is stale.
"""

from pathlib import Path
from typing import Any

import pytest

from qmigrate import events
from qmigrate.events import Side
from qmigrate.operations.migrate import migrate
from qmigrate.operations.plan import Plan
from qmigrate.operations.policy import AfterPass, AfterSeconds, AtOnce, IfStuck, Policy
from qmigrate.operations.result import MigrationResult, Outcome
from qmigrate.operations.whereabouts import Place
from qmigrate.qmp import migration, postcopy
from tests.live import versions
from tests.live.pair import SLOW, Pair, pair
from tests.live.some import every_qemu
from tests.live.versions import Qemu

pytestmark = [pytest.mark.live, pytest.mark.asyncio]


def plan_for(two: Pair, **wishes: Any) -> Plan:
    return Plan(**{"uri": two.uri, "answer_timeout_s": 60.0, "stall_timeout_s": 60.0, **wishes})


def never_converges(**wishes: Any) -> dict[str, Any]:
    """Precopy that only a switch or a cancel ends."""
    return {"bandwidth": SLOW, "downtime_limit_ms": 1, **wishes}


def statuses(result: MigrationResult, side: Side) -> list[str]:
    return [each.status for each in result.events if isinstance(each, events.StatusChanged) and each.side is side]


def told(result: MigrationResult) -> list[str]:
    return [each.command for each in result.events if isinstance(each, events.CommandSent)]


@every_qemu
async def test_precopy(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        result = await migrate(*two.sessions, plan_for(two))
        assert (result.outcome, result.exit_code, result.place) == (Outcome.COMPLETED, 0, Place.DESTINATION)
        assert not result.switched
        assert statuses(result, Side.SOURCE)[-1] == statuses(result, Side.DESTINATION)[-1] == "completed"
        await two.assert_guest_goes_on()


@every_qemu
async def test_postcopy_at_once(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        result = await migrate(*two.sessions, plan_for(two, **never_converges(postcopy=[AtOnce()])))
        assert (result.message, result.exit_code) == ("migrated with postcopy", 0)
        assert "postcopy-active" in statuses(result, Side.SOURCE)
        await two.assert_guest_goes_on()


@every_qemu
async def test_postcopy_after_a_pass(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        plan = plan_for(two, **never_converges(postcopy=[AfterPass(1)], bandwidth=4 * SLOW))
        result = await migrate(*two.sessions, plan)
        assert (result.message, result.exit_code) == ("migrated with postcopy", 0)
        # All of memory has gone once, whatever QEMU calls a pass.
        sent = next(each for each in result.events if isinstance(each, events.Decided))
        before = [each for each in result.events if isinstance(each, events.Progressed) and each.time_us < sent.time_us]
        ram = before[-1].data["ram"]
        assert (ram["normal"] + ram["duplicate"]) * ram["page-size"] >= 0.95 * ram["total"]
        await two.assert_guest_goes_on()


@every_qemu
async def test_a_migration_that_completes_before_the_switch_is_a_success(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        result = await migrate(*two.sessions, plan_for(two, postcopy=[AfterSeconds(60)]))
        assert (result.exit_code, result.switched) == (0, False)
        assert result.message == "migrated by precopy: it was already complete before the switch to postcopy was due"
        await postcopy.switch(two.source.session)  # S2: after the end it is harmless
        assert (await migration.query(two.source.session))["status"] == "completed"
        await two.assert_guest_goes_on()


@pytest.mark.parametrize("policy", [AfterSeconds(0.3), IfStuck()], ids=["after-seconds", "if-stuck"])
async def test_other_times_to_switch(policy: Policy, tmp_path: Path) -> None:
    async with pair(oldest(), tmp_path) as two:
        plan = plan_for(two, **never_converges(postcopy=[policy], bandwidth=4 * SLOW))
        result = await migrate(*two.sessions, plan)
        assert (result.message, result.exit_code) == ("migrated with postcopy", 0)
        await two.assert_guest_goes_on()


def oldest() -> Qemu:
    found = versions.installed()
    if not found:
        pytest.skip("no QEMU is installed: scripts/qemu_versions")
    return found[0]
