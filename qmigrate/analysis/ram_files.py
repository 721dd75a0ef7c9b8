"""RAM blocks as sparse files: their names, and page after page into them."""

import ctypes
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote_from_bytes

from qmigrate.capture.migration import Block
from qmigrate.errors import QmigrateError
from qmigrate.format.mapped_ram import MappedBlock, MappedPages
from qmigrate.format.ram import BlockList, PageRun, Pages, RamFlag
from qmigrate.format.stretch import Stretch
from qmigrate.format.walk import Entry, RamPage

if TYPE_CHECKING:
    from qmigrate.format.multifd_pages import PageDecoder

__all__ = ["ExtractError", "RamWriter", "distinct_names", "file_name", "file_names", "refuse_input"]

_PAGE: Final = int(RamFlag.PAGE)
_MOST_BUFFERS: Final = 1024  # IOV_MAX on Linux
_LONGEST_FILE: Final = (1 << 63) - 1


class ExtractError(QmigrateError):
    """The RAM can't be written there."""


def file_name(block: str) -> str:
    """One path component for a block's name: everything but plain characters is percent-encoded."""
    return _component(block) + ".raw"


def _component(name: str) -> str:
    raw = name.encode("utf-8", "surrogateescape")
    encoded = quote_from_bytes(raw, safe="").replace("~", "%7E")
    if not encoded.strip("."):
        encoded = "".join(f"%{byte:02X}" for byte in raw)
    # A component holds at most 255 bytes; 200 leave room for a number that tells shortened names apart.
    return encoded[:200]


def file_names(blocks: Sequence[str]) -> dict[str, str]:
    """A file name for each block: those that would collide get a number."""
    return {
        block: f"{component}.raw" for block, component in distinct_names({block: block for block in blocks}).items()
    }


