"""RAM in a file with a place for each page: the capability ``mapped-ram``, since 9.0.

The block list of such a stream is not in one piece.  After each block's entry stand a header, a bitmap of the
pages that have contents, a gap, and the block's pages, each at its place; then the next block's entry.  Offsets
in the headers count from the start of the file, which may begin with something else than the stream.

With x-ignore-shared as well a block that is left out has a header whose two offsets are 0, and neither bitmap nor
pages: so 11.1 writes it; 10.0 fails.

migration/ram.c: mapped_ram_setup_ramblock(), parse_ramblock_mapped_ram()
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from construct import Int32ub, Int64ub

from qmigrate.errors import StreamError, UnsupportedError
from qmigrate.format._record import Record, wire
from qmigrate.format.ram import PageRun, RamBlock, RamFlag

__all__ = ["Gap", "MappedBitmap", "MappedBlock", "MappedPages", "MappedRamHeader", "MappedSpan", "mapped_runs"]

VERSION: Final = 1
_BITS_A_WORD: Final = 64
_RUNS: Final = re.compile(r"0+|1+")
_PAGE: Final = int(RamFlag.PAGE)
_ZERO: Final = int(RamFlag.ZERO)
_ZEROS: Final = bytes(1 << 20)


class MappedRamHeader(Record):
    """Where a block's bitmap and pages stand, from the start of the file.  migration/ram.c: MappedRamHeader"""

    version: int = wire(Int32ub)
    page_size: int = wire(Int64ub)
    bitmap_offset: int = wire(Int64ub)
    pages_offset: int = wire(Int64ub)


@dataclass(frozen=True, kw_only=True)
class MappedBlock:
    """A block's entry in the list, and its header."""

    block: RamBlock
    header: MappedRamHeader

    @property
    def is_left_out(self) -> bool:
        """Has it neither bitmap nor pages, as x-ignore-shared leaves it out?"""
        return self.block.address is not None and self.header.bitmap_offset == self.header.pages_offset == 0

    def build(self) -> bytes:
        return self.block.build() + self.header.build()


