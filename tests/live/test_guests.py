"""The guests do what their descriptions say, on every board and in every real QEMU that is installed."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.guests.build import PAGE_BYTES, Guest
from tests.live import versions
from tests.live.versions import Qemu

pytestmark = [pytest.mark.live, pytest.mark.asyncio]

every_qemu = pytest.mark.parametrize("qemu", versions.installed(), ids=lambda qemu: qemu.name)
every_board = pytest.mark.parametrize("board", ["pc", "q35"])

SMALL = Guest("walker", memory_mib=8)


@asynccontextmanager
async def running(qemu: Qemu, guest: Guest, said: Path, *more: str, board: str = "pc") -> AsyncGenerator[Machine, None]:
    arguments = guest.arguments(console=said, machine=board)
    async with Machine(qemu.path, [*arguments, *more], name=said.name) as machine:
        yield machine


async def memory_of(machine: Machine, guest: Guest, file: Path) -> list[bytes]:
    """The pages that a guest has filled."""
    size = guest.filled_count * PAGE_BYTES
    await machine.session.execute("pmemsave", {"val": guest.first_address, "size": size, "filename": str(file)})
    memory = file.read_bytes()
    return [memory[start : start + PAGE_BYTES] for start in range(0, size, PAGE_BYTES)]


async def migrate(machine: Machine, uri: str) -> None:
    await migration.set_capabilities(machine.session, {"events": True})
    await migration.start(machine.session, uri)
    await migration.wait_until(machine.session, "completed", timeout_s=60)


@every_qemu
@every_board
async def test_a_walker_goes_on(qemu: Qemu, board: str, tmp_path: Path) -> None:
    said = tmp_path / "console"
    serial = tmp_path / "serial"
    async with running(qemu, SMALL, said, "-serial", f"file:{serial}", board=board):
        await console.wait_until_ready(said)
        assert [each.number for each in await console.wait_for_passes(said, 3)][:3] == [1, 2, 3]
        await console.assert_goes_on(said)
        await console.assert_goes_on(serial)


@every_qemu
@every_board
async def test_a_walker_goes_on_in_another_qemu_through_a_file(qemu: Qemu, board: str, tmp_path: Path) -> None:
    before, after, stream = tmp_path / "source", tmp_path / "destination", tmp_path / "stream"
    async with running(qemu, SMALL, before, board=board) as source:
        await console.wait_for_passes(before, 1)
        await migrate(source, f"exec:cat > {stream}")
    async with running(qemu, SMALL, after, "-incoming", "defer", board=board) as destination:
        await migration.set_capabilities(destination.session, {"events": True})
        await migration.start_incoming(destination.session, f"exec:cat {stream}")
        await migration.wait_until(destination.session, "completed", timeout_s=60)
        await console.assert_goes_on(after)
    assert console.passes(after)[0].number <= console.passes(before)[-1].number + 2


@every_qemu
@every_board
async def test_a_walker_goes_on_in_another_qemu_through_a_socket(qemu: Qemu, board: str, tmp_path: Path) -> None:
    before, after, address = tmp_path / "source", tmp_path / "destination", tmp_path / "socket"
    async with (
        running(qemu, SMALL, before, board=board) as source,
        running(qemu, SMALL, after, "-incoming", "defer", board=board) as destination,
    ):
        await migration.set_capabilities(destination.session, {"events": True})
        await console.wait_for_passes(before, 1)
        await migration.start_incoming(destination.session, f"unix:{address}")
        await migrate(source, f"unix:{address}")
        await console.assert_goes_on(after)


@every_qemu
async def test_the_memory_of_an_idle_guest_is_what_python_computes(qemu: Qemu, tmp_path: Path) -> None:
    guest, said = Guest("idle", memory_mib=16, still_mib=8), tmp_path / "console"
    async with running(qemu, guest, said) as machine:
        await console.wait_until_ready(said)
        memory = await memory_of(machine, guest, tmp_path / "memory")
        assert memory == [guest.page(index) for index in range(guest.filled_count)]
    assert 0.2 < memory.count(bytes(PAGE_BYTES)) / guest.filled_count < 0.3


@every_qemu
async def test_the_memory_of_a_walker_is_that_of_its_last_pass_or_the_one_before(qemu: Qemu, tmp_path: Path) -> None:
    said = tmp_path / "console"
    async with running(qemu, SMALL, said) as machine:
        await console.wait_for_passes(said, 3)
        await machine.session.execute("stop")
        last = console.passes(said)[-1].number
        memory = await memory_of(machine, SMALL, tmp_path / "memory")
    # The line of a pass may be cut short: the guest can be one pass further than it says.
    for index, page in enumerate(memory):
        assert page in [SMALL.page(index, last_pass=last + more) for more in (0, 1, 2)]
    walked = [i for i in range(SMALL.page_count) if SMALL.page(i) != SMALL.page(i, last_pass=1)]
    assert 0.45 < len(walked) / SMALL.page_count < 0.55


def a_walked_page_of_last_pass(memory: list[bytes], last_pass: int) -> int:
    return next(
        index
        for index, page in enumerate(memory)
        if page == SMALL.page(index, last_pass=last_pass) != SMALL.page(index, last_pass=last_pass - 1)
    )


@pytest.mark.parametrize("damage", ["lost", "stale", "torn", "changed"])
async def test_a_walker_tells_of_a_damaged_page_for_ever(damage: str, tmp_path: Path) -> None:
    qemu = versions.newest()
    if qemu is None:
        pytest.skip("no QEMU is installed: scripts/qemu_versions")
    before, after, stream = tmp_path / "source", tmp_path / "destination", tmp_path / "stream"
    async with running(qemu, SMALL, before) as source:
        await console.wait_for_passes(before, 3)
        await source.session.execute("stop")
        memory = await memory_of(source, SMALL, tmp_path / "memory")
        await migrate(source, f"exec:cat > {stream}")

    last_pass = console.passes(before)[-1].number
    index = a_walked_page_of_last_pass(memory, last_pass)
    page, older = memory[index], SMALL.page(index, last_pass=last_pass - 1)
    saved = stream.read_bytes()
    assert saved.count(page) == 1
    damaged = {
        "lost": bytes(PAGE_BYTES),
        "stale": older,
        "torn": page[:4000] + older[4000:],
        "changed": page[:2048] + bytes([page[2048] ^ 1]) + page[2049:],
    }
    stream.write_bytes(saved.replace(page, damaged[damage]))

    async with running(qemu, SMALL, after, "-incoming", f"exec:cat {stream}") as destination:
        await migration.wait_until(destination.session, "completed", timeout_s=60)
        await destination.session.execute("cont")
        for _ in range(2):
            offset = after.stat().st_size
            with pytest.raises(AssertionError, match=f"found its memory damaged: .* page={index} found="):
                await console.wait_for_passes(after, 1000, offset=offset)


async def test_a_walker_that_started_anew_does_not_go_on(tmp_path: Path) -> None:
    qemu = versions.newest()
    if qemu is None:
        pytest.skip("no QEMU is installed: scripts/qemu_versions")
    said = tmp_path / "console"
    async with running(qemu, SMALL, said) as machine:
        await console.wait_for_passes(said, 5)
        await machine.session.execute("stop")
        await machine.session.execute("system_reset")
        offset = said.stat().st_size
        await machine.session.execute("cont")
        seen = await console.wait_for_passes(said, 3, offset=offset)
        assert [each.number for each in seen][:3] == [1, 2, 3]


async def test_an_image_is_assembled_once(tmp_path: Path) -> None:
    first = SMALL.image(tmp_path)
    made = first.stat().st_mtime_ns
    assert SMALL.image(tmp_path) == first
    assert first.stat().st_mtime_ns == made
    assert Guest("walker", memory_mib=16, seed=7).image(tmp_path) != first
