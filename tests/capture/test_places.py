"""Pages that came over several channels, or were recorded, stand where they came; cut ones are spilled."""

import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmigrate.analysis.extract import extract
from qmigrate.capture.frames import Direction
from qmigrate.capture.index import Kind, PageIndex
from qmigrate.capture.kind import FILE_SHIFT
from qmigrate.capture.migration import Migration
from qmigrate.capture.places import Channels, Input
from qmigrate.capture.recorder import Recorder
from qmigrate.capture.saved import read_saved
from qmigrate.capture.saved_guest import SavedGuest
from qmigrate.errors import StreamError, UnsupportedError
from qmigrate.format.multifd import InitialPacket, PagePacket
from qmigrate.format.ram import RamFlag
from qmigrate.format.stretch import Stretch
from tests import streams
from tests.capture.test_index import in_spans, page_records, plainly, ram_of, saved, whole
from tests.joining import channel_entries
from tests.streams import BLOCKS, PAGE
from tests.walking import entries

FOLDER: Final = Path(__file__).parents[1] / "corpus" / "channels"
anew = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
IN_ONE: Final = 1 << 19  # bytes a piece: none of the small streams here is longer


def record(path: Path, connections: Sequence[bytes], sizes: Sequence[int]) -> Path:
    """Each connection forward, in pieces that are so long in turn, and one connection's after another's."""
    turn = 0
    with Recorder(path, overwrite=True) as recorder:
        for number in range(len(connections)):
            recorder.opened(number, peer="", listen="unix:/a", forward="unix:/b")
        left = list(connections)
        while any(left):
            for number, data in enumerate(left):
                size = sizes[turn % len(sizes)]
                turn += 1
                if data:
                    recorder.data(number, Direction.FORWARD, data[:size])
                left[number] = data[size:]
        for number, data in enumerate(connections):
            recorder.closed(number, forward_bytes=len(data), return_bytes=0)
    return path


