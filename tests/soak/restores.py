"""Saved guests restored lazily: every kind of input, sizes, machines, newer destinations; cuts, kills; a real Linux.

Whatever it is restored from, the destination, which is held by -S, is saved again and compared with one that loaded the
same file eagerly (QEMU itself where it can read the file, else our own precopy): every page of every block and every
field of every device is the same.  Then its guest goes on.
"""

import asyncio
import bz2
import gzip
import lzma
import random
import re
import shlex
import signal
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from qmigrate.analysis.diff import diff, read_side
from qmigrate.analysis.extract import extract
from qmigrate.capture.migration import Migration
from qmigrate.endpoint.relay import Channel, Relay
from qmigrate.errors import QmpCommandError
from qmigrate.operations.migrate import migrate
from qmigrate.operations.policy import AfterPass
from qmigrate.operations.restore import Restorer
from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.guests.build import Guest
from tests.guests.linux import Linux
from tests.live.broken import Cutter, broken_plan
from tests.live.command import ROOT
from tests.live.pair import pair
from tests.live.receiving import huge_pages
from tests.live.recording import FAST, KINDS, ODD, Kind, arguments_of, at_once, recorded
from tests.live.same import assert_same_ram
from tests.live.tapping import tapped
from tests.live.versions import Qemu, installed, named
from tests.soak import encodings, files
from tests.soak.migrations import Unit

__all__ = ["units"]

MIB: Final = 1 << 20
TIMEOUT_S: Final = 120.0
CUTS: Final = 20
# Else it goes on by the host's clock while all is held by -S, and differs from one destination to the next.
RTC: Final = ("-rtc", "base=2026-01-01,clock=vm")
VICTIM_PHASES: Final = ("at once", "early", "middle", "late", "at the end")

# Of the odd ones those that a guest can be restored from; the others are refused, and tests say so.
ODD_INPUTS: Final = (
    *("pc-no-footers", "pc-no-configuration", "pc-no-description", "pc-bare", "q35-bare", "pc-snapshot", "pc-savevm"),
    *("q35-early", "pc-huge", "pc-huge-postcopy"),
)
HUGE: Final = ("pc-huge", "pc-huge-postcopy")
PLAIN: Final = ("pc-running", "pc-paused", "q35-running", "q35-paused", "q35-many", "q35-advised", "pc-postcopy")
PACKED: Final[Mapping[str, Callable[[bytes], bytes]]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": partial(lzma.compress, preset=1),
}
# Memory in MiB, machine, share of zero pages.  q35 has its hole below 4 GiB from 2 GiB on.
SIZES: Final = (
    (128, "pc", 0.25),
    (1024, "q35", 0.25),
    (4096, "pc", 0.75),
    (4096, "q35", 0.75),
    (8192, "q35", 0.75),
)
NEWER: Final = (
    ("5.2", "7.2", "pc-q35-5.2"),
    ("7.2", "10.0", "pc-q35-7.2"),
    ("7.2", "11.1", "pc-q35-7.2"),
    ("10.0", "11.1", "pc-q35-10.0"),
)


@dataclass(frozen=True)
class Input:
    """A saved guest, and how to have its machine.  ``eager``: the URI from which QEMU itself loads it, if it can."""

    qemu: Qemu
    kind: Kind
    stream: Path
    channels: tuple[str, ...] = ()
    eager: str | None = None
    capabilities: Mapping[str, bool] | None = None


def units() -> Iterator[Unit]:
    """All of them."""
    for qemu in installed():
        yield from _inputs(qemu)
        for memory, machine, zero in SIZES:
            yield Unit(f"restore size {memory} MiB {machine} {qemu.name}", _size(qemu, memory, machine, zero))
        yield Unit(f"restore onto huge pages {qemu.name}", _onto_huge_pages(qemu))
        yield Unit(f"restore eight at once {qemu.name}", _eight(qemu))
        yield Unit(f"restore a Linux {qemu.name}", _linux(qemu))
        for number in range(CUTS):
            yield Unit(f"restore cut {number} {qemu.name}", _cut(qemu, number))
        for phase in VICTIM_PHASES:
            yield Unit(f"restore server killed {phase} {qemu.name}", _kill_server(qemu, phase))
            yield Unit(f"restore destination killed {phase} {qemu.name}", _kill_destination(qemu, phase))
    for source, destination, machine in NEWER:
        one, two = named(source), named(destination)
        if one is not None and two is not None:
            yield Unit(f"restore newer {source}→{destination}", _newer(one, two, machine))


