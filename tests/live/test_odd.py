"""Odd streams of every version that writes them, made afresh: whole, the same again, and said to be odd.

What each shows is asserted in detail of the recorded ones: tests/test_odd.py.
"""

from collections.abc import AsyncGenerator
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from qmigrate.analysis.check import check
from qmigrate.analysis.extract import extract
from qmigrate.analysis.summary import oddities
from qmigrate.capture.migration import Contents, Migration
from qmigrate.format.stream import SectionType
from qmigrate.format.write import write
from qmigrate.qmp import migration as qmp_migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.live.loading import loaded
from tests.live.receiving import huge_pages
from tests.live.recording import ODD, Recording, into_file, recorded
from tests.live.same import assert_same_ram
from tests.live.versions import Qemu

pytestmark = pytest.mark.live

HUGE_PAGES: Final = 8  # of 2 MiB: a source and a destination of 8 MiB
SAID: Final = {
    "pc-no-footers": ["Sections have no footers"],
    "pc-no-configuration": ["There is no CONFIGURATION section"],
    "pc-no-description": ["There is no description of the devices (suppress-vmdesc=on, or it was cut off)"],
    "pc-bare": ["There is no CONFIGURATION", "Sections have no footers", "There is no description"],
    "q35-bare": ["Sections have no footers", "There is no description"],
    "pc-snapshot": ["The ram section has no END: a background snapshot."],
    "pc-savevm": ["The guest was running, and no page was sent twice: an internal snapshot (savevm)"],
    "q35-early": [
        "0000:00:01.0/virtio-mem-device-early/0 at ",
        "2 RAM blocks have the same length, 8 MiB: ram0, 0000:00:01.0/more.",
    ],
    "pc-huge": ["Some RAM lies on larger pages of the host: ram0 (2 MiB).", "Postcopy was advised, but"],
    "pc-huge-savevm": ["Some RAM lies on larger pages of the host: ram0 (2 MiB).", "The guest was running"],
    "pc-huge-postcopy": [
        "Some RAM lies on larger pages of the host: ram0 (2 MiB).",
        "There is no description of the devices (postcopy sends none)",
    ],
    "pc-shared": ["The block list has addresses: x-ignore-shared leaves shared RAM out, and none of ram0 is"],
    "pc-mapped": ["Each page has its place in the file (mapped-ram)"],
    "pc-mapped-shared": [
        "The block list has addresses: x-ignore-shared leaves shared RAM out, and none of ram0 is",
        "Each page has its place in the file (mapped-ram)",
    ],
    "pc-cancelled": ["The stream ends while RAM is sent: the migration was cancelled, or it failed."],
    "arm-board": ["The target's pages have 1 KiB, which the stream does not announce"],
    "arm-virt": ["2 RAM blocks have the same length, 64 MiB: virt.flash0, virt.flash1."],
}


@pytest_asyncio.fixture(
    params=[pytest.param((qemu, name), id=f"{qemu.name}-{name}") for name, kind in ODD.items() for qemu in kind.qemus()]
)
async def odd(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[tuple[str, Recording]]:
    qemu: Qemu
    qemu, name = request.param
    with huge_pages(HUGE_PAGES) if "huge" in name else nullcontext():
        async with recorded(qemu, name, tmp_path) as recording:
            yield name, recording


@pytest.mark.asyncio
async def test_an_odd_stream_is_whole_and_says_what_is_odd(odd: tuple[str, Recording]) -> None:
    name, recording = odd
    with Migration(recording.stream) as migration:
        contents = migration.contents
    assert_said(oddities(contents), name)
    if name == "pc-cancelled":
        assert not contents.complete
        assert [section.name for section in contents.sections if section.kind == SectionType.FULL] == []
        return
    assert [str(error) for error in contents.errors] == []
    with Migration(recording.stream) as migration:
        checked = check(migration)
    assert (checked.valid, checked.identical, checked.differences) == (True, True, [])
    assert contents.length == recording.stream.stat().st_size
    assert_devices(contents, name)


MAPPED: Final = ODD["pc-mapped"]


@pytest.mark.asyncio
@pytest.mark.parametrize("qemu", MAPPED.qemus(), ids=lambda qemu: qemu.name)
async def test_a_mapped_ram_file_holds_what_its_source_holds_and_is_loaded_when_written_from_values(
    qemu: Qemu, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    async with recorded(qemu, "pc-mapped", tmp_path / "source") as recording:
        with Migration(recording.stream) as migration:
            extracted = extract(migration, tmp_path / "ram")
            written = b"".join(write(migration.entries()))
        compared = await assert_same_ram(recording.source, extracted, tmp_path / "memory")
        assert compared.whole == set(extracted.files)
    async with loaded(qemu, MAPPED, tmp_path / "destination", written, stopped=True) as destination:
        compared = await assert_same_ram(destination.machine, extracted, tmp_path / "memory")
        assert compared.whole == set(extracted.files)
        await destination.machine.session.execute("cont")
        await console.assert_goes_on(destination.console)


@pytest.mark.asyncio
@pytest.mark.parametrize("qemu", MAPPED.qemus(), ids=lambda qemu: qemu.name)
async def test_offsets_in_a_mapped_ram_file_count_from_the_start_of_the_file(qemu: Qemu, tmp_path: Path) -> None:
    offset = 0x3000
    said = tmp_path / "console"
    async with Machine(qemu.path, MAPPED.guest.arguments(console=said)) as source:
        await console.wait_until_ready(said)
        await qmp_migration.set_capabilities(source.session, MAPPED.capabilities)
        stream = await into_file(f",offset={offset}")(source, tmp_path)
    behind = tmp_path / "behind.mig"
    behind.write_bytes(stream.read_bytes()[offset:])
    with Migration(behind) as migration:
        checked = check(migration)
    assert (checked.valid, checked.identical) == (True, True)
    assert "The stream's offsets count from 0x3000 before it: it began there in its file." in oddities(
        checked.gathering.contents
    )


def assert_said(sentences: list[str], name: str) -> None:
    for beginning in SAID[name]:
        assert any(sentence.startswith(beginning) for sentence in sentences), (beginning, sentences)


def assert_devices(contents: Contents, name: str) -> None:
    full = [section for section in contents.sections if section.kind == SectionType.FULL]
    decoded = {section.key for section in full if section.state is not None}
    assert contents.undecoded == []
    if SAID[name][-1].startswith("There is no description"):
        assert decoded == set()
    else:
        assert decoded == {section.key for section in full}
    # Every stream ends with the run state: no section was taken for a part of another's data.
    assert "globalstate" in {section.name for section in full}
    assert len({section.section_id for section in full}) == len(full)


def test_each_kind_says_something() -> None:
    assert set(SAID) == set(ODD)
