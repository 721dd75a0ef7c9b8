"""A file is read by a process of its own, or not at all where an index of it was kept."""

import asyncio
import errno
import lzma
import os
import select
import signal
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmigrate.capture.arriving import ArrivingPages
from qmigrate.capture.kept_folder import KeptIndexes
from qmigrate.capture.migration import Migration
from qmigrate.capture.placed import Kind
from qmigrate.capture.saved import read_saved
from qmigrate.capture.saved_guest import SavedGuest
from qmigrate.errors import RefusedError, StreamError
from qmigrate.events import Decided, LiveEvent
from qmigrate.operations.reading import Reading, _nameless
from qmigrate.operations.send import Sender
from qmigrate.operations.serving import Indexed
from tests import streams
from tests.capture.test_index import ram_of
from tests.capture.test_places import corpus
from tests.capture.test_plain import FRONT, ROM, ZEROS

pytestmark = pytest.mark.asyncio

TIMEOUT_S = 60.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "stream.mig"
    path.write_bytes(streams.minimal())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "indexes"


@asynccontextmanager
async def read(
    path: Path, folder: Path, *, channels: Sequence[Path] = (), keep: bool = True
) -> AsyncGenerator[tuple[Reading, SavedGuest]]:
    with Reading(str(path), channels=tuple(map(str, channels)), folder=folder, keep=keep) as reading:
        async with asyncio.timeout(TIMEOUT_S):
            with await reading.saved() as saved:
                yield reading, saved


def plainly(path: Path, *channels: Path) -> dict[str, bytes]:
    with Migration(path, channels=channels) as migration, read_saved(migration) as saved:
        return ram_of(saved)


async def test_the_next_time_nothing_is_read(path: Path, folder: Path) -> None:
    async with read(path, folder) as (reading, saved):
        assert (reading.is_kept, ram_of(saved)) == (False, plainly(path))
    async with read(path, folder) as (reading, saved):
        assert (reading.is_kept, reading._process) == (True, None)
        assert ram_of(saved) == plainly(path)


@pytest.fixture
def several(tmp_path: Path) -> list[Path]:
    """Main, and two channels of multifd."""
    return corpus("pc-multifd-11.1", tmp_path)


async def test_the_index_of_several_files_is_kept_too(several: list[Path], folder: Path) -> None:
    main, *channels = several
    for is_kept in (False, True):
        async with read(main, folder, channels=channels) as (reading, saved):
            assert reading.is_kept == is_kept
            assert ram_of(saved) == plainly(*several)
    async with read(main, folder, channels=channels[::-1]) as (reading, saved):
        assert not reading.is_kept  # files are told by their order in it
        assert ram_of(saved) == plainly(*several)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_an_index_of_several_files_is_not_taken_once_one_was_changed(
    several: list[Path], folder: Path, number: int
) -> None:
    main, *channels = several
    async with read(main, folder, channels=channels):
        pass
    os.utime(several[number], ns=(0, 0))
    async with read(main, folder, channels=channels) as (reading, saved):
        assert not reading.is_kept
        assert ram_of(saved) == plainly(*several)
    with Reading(str(main), channels=tuple(map(str, channels)), folder=folder) as reading:
        several[number].write_bytes(several[number].read_bytes())
        with pytest.raises(RefusedError, match="the file was changed since"):
            await reading.saved()


async def test_a_further_channel_that_is_no_file_is_refused(several: list[Path], folder: Path) -> None:
    fifo = several[0].with_name("fifo")
    os.mkfifo(fifo)
    with pytest.raises(RefusedError, match="fifo is no file: the channels of a migration are told by looking at files"):
        Reading(str(several[0]), channels=(str(fifo),), folder=folder)  # and waits for nobody at its other end
    with pytest.raises(FileNotFoundError):
        Reading(str(several[0]), channels=(str(several[0].with_name("nowhere")),))


async def test_it_is_not_kept_where_it_shall_not(path: Path, folder: Path) -> None:
    for _ in range(2):
        async with read(path, folder, keep=False) as (reading, saved):
            assert (reading.is_kept, ram_of(saved)) == (False, plainly(path))
    assert not folder.exists()