# ---- the proof ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def waiting(saved: Input, folder: Path, *more: str, taker: Qemu | None = None) -> AsyncGenerator[Machine]:
    """A QEMU of the saved guest's machine, which waits for it."""
    folder.mkdir()
    qemu = taker or saved.qemu
    arguments = [*arguments_of(qemu, saved.kind, folder, folder / "console"), "-incoming", "defer", *RTC, *more]
    async with Machine(qemu.path, arguments, name=f"destination {qemu.name}") as machine:
        yield machine


async def proved(saved: Input, folder: Path, *more: str, taker: Qemu | None = None, ram: bool = True) -> str:
    """Restored lazily, it is what it is when loaded eagerly; and goes on.  ``ram``: held to the file's pages too."""
    async with waiting(saved, folder / "lazy", "-S", *more, taker=taker) as machine:
        result = await _restored(saved, machine, folder / "lazy")
        assert (result.exit_code, result.running) == (0, False), result.message
        assert result.counts.pages == result.counts.total
        if ram:
            with Migration(saved.stream, channels=saved.channels) as read:
                extracted = extract(read, folder / "ram")
            compared = await assert_same_ram(machine, extracted, folder / "memory")
            assert (taker or saved.qemu).number < (10,) or len(compared.whole) == len(extracted.files)
        lazily = await _saved_again(machine, folder / "lazy")
        if saved.kind.has_guest:
            await _go_on(machine)
            await console.assert_goes_on(folder / "lazy" / "console")
    async with waiting(saved, folder / "eager", "-S", *more, taker=taker) as machine:
        if saved.eager is None:
            result = await _restored(saved, machine, folder / "eager", eager=True)
            assert result.exit_code == 0, result.message
        else:
            await migration.set_capabilities(machine.session, saved.capabilities or {})
            await migration.start_incoming(machine.session, saved.eager)
            await migration.wait_until(machine.session, "completed", timeout_s=TIMEOUT_S)
        eagerly = await _saved_again(machine, folder / "eager")
    _assert_same(lazily, eagerly)
    return "" if saved.eager else "eagerly by our own precopy"


async def _restored(saved: Input, machine: Machine, folder: Path, **wishes: Any) -> Any:
    restorer = Restorer(saved.stream, channels=saved.channels, **wishes)
    return await restorer.run(machine.session, uri=f"unix:{folder / 'in'}")


