"""A saved guest restored lazily is what it is when loaded eagerly: how that is proved, for all units of a soak.

The destination, which is held by -S, is saved again and compared with one that loaded the same file eagerly (QEMU
itself where it can read the file, else our own precopy): every page of every block, every field of every device.
"""

import asyncio
import shlex
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from qmigrate.analysis.diff import diff, read_side
from qmigrate.analysis.extract import extract
from qmigrate.capture.migration import Migration
from qmigrate.errors import QmpCommandError
from qmigrate.operations.restore import Restorer, ServingResult
from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.live.command import ROOT
from tests.live.recording import FAST, Kind, arguments_of, recorded
from tests.live.same import assert_same_ram, loses_writes
from tests.live.versions import Qemu

__all__ = ["Input", "command_of", "proved", "recorded_input", "restored", "restorer_of", "waiting"]

TIMEOUT_S: Final = 120.0
# Else it goes on by the host's clock while all is held by -S, and differs from one destination to the next.
RTC: Final = ("-rtc", "base=2026-01-01,clock=vm")


@dataclass(frozen=True)
class Input:
    """A saved guest, and how to have its machine.  ``eager``: the URI from which QEMU itself loads it, if it can.

    ``index_folder``: where its index is kept; None: nowhere, and what was kept is not used.
    """

    qemu: Qemu
    kind: Kind
    stream: Path
    channels: tuple[str, ...] = ()
    eager: str | None = None
    capabilities: Mapping[str, bool] | None = None
    index_folder: Path | None = None


async def recorded_input(qemu: Qemu, kind: Kind, folder: Path) -> Input:
    folder.mkdir()
    async with recorded(qemu, kind, folder) as recording:
        path, channels = recording.stream, tuple(map(str, recording.channels))
    eager, capabilities = None, dict(kind.capabilities)
    if capabilities.get("mapped-ram"):
        eager = f"file:{path}"
    elif not channels and not kind.through_relay:
        eager, capabilities = f"exec:cat {shlex.quote(str(path))}", {}
    return Input(qemu, kind, path, channels, eager, capabilities, folder / "indexes")


async def command_of(saved: Input, qmp: Path, folder: Path, *more: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmigrate", "restore", str(saved.stream), "--qmp", str(qmp)),
        *("--uri", f"unix:{folder / 'in'}", "-q", *_index_of(saved), *more),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )


def _index_of(saved: Input) -> list[str]:
    return ["--no-kept-index"] if saved.index_folder is None else ["--index-folder", str(saved.index_folder)]


@asynccontextmanager
async def waiting(saved: Input, folder: Path, *more: str, taker: Qemu | None = None) -> AsyncGenerator[Machine]:
    """A QEMU of the saved guest's machine, which waits for it."""
    folder.mkdir()
    qemu = taker or saved.qemu
    arguments = [*arguments_of(qemu, saved.kind, folder, folder / "console"), "-incoming", "defer", *RTC, *more]
    async with Machine(qemu.path, arguments, name=f"destination {qemu.name}") as machine:
        yield machine


async def proved(
    saved: Input,
    folder: Path,
    *more: str,
    taker: Qemu | None = None,
    ram: bool = True,
    holds: Callable[[ServingResult], object] = bool,
) -> str:
    """Restored lazily, it is what it is when loaded eagerly; and goes on.  ``ram``: held to the file's pages too;
    ``holds``: more that is asked of its end.
    """
    async with waiting(saved, folder / "lazy", "-S", *more, taker=taker) as machine:
        result = await restored(saved, machine, folder / "lazy")
        assert (result.exit_code, result.running) == (0, False), result.message
        assert result.counts.pages == result.counts.total
        holds(result)
        if ram:
            with Migration(saved.stream, channels=saved.channels) as read:
                extracted = extract(read, folder / "ram")
            compared = await assert_same_ram(machine, extracted, folder / "memory")
            assert (taker or saved.qemu).number < (10,) or len(compared.whole) == len(extracted.files)
        lazily = await _saved_again(machine, folder / "lazy")
        if saved.kind.has_guest and not _is_damaged(saved):
            await _go_on(machine)
            await console.assert_goes_on(folder / "lazy" / "console")
    async with waiting(saved, folder / "eager", "-S", *more, taker=taker) as machine:
        if saved.eager is None:
            anew = replace(saved, index_folder=None)
            result = await restored(anew, machine, folder / "eager", eager=True)
            assert result.exit_code == 0, result.message
        else:
            await migration.set_capabilities(machine.session, saved.capabilities or {})
            await migration.start_incoming(machine.session, saved.eager)
            await migration.wait_until(machine.session, "completed", timeout_s=TIMEOUT_S)
        eagerly = await _saved_again(machine, folder / "eager")
    _assert_same(lazily, eagerly)
    return "" if saved.eager else "eagerly by our own precopy"


async def restored(saved: Input, machine: Machine, folder: Path, **wishes: Any) -> ServingResult:
    return await restorer_of(saved, **wishes).run(machine.session, uri=f"unix:{folder / 'in'}")


def restorer_of(saved: Input, **wishes: Any) -> Restorer:
    keeps = saved.index_folder is not None
    return Restorer(saved.stream, channels=saved.channels, keep_index=keeps, index_folder=saved.index_folder, **wishes)


def _is_damaged(saved: Input) -> bool:
    """May the saver have lost writes?  Then the file has them not, and the guest finds it out, however it is restored.

    5.2 and 7.2 under TCG lose those of a guest that never empties its TLB.
    """
    return loses_writes(saved.qemu, saved.kind) and not saved.kind.guest.pages_per_tick


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
