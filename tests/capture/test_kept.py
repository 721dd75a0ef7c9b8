"""An index that is kept tells of each page what a fresh one does, or it is not taken."""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmigrate.capture.kept import KeptError, Stamp, read_kept, write_kept
from qmigrate.capture.kept_folder import KeptIndexes
from qmigrate.capture.migration import Migration
from qmigrate.capture.placed import KIND_BITS, Kind
from qmigrate.capture.saved import read_saved
from qmigrate.capture.saved_guest import SavedGuest
from qmigrate.errors import RefusedError, StreamError
from tests import streams
from tests.capture.test_index import in_spans, page_records, ram_of, whole
from tests.streams import PAGE

anew = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)


@contextmanager
def fresh(path: Path) -> Iterator[tuple[SavedGuest, Stamp]]:
    spill = path.with_name("spill").open("w+b")
    with Migration(path) as migration, read_saved(migration, spill=spill) as saved, path.open("rb") as file:
        yield saved, Stamp.of(file.fileno())


@contextmanager
def kept(indexes: KeptIndexes, path: Path) -> Iterator[SavedGuest]:
    with path.open("rb") as file, indexes.read([file.fileno()]) as saved:
        yield saved


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "stream.mig"
    path.write_bytes(streams.minimal())
    return path


@pytest.fixture
def indexes(tmp_path: Path) -> KeptIndexes:
    return KeptIndexes(tmp_path / "indexes")


@pytest.fixture
def index(stream: Path, indexes: KeptIndexes) -> Path:
    """That of ``stream``."""
    with fresh(stream) as (saved, stamp):
        return indexes.keep(saved, [stamp])


def facts(saved: SavedGuest) -> dict[str, object]:
    return {name: value for name, value in vars(saved).items() if name not in ("index", "input")}


@anew
@given(page_records(), st.integers(1, 20))
def test_a_kept_index_is_the_same_as_a_fresh_one(tmp_path: Path, records: bytes, span: int) -> None:
    path, indexes = tmp_path / "stream.mig", KeptIndexes(tmp_path / "indexes")
    path.write_bytes(whole(records))
    with fresh(path) as (saved, stamp):
        with (tmp_path / "spill").open("rb") as spill, (tmp_path / "index").open("w+b") as file:
            write_kept(saved, [stamp], file.fileno(), spilled=saved.index.spilled)
            with (
                path.open("rb") as again,
                read_kept(file.fileno(), [stamp], [again.fileno()], spill=spill.fileno()) as read,
            ):
                assert facts(read) == facts(saved)
                assert ram_of(read) == in_spans(read, span) == ram_of(saved)
        indexes.keep(saved, [stamp])
        with kept(indexes, path) as read:
            assert facts(read) == facts(saved)
            assert ram_of(read) == in_spans(read, span) == ram_of(saved)


@pytest.mark.usefixtures("index")
def test_a_restore_with_a_kept_index_reads_nothing_but_what_it_serves(
    stream: Path, indexes: KeptIndexes, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[int, int]] = []
    preadv = os.preadv

    def noted(descriptor: int, buffers: list[memoryview], at: int) -> int:
        reads.append((at, sum(map(len, buffers))))
        return preadv(descriptor, buffers, at)

    with kept(indexes, stream) as saved, monkeypatch.context() as patched:
        patched.setattr(os, "preadv", noted)
        saved.index.records("pc.ram", 5, 1)
        (run,) = saved.index.runs("pc.ram", 5, 1)
    assert reads == [(run.offset - 8, 8 + PAGE)]


@anew
@given(st.data())
def test_whatever_is_damaged_in_it_it_is_not_taken(
    stream: Path, index: Path, indexes: KeptIndexes, data: st.DataObject
) -> None:
    good = index.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    how = data.draw(st.sampled_from(["flipped", "cut", "longer"]))
    bad = {
        "flipped": good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :],
        "cut": good[:at],
        "longer": good + b"\0",
    }[how]
    index.write_bytes(bad)
    try:
        with pytest.raises(KeptError), kept(indexes, stream):
            pass
    finally:
        index.write_bytes(good)
    with kept(indexes, stream):
        pass


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("change", ["longer", "its time", "another file"])
def test_an_index_of_a_file_that_was_changed_is_not_taken(stream: Path, indexes: KeptIndexes, change: str) -> None:
    if change == "longer":
        with stream.open("ab") as file:
            file.write(b"\0")
    elif change == "its time":
        os.utime(stream, ns=(0, 0))
    else:
        data = stream.read_bytes()
        stream.rename(stream.with_name("before"))
        stream.write_bytes(data)
    with pytest.raises(KeptError), kept(indexes, stream):
        pass


def test_an_index_that_somebody_else_laid_there_is_not_taken(stream: Path, index: Path, indexes: KeptIndexes) -> None:
    aside = index.with_name("aside")
    index.rename(aside)
    index.symlink_to(aside)
    with pytest.raises(KeptError), kept(indexes, stream):
        pass
    index.unlink()
    os.mkfifo(index)
    with pytest.raises(KeptError, match="no file of this user"), kept(indexes, stream):
        pass
    index.unlink()
    if os.geteuid() == 0:
        aside.rename(index)
        os.chown(index, 1, 1)
        with pytest.raises(KeptError, match="no file of this user"), kept(indexes, stream):
            pass