async def _go_on(machine: Machine) -> None:
    """11.1 says that a migration is completed a moment before it lets the guest go on."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            await machine.session.execute("cont")
        except QmpCommandError as exc:
            if "not finalized" not in exc.message or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.01)
        else:
            return


async def _saved_again(machine: Machine, folder: Path) -> Path:
    states = await migration.capabilities(machine.session)
    on = {name: False for name, state in states.items() if state and name != "events"}
    await migration.set_capabilities(machine.session, on)
    again = folder / "again.mig"
    await migration.set_parameters(machine.session, {"max-bandwidth": FAST})
    await migration.start(machine.session, f"exec:cat > {shlex.quote(str(again))}")
    await migration.wait_until(machine.session, "completed", timeout_s=TIMEOUT_S)
    return again


def _assert_same(lazily: Path, eagerly: Path) -> None:
    with ExitStack() as stack:
        sides = []
        for path in (lazily, eagerly):
            with Migration(path) as capture:
                sides.append(read_side(capture, path.parent.name, stack))
        found = diff(*sides)
        assert found.complete
        fields = [f"{each.path}: {each.a!r} lazily, {each.b!r} eagerly" for each in found.fields]
        assert not fields, fields
        structure = [each.name for each in found.structure if each.counts]
        assert not structure, structure
        unequal = {block.name: block.unequal for block in found.blocks or [] if block.unequal}
        assert not unequal, unequal
        assert found.same
        assert len(found.blocks or []) >= 2


# ---- kinds of input -----------------------------------------------------------------------------------------


def _inputs(qemu: Qemu) -> Iterator[Unit]:
    kinds: dict[str, Kind] = {name: KINDS[name] for name in PLAIN}
    kinds |= {name: ODD[name] for name in ODD_INPUTS}
    kinds |= {f"encoded {name}": kind for name, kind in encodings.ways()}
    kinds |= {f"file {name}": kind for name, kind in files.FILES.items()}
    for name, kind in kinds.items():
        if qemu in kind.qemus():
            yield Unit(f"restore input {name} {qemu.name}", _input(qemu, kind, is_huge=name in HUGE))
    for name in PACKED:
        yield Unit(f"restore input packed {name} {qemu.name}", _packed(qemu, name))
    for name, (preempt, cut) in files.TAPPED.items():
        if not preempt or qemu.number >= (7, 1):
            yield Unit(f"restore input tapped {name} {qemu.name}", _tapped(qemu, name, preempt, cut))


async def _recorded(qemu: Qemu, kind: Kind, folder: Path) -> Input:
    folder.mkdir()
    async with recorded(qemu, kind, folder) as recording:
        path, channels = recording.stream, tuple(map(str, recording.channels))
    eager, capabilities = None, dict(kind.capabilities)
    if capabilities.get("mapped-ram"):
        eager = f"file:{path}"
    elif not channels and not kind.through_relay:
        eager, capabilities = f"exec:cat {shlex.quote(str(path))}", {}
    return Input(qemu, kind, path, channels, eager, capabilities)


def _input(qemu: Qemu, kind: Kind, *, is_huge: bool) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(_: random.Random, folder: Path) -> str:
        with ExitStack() as stack:
            if is_huge:
                stack.enter_context(huge_pages(16))
            return await proved(await _recorded(qemu, kind, folder / "saved"), folder)

    return run


def _packed(qemu: Qemu, how: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(_: random.Random, folder: Path) -> str:
        saved = await _recorded(qemu, KINDS["pc-running"], folder / "saved")
        packed = saved.stream.with_suffix(f".{how}")
        packed.write_bytes(PACKED[how](saved.stream.read_bytes()))
        return await proved(replace(saved, stream=packed), folder)

    return run


def _tapped(qemu: Qemu, name: str, preempt: bool, cut: bool) -> Callable[[random.Random, Path], Awaitable[str]]:
    """A live migration that `qmigrate tap` recorded: one file with all channels."""

    async def run(chance: random.Random, folder: Path) -> str:
        cutter = Cutter([chance.randrange(MIB // 4, 2 * MIB)] if cut else [])
        behind = f"unix:{folder / 'behind'}"
        async with pair(qemu, folder) as two:
            async with (
                Relay(behind, two.uri, folder / "relayed", on_bytes=cutter.passed) as relay,
                tapped(folder, behind) as (listen, recording),
            ):
                cutter.relay = relay
                more = {"postcopy": [AfterPass(1)]} if name == "after a pass" else {}
                plan = broken_plan(two, uri=listen, preempt=preempt, **more)
                result = await migrate(*two.sessions, plan, on_event=cutter.heard)
                assert (result.exit_code, result.recoveries) == (0, cutter.cuts), result.message
            two.kill()
        kind = Kind("a guest of a pair", guest=Guest("walker", memory_mib=16))
        # QEMU's own postcopy goes on changing pages of a running guest: what the recording holds is the measure.
        return await proved(Input(qemu, kind, recording), folder)

    return run


# ---- sizes, machines, newer destinations --------------------------------------------------------------------


def _size(qemu: Qemu, memory: int, machine: str, zero: float) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(_: random.Random, folder: Path) -> str:
        guest = Guest("walker", memory_mib=memory, zero_share=zero, walked_share=1 / 256, pages_per_tick=0)
        kind = Kind("so large", machine=machine, guest=guest, paused=True, course=at_once)
        saved = await _recorded(qemu, kind, folder / "saved")
        # Of a large one the guest's own addresses are not read one by one: it is saved again and compared whole.
        return await proved(saved, folder, ram=memory <= 1024)

    return run


def _newer(saver: Qemu, taker: Qemu, machine: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(_: random.Random, folder: Path) -> str:
        kind = replace(KINDS["q35-running"], machine=machine)
        return await proved(await _recorded(saver, kind, folder / "saved"), folder, taker=taker)

    return run


def _onto_huge_pages(qemu: Qemu) -> Callable[[random.Random, Path], Awaitable[str]]:
    """The saver had none."""

    async def run(_: random.Random, folder: Path) -> str:
        memory = "memory-backend-memfd,id=pc.ram,size=8M,hugetlb=on,hugetlbsize=2M"
        memory += ",x-use-canonical-path-for-ramblock-id=off"
        saved = await _recorded(qemu, KINDS["pc-running"], folder / "saved")
        onto = replace(saved, kind=replace(saved.kind, machine="pc,memory-backend=pc.ram"))
        with huge_pages(16):
            return await proved(onto, folder, "-object", memory)

    return run


def _eight(qemu: Qemu) -> Callable[[random.Random, Path], Awaitable[str]]:
    """Eight commands serve one file of 128 MiB at once."""

    async def run(_: random.Random, folder: Path) -> str:
        guest = Guest("walker", memory_mib=128, walked_share=1 / 256, pages_per_tick=32)
        kind = Kind("one for many", guest=guest, paused=True, course=at_once)
        saved = await _recorded(qemu, kind, folder / "saved")

        async def one(number: int) -> None:
            here = folder / str(number)
            async with waiting(saved, here, "-qmp", f"unix:{folder / f'{number}.qmp'},server=on,wait=off"):
                command = await _command(saved, folder / f"{number}.qmp", here)
                _, said = await command.communicate()
                assert command.returncode == 0, said.decode()
                await console.assert_goes_on(here / "console")

        await asyncio.gather(*map(one, range(8)))
        return ""

    return run


async def _command(saved: Input, qmp: Path, folder: Path, *more: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmigrate", "restore", str(saved.stream), "--qmp", str(qmp)),
        *("--uri", f"unix:{folder / 'in'}", "-q", *more),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )


# ---- what breaks --------------------------------------------------------------------------------------------

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
    return await _recorded(qemu, Kind("to be broken", guest=BROKEN, paused=True, course=at_once), folder / "saved")


def _cut(qemu: Qemu, number: int) -> Callable[[random.Random, Path], Awaitable[str]]:
    """At a moment in its own twentieth of all bytes; then nothing is lost."""

    async def run(chance: random.Random, folder: Path) -> str:
        saved = await _for_breaking(qemu, folder)
        part = saved.stream.stat().st_size // CUTS
        acting = Acting(number * part + chance.randrange(part), cut)
        async with waiting(saved, folder / "d") as machine, relayed(folder / "d", acting):
            restorer = Restorer(saved.stream)
            here = folder / "d"
            result = await restorer.run(machine.session, uri=f"unix:{here / 'relay'}", listen=f"unix:{here / 'in'}")
            if result.exit_code == 3:  # before RUN nothing can be brought back, and nothing is lost
                assert not restorer._moments.get("loaded")
                return "before RUN: the guest is in the file"
            assert result.exit_code == 0, result.message
            assert result.recoveries == acting.acted, result.message
            await console.assert_goes_on(here / "console")
        return "" if acting.acted else "over before the cut"

    return run


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


def _kill_server(qemu: Qemu, phase: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    """SIGKILL; then another takes over, and nothing is lost; or nothing had begun."""

    async def run(chance: random.Random, folder: Path) -> str:
        saved = await _for_breaking(qemu, folder)
        here, qmp = folder / "d", folder / "qmp"
        victims: list[asyncio.subprocess.Process] = []
        acting = Acting(_after(phase, saved, chance), lambda _: victims[0].send_signal(signal.SIGKILL))
        more = ("-qmp", f"unix:{qmp},server=on,wait=off")
        async with waiting(saved, here, *more) as machine, relayed(here, acting) as relay:
            victims.append(await _command(saved, qmp, here, "--uri", str(relay.address), "--listen", f"unix:{here}/in"))
            await victims[0].communicate()
            if victims[0].returncode == 0:
                return "over before the kill"
            assert victims[0].returncode == -signal.SIGKILL
            status = await _settled(machine)
            if status == "postcopy-paused":
                second = await _command(saved, qmp, here, "--uri", f"unix:{here / 'again'}", "--resume")
                _, said = await second.communicate()
                assert second.returncode == 0, said.decode()
                status = "completed"
            if status == "completed":
                await console.assert_goes_on(here / "console")
                return "" if phase != "completed" else "all was in"
            machine.kill()
        async with waiting(saved, folder / "anew") as machine:
            result = await _restored(saved, machine, folder / "anew")
            assert result.exit_code == 0, result.message
            await console.assert_goes_on(folder / "anew" / "console")
        return f"before RUN ({status}): restored anew"

    return run


async def _settled(machine: Machine) -> str:
    """What a destination is that was left alone; empty where it ended."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if machine.exit_status is not None:
            return ""
        try:
            status = str((await migration.query(machine.session, timeout_s=5))["status"])
        except Exception:
            status = "silent"
        if status in ("postcopy-paused", "completed", "failed", "none"):
            return status
        await asyncio.sleep(0.05)
    return status


