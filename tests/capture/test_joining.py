"""The channels of one migration: told apart whatever their order, joined, and faults of one kept from the others."""

import gzip
import lzma
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import permutations
from pathlib import Path
from typing import Final
from uuid import UUID

import pytest

from qmigrate.analysis.check import check
from qmigrate.analysis.diff import read_side
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
from qmigrate.format.multifd import (
    DeviceStateHeader,
    DeviceStatePacket,
    InitialPacket,
    PageHeader,
    PagePacket,
    encode_packet,
    pack_offsets,
)
from qmigrate.format.multifd_channel import ChannelEntry
from qmigrate.format.ram import BlockList
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
def test_pages_of_blocks_that_main_never_came_to_list_whole_are_refused(files: list[Path], tmp_path: Path) -> None:
    main, *channels = files
    data = main.read_bytes()
    (listed,) = (entry for entry in entries(data) if isinstance(entry.record, BlockList))
    main.write_bytes(data[: listed.offset + listed.length - 1])
    with Migration(main, channels=channels) as migration:
        errors = check(migration).gathering.contents.errors
        assert [error.input for error in errors] == [str(file) for file in files]
        assert "the stream ends here" in str(errors[0])
        assert all("pages of the block 'pc.ram', which the block list does not have" in str(e) for e in errors[1:])
        assert extracted(migration, tmp_path / "ram") == {}


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
    assert str(error).startswith(f"{channels[0]}: {size - 100:#x}: {name}: the stream ends here")
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
    here, name = f"{channels[0]}: {size:#x}", contents.channels[1].name
    assert str(unread).startswith(f"{here}: {name}: the input can't be read on: gzip: Compressed file ended before")
    assert str(cut).startswith(f"{here}: {name}: the stream ends here")
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
        (main, [text], f"{text}: no channel of a migration: it begins with 68 65 6c 6c 6f 20 77 6f, as no"),
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


def test_a_page_in_which_preempt_was_cut_comes_again_after_the_recovery(tmp_path: Path) -> None:
    """As seen with huge pages, the more often the longer they are.  Of more connections than were cut it is a fault."""
    asked = streams.page(0x3000, b"p" * streams.PAGE, block="pc.ram")
    resumed = RECOVERY + streams.ram_end() + streams.eof()
    main, resumed_, cut, again, other = written(
        tmp_path, main=streams.postcopy()[:-50], resumed=resumed, cut=asked[:-100], again=asked, other=asked[:-90]
    )
    with Migration(main, channels=[resumed_, cut, again]) as migration:
        assert migration.contents.errors == []
        assert check(migration).identical
        assert check(migration).valid
        assert extracted(migration, tmp_path / "ram")["pc.ram"][0x3000:0x4000] == b"p" * streams.PAGE
    with Migration(main, channels=[resumed_, cut, other]) as migration:
        (error,) = migration.contents.errors
        assert error.message == "the stream ends here"
        assert error.trail[0] == "preempt"


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


# -- the order of pages between channels


UNORDERED: Final = (
    "Copies of pages came over two channels with no SYNC between, {} of pc.ram, as of QEMU 5.2 and 7.2 now and then: "
    "extract says whether any page is in doubt."
)
IN_DOUBT: Final = (
    "Pages came over two channels with no SYNC between, and not the same, {} of pc.ram: nothing says which copy is the "
    "later."
)


def sent(*pages: tuple[int, bytes], sync: bool = False) -> bytes:
    """A packet with these pages of pc.ram, those that are all zeros as such."""
    normal = [(start, contents) for start, contents in pages if any(contents)]
    zero = [start for start, contents in pages if not any(contents)]
    header = PageHeader(
        flags=int(sync),
        pages_alloc=128,
        normal_pages=len(normal),
        next_packet_size=streams.PAGE * len(normal),
        packet_num=0,
        zero_pages=len(zero),
        name=b"pc.ram".ljust(256, b"\0"),
        offsets=pack_offsets([*(start for start, _ in normal), *zero], page_size=streams.PAGE),
    )
    return encode_packet(PagePacket(header, streams.PAGE), b"".join(contents for _, contents in normal))


def of_two(folder: Path, *epochs: Sequence[bytes]) -> Migration:
    """A migration over main and two channels: in each epoch the packets of both, and records of main, if any."""
    parts = [streams.ram_part(*epoch[2:]) for epoch in epochs]
    main = [streams.header(), streams.configuration("pc"), streams.ram_start({"pc.ram": 0x8000}), *parts]
    main += [streams.ram_end(), streams.devices(), streams.eof()]
    sync = sent(sync=True)
    channels = [
        InitialPacket(channel_id=number).build() + sync + b"".join(epoch[number] + sync for epoch in epochs) + sync
        for number in range(2)
    ]
    one, *others = written(folder, main=b"".join(main), one=channels[0], two=channels[1])
    return Migration(one, channels=others)


A, B, ZERO = b"a" * streams.PAGE, b"b" * streams.PAGE, bytes(streams.PAGE)


@pytest.mark.parametrize(("first", "second"), [(A, B), (A, ZERO), (ZERO, A)])
def test_of_a_page_in_two_epochs_the_later_counts_whichever_channel_had_it(
    first: bytes, second: bytes, tmp_path: Path
) -> None:
    early, late, other = sent((0x3000, first)), sent((0x3000, second)), sent((0x5000, A))
    for epochs in ([(early, other), (other, late)], [(other, early), (late, other)], [(early, b""), (b"", late)]):
        with of_two(tmp_path, *epochs) as migration:
            assert not any("SYNC" in sentence for sentence in oddities(migration.contents))
            assert check(migration).identical
            assert extracted(migration, tmp_path / "ram")["pc.ram"][0x3000:0x4000] == second


