"""What breaks while a saved guest is restored: its connection, its server, its destination; what is said is true."""

import asyncio
import errno
import os
import random
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

from qmigrate.endpoint.relay import Channel, Relay
from qmigrate.errors import QmpError
from qmigrate.operations.restore import ServingResult
from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.guests.build import Guest
from tests.live.recording import Kind, at_once
from tests.live.versions import Qemu
from tests.soak.restoring import Input, command_of, recorded_input, restored, restorer_of, waiting

__all__ = [
    "CUTS",
    "VICTIM_PHASES",
    "WRONGS",
    "Acting",
    "assert_has_not_run",
    "cut",
    "cut_connection",
    "kill_destination",
    "kill_server",
    "relayed",
    "settled",
    "spoil_file",
]

CUTS: Final = 20
WRONGS: Final = ("truncated", "changed", "unreadable")
VICTIM_PHASES: Final = ("at once", "early", "middle", "late", "at the end")

BROKEN: Final = Guest("walker", memory_mib=32, zero_share=0.25, walked_share=0.25, pages_per_tick=0)


class Acting:
    """Does something once, when so many bytes have been passed on to the destination, while the guest runs there."""

    def __init__(self, after_bytes: int, act: Callable[[Relay], None]) -> None:
        self.relay: Relay | None = None
        self.acted = False
        self._after = after_bytes
        self._act = act

    def passed(self, _: Channel) -> None:
        if self.relay is None or self.acted:
            return
        if sum(channel.forward_bytes for channel in self.relay.channels) >= self._after:
            self.acted = True
            self._act(self.relay)


def cut(relay: Relay) -> None:
    """All connections."""
    for channel in relay.channels:
        channel.cut()


@asynccontextmanager
async def relayed(folder: Path, acting: Acting) -> AsyncGenerator[Relay]:
    """Between the server, which connects to ``folder/relay``, and the destination, which listens at ``folder/in``."""
    relay = Relay(f"unix:{folder / 'relay'}", f"unix:{folder / 'in'}", folder / "relayed", on_bytes=acting.passed)
    async with relay:
        acting.relay = relay
        yield relay


async def _for_breaking(qemu: Qemu, folder: Path) -> Input:
    """Saved while paused: in one pass, so that as many bytes pass as the file has, and no write is lost by the saver
    (5.2 and 7.2 lose some under TCG).
    """
    return await recorded_input(qemu, Kind("to be broken", guest=BROKEN, paused=True, course=at_once), folder / "saved")


def cut_connection(qemu: Qemu, number: int) -> Callable[[random.Random, Path], Awaitable[str]]:
    """At a moment in its own twentieth of all bytes; then nothing is lost."""

    async def run(chance: random.Random, folder: Path) -> str:
        saved = await _for_breaking(qemu, folder)
        part = saved.stream.stat().st_size // CUTS
        acting = Acting(number * part + chance.randrange(part), cut)
        async with waiting(saved, folder / "d") as machine, relayed(folder / "d", acting):
            restorer = restorer_of(saved)
            here = folder / "d"
            result = await restorer.run(machine.session, uri=f"unix:{here / 'relay'}", listen=f"unix:{here / 'in'}")
            if result.exit_code:
                assert_has_not_run(result)
                return f"before RUN ({result.exit_code}): the guest is in the file"
            assert result.recoveries == acting.acted, result.message
            await console.assert_goes_on(here / "console")
        return "" if acting.acted else "over before the cut"

    return run


def assert_has_not_run(result: ServingResult) -> None:
    """Before RUN nothing can be brought back, and nothing is lost; but a destination whose main loop waits for a page,
    to load its devices, does not say where its guest is.
    """
    assert "loaded" not in result.moments, result.message
    assert "running" not in result.moments, result.message
    assert result.exit_code == 3 or (
        result.exit_code == 7 and "as far as is known it has not begun to run: end that QEMU" in result.message
    ), result.message


def _after(phase: str, saved: Input, chance: random.Random) -> int:
    length = saved.stream.stat().st_size
    low, high = {
        "at once": (0.0, 0.01),
        "early": (0.01, 0.2),
        "middle": (0.2, 0.8),
        "late": (0.8, 0.97),
        "at the end": (0.97, 0.999),
    }[phase]
    return int(length * chance.uniform(low, high))