def kinds(read: SavedGuest) -> Counter[int]:
    """How many pages are where."""
    found: Counter[int] = Counter()
    for block in read.blocks:
        for run in read.index.runs(block.name, 0, block.used_length // read.page_size):
            found[run.kind] += run.page_count
    return found


def extracted(folder: Path, path: Path, *channels: Path) -> dict[str, bytes]:
    with Migration(path, channels=channels) as migration:
        found = extract(migration, folder)
    return {name: (folder / file).read_bytes() for name, file in found.files.items()}


def corpus(name: str, folder: Path) -> list[Path]:
    """Main, and its further channels."""
    files = []
    for packed in (FOLDER / f"{name}.mig.xz", *sorted(FOLDER.glob(f"{name}.0*-forward.xz"))):
        files.append(folder / packed.name.removesuffix(".xz"))
        files[-1].write_bytes(lzma.decompress(packed.read_bytes()))
    return files


# -- in pieces


@anew
@given(page_records(), st.lists(st.integers(1, 3 * PAGE), max_size=4), st.integers(1, 20))
def test_however_a_recording_is_cut_its_index_tells_of_each_page_what_the_stream_does(
    tmp_path: Path, records: bytes, sizes: list[int], span: int
) -> None:
    data = whole(records)
    path = record(tmp_path / "a.tap", [data], [*sizes, 5 * PAGE + 1])
    with saved(path) as read:
        assert ram_of(read) == in_spans(read, span) == plainly(data)


@anew
@given(st.lists(st.booleans(), min_size=30, max_size=100), st.lists(st.integers(1, 3 * PAGE), max_size=4))
def test_pages_in_short_runs_are_found_in_pieces_as_any_runs_are(
    tmp_path: Path, are_zero: list[bool], sizes: list[int]
) -> None:
    def entries_of() -> dict[str, list[int]]:
        with saved(path) as read:
            return {block.name: read.index.entries(block.name).tolist() for block in read.blocks}

    numbers = [7 * each % 16 for each in range(len(are_zero))]
    records = [
        streams.zero(number * PAGE) if is_zero else streams.page(number * PAGE)
        for number, is_zero in zip(numbers, are_zero, strict=True)
    ]
    first = streams.zero(0, 2, block="pc.rom") + streams.zero(0, BLOCKS["pc.ram"] // PAGE, block="pc.ram")
    short = (streams.page(PAGE) + streams.zero(PAGE)) * 20
    data = whole(first + short + b"".join(records))
    assert any(isinstance(getattr(entry.record, "runs", None), Stretch) for entry in entries(data))
    path = record(tmp_path / "a.tap", [data], [*sizes, 5 * PAGE + 1])
    fast = entries_of()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qmigrate.capture.index.Stretch", type(None))
        assert entries_of() == fast


def test_of_a_recording_only_what_is_cut_is_spilled(tmp_path: Path) -> None:
    data = streams.minimal()
    with saved(record(tmp_path / "a.tap", [data], [IN_ONE])) as read:
        assert (read.index.spilled, set(kinds(read))) == (0, {Kind.RECORD, Kind.ZERO})
        stays = kinds(read)[Kind.RECORD]
    last = streams.page(5 * PAGE)
    first = data.rindex(last)
    for cut in (first + len(last) - 1, first + 3):
        with saved(record(tmp_path / "a.tap", [data], [cut, IN_ONE])) as read:
            assert read.index.spilled == PAGE
            assert kinds(read)[Kind.RECORD] == stays - 1


def test_a_page_of_zeros_that_is_cut_needs_no_place(tmp_path: Path) -> None:
    data = whole(streams.zero(0, BLOCKS["pc.ram"] // PAGE, block="pc.ram") + streams.zero(0, 2, block="pc.rom"))
    with saved(record(tmp_path / "a.tap", [data], [5])) as read:
        assert read.index.spilled == 0
        assert ram_of(read) == plainly(data)


# -- in several files


@pytest.mark.parametrize("name", ["pc-multifd-5.2", "pc-multifd-11.1"])
@pytest.mark.parametrize("how", ["files", "main last", "recorded"])
def test_pages_of_multifd_stay_where_they_are(name: str, how: str, tmp_path: Path) -> None:
    main, *channels = files = corpus(name, tmp_path)
    expected = extracted(tmp_path / "ram", main, *channels)
    if how == "recorded":
        files = [record(tmp_path / "a.tap", [each.read_bytes() for each in files], [60_000, 100_000])]
    elif how == "main last":
        files = [*channels, main]
    with saved(files[0], *map(str, files[1:])) as read:
        assert ram_of(read) == in_spans(read, 7) == expected
        found = kinds(read)
        assert found[Kind.PLACED] > 100
        assert found[Kind.SPILLED] < found[Kind.PLACED] / 10
        assert (found[Kind.SPILLED] == read.index.spilled == 0) == (how != "recorded")
        where = {run.file for run in read.index.runs("pc.ram", 0, 2048) if run.kind == Kind.PLACED}
    assert where == {"files": {1, 2}, "main last": {0, 1}, "recorded": {0}}[how]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=10)
@given(st.lists(st.integers(PAGE + 1, 40 * PAGE), max_size=3))
def test_however_recorded_packets_are_cut_their_pages_are_the_same(tmp_path: Path, sizes: list[int]) -> None:
    main, *channels = files = corpus("pc-multifd-11.1", tmp_path)
    path = record(tmp_path / "a.tap", [each.read_bytes() for each in files], [*sizes, 10 * PAGE])
    with saved(path) as read, saved(main, *map(str, channels)) as expected:
        assert ram_of(read) == ram_of(expected)
        assert kinds(read)[Kind.SPILLED]


@pytest.mark.parametrize("name", ["pc-multifd-zlib-7.2", "pc-multifd-zstd-10.0"])
def test_pages_of_multifd_that_are_compressed_are_spilled(name: str, tmp_path: Path) -> None:
    main, *channels = corpus(name, tmp_path)
    with saved(main, *map(str, channels)) as read:
        assert ram_of(read) == extracted(tmp_path / "ram", main, *channels)
        assert not kinds(read)[Kind.PLACED]
        assert read.index.spilled > 100 * PAGE


@pytest.mark.parametrize("name", ["pc-xbzrle-11.1", "pc-compress-7.2"])
def test_of_encoded_pages_in_a_recording_the_plain_ones_stay(name: str, tmp_path: Path) -> None:
    """A delta's page is what stands in the recording, and the delta."""
    (main,) = corpus(name, tmp_path)
    with saved(record(tmp_path / "a.tap", [main.read_bytes()], [IN_ONE])) as read:
        assert ram_of(read) == extracted(tmp_path / "ram", main)
        assert kinds(read)[Kind.RECORD]
        assert kinds(read)[Kind.SPILLED]


@pytest.mark.parametrize("packed", ["main", "the channels"])
def test_what_is_packed_of_several_files_is_spilled_and_the_rest_stays(packed: str, tmp_path: Path) -> None:
    main, *channels = corpus("pc-multifd-5.2", tmp_path)
    expected = extracted(tmp_path / "ram", main, *channels)
    for each in [main] if packed == "main" else channels:
        each.write_bytes(zlib.compress(each.read_bytes(), wbits=31))
    with saved(main, *map(str, channels)) as read:
        assert ram_of(read) == expected
        assert (kinds(read)[Kind.PLACED] == 0) == (packed == "the channels")
        assert [each is None for each in read.index.inputs] == [packed == "main", *[packed != "main"] * 2]


PREEMPTED: Final = streams.page(0, b"\xee" * PAGE, block="pc.ram") + streams.zero(PAGE)


@contextmanager
def preempted(folder: Path) -> Iterator[tuple[Path, SavedGuest]]:
    """Main, and two pages on the preempt channel."""
    main, channel = folder / "main.mig", folder / "preempt"
    main.write_bytes(streams.postcopy())
    channel.write_bytes(PREEMPTED)
    with saved(main, str(channel)) as read:
        yield channel, read


def test_pages_of_the_preempt_channel_stay_in_its_file(tmp_path: Path) -> None:
    with preempted(tmp_path) as (_, read):
        one, other = read.index.runs("pc.ram", 0, 2)
        assert (one.kind, one.file, one.offset) == (Kind.RECORD, 1, 8 + len("\x06pc.ram"))
        assert (other.kind, other.file) == (Kind.ZERO, 1)
        assert read.index.contents("pc.ram", 0) == b"\xee" * PAGE


def test_a_page_that_is_not_where_it_was_in_its_own_file_is_not_served(tmp_path: Path) -> None:
    with preempted(tmp_path) as (channel, read):
        status = channel.stat()
        channel.write_bytes(PREEMPTED.replace(b"pc.ram", b"pc.rom"))
        os.utime(channel, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(StreamError, match=r"ram: pc\.ram: the page is no longer where it was"):
            read.index.contents("pc.ram", 0)


def test_where_one_of_the_files_was_changed_nothing_is_served(tmp_path: Path) -> None:
    """For before a page of multifd no word stands that could be compared."""
    main, *channels = corpus("pc-multifd-11.1", tmp_path)
    with saved(main, *map(str, channels)) as read:
        (run,) = [run for run in read.index.runs("pc.ram", 256, 1000) if run.kind == Kind.PLACED][:1]
        read.index.contents("pc.ram", run.page)
        os.utime(channels[1], ns=(0, 0))
        for page in (run.page, 0):
            with pytest.raises(StreamError, match="the input was changed since its pages were indexed"):
                read.index.contents("pc.ram", page)


def test_an_entry_that_names_a_file_that_there_is_not_is_not_served(tmp_path: Path) -> None:
    with preempted(tmp_path) as (_, read):
        entries = read.index.entries("pc.ram")
        for number in (2, 4095):
            entries[0] = entries[0] & (1 << FILE_SHIFT) - 1 | number << FILE_SHIFT
            with pytest.raises(StreamError, match="in a file that there is not"):
                read.index.contents("pc.ram", 0)


def test_a_file_too_long_for_an_entry_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="512 TiB or more"):
        PageIndex(None, channels=Channels(inputs=(None, Input(0, 1 << 49, 0))))


def test_of_more_files_than_an_entry_can_name_the_rest_is_spilled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, *channels = corpus("pc-multifd-11.1", tmp_path)
    expected = extracted(tmp_path / "ram", main, *channels)
    monkeypatch.setattr("qmigrate.capture.saved.MOST_FILES", 2)
    with Migration(main, channels=channels) as migration, read_saved(migration) as read:
        assert ram_of(read) == expected
        assert kinds(read)[Kind.PLACED]
        assert kinds(read)[Kind.SPILLED]


def test_the_packets_of_the_corpus_are_what_these_tests_take_them_for(tmp_path: Path) -> None:
    _, *channels = corpus("pc-multifd-11.1", tmp_path)
    records = [entry.record for each in channels for entry in channel_entries(each.read_bytes())]
    assert {type(each) for each in records} == {InitialPacket, PagePacket}
    assert RamFlag.PAGE in {run.flag for each in records if isinstance(each, PagePacket) for run in each.runs}
