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
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from qmigrate.endpoint.relay import Relay
from qmigrate.operations.migrate import migrate
from qmigrate.operations.policy import AfterPass
from qmigrate.operations.restore import Restorer
from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.guests.build import Guest
from tests.guests.linux import Linux
from tests.live.broken import Cutter, broken_plan
from tests.live.pair import SMALL, pair
from tests.live.receiving import huge_pages
from tests.live.recording import FAST, KINDS, ODD, Kind, at_once
from tests.live.tapping import tapped
from tests.live.versions import Qemu, installed, named
from tests.soak import encodings, files, restores_indexed
from tests.soak.migrations import Unit
from tests.soak.restores_broken import (
    CUTS,
    VICTIM_PHASES,
    WRONGS,
    cut_connection,
    kill_destination,
    kill_server,
    spoil_file,
)
from tests.soak.restoring import Input, command_of, proved, recorded_input, waiting

__all__ = ["units"]

MIB: Final = 1 << 20
TIMEOUT_S: Final = 120.0
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
            yield Unit(f"restore cut {number} {qemu.name}", cut_connection(qemu, number))
        for phase in VICTIM_PHASES:
            yield Unit(f"restore server killed {phase} {qemu.name}", kill_server(qemu, phase))
            yield Unit(f"restore destination killed {phase} {qemu.name}", kill_destination(qemu, phase))
        for how in WRONGS:
            yield Unit(f"restore file {how} while served {qemu.name}", spoil_file(qemu, how))
        yield from restores_indexed.units(qemu)
    for source, destination, machine in NEWER:
        one, two = named(source), named(destination)
        if one is not None and two is not None:
            yield Unit(f"restore newer {source}→{destination}", _newer(one, two, machine))


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


def _input(qemu: Qemu, kind: Kind, *, is_huge: bool) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(_: random.Random, folder: Path) -> str:
        with ExitStack() as stack:
            if is_huge:
                stack.enter_context(huge_pages(16))
            return await proved(await recorded_input(qemu, kind, folder / "saved"), folder)

    return run


def _packed(qemu: Qemu, how: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(_: random.Random, folder: Path) -> str:
        saved = await recorded_input(qemu, KINDS["pc-running"], folder / "saved")
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
        kind = Kind("a guest of a pair", guest=SMALL)
        # QEMU's own postcopy goes on changing pages of a running guest: what the recording holds is the measure.
        return await proved(Input(qemu, kind, recording, index_folder=folder / "indexes"), folder)

    return run


# ---- sizes, machines, newer destinations --------------------------------------------------------------------


def _size(qemu: Qemu, memory: int, machine: str, zero: float) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(_: random.Random, folder: Path) -> str:
        guest = Guest("walker", memory_mib=memory, zero_share=zero, walked_share=1 / 256, pages_per_tick=0)
        kind = Kind("so large", machine=machine, guest=guest, paused=True, course=at_once)
        saved = await recorded_input(qemu, kind, folder / "saved")
        # Of a large one the guest's own addresses are not read one by one: it is saved again and compared whole.
        return await proved(saved, folder, ram=memory <= 1024)

    return run


def _newer(saver: Qemu, taker: Qemu, machine: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(_: random.Random, folder: Path) -> str:
        kind = replace(KINDS["q35-running"], machine=machine)
        return await proved(await recorded_input(saver, kind, folder / "saved"), folder, taker=taker)

    return run


def _onto_huge_pages(qemu: Qemu) -> Callable[[random.Random, Path], Awaitable[str]]:
    """The saver had none."""

    async def run(_: random.Random, folder: Path) -> str:
        memory = "memory-backend-memfd,id=pc.ram,size=8M,hugetlb=on,hugetlbsize=2M"
        memory += ",x-use-canonical-path-for-ramblock-id=off"
        saved = await recorded_input(qemu, KINDS["pc-running"], folder / "saved")
        onto = replace(saved, kind=replace(saved.kind, machine="pc,memory-backend=pc.ram"))
        with huge_pages(16):
            return await proved(onto, folder, "-object", memory)

    return run


def _eight(qemu: Qemu) -> Callable[[random.Random, Path], Awaitable[str]]:
    """Eight commands serve one file of 128 MiB at once."""

    async def run(_: random.Random, folder: Path) -> str:
        guest = Guest("walker", memory_mib=128, walked_share=1 / 256, pages_per_tick=32)
        kind = Kind("one for many", guest=guest, paused=True, course=at_once)
        saved = await recorded_input(qemu, kind, folder / "saved")

        async def one(number: int) -> None:
            here = folder / str(number)
            async with waiting(saved, here, "-qmp", f"unix:{folder / f'{number}.qmp'},server=on,wait=off"):
                command = await command_of(saved, folder / f"{number}.qmp", here)
                _, said = await command.communicate()
                assert command.returncode == 0, said.decode()
                await console.assert_goes_on(here / "console")

        await asyncio.gather(*map(one, range(8)))
        return ""

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
