"""Inputs: files, pipes, compressed or not, cut, unreadable; and who closes what."""

import bz2
import contextlib
import gzip
import lzma
import os
import random
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qmigrate.analysis.check import check
from qmigrate.analysis.summary import summarize
from qmigrate.capture.migration import Migration
from qmigrate.capture.open import Source
from qmigrate.capture.readers import FileReader
from qmigrate.errors import NoStreamError, StreamError, StreamErrors
from qmigrate.format.entry import Entry, Trailing
from qmigrate.format.ram import RamFlag
from qmigrate.format.write import encode
from tests import streams
from tests.walking import entries, kept, until_fault

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STREAM = streams.minimal()
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bzip2": lambda data: bz2.compress(data, compresslevel=1),
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
        writer.join(60)
        assert not writer.is_alive()


def read(path: Path) -> list[tuple[int, int, object]]:
    with Source(path) as source:
        return outline(source.entries())


def outline(found: Iterator[Entry]) -> list[tuple[int, int, object]]:
    return [(entry.offset, entry.length, entry.record) for entry in found]


WHOLE = outline(entries(STREAM))


def long_stream() -> bytes:
    """Longer than all buffers, and of pages that can't be made shorter."""
    contents = random.Random(3)
    starts = range(0, 512 * streams.PAGE, streams.PAGE)
    pages = [streams.page(at, contents.randbytes(streams.PAGE), block=None if at else "pc.ram") for at in starts]
    start = streams.ram_start({"pc.ram": 512 * streams.PAGE})
    return streams.header() + streams.configuration() + start + streams.ram_part(*pages) + streams.eof()


LONG = long_stream()
UNPACKED: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": lambda data: zlib.decompressobj(wbits=31).decompress(data),
    "bzip2": lambda data: bz2.BZ2Decompressor().decompress(data),
    "xz": lambda data: lzma.LZMADecompressor().decompress(data),
    "zstd": lambda data: zstd.ZstdDecompressor().decompress(data),
}
"""What can be made of a beginning."""


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
        with pytest.raises(NoStreamError, match="no regular file, so it can be read only once"):
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


@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_a_compressed_file_that_is_cut_gives_all_that_can_be_unpacked(
    tmp_path: Path, compression: str, part: float
) -> None:
    packed = COMPRESSIONS[compression](LONG)
    cut = packed[: int(len(packed) * part)]
    readable = UNPACKED[compression](cut)
    assert readable == LONG[: len(readable)]
    assert len(readable) > len(LONG) * part / 2  # else this shows nothing
    path = tmp_path / "stream"
    path.write_bytes(cut)
    good: list[Entry] = []
    with Source(path) as source, pytest.raises(StreamError) as caught:
        good.extend(kept(source.entries()))
    expected, fault = until_fault(readable)
    assert sum(entry.length for entry in good) == sum(entry.length for entry in expected) > len(readable) - 5000
    if compression == "plain":
        assert str(caught.value) == str(fault)
    else:  # both are told, what is the reason first
        assert isinstance(caught.value, StreamErrors)
        first, then = caught.value.errors
        assert str(first).startswith(f"{len(readable):#x}: the input can't be read on: {source.compression}: ")
        assert str(then) == str(fault)


def test_a_pipe_whose_compression_is_cut_gives_all_that_can_be_unpacked(tmp_path: Path) -> None:
    packed = gzip.compress(LONG)[:-100_000]
    readable = UNPACKED["gzip"](packed)
    good: list[Entry] = []
    with (
        fed(tmp_path / "pipe", packed) as path,
        Source(path) as source,
        pytest.raises(StreamErrors, match="the input can't be read on: gzip: Compressed file ended before"),
    ):
        good.extend(kept(source.entries()))
    expected, _ = until_fault(readable)
    assert sum(entry.length for entry in good) == sum(entry.length for entry in expected) > len(readable) - 5000


def test_a_whole_stream_whose_checksum_is_wrong_is_given_whole(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(STREAM))
    packed[-8] ^= 1
    path = tmp_path / "stream"
    path.write_bytes(packed)
    good: list[Entry] = []
    with Source(path) as source, pytest.raises(StreamError) as caught:
        good.extend(kept(source.entries()))
    assert outline(iter(good)) == WHOLE
    assert not isinstance(caught.value, StreamErrors)
    assert str(caught.value).startswith(f"{len(STREAM):#x}: the input can't be read on: gzip: CRC check failed ")


def test_a_fault_of_the_stream_does_not_hide_that_the_file_was_damaged(tmp_path: Path) -> None:
    data = bytearray(LONG)
    data[data.index(struct.pack(">Q", 100 * streams.PAGE | RamFlag.PAGE | RamFlag.CONTINUE)) + 6] |= 0x04  # no flag
    packed = bytearray(gzip.compress(data))
    packed[-8] ^= 1
    path = tmp_path / "stream"
    path.write_bytes(packed)
    with Source(path) as source, pytest.raises(StreamErrors) as caught:
        list(source.entries())
    first, then = caught.value.errors
    assert str(first) == str(until_fault(bytes(data))[1])
    assert (first.offset or 0) < len(LONG) / 2
    assert str(then).startswith(f"{len(LONG):#x}: the input can't be read on: gzip: CRC check failed ")


def test_a_file_whose_damage_leaves_no_header_is_said_to_be_damaged(tmp_path: Path) -> None:
    packed = bytearray(bz2.compress(LONG))
    packed[400_000:400_004] = b"\xff" * 4
    path = tmp_path / "stream"
    path.write_bytes(packed)
    with Source(path) as source, pytest.raises(StreamError, match="the input can't be read on: bz2: Invalid data"):
        list(source.entries())


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


