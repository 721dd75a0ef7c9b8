"""``qmigrate tap`` between two QEMUs, and what its recording must hold."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from qmigrate.analysis.check import check
from qmigrate.analysis.extract import extract
from qmigrate.capture.migration import Migration
from qmigrate.qmp.machine import Machine
from tests.live.same import assert_same_ram


@asynccontextmanager
async def tapped(folder: Path, forward: str) -> AsyncGenerator[tuple[str, Path]]:
    """A tap of one migration: where it listens, and its recording, which is whole when this is left."""
    listen, recording = f"unix:{folder / 'tap'}", folder / "migration.tap"
    command = [sys.executable, "-m", "qmigrate", "tap", listen, forward, "-o", str(recording), "--once"]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        assert process.stderr is not None
        async with asyncio.timeout(60):
            assert b"listening at" in await process.stderr.readline()
        yield listen, recording
        async with asyncio.timeout(60):
            said = await process.stderr.read()
            assert await process.wait() == 0, said.decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def assert_recording_holds_what_the_source_has(recording: Path, source: Machine | None, folder: Path) -> None:
    """All channels joined: the same again when rebuilt, and RAM is that of the stopped source."""
    await assert_recording_holds_what_they_have(recording, [] if source is None else [source], folder)


async def assert_recording_holds_what_they_have(recording: Path, machines: Sequence[Machine], folder: Path) -> None:
    """All channels joined: the same again when rebuilt, and RAM is that of each of these stopped machines."""
    with Migration(recording) as migration:
        checked = check(migration)
        assert [str(error) for error in checked.gathering.contents.errors] == []
        assert (checked.valid, checked.identical) == (True, True)
        extracted = extract(migration, folder / "ram")
    for machine in machines:
        compared = await assert_same_ram(machine, extracted, folder / "memory")
        assert {"pc.ram", "pc.bios"} <= compared.seen.keys()