@dataclass(frozen=True, kw_only=True)
class MappedBitmap:
    """A piece of a block's bitmap: bit k of ``bits`` is set where page ``first_page`` + k has contents.

    ``length`` is in bytes.  QEMU writes the host's words: little-endian ones are read here.  The bits behind the
    block's last page are 0.
    """

    block: str
    first_page: int
    length: int
    bits: int

    def build(self) -> bytes:
        try:
            return self.bits.to_bytes(self.length, "little")
        except OverflowError as exc:
            raise StreamError(f"MappedBitmap can't be written: {exc}") from exc


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Bytes between a bitmap and its pages, a hole in a new file.  ``data`` is None where all are 0."""

    length: int
    data: bytes | None = None

    def build(self) -> bytes:
        return bytes(self.length) if self.data is None else self.data


class MappedPages(NamedTuple):
    """Pages of a block at their places, one after the other, as runs.

    PAGE runs have contents.  ZERO runs have none: zero, or never written.  ``stale`` counts the bytes of those
    where something stands nevertheless, of a page that was zero in a later pass, or of a migration that did not
    come to write its bitmaps; nobody reads it.
    """

    block: str
    page_size: int
    runs: Sequence[PageRun]
    stale: int = 0


@dataclass(frozen=True)
class MappedSpan:
    """Where a block's bitmap and pages stand, in bytes from the start of the stream; ``base`` is the stream's own
    place in the file."""

    base: int
    bitmap: int
    bitmap_length: int
    pages: int
    page_size: int
    page_count: int

    @classmethod
    def of(cls, mapped: MappedBlock, *, end: int, base: int | None, trail: Sequence[str]) -> "MappedSpan":
        """What the entry that ends at ``end`` says.

        The bitmap stands right behind it: that tells where in its file the stream begins, ``base`` where earlier
        blocks told.  Raises ``StreamError``, ``UnsupportedError``.
        """
        check_header(mapped, end=end, trail=trail)
        header, length, size = mapped.header, mapped.block.used_length, mapped.header.page_size
        at = end - (MappedRamHeader.size or 0)
        if length % size:
            raise StreamError(
                f"{mapped.block.name} has {length:#x} bytes, which its pages of {size:#x} bytes do not fill",
                offset=at + 4,
                trail=trail,
            )
        found = header.bitmap_offset - end
        if found < 0 or base not in (None, found):
            raise StreamError(
                f"the bitmap stands at {header.bitmap_offset:#x}, expected {end + (base or 0):#x}, right behind "
                "its header",
                offset=at + 12,
                trail=trail,
            )
        bitmap_length = -(-(length // size) // _BITS_A_WORD) * 8
        pages = header.pages_offset - found
        if pages < end + bitmap_length or header.pages_offset % size:
            raise StreamError(
                f"the pages stand at {header.pages_offset:#x}, expected a multiple of {size:#x} from "
                f"{header.bitmap_offset + bitmap_length:#x} on",
                offset=at + 20,
                trail=trail,
            )
        return cls(found, end, bitmap_length, pages, size, length // size)


def check_header(mapped: MappedBlock, *, end: int, trail: Sequence[str]) -> None:
    """Can this header, which ends at ``end``, be read on?  Raises ``StreamError``, ``UnsupportedError``."""
    at, size = end - (MappedRamHeader.size or 0), mapped.header.page_size
    if mapped.header.version != VERSION:
        raise UnsupportedError(
            f"mapped-ram version {mapped.header.version}, expected {VERSION}", offset=at, trail=trail
        )
    if size & (size - 1) or not 1 << 8 <= size <= 1 << 16:
        raise StreamError(
            f"page size is {size:#x}, expected a power of two from 0x100 to 0x10000", offset=at + 4, trail=trail
        )


def mapped_runs(bits: bytes | bytearray, first: int, count: int) -> Iterator[tuple[bool, int, int]]:
    """Pages ``first`` to ``first + count`` of a bitmap, as runs: (has contents, first page, page count)."""
    word = int.from_bytes(bits[first >> 3 : (first + count + 7) >> 3], "little") >> (first & 7)
    word &= (1 << count) - 1
    for found in _RUNS.finditer(format(word, f"0{count}b")[::-1]):
        yield found[0][0] == "1", first + found.start(), found.end() - found.start()


def read_mapped(block: str, view: memoryview, bits: bytearray, first: int, page_size: int, offset: int) -> MappedPages:
    """The pages in ``view``, which begins with page ``first`` and stands at ``offset`` in the stream."""
    runs, stale, begin = [], 0, first
    for present, page, count in mapped_runs(bits, first, len(view) // page_size):
        at = (page - begin) * page_size
        runs.append(PageRun(offset + at, _PAGE if present else _ZERO, page * page_size, count))
        if not present:
            stale += _not_zero(view[at : at + count * page_size], page_size)
    return MappedPages(block, page_size, tuple(runs), stale)


def _not_zero(view: memoryview, page_size: int) -> int:
    """The bytes of those pages that are not zero."""
    if is_zero(view):
        return 0
    return sum(page_size for at in range(0, len(view), page_size) if not is_zero(view[at : at + page_size]))


def is_zero(view: memoryview) -> bool:
    """Are all bytes 0?"""
    if len(view) <= len(_ZEROS):
        return _ZEROS.startswith(view)  # which is memcmp, and copies nothing
    return all(is_zero(view[at : at + len(_ZEROS)]) for at in range(0, len(view), len(_ZEROS)))


def encode_mapped(pages: MappedPages, contents: bytes | memoryview | None) -> bytes | bytearray:
    """The pages out of ``contents``, zeros elsewhere, and what is stale as it is.  Raises ``StreamError``."""
    length = sum(run.page_count for run in pages.runs) * pages.page_size
    if contents is None and not pages.stale and all(run.flag == _ZERO for run in pages.runs):
        return bytes(length)
    if contents is None or len(contents) != length:
        given = 0 if contents is None else len(contents)
        raise StreamError(f"the runs take {length} bytes, {given} bytes of contents are given")
    if pages.stale:
        return bytes(contents)
    out, begin = bytearray(length), pages.runs[0].offset
    for offset, flag, _, count in pages.runs:
        if flag == _PAGE:
            at, size = offset - begin, count * pages.page_size
            out[at : at + size] = contents[at : at + size]
    return out
