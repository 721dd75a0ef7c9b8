"""The channels of one migration: told apart whatever their order, joined, and faults of one kept from the others."""

import gzip
import lzma
import random
import re
import zlib
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Final
from uuid import UUID

import pytest

from qmigrate.analysis.check import check
from qmigrate.analysis.extract import extract
from qmigrate.analysis.summary import oddities
from qmigrate.capture.migration import Migration
from qmigrate.errors import NoStreamError, TruncatedError
from qmigrate.format.command import (
    DiscardRange,
    PostcopyListen,
    PostcopyRamDiscard,
    PostcopyResume,
    PostcopyRun,
    RecvBitmap,
)
from qmigrate.format.feed import Feed
from qmigrate.format.multifd import PagePacket
from qmigrate.format.multifd_channel import ChannelEntry
from qmigrate.format.walk import walk
from tests import streams
from tests.joining import channel_entries, joined
from tests.live.answers import summary_of
from tests.walking import entries

FOLDER: Final = Path(__file__).parents[1] / "corpus" / "channels"
MULTIFD: Final = sorted(path.name.removesuffix(".mig.xz") for path in FOLDER.glob("pc-multifd*.mig.xz"))
ALONE: Final = sorted(
    path.name.removesuffix(".mig.xz") for path in FOLDER.glob("*.mig.xz") if "multifd" not in path.name
)
ELSEWHERE: Final = (
    "No page with contents is in the stream: with multifd they travel over connections of their own (--channel)."
)


