"""What a guest says on its console: `ready`, then, if it is a walker, one line for each pass.

The file is followed while QEMU writes it.  All is polled, nothing sleeps blindly, every wait has a time-out.
"""

import asyncio
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Pass", "assert_goes_on", "passes", "wait_for_passes", "wait_until_ready"]

_POLL_S: Final = 0.01
# A line may begin on the source's console and end on the destination's: what is no whole line says nothing.
_PASS: Final = re.compile(r"pass (\d+) (good|bad\b.*)")


@dataclass(frozen=True)
class Pass:
    """One pass of a walker over its memory.  ``fault`` is empty when it found what it had written."""

    number: int
    fault: str

    @property
    def good(self) -> bool:
        return not self.fault


def passes(console: Path, *, offset: int = 0) -> list[Pass]:
    """The passes that a walker has told of, in whole lines behind ``offset`` in the file."""
    lines = _said(console)[offset:].decode("latin-1").split("\n")[:-1]
    matches = [match for line in lines if (match := _PASS.fullmatch(line))]
    return [Pass(int(match[1]), "" if match[2] == "good" else match[0]) for match in matches]


async def wait_until_ready(console: Path, *, timeout_s: float = 60.0) -> None:
    """Wait until the guest has filled its memory."""
    deadline = time.monotonic() + timeout_s
    while b"ready\n" not in _said(console):
        _still_time(console, deadline, f"the guest is not ready after {timeout_s:g} s")
        await asyncio.sleep(_POLL_S)


async def wait_for_passes(
    console: Path, count: int, *, timeout_s: float = 60.0, offset: int = 0, whole: bool = True
) -> list[Pass]:
    """Wait for so many passes behind ``offset`` in the file, all of them good, if its memory has to be ``whole``."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = passes(console, offset=offset)
        for each in seen:
            assert each.good or not whole, f"the guest found its memory damaged: {each.fault}"
        if len(seen) >= count:
            return seen
        _still_time(console, deadline, f"{len(seen)} of {count} passes after {timeout_s:g} s")
        await asyncio.sleep(_POLL_S)


async def assert_goes_on(console: Path, *, timeout_s: float = 60.0, whole: bool = True) -> None:
    """The guest goes on: three further passes, following on each other, and every one good.

    Not ``whole``: it need not have all of its memory, as its source may have lost writes (tests/live/same.py).
    """
    offset = console.stat().st_size if console.exists() else 0
    seen = await wait_for_passes(console, 3, timeout_s=timeout_s, offset=offset, whole=whole)
    numbers = [each.number for each in seen]
    first = numbers[0]
    assert numbers == list(range(first, first + len(numbers))), f"the guest started anew: passes {numbers}"


def _said(console: Path) -> bytes:
    return console.read_bytes() if console.exists() else b""


def _still_time(console: Path, deadline: float, otherwise: str) -> None:
    assert time.monotonic() < deadline, f"{otherwise}; its last words: {_said(console)[-200:]!r}"