@pytest.mark.parametrize(
    ("one", "two", "copies", "in_doubt"),
    [
        (sent((0x3000, A)), sent((0x3000, B)), 1, 1),
        (sent((0x3000, A)), sent((0x3000, ZERO)), 1, 1),
        (sent((0x3000, ZERO)), sent((0x3000, A)), 1, 1),
        (sent((0x1000, A), (0x2000, A), (0x5000, A)), sent((0x2000, B), (0x4000, B), (0x1000, ZERO)), 2, 2),
        (sent((0x3000, A)), sent((0x3000, A)), 1, 0),  # as 5.2 and 7.2 do
        (sent((0x1000, A)) + sent((0x2000, A)), sent((0x1000, A)) + sent((0x2000, B)), 2, 1),
        (sent((0x3000, A)), sent((0x3000, B)) + sent((0x3000, A)), 2, 1),
    ],
)
def test_of_a_page_over_two_channels_in_one_epoch_it_is_said_that_no_order_is_known(
    one: bytes, two: bytes, copies: int, in_doubt: int, tmp_path: Path
) -> None:
    with of_two(tmp_path, (one, two)) as migration:
        checked = check(migration)
        assert (checked.valid, checked.identical) == (True, True)
        assert UNORDERED.format(copies) in oddities(migration.contents)
        found = extract(migration, tmp_path / "ram").gathering.contents
    expected = [IN_DOUBT.format(in_doubt)] if in_doubt else []
    assert (found.complete, [str(error) for error in found.errors]) == (not in_doubt, expected)
    with of_two(tmp_path, (one, two)) as a, of_two(tmp_path, (one, two)) as b, ExitStack() as stack:
        sides = [read_side(each, "one", stack) for each in (a, b)]
        assert [[str(error) for error in side.contents.errors] for side in sides] == [expected] * 2


def test_a_page_that_comes_again_after_a_sync_is_in_doubt_no_more(tmp_path: Path) -> None:
    """The guest has written to it between both copies, so it is sent again: a whole migration leaves nothing open."""
    doubtful = [sent((0x3000, A), (0x4000, A)), sent((0x3000, B), (0x4000, B))]
    again = [sent((0x3000, ZERO)), b""]
    main = [b"", b"", streams.zero(0x4000, block="pc.ram")]
    with of_two(tmp_path, doubtful, again) as migration:
        (error,) = extract(migration, tmp_path / "ram").gathering.contents.errors
    assert str(error) == IN_DOUBT.format(1)
    for rest in ([again, main], [main, again], [again[::-1], main]):
        with of_two(tmp_path, doubtful, *rest) as migration:
            assert extract(migration, tmp_path / "ram").gathering.contents.errors == []


@pytest.mark.parametrize("channel", [0, 1])
def test_of_a_page_on_main_and_on_a_channel_in_one_epoch_no_order_is_known_either(channel: int, tmp_path: Path) -> None:
    """Until 8.2 zero pages travel on main."""
    packets = [b"", b""]
    packets[channel] = sent((0x3000, A))
    zeros = streams.zero(0x2000, 4, block="pc.ram")
    with of_two(tmp_path, [*packets, zeros]) as migration:
        assert UNORDERED.format(1) in oddities(migration.contents)
    with of_two(tmp_path, [b"", b"", zeros], packets, [b"", b"", zeros]) as migration:
        assert not any("SYNC" in sentence for sentence in oddities(migration.contents))
        assert extracted(migration, tmp_path / "ram")["pc.ram"] == bytes(0x8000)


def state(data: bytes, *, instance_id: int = 0) -> bytes:
    name = b"0000:00:05.0/vfio".ljust(256, b"\0")
    header = DeviceStateHeader(name=name, instance_id=instance_id, next_packet_size=len(data))
    return encode_packet(DeviceStatePacket(header, data))


def test_device_state_on_channels_is_counted_and_kept(tmp_path: Path) -> None:
    """As vfio sends it since 10.0: pieces over any channel."""
    pieces = state(b"x" * 500), state(b"y" * 3, instance_id=1)
    with of_two(tmp_path, [pieces[0] + sent((0x3000, A)), b"".join(pieces)], [b"", pieces[0]]) as migration:
        checked = check(migration)
        assert (checked.valid, checked.identical) == (True, True)
        assert checked.opaque["page contents"] == streams.PAGE
        assert checked.opaque["undecoded sections"] >= 3 * 500 + 3
        said = [sentence for sentence in oddities(migration.contents) if "vfio" in sentence]
        assert extracted(migration, tmp_path / "ram")["pc.ram"][0x3000:0x4000] == A
    assert said == [
        f"{length} bytes of the state of 0000:00:05.0/vfio/{number} came over multifd channels (10.0 and later): they "
        "are not decoded."
        for number, length in ((0, 1500), (1, 3))
    ]


def test_of_a_page_twice_over_one_channel_the_later_counts(tmp_path: Path) -> None:
    with of_two(tmp_path, (sent((0x3000, A)) + sent((0x3000, B)), sent((0x4000, A)))) as migration:
        assert not any("SYNC" in sentence for sentence in oddities(migration.contents))
        assert extracted(migration, tmp_path / "ram")["pc.ram"][0x3000:0x5000] == B + A


def test_a_multifd_channel_alone_says_what_is_missing() -> None:
    feed = Feed()
    feed.receive((0x11223344).to_bytes(4) + bytes(60))
    feed.end()
    with pytest.raises(NoStreamError, match=r"a multifd channel; its migration is read with its main channel \(--cha"):
        list(walk(feed))