@pytest.fixture
def files(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """Main and the channels of one recorded migration, as they came."""
    found = []
    for packed in (FOLDER / f"{request.param}.mig.xz", *sorted(FOLDER.glob(f"{request.param}.0*-forward.xz"))):
        found.append(tmp_path / packed.name.removesuffix(".xz"))
        found[-1].write_bytes(lzma.decompress(packed.read_bytes()))
    return found


def extracted(migration: Migration, folder: Path) -> dict[str, bytes]:
    found = extract(migration, folder)
    return {block: (folder / file).read_bytes() for block, file in found.files.items()}


@pytest.mark.parametrize("files", MULTIFD, indirect=True)
def test_ram_is_that_of_the_plain_joiner(files: list[Path], tmp_path: Path) -> None:
    main, *channels = files
    plain = joined(entries(main.read_bytes()), [channel_entries(file.read_bytes()) for file in channels])
    with Migration(main, channels=channels) as migration:
        assert extracted(migration, tmp_path / "ram") == {name: bytes(ram) for name, ram in plain.blocks.items()}
    assert any(any(ram) for ram in plain.blocks.values())


@pytest.mark.parametrize("files", MULTIFD, indirect=True)
def test_all_channels_are_the_same_again_when_they_are_rebuilt(files: list[Path]) -> None:
    main, *channels = files
    with Migration(main, channels=channels) as migration:
        checked = check(migration)
    contents = checked.gathering.contents
    assert (checked.valid, checked.identical, contents.errors) == (True, True, [])
    assert checked.length == sum(file.stat().st_size for file in files)
    assert {channel.name: channel.length for channel in contents.channels} == {
        channel.name: Path(channel.input).stat().st_size for channel in contents.channels
    }
    assert ELSEWHERE not in oddities(contents)
    summary_of(contents)


@pytest.mark.parametrize("files", MULTIFD[:1], indirect=True)
def test_the_order_of_the_files_does_not_matter(files: list[Path], tmp_path: Path) -> None:
    found = []
    for number, (first, *others) in enumerate(permutations(files)):
        with Migration(first, channels=others) as migration:
            found.append(extracted(migration, tmp_path / str(number)))
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("files", ALONE, indirect=True)
def test_encoded_pages_are_those_of_the_plain_joiner(files: list[Path], tmp_path: Path) -> None:
    (main,) = files
    plain = joined(entries(main.read_bytes()))
    assert plain.pages.get("xbzrle", 0) + plain.pages.get("compress_page", 0) > 0
    with Migration(main) as migration:
        assert extracted(migration, tmp_path / "ram") == {name: bytes(ram) for name, ram in plain.blocks.items()}


@pytest.mark.parametrize("files", MULTIFD[:1], indirect=True)
def test_main_alone_says_that_its_pages_are_elsewhere(files: list[Path]) -> None:
    with Migration(files[0]) as migration:
        assert ELSEWHERE in oddities(migration.contents)


@pytest.mark.parametrize("files", MULTIFD, indirect=True)
def test_ram_of_main_alone_is_not_taken_for_whole(files: list[Path], tmp_path: Path) -> None:
    with Migration(files[0]) as migration:
        contents = extract(migration, tmp_path).gathering.contents
    assert ([str(error) for error in contents.errors], contents.complete) == ([ELSEWHERE], False)


@pytest.mark.parametrize("files", MULTIFD, indirect=True)
@pytest.mark.parametrize("lacks", [0, 1])
def test_a_channel_that_is_not_given_is_missed(files: list[Path], lacks: int) -> None:
    """Nothing but its number, and those of its packets, tell that pages are missing."""
    main, *channels = files
    (given,) = (file for file in channels if file.read_bytes()[24] != lacks)
    with Migration(main, channels=[given]) as migration:
        checked = check(migration)
        (error,) = checked.gathering.contents.errors
    assert (checked.valid, checked.identical) == (False, True)
    if lacks == 0:
        assert str(error) == "multifd 0 is not among the channels that are given (1)"
    else:
        said = r"\d+ of \d+ packets, by their numbers, are in none of the multifd channels that are given \(0\): are"
        assert re.match(said, str(error))


@pytest.mark.parametrize("files", MULTIFD, indirect=True)
def test_a_channel_that_ends_between_two_packets_is_cut_all_the_same(files: list[Path]) -> None:
    main, *channels = files
    raw = channels[0].read_bytes()
    last = [each.offset for each in channel_entries(raw) if is_sync(each)][-1]
    channels[0].write_bytes(raw[:last])
    with Migration(main, channels=channels) as migration:
        (error,) = migration.errors
        assert not migration.complete
    assert isinstance(error, TruncatedError)
    assert (error.offset, error.trail) == (last, (f"multifd {raw[24]}",))
    assert error.message == "the stream ends here, main waits for another SYNC"


@pytest.mark.parametrize("files", MULTIFD, indirect=True)
def test_packets_that_main_does_not_wait_for_are_not_its_own(files: list[Path]) -> None:
    main, *channels = files
    raw = channels[0].read_bytes()
    (sync, *_) = [each for each in channel_entries(raw) if is_sync(each)]
    channels[0].write_bytes(raw + raw[sync.offset : sync.offset + sync.length])
    with Migration(main, channels=channels) as migration:
        (error,) = migration.errors
    assert (error.offset, error.message) == (len(raw), "a packet behind the last SYNC that main waits for")


def is_sync(entry: ChannelEntry) -> bool:
    return isinstance(entry.record, PagePacket) and entry.record.header.is_sync


@pytest.mark.parametrize("files", MULTIFD[:1], indirect=True)
def test_channels_of_one_number_or_of_two_machines_are_refused(files: list[Path], tmp_path: Path) -> None:
    main, one, two = files
    copy, other = tmp_path / "copy", tmp_path / "other"
    copy.write_bytes(one.read_bytes())
    raw = bytearray(two.read_bytes())
    raw[8:24] = bytes(range(16))
    other.write_bytes(raw)
    for channels, message in (
        ([one, two, copy], f"{one} and {copy} are both multifd 0"),
        ([one, other], f"{one} and {other} are of two machines: they have the UUIDs {UUID(int=0)} and 00010203-0405-"),
    ):
        with pytest.raises(NoStreamError, match=message), Migration(main, channels=channels) as migration:
            _ = migration.contents


@pytest.mark.parametrize("files", MULTIFD[-1:], indirect=True)
def test_a_channel_that_is_cut_is_named_and_the_others_are_read(files: list[Path]) -> None:
    main, *channels = files
    size = channels[0].stat().st_size
    channels[0].write_bytes(channels[0].read_bytes()[:-100])
    with Migration(main, channels=channels) as migration:
        contents = migration.contents
    (error,) = contents.errors
    name = contents.channels[1].name
    assert str(error).startswith(f"{size - 100:#x}: {name}: the stream ends here")
    assert not contents.complete
    assert contents.devices
    assert contents.channels[2].length == channels[1].stat().st_size


@pytest.mark.parametrize("files", MULTIFD[-1:], indirect=True)
def test_of_a_compressed_channel_that_is_cut_all_that_can_be_unpacked_is_read(files: list[Path]) -> None:
    main, *channels = files
    packed = gzip.compress(channels[0].read_bytes(), 0)[:-100]
    size = len(zlib.decompressobj(wbits=31).decompress(packed))
    channels[0].write_bytes(packed)
    with Migration(main, channels=channels) as migration:
        contents = migration.contents
    unread, cut = contents.errors
    name = contents.channels[1].name
    assert str(unread).startswith(f"{size:#x}: {name}: the input can't be read on: gzip: Compressed file ended before")
    assert str(cut).startswith(f"{size:#x}: {name}: the stream ends here")
    assert contents.devices
    assert contents.channels[2].length == channels[1].stat().st_size


@pytest.mark.parametrize("files", MULTIFD[-1:], indirect=True)
def test_a_fault_in_each_of_several_channels_is_told(files: list[Path]) -> None:
    main, *channels = files
    for file in channels:
        data = bytearray(file.read_bytes())
        data[64 + 8] = 0xFF  # the flags of the first packet
        file.write_bytes(data)
    with Migration(main, channels=channels) as migration:
        contents = migration.contents
    assert [error.trail for error in contents.errors] == [(channel.name,) for channel in contents.channels[1:]]
    assert all("unknown flags" in error.message for error in contents.errors)


@pytest.mark.parametrize("files", [*MULTIFD, *ALONE], indirect=True)
def test_damaged_channels_get_an_answer(files: list[Path], tmp_path: Path) -> None:
    chance = random.Random(str(files[0].name))
    whole = [file.read_bytes() for file in files]
    for number in range(20):
        for file, data in zip(files, whole, strict=True):
            damaged = bytearray(data)
            for _ in range(chance.randrange(3)):
                damaged[chance.randrange(len(damaged))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
            file.write_bytes(damaged[: chance.randrange(len(data))] if chance.random() < 0.1 else damaged)
        try:
            with Migration(files[0], channels=files[1:]) as migration:
                found = extract(migration, tmp_path / str(number))
                checked = check(migration)
        except NoStreamError:
            continue
        contents = found.gathering.contents
        assert contents.complete == (not contents.errors)
        assert checked.differences == []


def written(folder: Path, **contents: bytes) -> Iterator[Path]:
    for name, data in contents.items():
        (folder / name).write_bytes(data)
        yield folder / name


def test_what_is_no_set_of_channels_is_refused(tmp_path: Path) -> None:
    main, again, text, empty = written(
        tmp_path, main=streams.minimal(), again=streams.minimal(), text=b"hello world", empty=b""
    )
    for first, others, message in (
        (main, [again], f"two main channels: {main} and {again}"),
        (main, [text], f"{text} is no channel of a migration: it begins with 68 65 6c 6c 6f 20 77 6f, as no"),
        (empty, [], "no migration stream: 0 bytes are there"),
        (empty, [text], rf"no main channel among {empty} \(unknown\), {text} \(unknown\)"),
    ):
        with pytest.raises(NoStreamError, match=message), Migration(first, channels=others) as migration:
            _ = migration.contents


@pytest.mark.parametrize("comes_first", [False, True])
def test_a_silent_channel_is_taken_for_preempt_by_its_order(comes_first: bool, tmp_path: Path) -> None:
    """That of connections; files are given in any."""
    main, silent = written(tmp_path, main=streams.postcopy(), silent=b"")
    first, other = (silent, main) if comes_first else (main, silent)
    with Migration(first, channels=[other]) as migration:
        contents = migration.contents
    assert contents.complete
    assert [(channel.name, channel.known_by) for channel in contents.channels] == [
        ("main", "bytes"),
        ("preempt", "order"),
    ]


def test_pages_of_the_preempt_channel_win(tmp_path: Path) -> None:
    asked = streams.page(0x3000, b"p" * streams.PAGE, block="pc.ram") + streams.zero(0x4000)
    for name, end in (("since-8.0", b""), ("7.2", streams.eos())):
        main, preempt = written(tmp_path, main=streams.postcopy(), **{f"preempt-{name}": asked + end})
        with Migration(main, channels=[preempt]) as migration:
            assert migration.complete
            ram = extracted(migration, tmp_path / name)["pc.ram"]
            assert ram[0x3000:0x5000] == b"p" * streams.PAGE + bytes(streams.PAGE)
            assert check(migration).identical


def test_without_the_preempt_channel_pages_that_were_discarded_are_missed(tmp_path: Path) -> None:
    head = streams.header() + streams.configuration("pc") + streams.ram_start({"pc.ram": 0x10000})
    pages = streams.ram_part(streams.page(0x2000, b"o" * streams.PAGE, block="pc.ram"))
    ranges = (DiscardRange(start=0x2000, length=0x1000), DiscardRange(start=0x4000, length=0x2000))
    discard = streams.command(PostcopyRamDiscard(block="pc.ram", ranges=ranges))
    package = streams.package(streams.command(PostcopyListen()), streams.command(PostcopyRun()))
    rest = streams.ram_part(streams.zero(0x5000, block="pc.ram")) + streams.ram_end() + streams.eof()
    asked = streams.zero(0x4000, block="pc.ram") + streams.page(0x2000, b"n" * streams.PAGE)
    main, preempt = written(tmp_path, main=head + pages + discard + package + rest, preempt=asked)
    with Migration(main) as migration:
        alone = migration.contents
        found = extract(migration, tmp_path / "alone").gathering.contents
    (error,) = found.errors
    assert (alone.complete, found.complete) == (True, False)
    assert str(error) in oddities(alone)
    assert "discarded at the switch to postcopy did not come after it, 2 of pc.ram: " in str(error)
    with Migration(main, channels=[preempt]) as migration:
        whole = extract(migration, tmp_path / "whole").gathering.contents
    assert (whole.errors, [block.lost for block in whole.blocks.values()]) == ([], [0])


RECOVERY: Final = streams.command(RecvBitmap(block="pc.ram")) + streams.command(PostcopyResume())


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_connections_of_a_postcopy_that_was_cut_twice_may_be_given_in_any_order(
    order: tuple[int, ...], tmp_path: Path
) -> None:
    """Each but the one with the end was cut, anywhere."""
    whole = streams.postcopy()
    part, end = streams.ram_part(streams.zero(0, block="pc.ram")), streams.ram_end() + streams.eof()
    files = list(written(tmp_path, main=whole[: -len(end) - 3], once=RECOVERY + part[:-2], twice=RECOVERY + part + end))
    first, *others = (files[number] for number in order)
    with Migration(first, channels=others) as migration:
        assert (migration.errors, migration.complete) == ([], True)
    files[2].write_bytes((RECOVERY + part + end)[:-1])
    with Migration(first, channels=others) as migration:
        (error,) = migration.errors
    assert isinstance(error, TruncatedError)
    assert error.trail[0] == "main, resumed"


def test_a_multifd_channel_alone_says_what_is_missing() -> None:
    feed = Feed()
    feed.receive((0x11223344).to_bytes(4) + bytes(60))
    feed.end()
    with pytest.raises(NoStreamError, match=r"a multifd channel; its migration is read with its main channel \(--cha"):
        list(walk(feed))
