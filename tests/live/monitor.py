"""What the human monitor tells of a stopped machine, read into values.  It speaks alike from 5.2 to 11.1."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qmigrate.qmp.machine import Machine

__all__ = ["Mapped", "block_addresses", "mapped_memory", "physical_memory", "registers"]

_RANGE: Final = re.compile(r"  ([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (\S+)\): (.*?)(?: @([0-9a-f]{16}))?")
_BLOCK: Final = re.compile(r" *(\S.*?) +\d+ \S+ +0x\S+ +0x\S+ +0x\S+ +0x([0-9a-f]+) +r[ow]")
_REGISTER: Final = re.compile(r"\b([A-Z][A-Z0-9]+) *= *([0-9a-f]+)\b")
_TABLE: Final = re.compile(r"^(ES|CS|SS|DS|FS|GS|LDT|TR|GDT|IDT) *=(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Mapped:
    """Where part of a memory region is seen by the guest: ``offset`` is in the region, the others in bytes."""

    address: int
    length: int
    region: str
    offset: int


async def mapped_memory(machine: Machine) -> list[Mapped]:
    """The RAM and ROM in the guest's physical address space, as reads see it: nothing that is hidden."""
    views = (await machine.session.human_monitor_command("info mtree -f")).replace("\r", "").split("FlatView #")
    (view,) = [view for view in views if ' AS "memory", root: ' in view]
    return list(_memory_in(view))


def _memory_in(view: str) -> Iterator[Mapped]:
    for line in view.splitlines():
        if (match := _RANGE.fullmatch(line)) and match[3] in ("ram", "rom", "romd"):
            first, last = int(match[1], 16), int(match[2], 16)
            yield Mapped(first, last - first + 1, match[4], int(match[5] or "0", 16))


async def physical_memory(machine: Machine, address: int, length: int, scratch: Path) -> bytes:
    """``pmemsave``, by way of the file ``scratch``."""
    await machine.session.execute("pmemsave", {"val": address, "size": length, "filename": str(scratch)})
    return scratch.read_bytes()


async def block_addresses(machine: Machine) -> dict[str, int]:
    """Where each RAM block lies in the memory of QEMU itself; nothing where ``info ramblock`` does not say it."""
    said = await machine.session.human_monitor_command("info ramblock")
    matches = [_BLOCK.fullmatch(line) for line in said.splitlines()]
    return {match[1]: int(match[2], 16) for match in matches if match}


async def registers(machine: Machine) -> list[dict[str, int]]:
    """``info registers`` of each CPU: plain ones by name, of a segment CS (the selector), CS.base, CS.limit."""
    said = (await machine.session.human_monitor_command("info registers -a")).replace("\r", "")
    return [_registers_of(part) for part in re.split(r"^CPU#\d+\n", said, flags=re.MULTILINE)[1:]]


def _registers_of(said: str) -> dict[str, int]:
    found = {match[1]: int(match[2], 16) for match in _REGISTER.finditer(_TABLE.sub("", said))}
    for name, line in _TABLE.findall(said):
        numbers = [int(word, 16) for word in re.findall(r"\b[0-9a-f]{4,}\b", line)]
        if name not in ("GDT", "IDT"):
            found[name] = numbers.pop(0)
        found[f"{name}.base"], found[f"{name}.limit"] = numbers[:2]
        if name not in ("GDT", "IDT"):
            found[f"{name}.flags"] = numbers[2]
    return found
