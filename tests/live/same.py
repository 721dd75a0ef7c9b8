"""A stream and a stopped machine hold the same: RAM, and the registers of each CPU."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qmigrate.analysis.devices import plain
from qmigrate.analysis.extract import Extracted
from qmigrate.format.vm_state import VmState
from qmigrate.qmp.machine import Machine
from tests.live import monitor
from tests.live.recording import Kind
from tests.live.versions import Qemu

GENERAL: Final = ("AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI")  # as env.regs has them
SEGMENTS: Final = ("ES", "CS", "SS", "DS", "FS", "GS")  # as env.segs
PAGE: Final = 4096


@dataclass(frozen=True)
class Compared:
    """How many bytes of each block were compared at the guest's addresses, and which blocks from end to end."""

    seen: dict[str, int]
    whole: set[str]


async def assert_same_ram(
    machine: Machine, extracted: Extracted, scratch: Path, *, without: Collection[str] = ()
) -> Compared:
    """What the guest can see of each block, and the whole of it where QEMU tells where it has it."""
    seen: dict[str, int] = {}
    for part in await monitor.mapped_memory(machine):
        block = _block_of(part.region, extracted.files)
        if block in without:
            continue
        expected = await monitor.physical_memory(machine, part.address, part.length, scratch)
        _assert_same(_part_of(extracted, block, part.offset, part.length), expected, block, part.offset)
        seen[block] = seen.get(block, 0) + part.length
    addresses = await monitor.block_addresses(machine)
    whole = addresses.keys() - set(without)
    for block in whole:
        length, address = extracted.gathering.contents.blocks[block].length, addresses[block]
        expected = _memory_of_process(machine.pid, address, length)
        _assert_same(_part_of(extracted, block, 0, length), expected, block, 0)
    return Compared(seen, whole)


def _memory_of_process(pid: int, address: int, length: int) -> bytes:
    """Of a child of ours, which the kernel allows its parent to read."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        return os.pread(memory.fileno(), length, address)


def _block_of(region: str, blocks: Mapping[str, str]) -> str:
    """A block is named after its region, below the path of its device if it has one."""
    (block,) = [block for block in blocks if block == region or block.endswith(f"/{region}")]
    return block


def _part_of(extracted: Extracted, block: str, offset: int, length: int) -> bytes:
    with (extracted.directory / extracted.files[block]).open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _assert_same(ours: bytes, theirs: bytes, block: str, offset: int) -> None:
    assert len(ours) == len(theirs) > 0, f"{block}: {len(ours)} bytes at {offset:#x}, QEMU has {len(theirs)}"
    differ = [offset + at for at in range(0, len(ours), PAGE) if ours[at : at + PAGE] != theirs[at : at + PAGE]]
    assert not differ, f"{block}: {len(differ)} pages differ, the first at {differ[0]:#x}"


def registers_in(cpu: VmState, common: VmState) -> dict[str, int]:
    """A CPU's state in a stream, under the names of ``info registers`` for a 32-bit guest."""
    state: Any = plain(cpu)
    found = {f"E{name}": number for name, number in zip(GENERAL, state["env.regs"], strict=False)}
    found |= {"EIP": state["env.eip"], "EFL": state["env.eflags"], "EFER": state["env.efer"]}
    found |= {f"CR{number}": state[f"env.cr[{number}]"] for number in (0, 2, 3, 4)}
    found |= {f"DR{number}": value for number, value in enumerate(state["env.dr"]) if number not in (4, 5)}
    found |= {"FCW": state["env.fpuc"], "MXCSR": state["env.mxcsr"]}
    halted: Any = plain(common)
    found |= {"HLT": halted["halted"]}
    tables = dict(zip(SEGMENTS, state["env.segs"], strict=True))
    tables |= {"LDT": state["env.ldt"], "TR": state["env.tr"]}
    for name, table in tables.items():
        found |= {name: table["selector"], f"{name}.flags": table["flags"]}
    for name, table in {**tables, "GDT": state["env.gdt"], "IDT": state["env.idt"]}.items():
        found |= {f"{name}.base": table["base"], f"{name}.limit": table["limit"]}
    return found


async def assert_same_registers(machine: Machine, devices: Mapping[str, VmState]) -> int:
    """Each CPU of the machine; returns how many there are."""
    said = await monitor.registers(machine)
    for index, theirs in enumerate(said):
        ours = registers_in(devices[f"cpu/{index}"], devices[f"cpu_common/{index}"])
        assert {name: theirs[name] for name in ours} == ours, f"CPU {index}"
    assert sum(name.startswith("cpu/") for name in devices) == len(said)
    return len(said)


def loses_writes(qemu: Qemu, kind: Kind) -> bool:
    """Under TCG 5.2 and 7.2 may miss that a page is written again after it was sent: its old contents arrive.

    They clear dirty bits of aligned ranges and leave the CPU's TLB as it is (no longer so in 10.0).  Our guests
    empty it each tick, which leaves what they write between the last look at the bits and the next tick.  So the
    memory of such a source is no measure; that of a QEMU which has loaded the stream is.
    """
    return qemu.number < (10,) and not kind.paused
