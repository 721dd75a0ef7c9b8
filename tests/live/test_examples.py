"""The examples that drive migrations run, and the guest goes on."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guests import console
from tests.live.pair import SMALL, pair
from tests.live.some import only_newest
from tests.live.versions import Qemu

pytestmark = [pytest.mark.live, pytest.mark.asyncio]

ROOT = Path(__file__).parents[2]


async def example(name: str, *words: str | Path) -> tuple[int | None, str]:
    """Exit code, and all that it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, ROOT / "scripts" / "examples" / name, *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, said.decode()


@only_newest
async def test_postcopy(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        code, said = await example("postcopy.py", *two.addresses)
        assert code == 0, said
        assert "The guest runs on the destination, with all of its memory." in said
        await two.assert_guest_goes_on()


@only_newest
async def test_recovery(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        code, said = await example("recovery.py", *two.addresses, two.uri)
        assert code == 0, said
        assert "The migration is paused" in said
        assert "migrated with postcopy, brought back once" in said
        await two.assert_guest_goes_on()


@only_newest
async def test_ping_pong(qemu: Qemu, tmp_path: Path) -> None:
    said_by_guest = tmp_path / "console"
    # Each QEMU of the journey truncates the file when it starts, so that the guest's last words are the last's.
    arguments = SMALL.arguments(console=said_by_guest)
    code, said = await example("ping_pong.py", "3", "0.5", qemu.path, *arguments)
    assert code == 0, said
    assert said.count("hop ") == 3
    seen = console.passes(said_by_guest)
    assert all(each.good for each in seen)
    assert seen[0].number > 1  # it did not start anew
