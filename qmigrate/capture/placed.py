"""Where each page of RAM is, as an index tells it, and the pages themselves read from there.

An entry has eight bytes, of which nothing is used before a page is read: no claim of a length takes memory.  What an
index says is compared with what stands in its input before anything is served: of a page record its word, of a page of
zeros its byte too, of any page the size and time of all inputs.  Where no word stands before a page (mapped-ram, a
packet of multifd) it is these alone.
"""

import errno
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import IO, Final, NamedTuple

from qmigrate.capture.kind import ENTRY_BYTES, FILE_SHIFT, KIND_BITS, OFFSET_MASK, Kind, absent_pages
from qmigrate.capture.owner import Owner
from qmigrate.capture.places import Input
from qmigrate.errors import StreamError
from qmigrate.format.ram import RamBlock, RamFlag

__all__ = ["KIND_BITS", "Kind", "Placed", "PlacedPages", "lazy_entries"]

_LAZILY: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which mmap names since 3.13
_PAGE: Final = int(RamFlag.PAGE)
_ZERO: Final = int(RamFlag.ZERO)
_CONTINUE: Final = int(RamFlag.CONTINUE)
_HEAD: Final = struct.Struct(">Q")
_ZERO_RECORD: Final = struct.Struct(">QB")
_KIND_MASK: Final = (1 << KIND_BITS) - 1
_RECORDS: Final = (Kind.RECORD, Kind.ZERO)
_WORD_BYTES: Final = 8
_SHORT: Final = 9  # bytes of the record of a page of zeros
_MOST_BUFFERS: Final = 1024  # IOV_MAX on Linux
_COUNTED_AT_ONCE: Final = 1 << 14


def lazy_entries(page_count: int) -> mmap.mmap:
    """Room for entries, all absent; what is not written to takes no memory.  Raises ``OSError``, also for too many."""
    try:
        return mmap.mmap(-1, ENTRY_BYTES * page_count, flags=_LAZILY)
    except (OverflowError, ValueError) as exc:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from exc


class Placed(NamedTuple):
    """Pages of one kind, one after the other in the block and in their file; ``offset`` is the first one's.

    ``file`` is the number of the input.
    """

    kind: int
    page: int
    page_count: int
    offset: int
    file: int = 0


