"""Pages that are kept with an index, as they stand in no input, are what they were, or they are not served."""

import lzma
import os
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmigrate.capture.kept import KeptChecksum, KeptError, KeptHeader
from qmigrate.capture.kept_folder import MOST_SPILLED, KeptIndexes
from qmigrate.capture.placed import KIND_BITS, Kind
from qmigrate.errors import StreamError
from tests import streams
from tests.capture.test_index import ram_of
from tests.capture.test_kept import fresh, kept
from tests.streams import BLOCKS, PAGE

anew = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)


def packed(path: Path) -> Path:
    """Of three of its pages, 4 and 5 of pc.ram and the first of pc.rom, the contents are nowhere as they are."""
    path.write_bytes(lzma.compress(streams.minimal(), preset=0))
    return path


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    return packed(tmp_path / "stream.xz")


@pytest.fixture
def indexes(tmp_path: Path) -> KeptIndexes:
    return KeptIndexes(tmp_path / "indexes")


@pytest.fixture
def index(stream: Path, indexes: KeptIndexes) -> Path:
    """That of ``stream``."""
    return keep(indexes, stream)


@pytest.fixture
def pages(index: Path) -> Path:
    (pages,) = index.parent.glob("*.pages")
    assert pages.stat().st_size == 3 * PAGE
    return pages


def keep(indexes: KeptIndexes, path: Path) -> Path:
    with fresh(path) as (saved, stamp):
        return indexes.keep(saved, [stamp])


def names(indexes: KeptIndexes) -> list[str]:
    return sorted(each.name for each in indexes.folder.iterdir())


@pytest.mark.usefixtures("index")
def test_kept_pages_are_those_of_the_stream(stream: Path, indexes: KeptIndexes) -> None:
    with kept(indexes, stream) as again, fresh(stream) as (saved, _):
        assert ram_of(again) == ram_of(saved)
        assert {run.kind for run in again.index.runs("pc.ram", 4, 2)} == {Kind.SPILLED}
        assert again.index.inputs == [None]  # so it may change while it is served


@anew
@given(st.integers(0, 3 * PAGE - 1), st.integers(1, 255))
def test_a_kept_page_that_is_damaged_is_not_served_and_the_others_are(
    stream: Path, pages: Path, indexes: KeptIndexes, at: int, bits: int
) -> None:
    good = pages.read_bytes()
    pages.write_bytes(good[:at] + bytes([good[at] ^ bits]) + good[at + 1 :])
    try:
        with kept(indexes, stream) as again, fresh(stream) as (saved, _):
            served = []
            for block, page in (("pc.ram", 4), ("pc.ram", 5), ("pc.rom", 0)):
                try:
                    assert again.index.contents(block, page) == saved.index.contents(block, page)
                    served.append((block, page))
                except StreamError as exc:
                    assert "a page that was kept is no longer what it was" in str(exc)  # noqa: PT017 - most are none
            assert len(served) == 2
            assert not pages.exists()
            with pytest.raises(StreamError, match=r"ram: pc\.r[ao]m: a page that was kept is no longer what it was"):
                ram_of(again)
    finally:
        pages.write_bytes(good)


def test_pages_that_are_damaged_are_kept_no_longer(
    stream: Path, pages: Path, index: Path, indexes: KeptIndexes
) -> None:
    pages.write_bytes(bytes(3 * PAGE))
    with (
        kept(indexes, stream) as again,
        pytest.raises(StreamError, match="is no longer what it was; next time the file is read anew"),
    ):
        ram_of(again)
    assert names(indexes) == [index.name]
    with pytest.raises(KeptError, match="No such file"), kept(indexes, stream):
        pass
    assert keep(indexes, stream) == index
    with kept(indexes, stream) as again, fresh(stream) as (saved, _):
        assert ram_of(again) == ram_of(saved)


