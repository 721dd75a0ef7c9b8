"""The index of pages: it tells of each page what plain reading does, and notices when its input changes."""

import lzma
import os
import resource
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmigrate.analysis.extract import extract
from qmigrate.capture.index import Kind, PageIndex
from qmigrate.capture.migration import Migration
from qmigrate.capture.saved import read_saved
from qmigrate.capture.saved_guest import SavedGuest
from qmigrate.errors import RefusedError, StreamError, UnsupportedError
from qmigrate.format.command import DiscardRange, PostcopyRamDiscard
from qmigrate.format.entry import Entry
from qmigrate.format.feed import Feed
from qmigrate.format.mapped_ram import MappedPages
from qmigrate.format.ram import Pages
from qmigrate.format.ram_section import RamSection
from qmigrate.format.walk import walk
from tests import streams
from tests.joining import joined, pages_of
from tests.streams import BLOCKS, PAGE
from tests.walking import entries

CORPUS = Path(__file__).parents[1] / "corpus"
COUNTS = {name: length // PAGE for name, length in BLOCKS.items()}


@contextmanager
def saved(path: Path, *channels: str) -> Iterator[SavedGuest]:
    with Migration(path, channels=channels) as migration, read_saved(migration) as read:
        yield read


def ram_of(read: SavedGuest) -> dict[str, bytes]:
    """Page by page, as it would be served."""
    size = read.page_size
    return {
        block.name: b"".join(read.index.contents(block.name, page) for page in range(block.used_length // size))
        for block in read.blocks
    }


def in_spans(read: SavedGuest, count: int) -> dict[str, bytes]:
    """The same by the records that go out, so many pages at once, read back by the declaration."""
    out = {}
    for block in read.blocks:
        section = RamSection(Feed(), page_size=read.page_size, is_known=True, capabilities=frozenset(), advised=None)
        section.blocks, section.block = {block.name: block.used_length}, block.name
        for first in range(0, block.used_length // read.page_size, count):
            left = min(count, block.used_length // read.page_size - first)
            section.feed.receive(read.index.records(block.name, first, left))
        section.feed.receive(streams.eos())
        section.feed.end()
        entries = (entry for entry in section.records() if entry is not None)
        out[block.name] = bytes(joined_block(entries, block.used_length))
    return out


def joined_block(entries: Iterable[Entry], length: int) -> bytearray:
    contents = bytearray(length)
    for entry in entries:
        if isinstance(entry.record, Pages):
            for start, page in pages_of(entry.record, entry.view):
                contents[start : start + len(page)] = page
    return contents


def plainly(data: bytes) -> dict[str, bytes]:
    feed = Feed()
    feed.receive(data)
    feed.end()
    entries = (entry for entry in walk(feed) if entry is not None)
    return {name: bytes(contents) for name, contents in joined(entries).blocks.items()}


@st.composite
def page_records(draw: st.DrawFn) -> bytes:
    """Any pages of both blocks, again and again, in any order and of any kind."""
    out, block = (
        [streams.zero(0, COUNTS["pc.ram"], block="pc.ram"), streams.zero(0, COUNTS["pc.rom"], block="pc.rom")],
        "",
    )
    for _ in range(draw(st.integers(0, 40))):
        name = draw(st.sampled_from(sorted(BLOCKS)))
        start = PAGE * draw(st.integers(0, COUNTS[name] - 1))
        contents = bytes([draw(st.integers(0, 255))]) * PAGE
        named = name if name != block or draw(st.booleans()) else None
        match draw(st.sampled_from(["normal", "normal", "zero", "compressed", "xbzrle"])):
            case "normal":
                out.append(streams.page(start, contents, block=named))
            case "zero":
                out.append(streams.zero(start, block=named))
            case "compressed":
                out.append(streams.compressed(start, zlib.compress(contents), block=named))
            case "xbzrle":
                out.append(streams.xbzrle(start, b"\x03\x02" + contents[:2], block=named))
        block = name
    return b"".join(out)


def whole(records: bytes) -> bytes:
    return b"".join(
        (
            *(streams.header(), streams.configuration(), streams.ram_start(), streams.ram_part(records)),
            *(streams.ram_end(), streams.devices(), streams.eof(), streams.devices_described()),
        )
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(page_records(), st.integers(0, 15), st.integers(1, 16))
def test_pages_read_as_they_stand_are_those_read_by_runs(
    tmp_path: Path, records: bytes, first: int, count: int
) -> None:
    path = tmp_path / "stream.mig"
    path.write_bytes(whole(records))
    with saved(path) as read:
        some = min(count, COUNTS["pc.ram"] - first)
        assert read.index.records("pc.ram", first, some) == read.index._by_runs("pc.ram", first, some)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(page_records(), st.integers(1, 20))
def test_the_index_tells_of_each_page_what_plain_reading_does(tmp_path: Path, records: bytes, span: int) -> None:
    data = whole(records)
    path = tmp_path / "stream.mig"
    path.write_bytes(data)
    with saved(path) as read:
        assert ram_of(read) == in_spans(read, span) == plainly(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=20)
@given(page_records())
def test_the_index_of_a_packed_input_tells_the_same(tmp_path: Path, records: bytes) -> None:
    data = whole(records)
    path = tmp_path / "stream.mig.xz"
    path.write_bytes(lzma.compress(data, preset=0))
    with saved(path) as read:
        assert ram_of(read) == plainly(data)


@pytest.mark.parametrize("name", ["pc-running-11.1", "q35-many-7.2", "q35-advised-10.0", "pc-postcopy-5.2"])
def test_a_recorded_stream_is_indexed_as_it_is_extracted(name: str, tmp_path: Path) -> None:
    path = tmp_path / "stream.mig"
    path.write_bytes(lzma.decompress((CORPUS / f"{name}.mig.xz").read_bytes()))
    assert_as_extracted(path, tmp_path / "ram")


@pytest.mark.parametrize("name", ["pc-mapped-10.0", "pc-mapped-11.1"])
def test_a_mapped_file_is_indexed_as_it_is_extracted(name: str, tmp_path: Path) -> None:
    path = tmp_path / "stream.mig"
    path.write_bytes(lzma.decompress((CORPUS / "odd" / f"{name}.mig.xz").read_bytes()))
    assert_as_extracted(path, tmp_path / "ram")


@given(st.lists(st.booleans(), min_size=1, max_size=200), st.integers(0, 3))
@settings(max_examples=30)
def test_a_bitmap_says_of_each_page_what_its_run_does(present: list[bool], before: int) -> None:
    """With another block behind it, and the stream not at the file's beginning."""
    begin = streams.header() + streams.configuration(capabilities=["mapped-ram"])
    pages: dict[str, list[bytes | None]] = {
        "pc.ram": [bytes([number % 251]) * PAGE if is_there else None for number, is_there in enumerate(present)],
        "pc.rom": [None, b"r" * PAGE],
    }
    base = before * PAGE
    stream = begin + streams.mapped_ram_start(pages, begin=len(begin), base=base)
    with pytest.MonkeyPatch.context() as patch, PageIndex(0, base=base) as by_runs:
        patch.setattr("qmigrate.capture.index._BITS_AT_ONCE", 16)
        with PageIndex(0, base=base, by_bitmaps=True) as by_bitmaps:
            for entry in entries(stream + streams.eof()):
                by_runs.take(entry)
                if isinstance(entry.record, MappedPages):
                    by_bitmaps.take(entry._replace(record=MappedPages(entry.record.block, PAGE, ())))
                else:
                    by_bitmaps.take(entry)
            for name, each in pages.items():
                assert list(by_bitmaps.runs(name, 0, len(each))) == list(by_runs.runs(name, 0, len(each)))


def assert_as_extracted(path: Path, folder: Path) -> None:
    with Migration(path) as migration:
        extracted = extract(migration, folder)
    with saved(path) as read:
        ram = ram_of(read)
    assert ram == {name: (folder / file).read_bytes() for name, file in extracted.files.items()}


def test_pages_that_stand_in_the_input_are_left_there(tmp_path: Path) -> None:
    path = tmp_path / "stream.mig"
    path.write_bytes(streams.minimal())
    with saved(path) as read:
        kinds = {run.kind for name, count in COUNTS.items() for run in read.index.runs(name, 0, count)}
    assert kinds == {Kind.ZERO, Kind.RECORD}


def test_a_page_that_is_not_where_it_was_is_not_served(tmp_path: Path) -> None:
    path = tmp_path / "stream.mig"
    path.write_bytes(streams.minimal())
    status = path.stat()
    with saved(path) as read:
        (run,) = [run for run in read.index.runs("pc.ram", 4, 2) if run.kind == Kind.RECORD][:1]
        with path.open("r+b") as file:
            file.seek(run.offset - 1)
            file.write(b"\x09")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(StreamError, match=r"ram: pc.ram: the pages? (is|are) no longer where"):
            read.index.records("pc.ram", 4, 2)


def test_an_input_that_was_changed_is_not_served(tmp_path: Path) -> None:
    path = tmp_path / "stream.mig"
    path.write_bytes(streams.minimal())
    with saved(path) as read:
        with path.open("ab") as file:
            file.write(b"more")
        with pytest.raises(StreamError, match="the input was changed since its pages were indexed"):
            read.index.records("pc.ram", 0, 1)


@pytest.mark.parametrize("length", [1 << 40, 1 << 62])
def test_a_block_of_any_claimed_length_takes_no_memory_before_its_pages_come(length: int) -> None:
    before = peak()
    index = PageIndex(None)
    data = streams.ram_start({"huge": length}) + streams.ram_part(streams.zero(0, block="huge")) + streams.eof()
    feed = Feed()
    feed.receive(streams.header() + streams.configuration() + data)
    feed.end()
    entries = [entry for entry in walk(feed) if entry is not None]
    if length > 1 << 60:
        with pytest.raises(UnsupportedError, match="are more than can be indexed here"):
            take_all(index, entries)
    else:
        take_all(index, entries)
        assert [run.kind for run in index.runs("huge", 0, 2)] == [Kind.ZERO, Kind.ABSENT]
    assert peak() - before < 16 << 20


def take_all(index: PageIndex, entries: Iterable[Entry]) -> None:
    for entry in entries:
        index.take(entry)


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# -- what can't be restored


def refusal(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "stream.mig"
    path.write_bytes(data)
    with pytest.raises((RefusedError, StreamError)) as caught, saved(path):
        pass
    return str(caught.value)


def test_a_stream_that_lacks_pages_is_refused(tmp_path: Path) -> None:
    some = streams.zero(0, 10, block="pc.ram") + streams.zero(0, 2, block="pc.rom")
    assert "6 of 16 pages of pc.ram are not in it" in refusal(tmp_path, whole(some))


def test_a_page_that_was_discarded_and_did_not_come_again_is_not_taken_from_before(tmp_path: Path) -> None:
    ranges = (DiscardRange(start=PAGE, length=3 * PAGE),)
    data = streams.postcopy().replace(
        streams.command(PostcopyRamDiscard(block="pc.ram", ranges=(DiscardRange(start=PAGE, length=2 * PAGE),))),
        streams.command(PostcopyRamDiscard(block="pc.ram", ranges=ranges)),
    )
    assert "1 of 16 pages of pc.ram are not in it" in refusal(tmp_path, data)


@pytest.mark.parametrize("cut", [40, 300, 1])
def test_a_stream_that_was_cut_is_refused(cut: int, tmp_path: Path) -> None:
    data = streams.header() + streams.configuration() + streams.ram_start() + streams.ram() + streams.devices()
    assert "ends" in refusal(tmp_path, data[:-cut])


def test_a_stream_without_its_end_is_refused(tmp_path: Path) -> None:
    data = streams.header() + streams.configuration() + streams.ram_start() + streams.ram()
    assert refusal(tmp_path, data)


@pytest.mark.parametrize("cut", [1000, PAGE + 1000, 3 * PAGE])
def test_a_mapped_file_that_was_cut_among_its_pages_is_refused(cut: int, tmp_path: Path) -> None:
    """They are not read, and yet have to be there."""
    begin = streams.header() + streams.configuration(capabilities=["mapped-ram"])
    pages: dict[str, list[bytes | None]] = {"pc.ram": [b"a" * PAGE, None, b"b" * PAGE, b"c" * PAGE]}
    whole_file = begin + streams.mapped_ram_start(pages, begin=len(begin))
    assert "bytes too soon" in refusal(tmp_path, whole_file[: -cut - 13])


# -- all but RAM


def test_what_is_no_ram_is_kept_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "stream.mig"
    early = streams.device("early", b"\1\2\3", section_id=9)
    path.write_bytes(streams.minimal().replace(streams.ram_start(), early + streams.ram_start()))
    with saved(path) as read:
        assert read.opening == streams.header() + streams.configuration()
        assert (read.before, read.behind, read.devices) == (early, b"", streams.devices())
        assert read.description == streams.devices_described()
        assert (read.section_id, read.footers, read.machine_type) == (streams.RAM_ID, True, "pc-q35-10.0")


def test_a_package_is_taken_apart(tmp_path: Path) -> None:
    path = tmp_path / "stream.mig"
    path.write_bytes(streams.postcopy())
    with saved(path) as read:
        assert (read.devices, read.description, read.behind) == (streams.devices(), b"", b"")


def test_configuration_loses_what_is_so_only_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "stream.mig"
    begin = streams.header() + streams.configuration(page_bits=12, capabilities=["mapped-ram"])
    pages: dict[str, list[bytes | None]] = {"pc.ram": [b"a" * PAGE, None, b"b" * PAGE]}
    path.write_bytes(
        begin
        + streams.mapped_ram_start(pages, begin=len(begin))
        + streams.ram_end()
        + streams.devices()
        + streams.eof()
    )
    with saved(path) as read:
        assert read.opening == streams.header() + streams.configuration(page_bits=12)
        assert ram_of(read) == {"pc.ram": b"a" * PAGE + bytes(PAGE) + b"b" * PAGE}


def test_ram_that_was_shared_is_refused(tmp_path: Path) -> None:
    data = streams.minimal().replace(streams.configuration(), streams.configuration(capabilities=["x-ignore-shared"]))
    assert "saved with x-ignore-shared" in refusal(tmp_path, data)
