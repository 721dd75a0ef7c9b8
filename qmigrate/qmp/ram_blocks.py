"""The RAM blocks of a QEMU, with the size of their host pages.  Only the human monitor tells of them.

Its table is alike from 5.2 to 11.1, which has more columns at the end.
migration/ram.c, softmmu/physmem.c: ram_block_format()
"""

import re
from typing import Final

from qmigrate.qmp.session import COMMAND_TIMEOUT_S, Session
from qmigrate.value import Value

__all__ = ["RamBlockThere", "ram_blocks"]

_ROW: Final = re.compile(r" *(\S.*?) +(\d+) (B|KiB|MiB|GiB) +0x[0-9a-f]+ +0x([0-9a-f]+) +0x([0-9a-f]+)\b.*")
_UNITS: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class RamBlockThere(Value):
    """Sizes in bytes; ``longest`` is what it can be resized to."""

    page_size: int
    used_length: int
    longest: int


async def ram_blocks(session: Session, *, timeout_s: float = COMMAND_TIMEOUT_S) -> dict[str, RamBlockThere]:
    """Each block by name."""
    said = await session.human_monitor_command("info ramblock", timeout_s=timeout_s)
    rows = [match for line in said.splitlines() if (match := _ROW.fullmatch(line.rstrip("\r")))]
    return {row[1]: RamBlockThere(int(row[2]) * _UNITS[row[3]], int(row[4], 16), int(row[5], 16)) for row in rows}