def test_that_damaged_pages_can_not_be_removed_is_not_told_otherwise(
    stream: Path, pages: Path, indexes: KeptIndexes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    pages.write_bytes(bytes(3 * PAGE))
    with kept(indexes, stream) as again:
        monkeypatch.setattr(Path, "unlink", refused)
        with pytest.raises(StreamError, match="; it is read anew with --no-kept-index"):
            ram_of(again)
    monkeypatch.undo()
    assert pages.exists()


@pytest.mark.parametrize("how", ["cut", "longer", "gone", "a link", "a pipe", "a folder", "of another user"])
def test_pages_that_are_not_a_whole_file_of_this_user_are_not_taken(
    stream: Path, pages: Path, indexes: KeptIndexes, how: str
) -> None:
    good = pages.read_bytes()
    match how:
        case "cut":
            pages.write_bytes(good[:-1])
        case "longer":
            pages.write_bytes(good + b"\0")
        case "of another user":
            if os.geteuid():
                pytest.skip("only root can give a file away")
            os.chown(pages, 1, 1)
        case "gone":
            pages.unlink()
        case "a link":
            pages.rename(pages.with_name("aside"))
            pages.symlink_to(pages.with_name("aside"))
        case "a pipe":
            pages.unlink()
            os.mkfifo(pages)
        case "a folder":
            pages.unlink()
            pages.mkdir()
    with pytest.raises(KeptError), kept(indexes, stream):
        pass


def test_pages_of_another_index_are_not_served(stream: Path, pages: Path, indexes: KeptIndexes, tmp_path: Path) -> None:
    other = tmp_path / "other.xz"
    other.write_bytes(lzma.compress(streams.minimal().replace(streams.page(4 * PAGE)[8:], b"o" * PAGE)))
    keep(indexes, other)
    (others,) = set(indexes.folder.glob("*.pages")) - {pages}
    assert others.name.split(".")[1] != pages.name.split(".")[1]
    others.replace(pages)
    with kept(indexes, stream) as again, pytest.raises(StreamError, match="no longer what it was"):
        ram_of(again)


def rewritten(index: Path, entry: int | None = None, **changes: int) -> None:
    """With another entry for page 4 of pc.ram, or another header, and checksums that hold all the same."""
    data = index.read_bytes()
    header, used = KeptHeader.read_prefix(data)
    assert KeptChecksum.size is not None
    body = bytearray(data[used + KeptChecksum.size :])
    if entry is not None:
        begin = len(body) - 4 * header.checks - (BLOCKS["pc.ram"] + BLOCKS["pc.rom"]) // PAGE * 8
        memoryview(body)[begin + 4 * 8 : begin + 5 * 8].cast("Q")[0] = entry
    if changes.get("checks") == 0:
        del body[-4 * header.checks :]
    values: dict[str, Any] = {**vars(header), "body": len(body), "body_checksum": zlib.crc32(body), **changes}
    head = KeptHeader(**values).build()
    index.write_bytes(head + KeptChecksum(checksum=zlib.crc32(head)).build() + body)


@pytest.mark.parametrize(
    "entry",
    [
        (PAGE + 1) << KIND_BITS,  # beside a page
        (3 * PAGE) << KIND_BITS,  # behind the last
        ((1 << 49) - PAGE) << KIND_BITS,
        (2 * PAGE) << KIND_BITS | 1 << 52,  # of another file: there is but one with spilled pages
    ],
)
@pytest.mark.usefixtures("pages")
def test_an_entry_that_names_no_kept_page_is_not_served(
    stream: Path, index: Path, indexes: KeptIndexes, entry: int
) -> None:
    rewritten(index, entry | Kind.SPILLED)
    with kept(indexes, stream) as again:
        if entry >> 52:
            assert again.index.contents("pc.ram", 4) == again.index.contents("pc.rom", 0)
        else:
            with pytest.raises(StreamError, match=r"ram: pc\.ram: "):
                again.index.contents("pc.ram", 4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"checks": 0, "checks_checksum": 0}, "what it needs besides was not kept"),
        ({"checks": 2}, "its parts are not as long as it is"),
        ({"checks": 1 << 63}, "its parts are not as long as it is"),
        ({"checks_checksum": 1}, "No such file"),
        ({"spilled": 2 * PAGE}, "its pages have 12288 bytes, expected 8192"),
        ({"spilled": 1 << 63}, "its pages have 12288 bytes"),
        ({"page_size": 2048}, "it lacks"),
        ({"page_size": 0}, "it lacks"),
        ({"inputs": 2}, "it is of 2 files, expected 1"),
        ({"inputs": 0xFFFFFFFF}, "it is of 4294967295 files"),
        ({"blocks": 0xFFFFFFFF}, "the stream ends here|expected"),
    ],
)
@pytest.mark.usefixtures("pages")
def test_an_index_whose_numbers_do_not_fit_its_pages_is_not_taken(
    stream: Path, index: Path, indexes: KeptIndexes, changes: dict[str, int], reason: str
) -> None:
    rewritten(index)
    with kept(indexes, stream):
        pass
    rewritten(index, **changes)
    with pytest.raises(KeptError, match=reason), kept(indexes, stream):
        pass


