"""One stopped machine recorded in two ways is the same; a moment later it is not."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from qmigrate.analysis.diff import Diff, diff, read_side
from qmigrate.capture.migration import Migration
from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.live.recording import ODD, arguments_of, at_once, into_file, savevm
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
            await migration.set_capabilities(source.session, {"mapped-ram": True})
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