def distinct_names(wanted: Mapping[str, str]) -> dict[str, str]:
    """A path component for each, like the one it wants: those that would collide get a number."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for each, want in wanted.items():
        name = _component(want)
        number = 1
        # Case is folded, as some file systems do.
        while name.lower() in taken:
            number += 1
            name = f"{_component(want)}~{number}"
        taken.add(name.lower())
        names[each] = name
    return names


def refuse_input(target: Path, inputs: Container[tuple[int, int]]) -> None:
    """``inputs``: device and inode of each.  Raises ``ExtractError`` where ``target`` is one of them."""
    try:
        status = target.stat()
    except OSError:  # not there yet, mostly
        return
    if (status.st_dev, status.st_ino) in inputs:
        raise ExtractError(f"{target}: an input, which would be overwritten: extract into another directory")


class RamWriter:
    """One open file a block, under a temporary name until all is read.  ``inputs``: see ``refuse_input``."""

    def __init__(self, folder: Path, stack: ExitStack, inputs: Container[tuple[int, int]] = ()) -> None:
        self.folder = folder
        self.stack = stack
        self._inputs = inputs
        self.names: dict[str, str] = {}
        self.bytes_written: dict[str, int] = {}
        self._descriptors: dict[str, int] = {}
        self._temporary: dict[str, Path] = {}
        self._again: dict[str, int] = {}
        self._decoders: dict[int, PageDecoder] = {}
        self._doubtful: dict[str, set[int]] = {}

    def take(self, entry: Entry, blocks: dict[str, Block]) -> None:
        match entry.record:
            case BlockList():
                self._open(blocks)
            case MappedBlock(block=block):
                self._open({block.name: blocks[block.name]})
            case MappedPages() as mapped:
                self._mapped(mapped, entry)
            case Pages() as pages:
                self._pages(pages, entry, blocks[pages.block])
            case RamPage() as page:
                self._encoded(page, entry)
            case _ if entry.channel:
                self._of_channel(entry, blocks)

    def _encoded(self, page: RamPage, entry: Entry) -> None:
        """A delta to the page that was there, or a page compressed."""
        from qmigrate.format.encoded import page_after

        descriptor, start = self._descriptors[page.block], page.record.word.start
        before = os.pread(descriptor, page.page_size, start)
        _write_all(descriptor, [memoryview(page_after(page, before, offset=entry.offset))], start)
        self.bytes_written[page.block] += page.page_size
        self._settle(page.block, [PageRun(0, _PAGE, start, 1)], page.page_size)

    def _of_channel(self, entry: Entry, blocks: dict[str, Block]) -> None:
        """A packet of multifd, its pages as they are or compressed."""
        from qmigrate.format.multifd import PagePacket
        from qmigrate.format.multifd_channel import packet_entry
        from qmigrate.format.multifd_pages import PageDecoder

        packet = entry.record
        if not isinstance(packet, PagePacket) or not packet.runs:
            return
        decoder = self._decoders.setdefault(entry.channel, PageDecoder())
        contents = memoryview(decoder.contents(packet_entry(entry, packet)))
        name, page_size = packet.header.block, packet.page_size
        in_doubt = {page: self._page(name, page, page_size) for page in blocks[name].in_doubt}
        sent_again = blocks[name].again > self._again[name]
        self._again[name] = blocks[name].again
        for at, flag, start, page_count in packet.runs:
            length = page_count * packet.page_size
            if flag == _PAGE:
                _write_all(self._descriptors[name], [contents[at : at + length]], start)
                self.bytes_written[name] += length
            elif sent_again and _has_data(self._descriptors[name], start, length):
                _punch(self._descriptors[name], start, length)
        self._settle(name, packet.runs, page_size, in_doubt)
        differ = [page for page, before in in_doubt.items() if self._page(name, page, page_size) != before]
        if differ:
            self._doubtful.setdefault(name, set()).update(differ)

    def _page(self, block: str, page: int, page_size: int) -> bytes:
        """What it holds now."""
        return os.pread(self._descriptors[block], page_size, page * page_size)

    def _settle(self, block: str, runs: Sequence[PageRun], page_size: int, in_doubt: Container[int] = ()) -> None:
        """These pages came after all that came before, but for those that are in doubt again."""
        doubtful = self._doubtful.get(block)
        if not doubtful:
            return
        for run in runs:
            first, count = run.start // page_size, run.page_count
            span = range(first, first + count)
            # Whichever are fewer are looked through.
            settled = doubtful.intersection(span) if count < len(doubtful) else {p for p in doubtful if p in span}
            doubtful -= {page for page in settled if page not in in_doubt}

    def doubts(self) -> Iterator[str]:
        """A sentence where RAM is not known, though all of it came."""
        named = [f"{len(pages)} of {block}" for block, pages in self._doubtful.items() if pages]
        if named:
            yield (
                f"Pages came over two channels with no SYNC between, and not the same, {', '.join(named)}: nothing "
                "says which copy is the later."
            )

    def _mapped(self, pages: MappedPages, entry: Entry) -> None:
        """Pages at their places: whole runs lie as they belong into the file."""
        for offset, flag, start, page_count in pages.runs:
            if flag == _PAGE:
                at, length = offset - entry.offset, page_count * pages.page_size
                _write_all(self._descriptors[pages.block], [entry.view[at : at + length]], start)
                self.bytes_written[pages.block] += length

    def _open(self, blocks: dict[str, Block]) -> None:
        self.names = file_names([*self.names, *blocks])
        for block in blocks.values():
            if block.length > _LONGEST_FILE:
                raise ExtractError(f"{block.name!r} has {block.length} bytes, more than a file can")
            descriptor = self._descriptors[block.name] = self._new_file(block.name)
            self.bytes_written[block.name] = self._again[block.name] = 0
            try:
                os.ftruncate(descriptor, block.length)
            except OSError as exc:
                raise ExtractError(
                    f"a file of {block.length} bytes can't be made for {block.name!r}: {exc.strerror}"
                ) from exc

    def _new_file(self, block: str) -> int:
        """A descriptor to write the block's contents to.  ``diff`` has files without a name."""
        refuse_input(self.folder / self.names[block], self._inputs)
        temporary = self.folder / f".{self.names[block]}.{os.getpid()}.part"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        removing = self.stack.enter_context(ExitStack())  # before it is there: a signal may end us right after
        removing.callback(temporary.unlink, missing_ok=True)
        try:
            descriptor = os.open(temporary, flags, 0o666)
        except FileExistsError:  # it is somebody else's
            removing.pop_all()
            raise
        self.stack.callback(os.close, descriptor)
        self._temporary[block] = temporary
        return descriptor

    def finish(self) -> None:
        """All is read: give the files their names."""
        for block, temporary in self._temporary.items():
            target = self.folder / self.names[block]
            # Some file systems write all data out before they rename over a file: seconds for a large one.
            target.unlink(missing_ok=True)
            temporary.rename(target)

    def _pages(self, pages: Pages, entry: Entry, block: Block) -> None:
        descriptor = self._descriptors[pages.block]
        self._settle(pages.block, pages.runs, pages.page_size)
        name_bytes = 1 + len(pages.block.encode("utf-8", "surrogateescape")) if pages.named else 0
        # A zero page is a hole already, unless the file may hold data of an earlier pass.
        sent_again = block.again > self._again[pages.block]
        self._again[pages.block] = block.again
        if isinstance(pages.runs, Stretch) and not sent_again and not pages.fill and not pages.named:
            _write_stretch(descriptor, pages.runs, entry.view)
            self.bytes_written[pages.block] += pages.runs.normal_count * pages.page_size
            return
        page_count = 0
        for run in pages.runs:
            if run.flag == _PAGE:
                self._normal(descriptor, pages, run, entry, name_bytes)
                page_count += run.page_count
            elif sent_again or pages.fill:
                self._zero(descriptor, pages, run)
            name_bytes = 0  # only the first record of all can have a name
        self.bytes_written[pages.block] += page_count * pages.page_size

    @staticmethod
    def _normal(descriptor: int, pages: Pages, run: PageRun, entry: Entry, name_bytes: int) -> None:
        """Gather the pages out from between their headers."""
        page_size, view = pages.page_size, entry.view
        stride = 8 + page_size
        begin = run.offset - entry.offset + 8 + name_bytes
        for first in range(0, run.page_count, _MOST_BUFFERS):
            count = min(_MOST_BUFFERS, run.page_count - first)
            at = begin + first * stride
            buffers = [view[place : place + page_size] for place in range(at, at + count * stride, stride)]
            _write_all(descriptor, buffers, run.start + first * page_size)

    @staticmethod
    def _zero(descriptor: int, pages: Pages, run: PageRun) -> None:
        """Where the file has data from an earlier pass, that goes."""
        length = run.page_count * pages.page_size
        if pages.fill:
            _write_all(descriptor, [memoryview(bytes([pages.fill]) * length)], run.start)
        elif _has_data(descriptor, run.start, length):
            _punch(descriptor, run.start, length)


