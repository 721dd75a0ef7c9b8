"""Schemas that real QEMUs make for real packages: each field is as the description of a precopy has it."""

import resource
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from qmigrate.analysis.check import check
from qmigrate.analysis.devices import plain
from qmigrate.capture.migration import Migration
from qmigrate.capture.schemas import SchemaCache, SchemaError
from qmigrate.errors import QemuDiedError, QmpCommandError
from qmigrate.format.vm_state import VmState
from qmigrate.operations.schema import make_schema
from tests.live.recording import KINDS, arguments_of
from tests.live.saved import saved
from tests.live.versions import Qemu, installed

pytestmark = [pytest.mark.live, pytest.mark.asyncio]

PACKAGED = [qemu for qemu in installed() if qemu.name in ("7.2", "11.1")]
every_qemu = pytest.mark.parametrize("qemu", PACKAGED, ids=lambda qemu: qemu.name)


def plain_devices(devices: Mapping[str, VmState]) -> dict[str, object]:
    return {name: plain(state) for name, state in devices.items()}


@every_qemu
async def test_a_package_is_decoded_by_the_schema_of_a_stopped_machine(qemu: Qemu, tmp_path: Path) -> None:
    (tmp_path / "schema").mkdir()
    cache = SchemaCache(tmp_path / "schemas")
    arguments = arguments_of(qemu, KINDS["pc-postcopy"], tmp_path / "schema", tmp_path / "schema" / "console")
    schema = await make_schema([str(qemu.path), *arguments])
    assert schema.qemu == qemu.version
    assert schema.machine_type == f"pc-i440fx-{qemu.name}"
    cache.add(schema)
    with Migration((await saved(qemu, "pc-paused", tmp_path / "precopy")).stream) as precopy:
        description = precopy.contents.description
    stream = (await saved(qemu, "pc-postcopy", tmp_path / "postcopy")).stream
    with Migration(stream, description=cache) as migration:
        checked = check(migration)
    contents = checked.gathering.contents
    assert [str(error) for error in contents.errors] == []
    assert checked.undecoded == 0, [section.reason for section in contents.sections]
    assert checked.identical
    assert {section.schema for section in contents.sections if section.package is not None} == {str(schema)}
    with Migration(stream, description=description) as migration:
        expected = plain_devices(migration.devices)
    found = plain_devices(contents.devices)
    assert len(found) == len(expected) > 20
    for name, fields in expected.items():
        assert found[name] == fields, name


@every_qemu
async def test_a_machine_that_wants_to_migrate_over_many_channels_or_with_answers_does_so_over_one(qemu: Qemu) -> None:
    machine = [str(qemu.path), "-accel", "tcg", "-m", "8", "-nodefaults"]
    plain_one = await make_schema(machine, timeout_s=60)
    for capabilities in (("multifd",), ("return-path", "postcopy-ram")):
        words = [word for name in capabilities for word in ("-global", f"migration.x-{name}=on")]
        assert (await make_schema([*machine, *words], timeout_s=60)).id == plain_one.id


@every_qemu
@pytest.mark.parametrize("room", [1000, 1 << 16])
async def test_that_there_is_no_room_for_its_stream_is_not_said_of_qemu(room: int, qemu: Qemu) -> None:
    machine = ["-machine", "none"] if room < 1 << 16 else ["-accel", "tcg", "-m", "8", "-nodefaults"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            await make_schema([str(qemu.path), *machine])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Path(str(caught.value.filename)).parent == Path(tempfile.gettempdir())


@pytest.mark.parametrize("qemu", PACKAGED[-1:], ids=lambda qemu: qemu.name)
async def test_a_machine_with_many_devices_tells_all_but_what_its_guest_sets_up(qemu: Qemu, tmp_path: Path) -> None:
    arguments = arguments_of(qemu, KINDS["q35-many"], tmp_path, tmp_path / "console")
    schema = await make_schema([str(qemu.path), *arguments])
    cache = SchemaCache(tmp_path / "schemas")
    cache.add(schema)
    file = await saved(qemu, "q35-many", tmp_path / "saved")
    with Migration(file.stream) as migration:
        own, length = migration.contents, migration.contents.description_length or 0
    bare = tmp_path / "bare.mig"
    bare.write_bytes(file.stream.read_bytes()[: -5 - length])
    with Migration(bare, description=cache) as migration:
        contents = migration.contents
    assert contents.complete
    lost = {section.name.rpartition("/")[2] for section in contents.sections if section.reason is not None}
    # Both have lists whose lengths only the guest decides.
    assert lost <= {"virtio-gpu", "nvme"}
    found = plain_devices(contents.devices)
    assert found == {name: fields for name, fields in plain_devices(own.devices).items() if name in found}


@pytest.mark.parametrize("qemu", PACKAGED[:1], ids=lambda qemu: qemu.name)
async def test_a_qemu_that_can_not_is_told_in_its_own_words(qemu: Qemu) -> None:
    machine = [str(qemu.path), "-accel", "tcg", "-m", "8", "-nodefaults"]
    with pytest.raises(QemuDiedError, match="invalid option"):
        await make_schema([*machine, "-no-such-option"])
    # Before 11.1 this device is marked so.
    drive = "-drive if=none,id=drive,driver=null-co,read-zeroes=on"
    with pytest.raises(QmpCommandError, match=r"non-migratable device '.*nvme'"):
        await make_schema([*machine, *f"{drive} -device nvme,serial=1,drive=drive".split()])
    with pytest.raises(SchemaError, match="this stream has no description of its devices"):
        await make_schema([*machine, "-machine", "pc,suppress-vmdesc=on"])
