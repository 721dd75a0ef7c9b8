"""A recording whose RAM travelled over several channels, or encoded, held to the QEMU that loaded it."""

from collections.abc import Collection, Mapping
from pathlib import Path

from qmigrate.analysis.check import check
from qmigrate.analysis.extract import Extracted, extract, file_names
from qmigrate.capture.migration import Gathering, Migration
from qmigrate.format.multifd import InitialPacket, encode_packet
from tests.joining import Joined, channel_entries, joined
from tests.live.recording import Recording
from tests.live.same import assert_same_ram, loses_writes


async def assert_read_as_loaded(
    recording: Recording, folder: Path, *, without: Collection[str] = (), source_keeps: bool = True
) -> Joined:
    """Each channel is read to its end and written again the same; all joined is what the destination has in its RAM.

    The destination was kept stopped.  What the source has is the same, where it does not lose writes; or if not
    ``source_keeps``, as it gives back what it has sent.  ``without``: blocks that are not in the stream.
    """
    raw = [path.read_bytes() for path in recording.channels]
    assert all(again(each) == each for each in raw)
    assert {channel_id(each) for each in raw} == set(range(len(raw)))
    with Migration(recording.stream) as migration:
        checked = check(migration)
    assert checked.gathering.contents.errors == []
    assert checked.identical
    blocks = {name: block.length for name, block in checked.gathering.contents.blocks.items()}
    with Migration(recording.stream) as migration:
        gathering = Gathering(migration.entries())
        found = joined(gathering, [channel_entries(each, blocks=blocks) for each in raw])
    assert_joined_the_same(recording, found, folder / "joined")
    extracted = in_files(found.blocks, gathering, folder / "ram")
    assert recording.destination is not None
    compared = await assert_same_ram(recording.destination, extracted, folder / "memory", without=without)
    assert set(compared.seen) == {"pc.ram", "pc.bios"} - set(without)
    if source_keeps and not loses_writes(recording.qemu, recording.kind):
        await assert_same_ram(recording.source, extracted, folder / "memory", without=without)
    return found


def assert_joined_the_same(recording: Recording, plain: Joined, folder: Path) -> None:
    """What users get: the channels joined by ``Migration`` are valid, the same again, and RAM is the plain joiner's."""
    with Migration(recording.stream, channels=recording.channels) as migration:
        checked = check(migration)
        extracted = extract(migration, folder)
    assert (checked.valid, checked.identical) == (True, True)
    assert len(checked.gathering.contents.channels) == (len(recording.channels) + 1 if recording.channels else 0)
    # Over two channels a page comes twice in an epoch of 5.2 and 7.2 alone; nothing is in doubt even so.
    unordered = sum(block.unordered for block in checked.gathering.contents.blocks.values())
    assert not unordered or recording.qemu.number < (9,)
    assert extracted.gathering.contents.errors == []
    for block, file in extracted.files.items():
        assert (folder / file).read_bytes() == plain.blocks[block], block


def again(raw: bytes) -> bytes:
    """A multifd channel, written from its values."""
    return b"".join(encode_packet(entry.record, entry.data) for entry in channel_entries(raw))


def channel_id(raw: bytes) -> int:
    first = next(channel_entries(raw)).record
    assert isinstance(first, InitialPacket)
    return first.channel_id


def in_files(blocks: Mapping[str, bytes | bytearray], gathering: Gathering, folder: Path) -> Extracted:
    """As ``extract`` would leave it, for those who compare that with a QEMU."""
    folder.mkdir()
    files = file_names(list(blocks))
    for block, file in files.items():
        (folder / file).write_bytes(blocks[block])
    return Extracted(folder, files, gathering)