# -- room for others


@pytest.mark.usefixtures("pages")
def test_an_index_that_is_kept_anew_leaves_no_pages_of_the_one_before(stream: Path, indexes: KeptIndexes) -> None:
    before = names(indexes)
    keep(indexes, stream)
    assert names(indexes) == before
    stream.write_bytes(lzma.compress(streams.minimal().replace(streams.page(4 * PAGE)[8:], b"o" * PAGE)))
    keep(indexes, stream)
    assert len(names(indexes)) == 2
    assert names(indexes) != before
    stream.write_bytes(streams.minimal())
    keep(indexes, stream)
    assert len(names(indexes)) == 1


@pytest.fixture
def many(tmp_path: Path) -> list[Path]:
    """Four packed files, the last one with no pages but zeros."""
    paths = [packed(tmp_path / f"{number}.xz") for number in range(4)]
    zeros = streams.minimal().replace(streams.page(0)[8:], bytes(PAGE))
    paths[3].write_bytes(zeros)
    return paths


def test_of_many_the_oldest_go_with_their_pages(tmp_path: Path, many: list[Path]) -> None:
    for most, most_spilled, left in ((2, MOST_SPILLED, [2, 3]), (9, 6 * PAGE, [1, 2, 3]), (9, 3 * PAGE, [2, 3])):
        indexes = KeptIndexes(tmp_path / f"{most}-{most_spilled}", most=most, most_spilled=most_spilled)
        kept_ones = []
        for number, path in enumerate(many):
            kept_ones.append(keep(indexes, path))
            os.utime(kept_ones[-1], ns=(number, number))
        assert sorted(indexes.folder.glob("*.index")) == sorted(kept_ones[number] for number in left)
        stems = {each.name.split(".")[0] for each in indexes.folder.glob("*.pages")}
        assert stems == {kept_ones[number].stem for number in left if number != 3}


def test_what_was_left_behind_goes_once_it_is_old(many: list[Path], indexes: KeptIndexes) -> None:
    keep(indexes, many[0])
    there = names(indexes)
    left = [indexes.folder / name for name in (".1-1.index.7.part", ".1-1.00.pages.7.part")]
    for path in (*left, indexes.folder / "1-1.00000000.pages"):
        path.write_bytes(b"")
    keep(indexes, many[0])
    assert names(indexes) == sorted([*there, *(path.name for path in left)])  # maybe it is being written
    for path in left:
        os.utime(path, ns=(0, 0))
    keep(indexes, many[0])
    assert names(indexes) == there


def test_of_several_that_keep_the_same_pages_one_takes_the_room(stream: Path, indexes: KeptIndexes) -> None:
    keep(indexes, stream)
    (pages,) = indexes.folder.glob("*.pages")
    for each in indexes.folder.iterdir():
        each.unlink()
    other = indexes.folder / f".{pages.name}.one.part"
    other.write_bytes(b"half of it")
    with pytest.raises(FileExistsError):
        keep(indexes, stream)
    assert (names(indexes), other.read_bytes()) == ([other.name], b"half of it")
    os.utime(other, ns=(0, 0))  # it is not at it any more
    keep(indexes, stream)
    assert sorted(each.suffix for each in indexes.folder.iterdir()) == [".index", ".pages"]


@pytest.mark.parametrize("failing", ["pwrite", "sendfile", "preadv"])
def test_pages_that_can_not_be_written_leave_nothing(
    stream: Path, indexes: KeptIndexes, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with fresh(stream) as (saved, stamp):
        monkeypatch.setattr(os, failing, full)
        with pytest.raises(OSError, match="No space left"):
            indexes.keep(saved, [stamp])
    assert names(indexes) == []


def test_so_many_pages_as_would_fill_the_disk_are_not_kept(
    indexes: KeptIndexes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert indexes.why_not(0) is None
    assert indexes.why_not(MOST_SPILLED + 1) == (
        "1024 MiB of pages do not stand in the input as they are, and 1024 MiB at most are kept"
    )
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=8 * 100, f_frsize=4096))
    assert indexes.why_not(100 * PAGE) is None
    assert "and 3 MiB of disk are free" in str(indexes.why_not(101 * PAGE))
    assert indexes.why_not(0) is None