class PlacedPages(Owner):
    """The pages of each block.  Closes its spill file; the inputs stay open.

    An input is None where no page stands in it as it is, which may then change: what was in it is spilled.  ``checks``:
    the CRC-32 of each page in the spill file, where that was kept: it is compared first, too; where a page there is
    damaged, ``forget`` removes that file, so that it is not kept any more, and tells whether it could.
    """

    def __init__(
        self,
        inputs: Sequence[Input | None],
        *,
        page_size: int = 4096,
        blocks: Mapping[str, RamBlock] | None = None,
        entries: Mapping[str, memoryview] | None = None,
        spill: IO[bytes] | None = None,
        checks: memoryview | None = None,
        forget: Callable[[], bool] | None = None,
    ) -> None:
        self.page_size = page_size
        self.blocks: dict[str, RamBlock] = dict(blocks or {})
        self.inputs = inputs
        self._entries: dict[str, memoryview] = dict(entries or {})
        self._spill = spill
        self._checks = checks
        self._forget = forget

    def close(self) -> None:
        if self._spill is not None:
            self._spill.close()
            self._spill = None

    def entries(self, block: str) -> memoryview:
        """As they are kept: eight bytes a page, in this host's order."""
        return self._of(block)

    def noted(self, block: str) -> list[tuple[int, int]]:
        """Where entries may differ from zero, as (first page, end), in order; all others are absent."""
        return [(0, len(self._of(block)))]

    @property
    def spill(self) -> int | None:
        """The descriptor of the spill file, where there is one."""
        return None if self._spill is None else self._spill.fileno()

    @property
    def spilled(self) -> int:
        """How many bytes of pages stand in a spill file."""
        return 0

    def _of(self, block: str) -> memoryview:
        return self._entries[block]

    def absent(self, block: str) -> int:
        """How many of its pages have not come.  Of a block that claims to be huge only what was noted is read."""
        entries, there = self._of(block), self.noted(block)
        noted = sum(end - first for first, end in there)
        return len(entries) - noted + sum(self._absent_of(entries[first:end]) for first, end in there)

    @staticmethod
    def _absent_of(entries: memoryview) -> int:
        return sum(absent_pages(entries[at : at + _COUNTED_AT_ONCE]) for at in range(0, len(entries), _COUNTED_AT_ONCE))

    def runs(self, block: str, first: int, count: int) -> Iterator[Placed]:
        """Where these pages are, in their order."""
        entries = self._of(block)
        page, end = first, first + count
        while page < end:
            entry = entries[page]
            kind, step = entry & _KIND_MASK, self._step(entry)
            following, expected = page + 1, entry + step
            while following < end and entries[following] == expected:
                following += 1
                expected += step
            yield Placed(kind, page, following - page, entry >> KIND_BITS & OFFSET_MASK, entry >> FILE_SHIFT)
            page = following

    def _step(self, entry: int) -> int:
        """By how much the entry of a page differs from that of the page before, where they stand side by side."""
        kind, offset = entry & _KIND_MASK, entry >> KIND_BITS & OFFSET_MASK
        if kind == Kind.ABSENT or (kind == Kind.ZERO and not offset):
            return 0
        length = 1 if kind == Kind.ZERO else self.page_size
        return (length + (8 if kind in (Kind.ZERO, Kind.RECORD) else 0)) << KIND_BITS

    def contents(self, block: str, page: int) -> bytes:
        """One page; zeros where it is absent.  Raises ``StreamError``."""
        records = self.records(block, page, 1)
        return bytes(records[8:]) if len(records) == 8 + self.page_size else bytes(self.page_size)

    def records(self, block: str, first: int, count: int) -> bytearray:
        """These pages as page records that continue their block, in order; an absent page as zero.

        Raises ``StreamError`` where an input is no longer what was indexed: of a record its word is compared, of any
        page the files' sizes and times.
        """
        self.check()
        numbers = self._of(block)[first : first + count].tolist()
        pieces, page = [], 0
        while page < len(numbers):
            end, length = self._end_of_stretch(numbers, page)
            piece = self._as_it_stands(block, first + page, numbers[page:end], length) if length else None
            pieces.append(self._by_runs(block, first + page, end - page) if piece is None else piece)
            page = end
        return pieces[0] if len(pieces) == 1 else bytearray().join(pieces)

    # Most pages are records that stand one behind the other as they were sent, of whatever kind: then the input has
    # what goes out, and one read gets it.

    def _end_of_stretch(self, numbers: Sequence[int], begin: int) -> tuple[int, int]:
        """Where the stretch of entries ends that begins here, and its length in bytes; 0 where it is none of these."""
        end = begin
        while end < len(numbers) and not _is_record(numbers[end]):
            end += 1
        if end > begin:
            return end, 0
        place = numbers[begin] >> KIND_BITS
        record, started = _WORD_BYTES + self.page_size, place
        for entry in numbers[begin:] if begin else numbers:
            kind = entry & _KIND_MASK
            if entry >> KIND_BITS != place or kind not in _RECORDS:
                break
            place += record if kind == Kind.RECORD else _SHORT
            end += 1
        return end, place - started

    def _as_it_stands(self, block: str, first: int, numbers: Sequence[int], length: int) -> bytearray | None:
        """A stretch of records; None where one is not what it was, or names its block: by runs it is told."""
        place = numbers[0] >> KIND_BITS
        out = bytearray(length)
        at = (place & OFFSET_MASK) - _WORD_BYTES
        self._read_exactly(self._input(numbers[0] >> FILE_SHIFT), [memoryview(out)], at, block)
        at, unpack, word = 0, _HEAD.unpack_from, first * self.page_size | _CONTINUE
        record = _WORD_BYTES + self.page_size
        for number in numbers:
            if number & _KIND_MASK == Kind.RECORD:
                if unpack(out, at)[0] != word | _PAGE:
                    return None
                at += record
            else:
                if unpack(out, at)[0] != word | _ZERO or out[at + _WORD_BYTES]:
                    return None
                at += _SHORT
            word += self.page_size
        return out

    def _by_runs(self, block: str, first: int, count: int) -> bytearray:
        """Records of any pages."""
        runs = list(self.runs(block, first, count))
        out = bytearray(sum(run.page_count * self._record_bytes(run.kind) for run in runs))
        view, at = memoryview(out), 0
        for run in runs:
            length = run.page_count * self._record_bytes(run.kind)
            self._read(block, run, view[at : at + length])
            at += length
        return out

    def _record_bytes(self, kind: int) -> int:
        return 9 if kind in (Kind.ABSENT, Kind.ZERO) else 8 + self.page_size

    def _read(self, block: str, run: Placed, into: memoryview) -> None:
        page_size = self.page_size
        start = run.page * page_size
        if run.kind == Kind.ABSENT or (run.kind == Kind.ZERO and not run.offset):
            pack = _ZERO_RECORD.pack_into
            for index in range(run.page_count):
                pack(into, 9 * index, start + index * page_size | _ZERO | _CONTINUE, 0)
            return
        if run.kind in (Kind.RECORD, Kind.ZERO):
            self._read_records(block, run, into)
            return
        if run.kind not in (Kind.PLACED, Kind.SPILLED):
            raise StreamError(f"the index has an entry of kind {run.kind} for it", trail=("ram", block))
        descriptor = self.spill if run.kind == Kind.SPILLED else self._input(run.file)
        stride = 8 + page_size
        for begin in range(0, run.page_count, _MOST_BUFFERS):
            pages = range(begin, min(begin + _MOST_BUFFERS, run.page_count))
            buffers = [into[at * stride + 8 : (at + 1) * stride] for at in pages]
            self._read_exactly(descriptor, buffers, run.offset + begin * page_size, block)
        if run.kind == Kind.SPILLED and self._checks is not None:
            self._check_spilled(block, run, into, self._checks)
        for index in range(run.page_count):
            _HEAD.pack_into(into, index * stride, start + index * page_size | _PAGE | _CONTINUE)

    def _check_spilled(self, block: str, run: Placed, records: memoryview, checks: memoryview) -> None:
        number, beside = divmod(run.offset, self.page_size)
        stride = 8 + self.page_size
        found = [zlib.crc32(records[at * stride + 8 : (at + 1) * stride]) for at in range(run.page_count)]
        if beside or found != checks[number : number + run.page_count].tolist():
            is_forgotten = self._forget is not None and self._forget()
            following = "next time the file is read anew" if is_forgotten else "it is read anew with --no-kept-index"
            raise StreamError(
                f"a page that was kept is no longer what it was; {following}", offset=run.offset, trail=("ram", block)
            )

    def _read_records(self, block: str, run: Placed, into: memoryview) -> None:
        """They stand in the input as they go out; only the first may have another head, with the block's name."""
        page_size, start = self.page_size, run.page * self.page_size
        length, flag = (1, _ZERO) if run.kind == Kind.ZERO else (page_size, _PAGE)
        self._read_exactly(self._input(run.file), [into], max(run.offset - 8, 0), block)
        words = _words(length, run.page_count).unpack(into)
        expected = start | flag | _CONTINUE
        if words[0] != expected:
            self._check_named(block, run, expected & ~_CONTINUE)
            _HEAD.pack_into(into, 0, expected)
        is_filled = run.kind == Kind.ZERO and any(into[8::9])
        if is_filled or words[1:] != tuple(
            range(expected + page_size, expected + page_size * run.page_count, page_size)
        ):
            raise StreamError("the pages are no longer where they were", offset=run.offset, trail=("ram", block))

    def _check_named(self, block: str, run: Placed, word: int) -> None:
        name = block.encode("utf-8", "surrogateescape")
        expected = _HEAD.pack(word) + bytes([len(name)]) + name
        head = bytearray(len(expected))
        self._read_exactly(self._input(run.file), [memoryview(head)], max(run.offset - len(expected), 0), block)
        if head != expected:
            raise StreamError("the page is no longer where it was", offset=run.offset, trail=("ram", block))

    def _read_exactly(self, descriptor: int | None, buffers: list[memoryview], offset: int, block: str) -> None:
        if descriptor is None:
            raise StreamError("the index has a place for it in a file that there is not", trail=("ram", block))
        wanted = sum(map(len, buffers))
        try:
            found = os.preadv(descriptor, buffers, offset)
        except OSError as exc:
            raise StreamError(f"the input can't be read: {exc.strerror}", offset=offset, trail=("ram", block)) from exc
        except OverflowError as exc:  # no file is so long
            raise StreamError("the index has a place for it beyond any file", trail=("ram", block)) from exc
        if found != wanted:
            raise StreamError(
                f"the input gives {found} bytes here, expected {wanted}", offset=offset, trail=("ram", block)
            )

    # -- is it still the same input

    def _input(self, number: int) -> int | None:
        """Its descriptor, where there is such an input."""
        found = self.inputs[number] if number < len(self.inputs) else None
        return None if found is None else found.descriptor

    def check(self) -> None:
        """Raises ``StreamError`` where an input was changed since."""
        for each in self.inputs:
            if each is not None and Input.of(each.descriptor) != each:
                raise StreamError("the input was changed since its pages were indexed")


def _is_record(entry: int) -> bool:
    """Is it of a page that has a record in an input?"""
    return entry & _KIND_MASK in _RECORDS and entry >> KIND_BITS & OFFSET_MASK >= _WORD_BYTES


@lru_cache(maxsize=4096)
def _words(page_size: int, count: int) -> struct.Struct:
    """The words of so many page records that stand side by side."""
    return struct.Struct(">" + f"Q{page_size}x" * count)
