"""``restore`` by an index that was kept, whatever a guest was saved into: it has every page of that."""

import asyncio
import zlib
from pathlib import Path
from typing import Any

import pytest

from qmigrate.capture.placed import Kind as Where
from qmigrate.events import LiveEvent
from qmigrate.operations.migrate import migrate
from qmigrate.operations.plan import Plan
from qmigrate.operations.reading import Reading
from qmigrate.operations.restore import Indexed
from tests.capture.test_places import kinds
from tests.live.pair import AT_ONCE, SMALL, pair
from tests.live.recording import Kind
from tests.live.saved import File, saved
from tests.live.some import only_newest
from tests.live.tapping import tapped
from tests.live.test_restore import TIMEOUT_S, assert_has_all, restore, waiting
from tests.live.versions import Qemu

pytestmark = [pytest.mark.live, pytest.mark.asyncio]

WAYS = {
    # where most of its pages stand, and what is kept
    "multifd": (Where.PLACED, [".index"]),
    "multifd with zlib": (Where.SPILLED, [".index", ".pages"]),
    "packed": (Where.SPILLED, [".index", ".pages"]),
    "recorded multifd": (Where.PLACED, [".index", ".pages"]),
    "recorded postcopy": (Where.RECORD, [".index", ".pages"]),
}


async def saved_so(qemu: Qemu, way: str, folder: Path) -> File:
    if way.startswith("recorded"):
        return await recorded_so(qemu, way, folder)
    names = {"multifd": "pc-multifd", "multifd with zlib": "pc-multifd-zlib", "packed": "pc-paused"}
    file = await saved(qemu, names[way], folder)
    if way == "packed":
        file.stream.write_bytes(zlib.compress(file.stream.read_bytes(), 1, wbits=31))
    return file


async def recorded_so(qemu: Qemu, way: str, folder: Path) -> File:
    """By a tap that it was migrated through."""
    folder.mkdir()
    wishes: dict[str, Any] = {"multifd": 2} if way == "recorded multifd" else {"preempt": True, **AT_ONCE}
    async with pair(qemu, folder) as two, tapped(folder, two.uri) as (listen, recording):
        result = await migrate(*two.sessions, Plan(uri=listen, listen=two.uri, **wishes))
        assert result.exit_code == 0, result.message
    return File(qemu, Kind(way, guest=SMALL), recording, ())


@only_newest
@pytest.mark.parametrize("way", WAYS)
async def test_by_a_kept_index_a_guest_has_every_page(qemu: Qemu, way: str, tmp_path: Path) -> None:
    where, what = WAYS[way]
    file, folder = await saved_so(qemu, way, tmp_path / "saved"), tmp_path / "indexes"
    with Reading(str(file.stream), channels=file.channels, folder=folder) as reading:
        async with asyncio.timeout(TIMEOUT_S):
            with await reading.saved() as first:
                found = kinds(first)
        assert (reading.is_kept, reading.not_kept) == (False, None)
    assert found[where] > 10 * sum(
        found[other] for other in (Where.RECORD, Where.PLACED, Where.SPILLED) if other != where
    )
    assert sorted(each.suffix for each in folder.iterdir()) == what
    said: list[LiveEvent] = []
    async with waiting(file, tmp_path / "d") as machine:
        result = await restore(file, machine, tmp_path / "d", paused=True, index_folder=folder, on_event=said.append)
        assert (result.exit_code, result.running) == (0, False)
        await assert_has_all(file, machine, tmp_path / "d")
    assert [each.kept for each in said if isinstance(each, Indexed)] == [True]
