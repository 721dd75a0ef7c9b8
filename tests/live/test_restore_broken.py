"""``restore`` where something breaks: the connection, the destination, the terminal; and being told to stop."""

import asyncio
import os
import pty
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, ClassVar, Final

import pytest

from qmigrate.capture.migration import Migration
from qmigrate.events import GuestChanged, LiveEvent, Recovering
from qmigrate.operations.restore import Restorer, ServingResult
from qmigrate.protocol.source import Source
from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.live.command import ROOT
from tests.live.recording import arguments_of
from tests.live.saved import File, saved
from tests.live.some import every_qemu, oldest_and_newest, only_newest
from tests.live.test_restore import Withholding, hold, peers, until, waiting
from tests.live.versions import Qemu

__all__ = ["peers"]  # a fixture

pytestmark = [pytest.mark.live, pytest.mark.asyncio]

TIMEOUT_S: Final = 60.0


class Breaking(Withholding):
    """Each time that all is sent but the last block, or all, ``then`` happens in place of END, while there is one."""

    acts: ClassVar[list[Callable[[], object]]] = []

    def end(self) -> bytes:
        assert type(self).go_on.wait(TIMEOUT_S)
        if type(self).acts:
            type(self).acts.pop(0)()
            return b""
        return Source.end(self)


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> type[Breaking]:
    Breaking.go_on, Breaking.acts = Event(), []
    monkeypatch.setattr("qmigrate.endpoint.source.Source", Breaking)
    return Breaking


async def restored(file: File, machine: Machine, folder: Path, said: list[LiveEvent], **wishes: Any) -> ServingResult:
    """What breaks breaks once the guest runs."""
    restorer = Restorer(file.stream, on_event=said.append, **wishes)
    task = asyncio.ensure_future(restorer.run(machine.session, uri=f"unix:{folder / 'in'}"))
    async with asyncio.timeout(TIMEOUT_S):
        await until(lambda: task.done() or any(isinstance(each, GuestChanged) and each.running for each in said))
        Breaking.go_on.set()
        return await task


def cut(peers: list[socket.socket]) -> None:
    """All connections, as when a cable is pulled."""
    for peer in peers:
        if peer.fileno() >= 0:
            peer.shutdown(socket.SHUT_RDWR)


@every_qemu
async def test_a_connection_that_breaks_is_made_anew(
    qemu: Qemu, tmp_path: Path, peers: list[socket.socket], breaking: type[Breaking]
) -> None:
    """With pages missing, and with its preempt channel where there is one."""
    file = await saved(qemu, "pc-running", tmp_path / "saved")
    breaking.acts = [partial(cut, peers)]
    async with waiting(file, tmp_path / "d") as machine:
        result = await restored(file, machine, tmp_path / "d", [])
        assert (result.exit_code, result.message) == (0, "the guest runs, all its pages are in, brought back once")
        assert result.counts.pages == result.counts.total
        await console.assert_goes_on(tmp_path / "d" / "console")


@every_qemu
async def test_a_connection_that_breaks_twice_is_made_anew_twice(
    qemu: Qemu, tmp_path: Path, peers: list[socket.socket], breaking: type[Breaking]
) -> None:
    """Once with pages missing, once with none.

    Without its preempt channel: 10.0 is killed by SIGSEGV, about 1 time in 60 with eight such tests at a time on two
    cores, where both connections break within milliseconds of a recovery.
    """
    file = await saved(qemu, "pc-running", tmp_path / "saved")
    breaking.acts = [partial(cut, peers), partial(cut, peers)]
    said: list[LiveEvent] = []
    async with waiting(file, tmp_path / "d") as machine:
        result = await restored(file, machine, tmp_path / "d", said, preempt=False)
        assert (result.exit_code, result.message) == (
            0,
            "the guest runs, all its pages are in, brought back 2 times",
        )
        assert [each.attempt for each in said if isinstance(each, Recovering)] == [1, 2]
        assert result.counts.pages == result.counts.total
        await console.assert_goes_on(tmp_path / "d" / "console")