def kill_server(qemu: Qemu, phase: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    """SIGKILL; then another takes over, and nothing is lost; or nothing had begun."""

    async def run(chance: random.Random, folder: Path) -> str:
        saved = await _for_breaking(qemu, folder)
        here, qmp = folder / "d", folder / "qmp"
        victims: list[asyncio.subprocess.Process] = []
        acting = Acting(_after(phase, saved, chance), lambda _: victims[0].send_signal(signal.SIGKILL))
        more = ("-qmp", f"unix:{qmp},server=on,wait=off")
        async with waiting(saved, here, *more) as machine, relayed(here, acting) as relay:
            victims.append(
                await command_of(saved, qmp, here, "--uri", str(relay.address), "--listen", f"unix:{here}/in")
            )
            await victims[0].communicate()
            if victims[0].returncode == 0:
                return "over before the kill"
            assert victims[0].returncode == -signal.SIGKILL
            status = await settled(machine)
            if status == "postcopy-paused":
                second = await command_of(saved, qmp, here, "--uri", f"unix:{here / 'again'}", "--resume")
                _, said = await second.communicate()
                assert second.returncode == 0, said.decode()
                status = "completed"
            if status == "completed":
                await console.assert_goes_on(here / "console")
                return ""
            machine.kill()
        async with waiting(saved, folder / "anew") as machine:
            result = await restored(saved, machine, folder / "anew")
            assert result.exit_code == 0, result.message
            await console.assert_goes_on(folder / "anew" / "console")
        return f"before RUN ({status}): restored anew"

    return run


async def settled(machine: Machine) -> str:
    """What a destination is that was left alone; empty where it ended."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if machine.exit_status is not None:
            return ""
        try:
            status = str((await migration.query(machine.session, timeout_s=5))["status"])
        except QmpError:
            status = "silent"
        if status in ("postcopy-paused", "completed", "failed", "none"):
            return status
        await asyncio.sleep(0.05)
    return status


def kill_destination(qemu: Qemu, phase: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    """It is said where the guest is: in the file, or lost."""

    async def run(chance: random.Random, folder: Path) -> str:
        saved = await _for_breaking(qemu, folder)
        here = folder / "d"
        async with waiting(saved, here) as machine:
            acting = Acting(_after(phase, saved, chance), lambda _: machine.kill())
            async with relayed(here, acting):
                restorer = restorer_of(saved)
                result = await restorer.run(machine.session, uri=f"unix:{here / 'relay'}", listen=f"unix:{here / 'in'}")
            if result.exit_code == 0:
                return "over before the kill"
            ran = "loaded" in result.moments or "running" in result.moments
            assert result.exit_code == (6 if ran else 3), result.message
            assert "SIGKILL" in result.message, result.message
        return "" if ran else "before RUN: the guest is in the file"

    return run


def spoil_file(qemu: Qemu, how: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    """While it is served: its guest stops rather than to get what is wrong; once it is whole again it goes on."""

    async def run(chance: random.Random, folder: Path) -> str:
        saved = await _for_breaking(qemu, folder)
        here, whole = folder / "d", saved.stream.read_bytes()
        with ExitStack() as stack:

            def spoil(_: Relay) -> None:
                if how == "unreadable":
                    stack.enter_context(_unreadable(saved.stream))
                elif how == "truncated":
                    os.truncate(saved.stream, len(whole) // 2)
                else:
                    os.utime(saved.stream)

            async with waiting(saved, here) as machine:
                acting = Acting(_after("middle", saved, chance), spoil)
                async with relayed(here, acting):
                    result = await restorer_of(saved).run(
                        machine.session, uri=f"unix:{here / 'relay'}", listen=f"unix:{here / 'in'}"
                    )
                if result.exit_code == 0:
                    return "over before it went wrong"
                assert result.exit_code == 5, result.message
                expected = "can't be read" if how == "unreadable" else "the input was changed since"
                assert expected in result.message, result.message
                assert await settled(machine) == "postcopy-paused"
                stack.close()
                saved.stream.write_bytes(whole)
                again = await restorer_of(saved, resume=True).run(machine.session, uri=f"unix:{here / 'again'}")
                assert again.exit_code == 0, again.message
                await console.assert_goes_on(here / "console")
        return ""

    return run


@contextmanager
def _unreadable(path: Path) -> Generator[None]:
    """Each read of its contents in this process fails, as those of a disk that is broken do."""
    inode, read = path.stat().st_ino, os.preadv

    def preadv(descriptor: int, *rest: Any) -> int:
        if os.fstat(descriptor).st_ino == inode:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, *rest)

    os.preadv = preadv
    try:
        yield
    finally:
        os.preadv = read