def swapped(index: Path, change: dict[int, int]) -> bytes:
    """With other entries for some pages of pc.ram, and checksums that hold all the same."""
    with index.open("r+b") as file:
        data = bytearray(file.read())
        entries = memoryview(data)[-8 * (streams.BLOCKS["pc.ram"] + streams.BLOCKS["pc.rom"]) // PAGE :].cast("Q")
        for page, entry in change.items():
            entries[page] = entry
        body = data[-data_length(bytes(data)) :]
        begin = len(data) - len(body) - 4
        data[begin - 4 : begin] = zlib.crc32(body).to_bytes(4)
        data[begin : begin + 4] = zlib.crc32(data[:begin]).to_bytes(4)
    return bytes(data)


def data_length(data: bytes) -> int:
    from qmigrate.capture.kept import KeptHeader

    header, _ = KeptHeader.read_prefix(data)
    return header.body


def test_pages_are_compared_with_the_file_before_they_are_served(
    stream: Path, index: Path, indexes: KeptIndexes
) -> None:
    with kept(indexes, stream) as saved:
        entries = saved.index.entries("pc.ram").tolist()
    page, other = [at for at, entry in enumerate(entries) if entry & 7 == Kind.RECORD][:2]
    zero = next(at for at, entry in enumerate(entries) if entry & 7 == Kind.ZERO)
    for wrong in (
        entries[other],  # another page's record
        entries[zero],  # a page of zeros of another's
        entries[page] + (1 << KIND_BITS),  # in the middle of it
        stream.stat().st_size << KIND_BITS | Kind.RECORD,  # beyond the end
        (1 << 60) << KIND_BITS | Kind.RECORD,
        7,  # no kind that there is
        Kind.SPILLED,  # in a file that there is not
        3 << KIND_BITS | Kind.RECORD,  # before there was anything
        3 << KIND_BITS | Kind.ZERO,
    ):
        index.write_bytes(swapped(index, {page: wrong}))
        with kept(indexes, stream) as saved, pytest.raises(StreamError):
            saved.index.records("pc.ram", page, 1)
    index.write_bytes(swapped(index, {page: entries[page]}))
    with kept(indexes, stream) as saved:
        saved.index.records("pc.ram", page, 1)


def test_of_many_the_oldest_go(tmp_path: Path) -> None:
    indexes = KeptIndexes(tmp_path / "indexes", most=2)
    paths = []
    for number in range(4):
        path = tmp_path / f"{number}.mig"
        path.write_bytes(streams.minimal())
        with fresh(path) as (saved, stamp):
            paths.append(indexes.keep(saved, [stamp]))
            os.utime(paths[-1], ns=(number, number))
    assert sorted(indexes.folder.iterdir()) == sorted(paths[2:])


def test_one_that_can_not_be_written_leaves_nothing(
    stream: Path, indexes: KeptIndexes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with fresh(stream) as (saved, stamp):
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            indexes.keep(saved, [stamp])
    assert list(indexes.folder.iterdir()) == []


def test_it_is_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QMIGRATE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert KeptIndexes().folder == tmp_path / "qmigrate" / "indexes"
    monkeypatch.setenv("QMIGRATE_CACHE", str(tmp_path / "mine"))
    assert KeptIndexes().folder == tmp_path / "mine" / "indexes"


def virtio_mem(length: int) -> bytes:
    """A guest whose virtio-mem claims so much, and has three pages plugged in."""
    blocks, name = {"pc.ram": 2 * PAGE, "0000:00:02.0/more": length}, "0000:00:02.0/virtio-mem"
    pages = [streams.zero(0, 2, block="pc.ram"), streams.page(0, b"a" * PAGE, block="0000:00:02.0/more")]
    pages += [streams.page(length // 2, b"b" * PAGE), streams.page(length - PAGE, b"c" * PAGE)]
    ram = streams.ram_start(blocks) + streams.ram_end(*pages)
    described = streams.description(streams.described(name, streams.field("x", "buffer", 64)))
    device = streams.device(name, bytes(64), section_id=9)
    return streams.header() + streams.configuration() + ram + device + streams.eof() + described


def test_an_index_is_as_long_as_what_was_sent_and_not_as_what_a_block_claims(
    tmp_path: Path, indexes: KeptIndexes
) -> None:
    stream, length = tmp_path / "more.mig", 1 << 40
    stream.write_bytes(virtio_mem(length))
    with fresh(stream) as (saved, stamp):
        index = indexes.keep(saved, [stamp])
    assert index.stat().st_size < 1 << 24
    with kept(indexes, stream) as saved:
        assert saved.absent == length // PAGE - 3
        for page, byte in ((0, b"a"), (1, b"\0"), (length // 2 // PAGE, b"b"), (length // PAGE - 1, b"c")):
            assert saved.index.contents("0000:00:02.0/more", page) == byte * PAGE


def test_a_guest_of_which_next_to_nothing_came_is_refused(tmp_path: Path) -> None:
    stream = tmp_path / "more.mig"
    stream.write_bytes(virtio_mem(1 << 41))
    said = r"its blocks have 536870909 pages that are not in it, and 5 that are: to serve so many takes memory for each"
    with pytest.raises(RefusedError, match=said), fresh(stream):
        pass


@pytest.mark.parametrize("spans", [[(0, 17)], [(0, 8), (9, 8)], [(1 << 63, 1 << 63 | 1)], [(0, 16)] * 1000])
def test_an_index_with_spans_that_are_in_no_block_is_not_taken(
    stream: Path, index: Path, indexes: KeptIndexes, spans: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh(stream) as (saved, stamp), index.open("w+b") as file:
        monkeypatch.setattr(saved.index, "noted", lambda _: spans)
        write_kept(saved, [stamp], file.fileno())
    with pytest.raises(KeptError), kept(indexes, stream):
        pass