@only_newest
async def test_a_connection_is_made_anew_as_often_as_was_said(
    qemu: Qemu, tmp_path: Path, peers: list[socket.socket], breaking: type[Breaking]
) -> None:
    file = await saved(qemu, "pc-running", tmp_path / "saved")
    breaking.acts = [partial(cut, peers), partial(cut, peers)]
    async with waiting(file, tmp_path / "d") as machine:
        result = await restored(file, machine, tmp_path / "d", [], recoveries=1, preempt=False)
        assert result.exit_code == 5
        assert "broke after one attempt to bring it back" in result.message
        assert "`qmigrate restore --resume` goes on" in result.message
        assert (await migration.query(machine.session))["status"] == "postcopy-paused"
        async with asyncio.timeout(TIMEOUT_S):
            again = await Restorer(file.stream, resume=True).run(
                machine.session, uri=f"unix:{tmp_path / 'd' / 'again'}"
            )
        assert (again.exit_code, again.running) == (0, True)
        await console.assert_goes_on(tmp_path / "d" / "console")


@oldest_and_newest
async def test_a_destination_that_is_killed_has_lost_the_guest(
    qemu: Qemu, tmp_path: Path, breaking: type[Breaking]
) -> None:
    file = await saved(qemu, "pc-running", tmp_path / "saved")
    async with waiting(file, tmp_path / "d") as machine:
        breaking.acts = [machine.kill]
        result = await restored(file, machine, tmp_path / "d", [])
        assert result.exit_code == 6
        assert "what the guest did since it ran is lost" in result.message
        assert "SIGKILL" in result.message


@only_newest
async def test_a_destination_that_is_killed_before_the_guest_runs_leaves_it_in_the_file(
    qemu: Qemu, tmp_path: Path
) -> None:
    file = await saved(qemu, "pc-running", tmp_path / "saved")
    async with waiting(file, tmp_path / "d") as machine:

        def is_dead() -> bool:
            machine.kill()
            return machine.exit_status is not None

        restorer = Restorer(file.stream)
        with Migration(file.stream) as read, restorer.read(read) as indexed:
            hold(indexed.index, is_dead)
            async with asyncio.timeout(TIMEOUT_S):
                result = await restorer.run_saved(indexed, machine.session, uri=f"unix:{tmp_path / 'd' / 'in'}")
        assert result.exit_code == 3
        assert "SIGKILL" in result.message


@only_newest
async def test_a_terminal_that_goes_away_stops_nothing_once_the_guest_may_run(
    qemu: Qemu, tmp_path: Path, breaking: type[Breaking]
) -> None:
    file = await saved(qemu, "pc-running", tmp_path / "saved")
    async with waiting(file, tmp_path / "d") as machine:
        said: list[LiveEvent] = []
        restorer = Restorer(file.stream, on_event=said.append)
        assert not restorer.hang_up()  # before: to be cancelled
        task = asyncio.ensure_future(restorer.run(machine.session, uri=f"unix:{tmp_path / 'd' / 'in'}"))
        async with asyncio.timeout(TIMEOUT_S):
            await until(lambda: any(isinstance(each, GuestChanged) and each.running for each in said))
            assert [restorer.hang_up() for _ in range(3)] == [True] * 3  # of the kernel, of a shell, of anybody
            breaking.go_on.set()
            result = await task
        assert (result.exit_code, result.running) == (0, True)