async def test_one_that_is_damaged_is_made_anew(path: Path, folder: Path) -> None:
    async with read(path, folder):
        pass
    (index,) = folder.iterdir()
    index.write_bytes(index.read_bytes()[:-1] + b"\xff")
    async with read(path, folder) as (reading, saved):
        assert (reading.is_kept, ram_of(saved)) == (False, plainly(path))
    with path.open("rb") as file, KeptIndexes(folder).read([file.fileno()]) as again:
        assert ram_of(again) == plainly(path)


@pytest.fixture
def packed(path: Path) -> Path:
    packed = path.with_suffix(".xz")
    packed.write_bytes(lzma.compress(path.read_bytes()))
    return packed


async def test_the_pages_of_a_packed_file_are_kept_with_its_index(path: Path, packed: Path, folder: Path) -> None:
    for is_kept in (False, True):
        async with read(packed, folder) as (reading, saved):
            assert (reading.is_kept, reading.not_kept) == (is_kept, None)
            assert ram_of(saved) == plainly(path)
            assert {run.kind for run in saved.index.runs("pc.ram", 4, 2)} == {Kind.SPILLED}
    assert sorted(each.suffix for each in folder.iterdir()) == [".index", ".pages"]


async def test_what_was_kept_of_a_packed_file_is_made_anew_where_its_pages_are_gone(
    path: Path, packed: Path, folder: Path
) -> None:
    async with read(packed, folder):
        pass
    (pages,) = folder.glob("*.pages")
    pages.unlink()
    for is_kept in (False, True):
        async with read(packed, folder) as (reading, saved):
            assert (reading.is_kept, ram_of(saved)) == (is_kept, plainly(path))


