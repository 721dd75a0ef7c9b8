"""A stream and its stopped source hold the same: RAM, and the registers of each CPU."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from qmigrate.analysis.devices import plain
from qmigrate.analysis.extract import Extracted
from qmigrate.format.device import VmState
from qmigrate.qmp.machine import Machine
from tests.live import monitor

GENERAL: Final = ("AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI")  # as env.regs has them
SEGMENTS: Final = ("ES", "CS", "SS", "DS", "FS", "GS")  # as env.segs
PAGE: Final = 4096


async def assert_same_ram(source: Machine, extracted: Extracted, scratch: Path) -> dict[str, int]:
    """What the guest can see of each block, and the whole of it where QEMU tells where it has it.

    Returns how many bytes of each block were compared by the guest's addresses.
    """
    seen: dict[str, int] = {}
    for part in await monitor.mapped_memory(source):
        block = _block_of(part.region, extracted.files)
        expected = await monitor.physical_memory(source, part.address, part.length, scratch)
        _assert_same(_part_of(extracted, block, part.offset, part.length), expected, block, part.offset)
        seen[block] = seen.get(block, 0) + part.length
    blocks = extracted.gathering.contents.blocks
    for block, address in (await monitor.block_addresses(source)).items():
        length = blocks[block].length
        with Path(f"/proc/{source.pid}/mem").open("rb", buffering=0) as memory:
            expected = os.pread(memory.fileno(), length, address)
        _assert_same(_part_of(extracted, block, 0, length), expected, block, 0)
    return seen


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
    found |= {"HLT": _plain(common)["halted"]}
    tables = dict(zip(SEGMENTS, state["env.segs"], strict=True))
    tables |= {"LDT": state["env.ldt"], "TR": state["env.tr"]}
    for name, table in tables.items():
        found |= {name: table["selector"], f"{name}.flags": table["flags"]}
    for name, table in {**tables, "GDT": state["env.gdt"], "IDT": state["env.idt"]}.items():
        found |= {f"{name}.base": table["base"], f"{name}.limit": table["limit"]}
    return found


def _plain(state: VmState) -> Any:
    return plain(state)


async def assert_same_registers(source: Machine, devices: Mapping[str, VmState]) -> int:
    """Each CPU of the source; returns how many there are."""
    said = await monitor.registers(source)
    for index, theirs in enumerate(said):
        ours = registers_in(devices[f"cpu/{index}"], devices[f"cpu_common/{index}"])
        assert {name: theirs[name] for name in ours} == ours, f"CPU {index}"
    assert sum(name.startswith("cpu/") for name in devices) == len(said)
    return len(said)
