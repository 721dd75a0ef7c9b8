"""One stopped machine is the same whichever way it was recorded; a moment later it is not."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from qmigrate.analysis.diff import Diff, diff, read_side
from qmigrate.capture.migration import Migration
from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.live.recording import ODD, arguments_of, at_once, extra, into_file, savevm
from tests.live.snapshot import snapshot_disk
from tests.live.tapping import tapped
from tests.live.versions import Qemu, installed

pytestmark = [pytest.mark.live, pytest.mark.asyncio]

# savevm leaves the machine as it was: the next migration is of the same moment.
KIND = replace(ODD["pc-savevm"], paused=True)


def compared(a: Path, b: Path) -> Diff:
    with ExitStack() as stack:
        sides = []
        for path in (a, b):
            with Migration(path) as capture:
                sides.append(read_side(capture, path.name, stack))
        return diff(*sides)


@pytest.mark.parametrize("qemu", installed(), ids=lambda qemu: qemu.name)
async def test_a_snapshot_and_a_migration_of_one_stopped_machine_are_the_same(qemu: Qemu, tmp_path: Path) -> None:
    said = tmp_path / "console"
    folders = [tmp_path / name for name in ("before", "snapshot", "migrated")]
    for folder in folders:
        folder.mkdir()
    async with Machine(qemu.path, arguments_of(qemu, KIND, folders[1], said), name=f"source {qemu.name}") as source:
        await console.wait_until_ready(said)
        await console.wait_for_passes(said, 1)
        before = await savevm(source, folders[1])
        before.rename(folders[0] / before.name)
        await console.assert_goes_on(said)
        await source.session.execute("stop")
        snapshot = await savevm(source, folders[1])
        # From 9.0 on each page has its place in the file; before, all in one pass.
        is_mapped = qemu.number >= (9,)
        if is_mapped:
            await migration.set_capabilities(source.session, {"mapped-ram": True, "events": True})
        migrated = await (into_file() if is_mapped else at_once)(source, folders[2])
        assert (await migration.query(source.session))["status"] == "completed"

    found = compared(snapshot, migrated)
    assert found.complete
    assert [(each.path, each.a, each.b) for each in found.fields] == []
    assert [each for each in found.structure if each.counts] == []
    assert [each.name for each in found.structure] == ["mapped-ram"] * is_mapped
    assert {block.name: block.unequal for block in found.blocks or [] if block.unequal} == {}
    assert len(found.blocks or []) == len(found.a.contents.blocks) > 3
    assert found.same

    found = compared(folders[0] / before.name, migrated)
    assert not found.same
    assert "timer/0.cpu_ticks_offset" in [each.path for each in found.fields]
    assert {block.name for block in found.blocks or [] if block.unequal} == {"pc.ram"}


# The clock of the machine, not of the host: it stands still, and saving it does not change it.
STILL = replace(KIND, devices=extra("-rtc clock=vm -drive if=none,id=disk0,file=FOLDER/disk.qcow2,format=qcow2"))
# What is set on both sides, and since which version both can.
WAYS: Final[dict[str, tuple[tuple[int, ...], dict[str, bool], dict[str, Any]]]] = {
    "precopy": ((), {"return-path": True}, {}),
    "multifd": ((), {"multifd": True}, {"multifd-channels": 2}),
    "multifd zlib": ((), {"multifd": True}, {"multifd-channels": 2, "multifd-compression": "zlib"}),
    "xbzrle": ((), {"xbzrle": True}, {}),
    "postcopy": ((), {"postcopy-ram": True}, {}),
    "preempt": ((7, 1), {"postcopy-ram": True, "postcopy-preempt": True}, {}),
}


@asynccontextmanager
async def loaded(qemu: Qemu, snapshot: Path, folder: Path) -> AsyncGenerator[Machine]:
    """The machine of a snapshot, stopped where it was saved."""
    arguments = [*arguments_of(qemu, STILL, folder, folder / "loaded"), "-incoming", "defer", "-S"]
    async with Machine(qemu.path, arguments, name=f"loaded {qemu.name}") as machine:
        await migration.set_capabilities(machine.session, {"events": True})
        await migration.start_incoming(machine.session, f"exec:cat {snapshot}")
        await migration.wait_until(machine.session, "completed", timeout_s=60)
        yield machine


async def recorded(qemu: Qemu, snapshot: Path, folder: Path, way: str) -> Path:
    """It goes through a tap to another, which stays stopped."""
    (folder / way).mkdir()
    _, capabilities, parameters = WAYS[way]
    arguments = [*arguments_of(qemu, STILL, folder, folder / "destination"), "-incoming", "defer", "-S"]
    arguments = [word.replace("format=qcow2", "format=qcow2,readonly=on") for word in arguments]
    target = f"unix:{folder / way / 'in'}"
    async with (
        loaded(qemu, snapshot, folder) as source,
        Machine(qemu.path, arguments, name=f"destination {qemu.name}") as destination,
    ):
        for machine in (source, destination):
            await migration.set_capabilities(machine.session, {"events": True, **capabilities})
            await migration.set_parameters(machine.session, parameters)
        postcopy = "postcopy-ram" in capabilities
        await migration.set_parameters(source.session, {"max-bandwidth": 64 << 10 if postcopy else 1 << 30})
        await migration.start_incoming(destination.session, target)
        async with tapped(folder / way, target) as (listen, recording):
            # QEMU has the switch before it has sent anything: the guest stands still, so precopy would end.
            switch = [source.session.execute("migrate-start-postcopy")] if postcopy else []
            await asyncio.gather(migration.start(source.session, listen), *switch)
            for machine in (source, destination):
                await migration.wait_until(machine.session, "completed", timeout_s=60)
    return recording


@pytest.mark.parametrize("qemu", installed(), ids=lambda qemu: qemu.name)
async def test_whichever_way_a_stopped_machine_travels_it_is_the_same(qemu: Qemu, tmp_path: Path) -> None:
    said, snapshot = tmp_path / "console", tmp_path / "snapshot"
    snapshot_disk(qemu, tmp_path)
    async with Machine(qemu.path, arguments_of(qemu, STILL, tmp_path, said), name=f"source {qemu.name}") as source:
        await console.wait_until_ready(said)
        await console.wait_for_passes(said, 1)
        await source.session.execute("stop")
        (await savevm(source, tmp_path)).rename(snapshot)
    async with loaded(qemu, snapshot, tmp_path) as source:
        plain = await at_once(source, tmp_path)
    for way, (since, capabilities, _) in WAYS.items():
        if qemu.number < since:
            continue
        recording = await recorded(qemu, snapshot, tmp_path, way)
        found = compared(plain, recording)
        assert found.complete, way
        assert [str(error) for side in (found.a, found.b) for error in side.contents.errors] == [], way
        assert [(each.path, each.a, each.b) for each in found.fields] == [], way
        assert [each for each in found.structure if each.counts] == [], way
        assert {block.name: block.unequal for block in found.blocks or [] if block.unequal} == {}, way
        assert (found.as_bytes, found.not_compared) == ([], []), way
        assert found.compared > 1000
        assert ("postcopy-ram" in capabilities) == (found.b.contents.description is None)  # it did switch