@pytest.fixture
def keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a page."""
    fewer = (
        "import sys; from qmigrate.capture import kept_folder; kept_folder.MOST_SPILLED = 4096; "
        "from qmigrate.operations.indexing import main; main(sys.argv[1:])"
    )
    monkeypatch.setattr(
        "qmigrate.operations.reading.own_python", lambda _, *words: [sys.executable, "-P", "-c", fewer, *words]
    )


TOO_MANY = "12288 bytes of pages do not stand in the input as they are, and 4096 bytes at most are kept"


@pytest.mark.usefixtures("keeps_less")
async def test_that_there_are_too_many_pages_to_be_kept_is_said(path: Path, packed: Path, folder: Path) -> None:
    said: list[LiveEvent] = []
    for _ in range(2):
        with pytest.raises(RefusedError, match="it can't be reached"):
            await Sender(packed, index_folder=folder, on_event=said.append).run(f"unix:{path}.nobody")
    assert [each.kept for each in said if isinstance(each, Indexed)] == [False, False]
    assert [(each.decision, each.reason) for each in said if isinstance(each, Decided)] == [
        ("keep no index", TOO_MANY)
    ] * 2
    assert not folder.exists()
    async with read(packed, folder, keep=False) as (reading, _):
        assert reading.not_kept is None  # nobody wants it


@pytest.mark.usefixtures("keeps_less")
async def test_it_is_known_too_of_a_file_that_is_served_while_it_is_read(path: Path, folder: Path) -> None:
    deltas = b"".join(streams.xbzrle(page * streams.PAGE, b"\x03\x02ab", block="pc.ram") for page in (4, 5, 6))
    path.write_bytes(path.read_bytes().replace(streams.ram_end()[:5], streams.ram_part(deltas) + streams.ram_end()[:5]))
    with Reading(str(path), folder=folder, at_once_from=0) as reading:
        async with asyncio.timeout(TIMEOUT_S):
            with await reading.saved() as saved:
                assert isinstance(saved.index, ArrivingPages)
                while not saved.index.is_complete:
                    await asyncio.sleep(0.01)
                    saved.index.hear()
                assert ram_of(saved) == plainly(path)
                assert saved.index.not_kept == TOO_MANY
    assert not folder.exists()


async def test_a_folder_that_can_not_be_written_is_no_harm(path: Path, folder: Path) -> None:
    folder.write_bytes(b"in its place")
    async with read(path, folder) as (_, saved):
        assert ram_of(saved) == plainly(path)
    assert folder.read_bytes() == b"in its place"


async def test_what_is_wrong_with_the_file_is_a_refusal(path: Path, folder: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(RefusedError, match=r"stream\.mig: 0x.*the stream ends here"):
        async with read(path, folder):
            pass
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(RefusedError, match="no migration stream"):
        async with read(path, folder):
            pass
    with pytest.raises(FileNotFoundError):
        Reading(str(path.with_name("nowhere")))


async def test_a_process_that_dies_is_told_of(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = [sys.executable, "-c", "import time; time.sleep(1000)"]  # the real one may be done before it is killed
    monkeypatch.setattr("qmigrate.operations.reading.own_python", lambda *_: waits)
    with Reading(str(path), folder=folder) as reading:
        assert reading._process is not None
        os.kill(reading._process, signal.SIGKILL)
        with pytest.raises(RefusedError, match="its index can't be made: what makes it was killed by signal 9"):
            await reading.saved()


async def test_what_was_begun_ends_with_it(path: Path, folder: Path) -> None:
    with Reading(str(path), folder=folder) as reading:
        process = reading._process
        assert process is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


async def test_a_file_that_is_changed_while_it_is_read_is_not_served(path: Path, folder: Path) -> None:
    with Reading(str(path), folder=folder) as reading:
        with path.open("ab") as file:
            file.write(b"more")
        with pytest.raises(RefusedError, match="the file was changed since"):
            await reading.saved()


async def test_it_is_said_that_an_index_was_kept(path: Path, folder: Path) -> None:
    said: list[LiveEvent] = []
    for _ in range(2):
        sender = Sender(path, index_folder=folder, on_event=said.append)
        with pytest.raises(RefusedError, match="it can't be reached"):
            await sender.run(f"unix:{path}.nobody")
    assert [each.kept for each in said if isinstance(each, Indexed)] == [False, True]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated", "the input was changed since its pages were indexed"),
        ("changed", "the input was changed since its pages were indexed"),
        ("other pages", r"the pages? (is|are) no longer where"),
        ("unreadable", "the input can't be read: Input/output error"),
    ],
)
async def test_a_file_that_goes_wrong_while_it_is_served_is_served_no_longer(
    path: Path, folder: Path, how: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with read(path, folder):
        pass
    async with read(path, folder) as (reading, saved):
        assert reading.is_kept
        saved.index.records("pc.ram", 4, 2)
        status = path.stat()
        if how == "truncated":
            os.truncate(path, 9000)
        elif how == "changed":
            os.utime(path, ns=(0, 0))
        elif how == "other pages":
            path.write_bytes(bytes(status.st_size))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        else:

            def fails(*_: object) -> int:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            monkeypatch.setattr(os, "preadv", fails)
        with pytest.raises(StreamError, match=reason):
            saved.index.records("pc.ram", 4, 2)


@pytest.mark.parametrize("passes", [1, 2])
async def test_a_long_file_is_given_while_it_is_read(path: Path, folder: Path, passes: int) -> None:
    records = [streams.page(0, block="pc.ram"), *(ZEROS, ROM) * passes]
    if passes == 1:
        records = [ZEROS, ROM]
    parts = [FRONT, streams.ram_part(*records), streams.ram_end(), streams.devices(), streams.eof()]
    path.write_bytes(b"".join([*parts, streams.devices_described()]))
    for keeps in (False, True, True):
        with Reading(str(path), folder=folder, keep=keeps, at_once_from=0) as reading:
            async with asyncio.timeout(TIMEOUT_S):
                with await reading.saved() as saved:
                    while isinstance(saved.index, ArrivingPages) and not saved.index.is_complete:
                        await asyncio.to_thread(select.select, [saved.index.news], [], [])
                        saved.index.hear()
                    assert ram_of(saved) == plainly(path)
    assert reading.is_kept


@pytest.mark.parametrize("there", [True, False])
async def test_what_is_spilled_has_no_name_whether_the_folder_is_there_or_not(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path if there else tmp_path / "none"))
    descriptor = _nameless()
    try:
        assert os.fstat(descriptor).st_nlink == 0
        assert os.pwrite(descriptor, b"page", 4096) == 4
        assert os.pread(descriptor, 4, 4096) == b"page"
    finally:
        os.close(descriptor)
    assert list(tmp_path.iterdir()) == []
