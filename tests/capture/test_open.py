"""Inputs: files, pipes, compressed or not, cut, unreadable; and who closes what."""

import bz2
import contextlib
import gzip
import lzma
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmigrate.capture.open import Source
from qmigrate.errors import NoStreamError, StreamError
from qmigrate.format.entry import Entry
from tests import streams
from tests.walking import entries, kept

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STREAM = streams.minimal()
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd.compress,
}


@pytest.fixture(params=COMPRESSIONS)
def compression(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def fed(path: Path, data: bytes, *, step: int = 1 << 16) -> Iterator[Path]:
    """A FIFO at ``path`` into which ``data`` is written."""
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for at in range(0, len(data), step):
                try:
                    file.write(data[at : at + step])
                except BrokenPipeError:
                    return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield path
    finally:
        writer.join(10)
        assert not writer.is_alive()


def read(path: Path) -> list[tuple[int, int, object]]:
    with Source(path) as source:
        return outline(source.entries())


def outline(found: Iterator[Entry]) -> list[tuple[int, int, object]]:
    return [(entry.offset, entry.length, entry.record) for entry in found]


WHOLE = outline(entries(STREAM))


def test_a_file_is_read_compressed_or_not_and_again(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "stream"
    path.write_bytes(COMPRESSIONS[compression](STREAM))
    with Source(path) as source:
        assert (source.name, source.size, source.can_rewind) == (str(path), path.stat().st_size, True)
        assert outline(source.entries()) == WHOLE
        assert outline(source.entries()) == WHOLE


@pytest.mark.parametrize("step", [1, 1000, 1 << 16])
def test_a_pipe_is_read_compressed_or_not(tmp_path: Path, compression: str, step: int) -> None:
    data = COMPRESSIONS[compression](STREAM)
    if step == 1:
        data = data[:300]
    with fed(tmp_path / "pipe", data, step=step) as path, Source(path) as source:
        assert (source.size, source.can_rewind, source.position) == (None, False, None)
        if step > 1:
            assert len(list(source.entries())) > 20
        else:
            with pytest.raises(StreamError):
                list(source.entries())
        with pytest.raises(NoStreamError, match="a pipe can be read only once"):
            next(source.entries())


def test_a_pipe_that_does_not_wait_is_waited_for() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    def write() -> None:
        os.write(writing, STREAM[:9000])
        os.close(writing)

    writer = threading.Timer(0.05, write)
    writer.start()
    with Source(f"/dev/fd/{reading}") as source, pytest.raises(StreamError) as caught:
        list(source.entries())
    writer.join()
    os.close(reading)
    assert caught.value.offset == 9000


@pytest.mark.parametrize("missing", [1, 20, 200])
def test_a_compressed_file_that_is_cut_gives_what_was_good_before(
    tmp_path: Path, compression: str, missing: int
) -> None:
    path = tmp_path / "stream"
    path.write_bytes(COMPRESSIONS[compression](STREAM)[:-missing])
    good: list[Entry] = []
    with Source(path) as source, pytest.raises(StreamError):
        good.extend(kept(source.entries()))
    assert compression != "plain" or len(good) > 10


@pytest.mark.parametrize("at", range(6, 300, 7))
def test_a_compressed_file_that_is_damaged_is_at_worst_a_fault_like_any_other(
    tmp_path: Path, compression: str, at: int
) -> None:
    path = tmp_path / "stream"
    data = bytearray(COMPRESSIONS[compression](STREAM))
    data[at : at + 8] = b"\xff" * 8
    path.write_bytes(data)
    found: list[Entry] = []
    with Source(path) as source, contextlib.suppress(StreamError, NoStreamError):
        found.extend(source.entries())
    # What was good before the fault is given, and each record once.
    assert [entry.offset for entry in found] == sorted({entry.offset for entry in found})


def test_a_file_that_shrinks_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    parts = streams.ram_part(*(streams.page(0, block="pc.ram") for _ in range(600)))
    path.write_bytes(streams.header() + streams.configuration() + streams.ram_start() + parts + streams.eof())
    with Source(path) as source:
        found = source.entries()
        next(found)
        os.truncate(path, 100)
        with pytest.raises(StreamError, match="the stream ends here"):
            list(found)


class Failing:
    """A reader whose disk fails."""

    def readinto(self, buffer: memoryview, /) -> int:
        raise OSError(5, "Input/output error", len(buffer))

    def close(self) -> None: ...


def test_a_file_that_fails_midway_is_an_error_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stream"
    path.write_bytes(STREAM)
    with Source(path) as source:
        monkeypatch.setattr(source, "open_reader", Failing)
        with pytest.raises(StreamError) as caught:
            list(source.entries())
    assert str(caught.value) == "0x0: the input can't be read on: Input/output error"


def test_a_directory_is_no_stream(tmp_path: Path) -> None:
    with pytest.raises(NoStreamError, match="a directory, expected a migration stream"):
        Source(tmp_path)


def test_what_is_not_there_is_said_by_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Source(tmp_path / "nothing")


def test_an_empty_file_is_no_stream(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    with Source(path) as source, pytest.raises(NoStreamError, match="0 bytes are there"):
        list(source.entries())


def test_a_path_is_closed_and_standard_input_is_not(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(b"before" + STREAM)
    with Source(path) as source:
        descriptor = source._file.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    kept_stdin = os.dup(0)
    try:
        with path.open("rb") as file:
            file.seek(6)
            os.dup2(file.fileno(), 0)
        with Source("-") as source:
            assert source.name == "standard input"
            assert outline(source.entries()) == WHOLE
            assert outline(source.entries()) == WHOLE  # from where it stood
        os.fstat(0)
    finally:
        os.dup2(kept_stdin, 0)
        os.close(kept_stdin)


def test_two_walks_of_one_file_do_not_disturb_one_another(tmp_path: Path) -> None:
    path = tmp_path / "vm.mig"
    path.write_bytes(streams.minimal())
    with Source(path) as source:
        alone = [(entry.offset, entry.length) for entry in source.entries()]
        outer = source.entries()
        first = next(outer)
        inner = [(entry.offset, entry.length) for entry in source.entries()]
        rest = [(entry.offset, entry.length) for entry in outer]
    assert inner == [(first.offset, first.length), *rest] == alone