@only_newest
async def test_the_command_outlives_its_terminal(qemu: Qemu, tmp_path: Path) -> None:
    """The guest is in a QEMU of its own, which goes on too; and ends when the command is told to, twice."""
    file = await saved(qemu, "pc-running", tmp_path / "saved")
    said = tmp_path / "console"
    arguments = [str(qemu.path), *arguments_of(qemu, file.kind, tmp_path, said)]
    controller, terminal = pty.openpty()
    # A session of its own, whose terminal this is: setsid --ctty.
    command = await asyncio.create_subprocess_exec(
        *("setsid", "--ctty", sys.executable, "-m", "qmigrate", "restore", str(file.stream), "--", *arguments),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=ROOT,
    )
    os.close(terminal)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            heard = b""
            while b"all its pages are in" not in heard:
                heard += await asyncio.to_thread(os.read, controller, 4096)
            os.close(controller)  # SIGHUP, and what it says from now on goes nowhere
            await console.assert_goes_on(said)
            await console.assert_goes_on(said)
            assert command.returncode is None
            command.send_signal(signal.SIGINT)
            command.send_signal(signal.SIGTERM)
            assert await command.wait() == 130
    finally:
        if command.returncode is None:
            command.kill()
            await command.wait()


@only_newest
async def test_that_nobody_reads_what_the_command_says_ends_nothing(qemu: Qemu, tmp_path: Path) -> None:
    file = await saved(qemu, "pc-running", tmp_path / "saved")
    statuses = {}
    for option in ("--ndjson", "--verbose"):
        folder = tmp_path / option.strip("-")
        qmp = tmp_path / f"{option.strip('-')}.qmp"
        async with waiting(file, folder, ("-qmp", f"unix:{qmp},server=on,wait=off")) as machine:
            nobody, end = os.pipe()
            os.close(nobody)
            command = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "qmigrate", "restore", option, str(file.stream), "--qmp", str(qmp)),
                stdout=end,
                stderr=end,
                cwd=ROOT,
            )
            os.close(end)
            async with asyncio.timeout(TIMEOUT_S):
                statuses[option] = await command.wait()
            assert (await migration.query(machine.session))["status"] == "completed"
            await console.assert_goes_on(folder / "console")
    assert statuses == {"--ndjson": 141, "--verbose": 141}


@only_newest
async def test_told_to_stop_before_anything_began_it_leaves_nothing_running(qemu: Qemu, tmp_path: Path) -> None:
    file = await saved(qemu, "pc-running", tmp_path / "saved")
    whoever, started = tmp_path / "qemu", tmp_path / "pid"
    whoever.write_text(f"#!/bin/sh\necho $$ > {started}.new\nmv {started}.new {started}\nexec sleep 600\n")
    whoever.chmod(0o755)
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmigrate", "restore", str(file.stream), "--", str(whoever)),
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await until(started.exists)
            command.send_signal(signal.SIGHUP)
            _, said = await command.communicate()
        assert command.returncode == 130
        assert b"interrupted before anything began" in said
        assert not Path(f"/proc/{started.read_text().strip()}").exists()
    finally:
        if command.returncode is None:
            command.kill()
            await command.wait()


@only_newest
async def test_a_qemu_of_our_own_ends_with_us_and_that_is_said(
    qemu: Qemu, tmp_path: Path, breaking: type[Breaking]
) -> None:
    """Told twice while it serves: here nobody can take over."""
    file = await saved(qemu, "pc-running", tmp_path / "saved")
    said: list[LiveEvent] = []
    async with waiting(file, tmp_path / "d") as machine:
        restorer = Restorer(file.stream, on_event=said.append, owned=True)
        task = asyncio.ensure_future(restorer.run(machine.session, uri=f"unix:{tmp_path / 'd' / 'in'}"))
        async with asyncio.timeout(TIMEOUT_S):
            await until(lambda: any(isinstance(each, GuestChanged) and each.running for each in said))
            assert restorer.interrupt()
            assert "in a QEMU that ends with this command" in str(said[-1])
            assert restorer.interrupt()
            breaking.acts = [bool]  # no END
            breaking.go_on.set()
            result = await task
        assert result.exit_code == 6
        assert "what the guest did is lost" in result.message
        machine.kill()  # it would not end by itself
