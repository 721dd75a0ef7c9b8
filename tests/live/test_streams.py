"""What is read from a real stream is what its source says of itself; what is written, real QEMU loads.

Each kind of machine is recorded once for each version, and everything is asked of that recording while its source
is still there, stopped.  Postcopy streams, which have no description, are in test_postcopy.py.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest

import qmigrate
from qmigrate.analysis.check import check
from qmigrate.analysis.extract import extract
from qmigrate.analysis.summary import summarize
from qmigrate.capture.migration import Migration
from qmigrate.format.device import Field, Value, VmState
from qmigrate.format.feed import Feed
from qmigrate.format.ram import NormalPage, RamFlag, RamRecord, RamWord
from qmigrate.format.return_path import Message, Pong, Shut, read_return_path
from qmigrate.format.stream import SectionHeader, SectionPart, SectionType
from qmigrate.format.walk import DeviceState, Entry
from qmigrate.format.write import encode, write
from qmigrate.qmp.blocking import Blocking
from tests.guests import console
from tests.guests.build import PAGE_BYTES
from tests.live import monitor
from tests.live.loading import Loaded, loaded
from tests.live.recording import KINDS, Recording, recorded
from tests.live.same import assert_same_ram, assert_same_registers
from tests.live.versions import Qemu, installed

pytestmark = pytest.mark.live

SCHEMA: Final = json.loads((Path(qmigrate.__file__).parent / "report" / "dissect.schema.json").read_text())
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
    params=[(qemu, name) for qemu in installed() for name in DESCRIBED],
    ids=lambda param: f"{param[0].name}-{param[1]}",
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
        summary = json.loads(json.dumps(summarize(migration.contents)))
    jsonschema.validate(summary, SCHEMA)
    ram = lab.recording.queried["ram"]
    pages = [block["pages"] for block in summary["ram_blocks"]]
    assert sum(block["normal"] for block in pages) == ram["normal"]
    assert sum(block["zero"] for block in pages) == ram["duplicate"]
    assert sum(block["length"] for block in summary["ram_blocks"]) == ram["total"]


def test_extracted_ram_is_that_of_the_stopped_source(lab: Lab, tmp_path: Path) -> None:
    with Migration(lab.stream) as migration:
        extracted = extract(migration, tmp_path / "ram")
    source = lab.recording.source
    seen = lab.qmp.run(assert_same_ram(source, extracted, tmp_path / "memory"))
    has_vga = any("VGA" in word for word in lab.recording.arguments)
    assert {name.rpartition("/")[2] for name in seen} == {"pc.ram", "pc.bios"} | ({"vga.vram"} if has_vga else set())
    # All of it but the window to the VGA, and none of it twice.
    assert seen["pc.ram"] == lab.recording.kind.guest.memory_mib * (1 << 20) - (0x20000 if has_vga else 0)


def test_cpu_registers_are_those_of_the_stopped_source(lab: Lab) -> None:
    with Migration(lab.stream) as migration:
        count = lab.qmp.run(assert_same_registers(lab.recording.source, migration.devices))
    assert count == (4 if "-smp" in lab.recording.arguments else 1)


def test_a_guest_goes_on_in_a_qemu_that_loads_what_was_written_from_values(lab: Lab, tmp_path: Path) -> None:
    with Migration(lab.stream) as migration:
        written = b"".join(write(migration.entries()))
    recording = lab.recording

    async def load() -> bytes:
        async with loaded(recording.qemu, recording.kind, tmp_path / "destination", written) as destination:
            if recording.kind.paused:
                await destination.machine.session.execute("cont")
            await console.assert_goes_on(destination.console)
            return destination.back

    back = lab.qmp.run(load())
    if recording.kind.through_relay:
        assert messages(back) == [Pong(token=1), Shut(value=0)] == messages(recording.back.read_bytes())


def messages(data: bytes) -> list[Message]:
    feed = Feed()
    feed.receive(data)
    feed.end()
    return [entry.message for entry in read_return_path(feed) if entry is not None]
