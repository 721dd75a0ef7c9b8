"""A whole postcopy migration between real QEMUs through the relay, read in both directions."""

from pathlib import Path

import pytest

from qmigrate.analysis.check import check
from qmigrate.analysis.extract import extract
from qmigrate.capture.migration import CommandPlace, Migration
from qmigrate.format.command import Packaged, Ping
from qmigrate.format.return_path import Pong, RequestPages, RequestPagesId, Shut, encode_message
from qmigrate.format.write import write
from tests.guests import console
from tests.live.answers import messages_in, summary_of
from tests.live.loading import loaded
from tests.live.recording import recorded
from tests.live.same import assert_same_ram, assert_same_registers, loses_writes
from tests.live.saved import saved
from tests.live.some import every_qemu
from tests.live.versions import Qemu

pytestmark = [pytest.mark.live, pytest.mark.asyncio]


def names(places: list[CommandPlace]) -> list[str]:
    """Commands as QEMU spells them, a PING with its token; repeated ones once."""
    found: list[str] = []
    for place in places:
        name = f"PING {place.command.token:#x}" if isinstance(place.command, Ping) else place.command.name
        if name != "POSTCOPY_RAM_DISCARD" or found[-1:] != [name]:
            found.append(name)
    return found


@every_qemu
async def test_a_postcopy_stream_holds_what_its_source_holds(qemu: Qemu, tmp_path: Path) -> None:
    (tmp_path / "postcopy").mkdir()
    precopy = await saved(qemu, "pc-paused", tmp_path / "precopy")
    with Migration(precopy.stream) as migration:
        # A postcopy stream has none; that of the same machine in the same QEMU fits.
        description = migration.contents.description
    async with recorded(qemu, "pc-postcopy", tmp_path / "postcopy") as recording:
        with Migration(recording.stream, description=description) as migration:
            checked = check(migration)
            extracted = extract(migration, tmp_path / "ram")
        contents = checked.gathering.contents
        assert [str(error) for error in contents.errors] == []
        assert checked.differences == []
        assert (checked.valid, checked.undecoded) == (True, 0)
        assert all(section.package is not None for section in contents.sections if section.state is not None)
        await assert_same_registers(recording.source, contents.devices)
        without = {"pc.ram"} if loses_writes(qemu, recording.kind) else set()
        compared = await assert_same_ram(recording.source, extracted, tmp_path / "memory", without=without)
        assert set(compared.seen) == {"pc.ram", "pc.bios"} - without
        assert recording.console is not None
        await console.assert_goes_on(recording.console)


@every_qemu
async def test_a_qemu_that_loads_a_postcopy_stream_written_from_values_has_what_was_extracted(
    qemu: Qemu, tmp_path: Path
) -> None:
    file = await saved(qemu, "pc-postcopy", tmp_path / "postcopy")
    kind = file.kind
    with Migration(file.stream) as migration:
        assert any(isinstance(place.command, Packaged) for place in migration.commands)
        extracted = extract(migration, tmp_path / "ram")
        written = b"".join(write(migration.entries()))
    # A guest that is held sees each page as it came, also where the source lost writes (same.loses_writes).
    async with loaded(qemu, kind, tmp_path / "destination", written, stopped=True) as destination:
        compared = await assert_same_ram(destination.machine, extracted, tmp_path / "memory")
        assert compared.seen == {"pc.ram": kind.guest.memory_mib << 20, "pc.bios": 0x40000}
        answers = messages_in(destination.back)
        assert (answers[0], answers[-1]) == (Pong(token=1), Shut(value=0))
        await destination.machine.session.execute("cont")
        await console.assert_goes_on(destination.console)


@every_qemu
async def test_commands_and_answers_of_a_postcopy_migration_are_those_of_the_protocol(
    qemu: Qemu, tmp_path: Path
) -> None:
    file = await saved(qemu, "pc-postcopy", tmp_path / "postcopy")
    assert file.back is not None
    back = file.back.read_bytes()
    with Migration(file.stream) as migration:
        # Without a description too: the device sections of the package are told apart.
        assert check(migration).identical
        summary_of(migration.contents)
        commands, blocks = migration.commands, migration.blocks
    (package,) = [place for place in commands if place.contents]
    inside = [item for item in package.contents if isinstance(item, CommandPlace)]
    since_10_0 = ["SWITCHOVER_START"] if qemu.number >= (10,) else []
    since_10_2 = ["PING 0x42"] if qemu.number >= (10, 2) else []
    assert names(commands) == [
        *("OPEN_RETURN_PATH", "PING 0x1", "POSTCOPY_ADVISE", *since_10_0, "POSTCOPY_RAM_DISCARD"),
        *("PING 0x2", "PACKAGED", "PING 0x4"),
    ]
    assert names(inside) == ["POSTCOPY_LISTEN", "PING 0x3", *since_10_2, "POSTCOPY_RUN"]
    assert (package.contents[0], package.contents[-1]) == (inside[0], inside[-1])

    messages = messages_in(back)
    assert b"".join(encode_message(message) for message in messages) == back
    pings = [place.command for place in [*commands, *inside] if isinstance(place.command, Ping)]
    pongs = [message for message in messages if isinstance(message, Pong)]
    assert sorted(pong.token for pong in pongs) == sorted(ping.token for ping in pings)
    assert (messages[0], messages[-1]) == (Pong(token=1), Shut(value=0))
    requests = [message for message in messages if isinstance(message, RequestPagesId | RequestPages)]
    assert len(messages) == len(pongs) + len(requests) + 1
    for request in requests:
        assert request.start % 4096 == 0 < request.length
    assert {request.block for request in requests if isinstance(request, RequestPagesId)} <= set(blocks)
