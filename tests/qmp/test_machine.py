"""The machine, with a program in QEMU's place that does what no QEMU does."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from qmigrate.errors import QemuDiedError, QmpConnectError, QmpError, QmpTimeoutError
from qmigrate.qmp import machine as machine_module
from qmigrate.qmp.machine import Machine

pytestmark = pytest.mark.asyncio

# Speaks QMP on the descriptor that it is given, as far as a test wants.
FAKE_QEMU = """
import json, os, re, signal, socket, sys, time
monitor = socket.socket(fileno=int(re.search(r"fd=(\\d+)", " ".join(sys.argv))[1]))
def say(message): monitor.sendall(json.dumps(message).encode() + b"\\r\\n")
def hear():
    heard = monitor.recv(65536)
    return json.loads(heard) if heard else sys.exit()
def greet():
    say({"QMP": {"version": {}, "capabilities": []}})
    hear(); say({"return": {}})
def serve():
    while True: say({"return": {}, "id": hear()["id"]})
"""


def fake(script: str, *, kind: type[Machine] = Machine, **options: float) -> Machine:
    return kind([sys.executable, "-c", FAKE_QEMU + script], name="fake", **options)  # type: ignore[arg-type]


class Impatient(Machine):
    """Asks for a moment only, and then leaves it all the time it needs to obey SIGTERM."""

    async def quit(self, *, timeout_s: float | None = None) -> int:
        return await super().quit(timeout_s=0.05 if timeout_s is None else timeout_s)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def open_files() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


async def test_what_cannot_be_executed_is_named(tmp_path: Path) -> None:
    with pytest.raises(QemuDiedError, match=r"it did not start: .* exit status 1: .*qemu: No such file") as caught:
        await Machine(tmp_path / "qemu").start()
    assert caught.value.exit_status == 1


async def test_an_early_end_is_told_with_the_last_words() -> None:
    machine = fake("print('qemu: -foo: invalid option', file=sys.stderr); sys.exit(3)")
    with pytest.raises(QemuDiedError) as caught:
        await machine.start()
    assert str(caught.value) == ("fake: it did not start: QEMU ended with exit status 3: qemu: -foo: invalid option")
    assert caught.value.exit_status == machine.exit_status == 3
    assert caught.value.stderr == "qemu: -foo: invalid option\n"


async def test_a_machine_that_never_greets_is_killed() -> None:
    machine = fake("time.sleep(1000)", start_timeout_s=0.3)
    with pytest.raises(QmpConnectError, match=r"fake: no QMP greeting within 0\.3 s of its start: is this a QEMU\?"):
        await machine.start()
    assert machine.exit_status == -signal.SIGKILL


async def test_a_machine_that_ignores_quit_and_sigterm_is_killed() -> None:
    async with fake("signal.signal(signal.SIGTERM, signal.SIG_IGN); greet(); serve()", quit_timeout_s=0.05) as machine:
        pid = machine.pid
    assert machine.exit_status == -signal.SIGKILL
    assert not is_running(pid)


async def test_a_stopped_machine_is_killed() -> None:
    async with fake("greet(); serve()", quit_timeout_s=0.05) as machine:
        os.kill(machine.pid, signal.SIGSTOP)
    assert machine.exit_status == -signal.SIGKILL


async def test_a_machine_that_closes_qmp_but_runs_is_told_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "DEATH_TIMEOUT_S", 0.5)
    script = "greet(); hear(); monitor.close(); time.sleep(1000)"
    async with fake(script, kind=Impatient, quit_timeout_s=120) as machine:
        with pytest.raises(QemuDiedError, match="stop: QEMU closed the connection, but runs") as caught:
            await machine.session.execute("stop")
        assert caught.value.exit_status is None
    assert machine.exit_status == -signal.SIGTERM


async def test_a_machine_killed_by_a_signal_is_told_with_its_name() -> None:
    async with fake("greet(); hear(); os.kill(os.getpid(), signal.SIGABRT)") as machine:
        with pytest.raises(QemuDiedError, match="stop: QEMU was killed by SIGABRT") as caught:
            await machine.session.execute("stop")
        assert caught.value.exit_status == -signal.SIGABRT
        assert await machine.wait(timeout_s=10) == -signal.SIGABRT


async def test_only_the_end_of_stderr_is_kept() -> None:
    script = "greet(); hear(); os.write(2, b'x' * 1_000_000 + b'the end'); sys.exit(1)"
    async with fake(script) as machine:
        with pytest.raises(QemuDiedError):
            await machine.session.execute("stop")
        assert len(machine.stderr) == machine_module.STDERR_KEPT_BYTES
        assert machine.stderr.endswith("xthe end")


async def test_waiting_for_a_machine_that_runs_on_is_a_time_out() -> None:
    async with fake("greet(); serve()", quit_timeout_s=0.05) as machine:
        with pytest.raises(QmpTimeoutError, match=r"fake: it still runs after 0\.05 s"):
            await machine.wait(timeout_s=0.05)


async def test_descriptors_are_handed_over_under_their_numbers() -> None:
    reader, writer = os.pipe()
    try:
        machine = Machine(
            [sys.executable, "-c", FAKE_QEMU + f"os.write({writer}, b'here'); greet(); hear()"],
            pass_fds=[writer],
        )
        async with machine:
            assert os.read(reader, 100) == b"here"
    finally:
        os.close(reader)
        os.close(writer)


async def test_no_descriptor_is_left_open() -> None:
    before = open_files()
    async with fake("greet(); hear()"):
        pass
    with pytest.raises(QemuDiedError):
        await fake("sys.exit(1)").start()
    assert open_files() == before


async def test_a_machine_starts_once() -> None:
    machine = fake("greet(); hear()")
    with pytest.raises(QmpError, match="fake: it has not been started"):
        _ = machine.session
    async with machine:
        with pytest.raises(QmpError, match="fake: it has been started already"):
            await machine.start()


async def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    before = open_files()
    machine = fake("time.sleep(1000)")
    starting = asyncio.create_task(machine.start())
    await asyncio.sleep(0)  # by now it has been spawned, and is waited for
    pid = machine.pid
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not is_running(pid)
    assert open_files() == before


async def test_a_machine_whose_block_is_cancelled_has_ended() -> None:
    machine = fake("greet(); serve()", quit_timeout_s=0.05)
    inside = asyncio.Event()

    async def use() -> None:
        async with machine:
            inside.set()
            await asyncio.sleep(1000)

    using = asyncio.create_task(use())
    await inside.wait()
    using.cancel()
    with pytest.raises(asyncio.CancelledError):
        await using
    assert machine.exit_status is not None
