"""What was received, as files: RAM, or one plain stream that a stock QEMU loads.

RAM goes from the memory files of the destination's processes into files as ``extract`` writes them, under temporary
names until all of it is there.
"""

import errno
import itertools
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from qmigrate.analysis.extract import file_names
from qmigrate.format.entry import VmDescription
from qmigrate.format.ram import RAM_VERSION, BlockList, PageRun, Pages, RamBlock, RamFlag, RamRecord, RamWord
from qmigrate.format.stream import EndOfFile, Footer, SectionHeader, SectionPart, SectionType, VmDescriptionHeader
from qmigrate.format.write import encode

__all__ = ["Parts", "write_raw", "write_stream"]

_PIECE: Final = 1 << 20
_PAGES_AT_ONCE: Final = 256
_PAGE: Final = int(RamFlag.PAGE)
_ZERO: Final = int(RamFlag.ZERO)
_EOS: Final = RamRecord(word=RamWord(0, int(RamFlag.EOS)), block=None, body=None)
_EMPTY_DESCRIPTION: Final = b"".join(
    encode(record) for record in (EndOfFile(), VmDescriptionHeader(length=0), VmDescription(b""))
)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a saved stream is made of, as files in memory.

    ``blocks``: (name, length, page size) of each block, ``memory`` their contents.  ``kept``: ``opening``, ``live``,
    ``devices``, ``closing`` of the stream that came.
    """

    blocks: Sequence[tuple[str, int, int]]
    memory: Sequence[int]
    target_page: int
    kept: Mapping[str, int]
    section_id: int
    footers: bool


def write_raw(
    folder: Path,
    blocks: Sequence[Sequence[int | str]],
    descriptors: Sequence[int],
    stops: threading.Event | None = None,
) -> None:
    """Each block (name, length, page size) as a sparse file of its full length, and ``blocks.json``.

    Raises ``OSError``, ``InterruptedError`` where it was to stop; then nothing of it is left.
    """
    names = file_names([str(name) for name, _, _ in blocks])
    with ExitStack() as stack:
        finished: list[tuple[Path, Path]] = []
        for (name, length, _), descriptor in zip(blocks, descriptors, strict=True):
            target = folder / names[str(name)]
            temporary = folder / f".{target.name}.{os.getpid()}.part"
            stack.callback(temporary.unlink, missing_ok=True)
            _write_block(temporary, descriptor, int(length), stops)
            finished.append((temporary, target))
        index = folder / f".blocks.json.{os.getpid()}.part"
        stack.callback(index.unlink, missing_ok=True)
        index.write_text(json.dumps(_index(blocks, names), indent=2) + "\n")
        _go_on(stops)
        for temporary, target in (*finished, (index, folder / "blocks.json")):
            temporary.replace(target)


def _index(blocks: Sequence[Sequence[int | str]], names: dict[str, str]) -> list[dict[str, object]]:
    return [{"name": name, "file": names[str(name)], "length": length, "address": None} for name, length, _ in blocks]


def _go_on(stops: threading.Event | None) -> None:
    """Whoever wanted it has gone."""
    if stops is not None and stops.is_set():
        raise InterruptedError(errno.EINTR, "interrupted")


def _write_block(path: Path, descriptor: int, length: int, stops: threading.Event | None) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    out = os.open(path, flags, 0o666)
    try:
        os.ftruncate(out, length)
        for start, end in data_ranges(descriptor, length):
            _copy(descriptor, out, start, end, stops)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(path)) from exc
    finally:
        os.close(out)


def _copy(descriptor: int, out: int, at: int, end: int, stops: threading.Event | None) -> None:
    """Not by sendfile(), which refuses memory on huge pages."""
    while at < end:
        _go_on(stops)
        piece = os.pread(descriptor, min(end - at, _PIECE), at)
        at += os.pwrite(out, piece, at)


def data_ranges(descriptor: int, length: int) -> Iterator[tuple[int, int]]:
    """From where to where there is anything but holes."""
    at = 0
    while at < length:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but holes from here on
            return
        end = min(os.lseek(descriptor, start, os.SEEK_HOLE), length)
        if start < end:
            yield start, end
        at = max(end, start + 1)


# -- a stream


def write_stream(path: Path, parts: Parts, stops: threading.Event | None = None) -> None:
    """One plain stream: what came by precopy as it was, by postcopy with an empty description.

    It has its name, and is on disk, when this returns.  Raises ``OSError``, ``InterruptedError`` where it was to stop;
    then nothing of it is left.
    """
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as out:
            for piece in _stream(parts):
                _go_on(stops)
                out.write(piece)
            _settle(out)
        _go_on(stops)
        temporary.replace(path)
        _settle_folder(path.parent)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(path)) from exc
    finally:
        temporary.unlink(missing_ok=True)


def _settle(out: BinaryIO) -> None:
    out.flush()
    os.fsync(out.fileno())


def _settle_folder(folder: Path) -> None:
    """The new name too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stream(parts: Parts) -> Iterator[bytes | bytearray]:
    number = parts.section_id
    yield from _contents(parts.kept["opening"])
    header = SectionHeader(
        kind=SectionType.START, section_id=number, idstr="ram", instance_id=0, version_id=RAM_VERSION
    )
    listed = tuple(RamBlock(name=name, used_length=length) for name, length, _ in parts.blocks)
    yield encode(header)
    yield encode(BlockList(total=sum(length for _, length, _ in parts.blocks), blocks=listed))
    yield from _section_end(parts)
    yield from _contents(parts.kept["live"])
    yield encode(SectionPart(kind=SectionType.END, section_id=number))
    for (name, length, _), descriptor in zip(parts.blocks, parts.memory, strict=True):
        yield from _block_pages(name, length, descriptor, parts.target_page)
    yield from _section_end(parts)
    yield from _contents(parts.kept["devices"])
    if os.fstat(parts.kept["closing"]).st_size > 1:
        yield from _contents(parts.kept["closing"])
    else:
        yield _EMPTY_DESCRIPTION