def _kill_destination(qemu: Qemu, phase: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    """It is said where the guest is: in the file, or lost."""

    async def run(chance: random.Random, folder: Path) -> str:
        saved = await _for_breaking(qemu, folder)
        here = folder / "d"
        async with waiting(saved, here) as machine:
            acting = Acting(_after(phase, saved, chance), lambda _: machine.kill())
            async with relayed(here, acting):
                restorer = Restorer(saved.stream)
                result = await restorer.run(machine.session, uri=f"unix:{here / 'relay'}", listen=f"unix:{here / 'in'}")
            if result.exit_code == 0:
                return "over before the kill"
            ran = "loaded" in result.moments or "running" in result.moments
            assert result.exit_code == (6 if ran else 3), result.message
            assert "SIGKILL" in result.message, result.message
        return "" if ran else "before RUN: the guest is in the file"

    return run


# ---- a real Linux -------------------------------------------------------------------------------------------

_COUNTED: Final = re.compile(rb"count (\d+) at (\d+)\.(\d+)")


def _linux(qemu: Qemu) -> Callable[[random.Random, Path], Awaitable[str]]:
    """Debian's kernel counts on its serial console each second, and goes on counting after a lazy restore; its clocks
    go on too: its own seconds go by as ours do.
    """

    async def run(_: random.Random, folder: Path) -> str:
        linux = Linux.installed()
        stream, here = folder / "linux.mig", folder / "d"
        async with Machine(qemu.path, linux.arguments(folder / "serial"), name=f"source {qemu.name}") as machine:
            before = (await _counts(folder / "serial", 3, timeout_s=180))[-1]
            await migration.set_parameters(machine.session, {"max-bandwidth": FAST})
            await migration.start(machine.session, f"exec:cat > {shlex.quote(str(stream))}")
            await migration.wait_until(machine.session, "completed", timeout_s=TIMEOUT_S)
            last = (await _counts(folder / "serial", 3, timeout_s=5))[-1]
        here.mkdir()
        arguments = [*linux.arguments(here / "serial"), "-incoming", "defer"]
        async with Machine(qemu.path, arguments, name=f"destination {qemu.name}") as machine:
            began = time.monotonic()
            result = await Restorer(stream).run(machine.session, uri=f"unix:{here / 'in'}")
            assert result.exit_code == 0, result.message
            first = (await _counts(here / "serial", 2, timeout_s=60))[-1]
            at = time.monotonic()
            later = (await _counts(here / "serial", 7, timeout_s=120))[-1]
            passed, took = later[1] - first[1], time.monotonic() - at
            numbers = [each[0] for each in await _counts(here / "serial", 7, timeout_s=1)]
        assert before[0] <= last[0] < numbers[0] <= last[0] + 2, (last, numbers)
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "it counts one after the other"
        assert later[1] > first[1] > last[1], "its clock is alive, and does not go back"
        assert 0.5 * took < passed < 2 * took + 1, f"its clock went {passed:.2f} s in {took:.2f} s of ours"
        running = (result.moments["running"]) / 1e6
        return (
            f"saved at {last[0]}, counted on from {numbers[0]}; its clock went {passed:.1f} s in {took:.1f} s; "
            f"ran after {running:.2f} s, first count after {at - began:.1f} s"
        )

    return run


async def _counts(serial: Path, number: int, *, timeout_s: float) -> list[tuple[int, float]]:
    """What it has counted, and when by its own clock (seconds), once there are so many."""
    deadline = time.monotonic() + timeout_s
    while True:
        said = serial.read_bytes() if serial.exists() else b""
        found = [(int(each[1]), int(each[2]) + int(each[3]) / 100) for each in _COUNTED.finditer(said)]
        if len(found) >= number:
            return found
        assert time.monotonic() < deadline, f"{len(found)} of {number} counts; its last words: {said[-300:]!r}"
        await asyncio.sleep(0.05)
