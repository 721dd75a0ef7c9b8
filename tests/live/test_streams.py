"""What is read from a real stream is what its source says of itself; what is written, real QEMU loads.

Each kind of machine is recorded once for each version, and everything is asked of that recording while its source
is still there, stopped.  Postcopy streams, which have no description, are in test_postcopy.py.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest

from qmigrate.analysis.check import check
from qmigrate.analysis.extract import extract
from qmigrate.capture.migration import Migration
from qmigrate.format.ram import NormalPage, RamFlag, RamRecord, RamWord
from qmigrate.format.return_path import Pong, Shut
from qmigrate.format.stream import SectionHeader, SectionPart, SectionType
from qmigrate.format.vm_state import Value, VmState
from qmigrate.format.walk import DeviceState, Entry
from qmigrate.format.write import write
from qmigrate.qmp.blocking import Blocking
from tests.guests import console
from tests.guests.build import PAGE_BYTES, Guest
from tests.live import monitor
from tests.live.answers import messages_in, summary_of
from tests.live.loading import loaded
from tests.live.recording import KINDS, Recording, many_devices, recorded
from tests.live.same import assert_same_ram, assert_same_registers, loses_writes
from tests.live.saved import saved
from tests.live.versions import Qemu, installed

pytestmark = pytest.mark.live

DESCRIBED: Final = [name for name, kind in KINDS.items() if not kind.postcopy]


@dataclass(frozen=True)
class Lab:
    """A recording whose machines are there, and the loop to talk to them."""

    qmp: Blocking
    recording: Recording

    @property
    def stream(self) -> Path:
        return self.recording.stream


@pytest.fixture(
    scope="module",
    params=[pytest.param((qemu, name), id=f"{qemu.name}-{name}") for qemu in installed() for name in DESCRIBED],
)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    qemu, name = request.param
    folder = tmp_path_factory.mktemp("recording")
    with Blocking() as qmp:
        yield Lab(qmp, qmp.enter(recorded(qemu, name, folder)))


def test_a_stream_is_valid_and_rebuilt_identically_with_every_device_decoded(lab: Lab) -> None:
    with Migration(lab.stream) as migration:
        checked = check(migration)
    contents = checked.gathering.contents
    assert [str(error) for error in contents.errors] == []
    assert checked.differences == []
    assert (checked.valid, checked.identical, checked.undecoded) == (True, True, 0)
    assert checked.length == contents.length == lab.stream.stat().st_size


def test_the_summary_follows_its_schema_and_counts_what_qemu_counts(lab: Lab) -> None:
    with Migration(lab.stream) as migration:
        summary = summary_of(migration.contents)
    ram = lab.recording.queried["ram"]
    pages = [block["pages"] for block in summary["ram_blocks"]]
    assert sum(block["normal"] for block in pages) == ram["normal"]
    assert sum(block["zero"] for block in pages) == ram["duplicate"]
    assert sum(block["length"] for block in summary["ram_blocks"]) == ram["total"]


def test_extracted_ram_is_that_of_the_stopped_source(lab: Lab, tmp_path: Path) -> None:
    with Migration(lab.stream) as migration:
        extracted = extract(migration, tmp_path / "ram")
    recording = lab.recording
    without = {"pc.ram"} if loses_writes(recording.qemu, recording.kind) else set()
    compared = lab.qmp.run(assert_same_ram(recording.source, extracted, tmp_path / "memory", without=without))
    assert compared.seen == expected_to_be_seen(recording, without)
    # Blocks that the guest does not see, such as ACPI's tables, only where QEMU tells where it has them.
    assert compared.whole == (set(extracted.files) - without if recording.qemu.number >= (10,) else set())


def expected_to_be_seen(recording: Recording, without: Collection[str] = ()) -> dict[str, int]:
    """How many bytes of each block the guest sees.  Of its RAM all but the window to the VGA; nothing twice."""
    found = {"pc.ram": recording.kind.guest.memory_mib << 20, "pc.bios": 0x40000}
    if recording.kind.devices is many_devices:
        found["pc.ram"] -= 0x20000
        found["0000:00:01.0/vga.vram"] = 1 << 20
    return {block: length for block, length in found.items() if block not in without}


def test_cpu_registers_are_those_of_the_stopped_source(lab: Lab) -> None:
    with Migration(lab.stream) as migration:
        count = lab.qmp.run(assert_same_registers(lab.recording.source, migration.devices))
    assert count == (4 if "-smp" in lab.recording.arguments else 1)


def test_a_qemu_that_loads_what_was_written_from_values_has_the_same_and_its_guest_goes_on(
    lab: Lab, tmp_path: Path
) -> None:
    recording = lab.recording
    with Migration(lab.stream) as migration:
        extracted = extract(migration, tmp_path / "ram")
        devices = migration.devices
        written = b"".join(write(migration.entries()))

    async def load() -> bytes:
        folder = tmp_path / "destination"
        async with loaded(recording.qemu, recording.kind, folder, written, stopped=True) as destination:
            compared = await assert_same_ram(destination.machine, extracted, tmp_path / "memory")
            assert compared.seen == expected_to_be_seen(recording)
            await assert_same_registers(destination.machine, devices)
            await destination.machine.session.execute("cont")
            # Its memory is the stream's, as was seen: where the source has lost writes the guest finds it damaged.
            whole = not loses_writes(recording.qemu, recording.kind)
            await console.assert_goes_on(destination.console, whole=whole)
            return destination.back

    back = lab.qmp.run(load())
    if recording.back is not None:
        assert messages_in(back) == [Pong(token=1), Shut(value=0)]
        assert messages_in(recording.back.read_bytes()) == [Pong(token=1), Shut(value=0)]


# -- values are changed


SCRATCH_REGISTER: Final = 0x5A
EBX: Final = 0x20141125
PATTERN: Final = bytes(range(256)) * (PAGE_BYTES // 256)


@pytest.mark.asyncio
@pytest.mark.parametrize("qemu", installed(), ids=lambda qemu: qemu.name)
async def test_values_changed_in_the_records_are_those_of_the_qemu_that_loads_them(qemu: Qemu, tmp_path: Path) -> None:
    file = await saved(qemu, "q35-many", tmp_path / "saved")
    kind = file.kind
    with Migration(file.stream) as migration:
        changed = b"".join(write(with_changes(migration.entries(), kind.guest)))
    async with loaded(qemu, kind, tmp_path / "destination", changed, stopped=True) as destination:
        machine, memory = destination.machine, tmp_path / "memory"
        cpus = await monitor.registers(machine)
        assert [cpu["EBX"] == EBX for cpu in cpus] == [False, False, False, True]
        assert "= 0x5a" in await machine.session.human_monitor_command("i /xb 0x3ff")
        address = kind.guest.first_address + filled_page(kind.guest) * PAGE_BYTES
        assert await monitor.physical_memory(machine, address, PAGE_BYTES, memory) == changed_page(kind.guest)
        (vram,) = [part for part in await monitor.mapped_memory(machine) if part.region == "vga.vram"]
        assert await monitor.physical_memory(machine, vram.address, PAGE_BYTES, memory) == PATTERN
        # The guest looks at three words of a page, of which none was changed; the other CPUs have halted.
        await machine.session.execute("cont")
        await console.assert_goes_on(destination.console)


def with_changes(entries: Iterable[Entry], guest: Guest) -> Iterator[Entry]:
    """A register, a byte of a device, and two pages that are sent once more before RAM ends."""
    pages = {
        "pc.ram": (guest.first_address + filled_page(guest) * PAGE_BYTES, changed_page(guest)),
        "0000:00:01.0/vga.vram": (0, PATTERN),
    }
    key, in_end = "", False
    for entry in entries:
        match entry.record:
            case SectionHeader(idstr=name, instance_id=instance):
                key = f"{name}/{instance}"
            case SectionPart(kind=kind):
                in_end = kind == SectionType.END
            case RamRecord(is_marker=True) if in_end:
                for block, (start, contents) in pages.items():
                    page = NormalPage(contents=contents)
                    record = RamRecord(word=RamWord(start, int(RamFlag.PAGE)), block=block, body=page)
                    yield entry._replace(record=record)
            case DeviceState(state=state) if key == "cpu/3":
                yield entry._replace(record=DeviceState(replaced(state, "env.regs", _with_ebx)))
                continue
            case DeviceState(state=state) if key == "serial/0":
                state = replaced(state, "state", lambda inner: replaced(inner, "scr", lambda _: SCRATCH_REGISTER))
                yield entry._replace(record=DeviceState(state))
                continue
        yield entry


def _with_ebx(registers: Any) -> Value:
    return (*registers[:3], EBX, *registers[4:])


def replaced(state: VmState, name: str, change: Callable[[Any], Value]) -> VmState:
    """The same state but for one field."""
    fields = [replace(field, value=change(field.value)) if field.name == name else field for field in state.fields]
    assert fields != list(state.fields), f"{name} was not changed"
    return replace(state, fields=tuple(fields))


def filled_page(guest: Guest) -> int:
    """One that the guest fills and never writes again."""
    return next(
        i for i in range(guest.page_count) if any(guest.page(i)) and guest.page(i) == guest.page(i, last_pass=1)
    )


def changed_page(guest: Guest) -> bytes:
    """What it holds, but for a byte at which the guest does not look."""
    page = bytearray(guest.page(filled_page(guest)))
    page[100] ^= 0xFF
    return bytes(page)