def _section_end(parts: Parts) -> Iterator[bytes | bytearray]:
    yield encode(_EOS)
    if parts.footers:
        yield encode(Footer(section_id=parts.section_id))


def _contents(descriptor: int) -> Iterator[bytes]:
    at = 0
    while piece := os.pread(descriptor, _PIECE, at):
        yield piece
        at += len(piece)


def _block_pages(name: str, length: int, descriptor: int, page_size: int) -> Iterator[bytes | bytearray]:
    """Every page, zeros too: a block of ROM has contents of its own before it is loaded."""
    named = True
    for start in range(0, length, _PAGES_AT_ONCE * page_size):
        contents = os.pread(descriptor, min(_PAGES_AT_ONCE * page_size, length - start), start)
        for first, count, is_zero in _runs(contents, page_size):
            flag = _ZERO if is_zero else _PAGE
            run = PageRun(0, flag, start + first * page_size, count)
            pages = Pages(name, named, page_size, 0, (run,))
            yield encode(pages, contents=None if is_zero else memoryview(_spread(contents, first, count, pages)))
            named = False


def _runs(contents: bytes, page_size: int) -> Iterator[tuple[int, int, bool]]:
    """(first page, how many, are they all zeros) of each stretch of one kind."""
    zeros, view = bytes(page_size), memoryview(contents)
    kinds = [view[at : at + page_size] == zeros for at in range(0, len(contents), page_size)]
    first = 0
    for kind, group in itertools.groupby(kinds):
        count = sum(1 for _ in group)
        yield first, count, kind
        first += count


def _spread(contents: bytes, first: int, count: int, pages: Pages) -> bytearray:
    """Pages with room for their heads between them, as ``encode`` takes them."""
    size, stride = pages.page_size, 8 + pages.page_size
    name_bytes = 1 + len(pages.block.encode("utf-8", "surrogateescape")) if pages.named else 0
    out = bytearray(name_bytes + count * stride)
    for index in range(count):
        at = name_bytes + index * stride + 8
        out[at : at + size] = contents[(first + index) * size : (first + index + 1) * size]
    return out