def test_holes_of_a_file_are_zeros_and_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = streams.header() + streams.configuration(capabilities=["mapped-ram"])
    pages: list[bytes | None] = [None] * 4096  # 16 MiB
    for number in (0, 1, 700, 701, 4095):
        pages[number] = bytes([number % 255 + 1]) * streams.PAGE
    data = begin + streams.mapped_ram_start({"pc.ram": pages}, begin=len(begin)) + streams.ram_end()
    data += streams.devices() + streams.eof()
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        for at in range(0, len(data), streams.PAGE):
            if any(data[at : at + streams.PAGE]):
                os.pwrite(file.fileno(), data[at : at + streams.PAGE], at)
        file.truncate(len(data))
    if path.stat().st_blocks * 512 > len(data) // 2:
        pytest.skip(f"no holes in files of {tmp_path}")
    read = 0

    def preadv(*arguments: Any) -> int:
        nonlocal read
        read += (count := real(*arguments))
        return count

    real = os.preadv
    monkeypatch.setattr(os, "preadv", preadv)
    with Source(path) as source:
        found = b"".join(bytes(entry.view) for entry in source.entries())
    assert found == data
    assert read < 6 << 20


def test_a_hole_behind_a_stream_costs_nothing_and_is_counted(tmp_path: Path) -> None:
    path, tebibyte = tmp_path / "a.mig", 1 << 40
    path.write_bytes(STREAM)
    with path.open("r+b") as file:
        file.seek(tebibyte)
        file.write(b"behind")
        file.truncate(2 * tebibyte)
    with Migration(path) as migration:
        checked = check(migration)
        contents = checked.gathering.contents
        assert migration.source.position == checked.length == contents.length == 2 * tebibyte
    assert contents.trailing == 2 * tebibyte - len(STREAM)
    assert (contents.trailing_head, contents.complete, checked.identical) == (bytes(8), True, True)
    assert checked.opaque["undecoded sections"] == contents.trailing


def test_where_a_hole_is_read_changes_no_answer(tmp_path: Path) -> None:
    path, behind = tmp_path / "a.mig", bytes(5 << 20) + b"QEVM" + bytes(3 << 20)
    path.write_bytes(STREAM)
    with path.open("r+b") as file:
        file.seek(len(STREAM) + (5 << 20))
        file.write(b"QEVM")
        file.truncate(len(STREAM) + len(behind))
    with Source(path) as sparse:
        found = [encode(entry.record) for entry in sparse.entries() if isinstance(entry.record, Trailing)]
    assert b"".join(found) == behind
    with Migration(path) as sparse_one, fed(tmp_path / "pipe", STREAM + behind) as pipe, Migration(pipe) as piped:
        assert summarize(sparse_one.contents) == summarize(piped.contents)


def test_to_look_for_a_hole_moves_nobody_who_has_the_file_open_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lseek, sought = tmp_path / "a.mig", os.lseek, set()
    path.write_bytes(STREAM)

    def noted(descriptor: int, *where: int) -> int:
        sought.add(descriptor)
        return lseek(descriptor, *where)

    with path.open("r+b") as file:
        file.truncate(1 << 24)
        monkeypatch.setattr(os, "lseek", noted)
        with FileReader(file.fileno(), 1 << 20) as behind, FileReader(file.fileno(), 0) as first:
            assert behind.skip_hole() == (1 << 24) - (1 << 20)
            assert first.skip_hole() == 0
        assert len(sought) == 2
        assert file.fileno() not in sought


def test_what_comes_while_a_hole_is_looked_for_is_no_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lseek = tmp_path / "a.mig", os.lseek
    with path.open("wb") as made:
        made.truncate(1 << 20)
        made.seek(1 << 20)
        made.write(STREAM)

    def grown(descriptor: int, *where: int) -> int:
        try:
            return lseek(descriptor, *where)
        except OSError:
            with path.open("ab") as writer:
                writer.write(b"A" * 100)
            raise

    monkeypatch.setattr(os, "lseek", grown)
    found = bytearray()
    with path.open("rb") as file, FileReader(file.fileno(), 1 << 20) as reader:
        buffer = memoryview(bytearray(len(STREAM)))
        while (count := reader.readinto(buffer)) and len(found) < 2 * len(STREAM):
            found += buffer[:count]
    assert bytes(found).removeprefix(STREAM).strip(b"A") == b""
    assert found.startswith(STREAM)


def test_holes_in_a_stream_are_not_read_and_are_zeros_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, chance, piece = tmp_path / "a.mig", random.Random(1), 1 << 16
    with path.open("wb") as file:
        for number in range(40):
            file.seek(number * 40 * piece + chance.randrange(piece))
            file.write(chance.randbytes(chance.randrange(1, 2 * piece)))
        file.truncate(file.tell() + 40 * piece)
    whole, preadv, asked = path.read_bytes(), os.preadv, 0

    def counted(descriptor: int, buffers: list[memoryview], at: int) -> int:
        nonlocal asked
        asked += (count := preadv(descriptor, buffers, at))
        return count

    monkeypatch.setattr(os, "preadv", counted)
    found = bytearray()
    with Source(path) as source:
        reader, buffer = source.open_reader(), memoryview(bytearray(1 << 17))
        while count := reader.readinto(space := buffer[: chance.randrange(1, len(buffer))]):
            found += space[:count]
    assert found == whole
    assert asked < len(whole) // 4