def _write_stretch(descriptor: int, stretch: Stretch, view: memoryview) -> None:
    """The normal pages of a stretch, one by one; the others are holes."""
    page_size, at = stretch.page_size, 0
    normal, mask = _PAGE | int(RamFlag.CONTINUE), page_size - 1
    for number in stretch.numbers:
        at += 8
        if number & mask != normal:
            at += 1
            continue
        page = view[at : at + page_size]
        if os.pwrite(descriptor, page, number - normal) != page_size:
            _write_all(descriptor, [page], number - normal)
        at += page_size


def _write_all(descriptor: int, buffers: list[memoryview], start: int) -> None:
    left = sum(len(buffer) for buffer in buffers)
    written = os.pwritev(descriptor, buffers, start)
    if written == left:
        return
    data = memoryview(b"".join(buffers))  # a short write is rare: a disk that is nearly full
    while written < left:
        written += os.pwrite(descriptor, data[written:], start + written)


def _has_data(descriptor: int, start: int, length: int) -> bool:
    try:
        return os.lseek(descriptor, start, os.SEEK_DATA) < start + length
    except OSError:  # ENXIO: nothing but holes from here on
        return False


_PUNCH_HOLE_KEEP_SIZE: Final = 0x03  # linux/falloc.h: FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


def _punch(descriptor: int, start: int, length: int) -> None:
    """Make a hole; where the file system can't, write zeros."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_int(descriptor), ctypes.c_int(_PUNCH_HOLE_KEEP_SIZE))
    if libc.fallocate(*arguments, ctypes.c_int64(start), ctypes.c_int64(length)) == 0:
        return
    zeros = bytes(1 << 16)
    for at in range(start, start + length, len(zeros)):
        _write_all(descriptor, [memoryview(zeros)[: start + length - at]], at)
