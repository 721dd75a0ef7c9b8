"""The command `qmigrate` in a process of its own, as a user starts it."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Final

__all__ = ["qmigrate", "started"]

ROOT: Final = Path(__file__).parents[2]


async def qmigrate(*words: str, timeout_s: float = 60.0) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    process = await started(*words)
    try:
        out, err = await asyncio.wait_for(process.communicate(), timeout_s)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def started(*words: str) -> asyncio.subprocess.Process:
    """Its outputs are pipes."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmigrate", *words), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
