"""The machine and the session with every real QEMU that is installed."""

import asyncio
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qmigrate.errors import QemuDiedError, QmpCommandError, QmpError
from qmigrate.qmp import migration
from qmigrate.qmp.blocking import Blocking
from qmigrate.qmp.machine import Machine
from qmigrate.qmp.session import Session
from tests.live import versions
from tests.live.versions import Qemu

pytestmark = pytest.mark.live

BARE = ["-machine", "pc,accel=tcg", "-m", "16", "-nodefaults", "-display", "none", "-S"]

every_qemu = pytest.mark.parametrize("qemu", versions.installed(), ids=lambda qemu: qemu.name)


@every_qemu
@pytest.mark.asyncio
async def test_a_machine_answers_and_ends_when_asked(qemu: Qemu) -> None:
    async with Machine(qemu.path, BARE) as machine:
        status = await machine.session.execute("query-status")
        assert status["status"] == "prelaunch"
        version = machine.session.greeting["version"]["qemu"]
        assert (version["major"], version["minor"], version["micro"]) == qemu.number
        assert "paused" in await machine.session.human_monitor_command("info status")
    assert machine.exit_status == 0
    assert machine.stderr == ""


@every_qemu
@pytest.mark.asyncio
async def test_a_bad_option_is_told_in_qemus_words(qemu: Qemu) -> None:
    with pytest.raises(QemuDiedError, match=r"it did not start: QEMU ended with exit status 1: .*-nonsense: invalid"):
        await Machine(qemu.path, [*BARE, "-nonsense"]).start()


@every_qemu
@pytest.mark.asyncio
async def test_a_refused_command_is_told_in_qemus_words(qemu: Qemu) -> None:
    async with Machine(qemu.path, BARE) as machine:
        with pytest.raises(QmpCommandError, match="device_del: Device 'x' not found") as caught:
            await machine.session.execute("device_del", {"id": "x"})
        assert caught.value.error_class == "DeviceNotFound"


@every_qemu
@pytest.mark.asyncio
async def test_a_killed_machine_ends_iteration_and_commands(qemu: Qemu) -> None:
    async with Machine(qemu.path, BARE) as machine:
        machine.kill()
        assert [event async for event in machine.session.events()] == []
        with pytest.raises(QemuDiedError, match="cont: QEMU was killed by SIGKILL"):
            await machine.session.execute("cont")


@every_qemu
@pytest.mark.asyncio
async def test_events_come_with_qemus_time(qemu: Qemu) -> None:
    async with Machine(qemu.path, BARE) as machine:
        with machine.session.listen("RESUME", "STOP") as listener:
            await machine.session.execute("cont")
            await machine.session.execute("stop")
            resumed, stopped = [await listener.get(), await listener.get()]
    assert (resumed.name, stopped.name) == ("RESUME", "STOP")
    assert 0 < resumed.timestamp_us <= stopped.timestamp_us


PARENT = """
import asyncio, sys
from qmigrate.qmp.machine import Machine

async def main():
    async with Machine(sys.argv[1], sys.argv[2:]) as machine:
        print(machine.pid, flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


@every_qemu
def test_a_killed_parent_leaves_no_qemu_behind(qemu: Qemu) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, qemu.path, *BARE], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        qemu_process = os.pidfd_open(pid)
        try:
            parent.send_signal(signal.SIGKILL)
            ended, _, _ = select.select([qemu_process], [], [], 60)
            assert ended, f"QEMU {pid} runs on"
        finally:
            os.close(qemu_process)


@every_qemu
@pytest.mark.asyncio
async def test_a_second_client_is_told_that_it_may_not_be_alone(qemu: Qemu, tmp_path: Path) -> None:
    address = tmp_path / "qmp.sock"
    async with Machine(qemu.path, [*BARE, "-qmp", f"unix:{address},server=on,wait=off"]):
        async with Session.connect(address) as first:
            assert (await first.execute("query-status"))["running"] is False
            with pytest.raises(QmpError, match=r"QEMU talks to one client: is there another\?"):
                await Session.open(address, timeout_s=0.2)
        async with Session.connect(address) as second:
            assert (await second.execute("query-status"))["running"] is False


@every_qemu
@pytest.mark.asyncio
async def test_a_migration_to_nobody_fails_with_qemus_reason(qemu: Qemu, tmp_path: Path) -> None:
    async with Machine(qemu.path, BARE) as machine:
        assert (await migration.query(machine.session))["status"] == "none"
        await migration.set_parameters(machine.session, {"max-bandwidth": 1 << 30})
        await migration.start(machine.session, f"unix:{tmp_path}/nobody")
        with pytest.raises(QmpCommandError, match=r"migrate: Failed to connect to .*nobody.*: No such file"):
            await migration.wait_until(machine.session, "completed", timeout_s=60)


@every_qemu
@pytest.mark.asyncio
async def test_a_capability_that_no_qemu_has_is_named(qemu: Qemu) -> None:
    async with Machine(qemu.path, BARE) as machine:
        with pytest.raises(QmpError, match="no migration capability time-travel"):
            await migration.set_capabilities(machine.session, {"events": True, "time-travel": True})
        await migration.set_capabilities(machine.session, {"events": True, "time-travel": False})
        assert (await migration.capabilities(machine.session))["events"] is True


@every_qemu
@pytest.mark.asyncio
async def test_many_commands_at_once_are_all_answered(qemu: Qemu) -> None:
    async with Machine(qemu.path, BARE) as machine:
        answers = await asyncio.gather(*(machine.session.execute("query-name") for _ in range(200)))
    assert answers == [{}] * 200


@every_qemu
def test_a_machine_can_be_had_without_asyncio(qemu: Qemu) -> None:
    with Blocking() as qmp:
        machine = qmp.enter(Machine(qemu.path, BARE))
        assert qmp.run(machine.session.execute("query-status"))["status"] == "prelaunch"
    assert machine.exit_status == 0
