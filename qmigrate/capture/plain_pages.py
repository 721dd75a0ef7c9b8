"""Where RAM's pages stand in a plain stream in a file, read as fast as they can be: for a guest that shall run at once.

Of QEMU's records only those that it writes into a file with nothing set: pages as they are and pages of zeros, each of
4096 bytes.  For all else ``NotPlainError`` is raised, and ``saved.read_saved`` does it; tests/capture/test_plain.py
holds the two against each other.

Pages mostly come in runs.  So after some that follow one another the words of many records are taken out at once and
compared with what they would be; a record by itself costs what a loop costs.

migration/ram.c: ram_save_iterate(), save_normal_page(), save_zero_page(), save_page_header()
"""

import mmap
import os
import struct
from array import array
from collections.abc import Callable, Generator, Mapping
from functools import lru_cache
from typing import Final, TypeAlias

from qmigrate.capture.kind import ENTRY_BYTES, KIND_BITS, Kind, absent_pages
from qmigrate.capture.plain_ends import Head, NotPlainError
from qmigrate.format.ram_flag import RamFlag

__all__ = ["PAGE_BYTES", "STEPS", "PlainPages", "Run", "overlay", "shared_entries"]

Run: TypeAlias = tuple[str, int, int, int, int]
"""Block, kind as an entry has it, first page, how many pages, where the first one's contents are in the file."""

PAGE_BYTES: Final = 4096
_RECORD: Final = 8 + PAGE_BYTES
_SHORT: Final = 9
STEPS: Final = {Kind.RECORD: _RECORD << KIND_BITS, Kind.ZERO: _SHORT << KIND_BITS}
_NORMAL: Final = int(RamFlag.PAGE)
_ZERO: Final = int(RamFlag.ZERO)
_CONTINUE: Final = int(RamFlag.CONTINUE)
_NORMAL_WORD: Final = _NORMAL | _CONTINUE
_ZERO_WORD: Final = _ZERO | _CONTINUE
_FLAGS: Final = PAGE_BYTES - 1
_PAGE_BITS: Final = 12
_WINDOW: Final = 1 << 20  # stays in a core's own cache
_LONGEST_FRONT: Final = 8 + 1 + 255 + 1  # of a record; what stands between two sections is shorter
_WORD: Final = struct.Struct(">Q")
_LENGTH: Final = struct.Struct(">I")
_PART, _END = 2, 3
_SWITCHOVER_START: Final = b"\x08\0\x0b\0\0"  # says nothing to who has a file; since 10.0
_CYCLE: Final = 1 << 24  # bytes of RAM, whose words are made at once
_PAGES_A_CYCLE: Final = _CYCLE // PAGE_BYTES
_IN_A_ROW: Final = 6  # after so many the next ones are looked at all at once
_OVERLAID_AT_ONCE: Final = 512
_FEW, _FEW_ZEROS = 8, 32  # as many of them first


class PlainPages:
    """The pages of an open file, which stays open.  ``window``: how many bytes are read at once.

    ``page_count``: how many ``index()`` has noted, each copy of a page counted.  ``block``: the one that a record would
    continue where it stopped.
    """

    def __init__(self, descriptor: int, head: Head, *, window: int = _WINDOW) -> None:
        self.page_count = 0
        self.block: str | None = None
        self._descriptor = descriptor
        self._head = head
        self._closing = head.closing
        self._buffer = bytearray(max(window, 2 * _RECORD) + 7 & ~7)
        self._view = memoryview(self._buffer)
        # Every eighth byte begins a word of one of these: so words that stand _RECORD apart are a slice.
        self._words = [self._view[phase : len(self._buffer) - -phase % 8].cast("Q") for phase in range(8)]

    def index(
        self,
        entries: Mapping[str, memoryview],
        *,
        begin: tuple[int, str] | None = None,
        stop: int | None = None,
        on_window: Callable[[int], None] | None = None,
    ) -> int:
        """Note where the last copy of each page is, in its block's ``entries``: eight bytes each, as an index has them.

        The value is where RAM ends, or ``stop``.  ``begin``: not from the beginning, but from a record on that
        continues this block.  ``on_window`` is told now and then how far in the file it is.  Raises ``OSError``, and
        ``NotPlainError``, also where no record begins at ``stop``.
        """
        at, block = begin or (self._head.pages_at, None)
        runs = self.runs(at, block=block, stop=stop, entries=entries, on_window=on_window)
        while True:
            try:
                block, kind, page, count, offset = next(runs)
            except StopIteration as ended:
                return int(ended.value)
            entry = offset << KIND_BITS | kind
            step = STEPS[kind]
            entries[block][page : page + count] = array("Q", range(entry, entry + step * count, step))
            self.page_count += count

    def runs(
        self,
        begin: int,
        *,
        block: str | None = None,
        stop: int | None = None,
        entries: Mapping[str, memoryview] | None = None,
        on_window: Callable[[int], None] | None = None,
    ) -> Generator[Run, None, int]:
        """Runs of pages from ``begin`` to RAM's end; its value is where that is, behind END's footer.

        ``begin``: where a section of RAM does; or a record, given the ``block`` that it continues: then, where its
        section ends and none of RAM follows, it is taken for the last.  With ``entries`` most runs are noted there, and
        not given.  ``stop``: it ends there, if that is between two records.  Raises ``NotPlainError``, ``OSError``.
        """
        window, is_last, is_sure = begin, False, block is None
        if is_sure:
            is_last, window = self._section(begin)
        while window != stop:
            room = self._view if stop is None else self._view[: max(stop - window, 0)]
            count, at = os.preadv(self._descriptor, [room], window), 0
            while True:
                if entries is not None and block is not None:
                    at = self._note(entries[block], at, count, window)
                found = self._next_run(at, count, block)
                if found is None:
                    break
                block, kind, page, pages, first, at = found
                yield block, kind, page, pages, window + first
            ended = len(self._closing) if self._buffer.startswith(self._closing, at, count) else 0
            if not at and not ended:
                raise NotPlainError("it ends among its pages, or has records of other kinds")
            window += at + ended
            if on_window is not None:
                on_window(window)
            if ended and is_last:
                return window
            if ended:
                try:
                    is_last, window = self._section(window)
                except NotPlainError:
                    if is_sure:
                        raise
                    return window  # we began in the last section
                is_sure = True
        self.block = block
        return window

    def _section(self, position: int) -> tuple[bool, int]:
        """The header of RAM's next section: is it the last, and where do its records begin?"""
        header = os.pread(self._descriptor, 5, position)
        if header == _SWITCHOVER_START:
            position += 5
            header = os.pread(self._descriptor, 5, position)
        if len(header) < 5 or header[0] not in (_PART, _END) or header[1:] != _LENGTH.pack(self._head.section_id):
            raise NotPlainError("it has other sections among RAM's")
        return header[0] == _END, position + 5

    # -- in the window

    def _next_run(self, at: int, end: int, block: str | None) -> tuple[str, int, int, int, int, int] | None:
        """A run, its first page's place in the window, and where it ends there.  None where no whole record stands."""
        if end - at < _LONGEST_FRONT and (end == len(self._buffer) or end - at < _SHORT):
            return None
        (word,) = _WORD.unpack_from(self._buffer, at)
        flags, page, first = word & _FLAGS, word >> _PAGE_BITS, at + 8
        if flags & ~_CONTINUE not in (_NORMAL, _ZERO):
            return None
        if not flags & _CONTINUE:
            first += 1 + self._buffer[at + 8]
            block = self._buffer[at + 9 : first].decode("utf-8", "surrogateescape")
        if block is None or page >= (page_count := self._head.blocks.get(block, 0) // PAGE_BYTES):
            raise NotPlainError("it has a page that is in no block")
        if flags & _NORMAL:
            at = first + PAGE_BYTES
            if at > end:
                return None
            more = self._normal(at, end, page + 1, page_count)
            return block, Kind.RECORD, page, 1 + more, first, at + more * _RECORD
        at = first + 1
        if at > end:
            return None
        if self._buffer[first]:
            raise NotPlainError("it has a page of one byte that is not zero")
        more = self._zeros(at, end, page + 1, page_count)
        return block, Kind.ZERO, page, 1 + more, first, at + more * _SHORT

    def _note(self, entries: memoryview, at: int, end: int, window: int) -> int:
        """Note the pages that continue the block, as far as there are any; where they end."""
        buffer, unpack = self._buffer, _WORD.unpack_from
        last, page_count, behind = end - _RECORD, len(entries), window + 8
        expected = in_a_row = shorts = longs = 0
        try:
            while at <= last:
                (word,) = unpack(buffer, at)
                flags = word & _FLAGS
                if flags == _NORMAL_WORD:
                    entries[word >> _PAGE_BITS] = (behind + at) << KIND_BITS | Kind.RECORD
                    at += _RECORD
                    longs += 1
                elif flags == _ZERO_WORD and not buffer[at + 8]:
                    entries[word >> _PAGE_BITS] = (behind + at) << KIND_BITS | Kind.ZERO
                    at += _SHORT
                    shorts += 1
                else:
                    break
                if word != expected:
                    in_a_row = 0
                elif in_a_row == _IN_A_ROW:
                    in_a_row, page = 0, (word >> _PAGE_BITS) + 1
                    kind = Kind.RECORD if flags == _NORMAL_WORD else Kind.ZERO
                    count = (self._normal if flags == _NORMAL_WORD else self._zeros)(at, end, page, page_count)
                    entry, step = (behind + at) << KIND_BITS | kind, STEPS[kind]
                    entries[page : page + count] = array("Q", range(entry, entry + step * count, step))
                    at += count * step >> KIND_BITS
                    self.page_count += count
                else:
                    in_a_row += 1
                expected = word + PAGE_BYTES
        except IndexError as exc:
            raise NotPlainError("it has a page behind its block's end") from exc
        self.page_count += shorts + longs
        return at

    def _normal(self, at: int, end: int, page: int, page_count: int) -> int:
        """How many records from ``at`` on are those of ``page`` and its followers, as they are."""
        into = page % _PAGES_A_CYCLE
        most = min((end - at) // _RECORD, page_count - page, _PAGES_A_CYCLE - into)
        if most <= 0 or _WORD.unpack_from(self._buffer, at)[0] != page << _PAGE_BITS | _NORMAL_WORD:
            return 0
        table, words, start = _normal_words(page // _PAGES_A_CYCLE), self._words[at & 7], at >> 3
        for some in (min(_FEW, most), most):
            found = words[start : start + some * (_RECORD // 8) : _RECORD // 8].tobytes()
            expected = table[8 * into : 8 * (into + some)]
            if found != expected:
                return _equal_bytes(found, expected) // 8
        return most

    def _zeros(self, at: int, end: int, page: int, page_count: int) -> int:
        """The same of pages of zeros."""
        into, buffer = page % _PAGES_A_CYCLE, self._buffer
        most = min((end - at) // _SHORT, page_count - page, _PAGES_A_CYCLE - into)
        if most <= 0 or _WORD.unpack_from(buffer, at)[0] != page << _PAGE_BITS | _ZERO_WORD:
            return 0
        table = _zero_records(page // _PAGES_A_CYCLE)
        for some in (min(_FEW_ZEROS, most), most):
            found = buffer[at : at + _SHORT * some]
            expected = table[_SHORT * into : _SHORT * (into + some)]
            if found != expected:
                return _equal_bytes(found, expected) // _SHORT
        return most


def _equal_bytes(one: bytes | bytearray, other: bytes) -> int:
    """How many bytes are equal before the first that are not.  Both have the same length, and differ."""
    difference = int.from_bytes(one) ^ int.from_bytes(other)
    return (8 * len(one) - difference.bit_length()) // 8


@lru_cache(maxsize=256)
def _normal_words(cycle: int) -> bytes:
    return _records(cycle, _NORMAL_WORD, 8)


@lru_cache(maxsize=256)
def _zero_records(cycle: int) -> bytes:
    return _records(cycle, _ZERO_WORD, _SHORT)


def _records(cycle: int, flags: int, stride: int) -> bytes:
    """The words of the pages of one cycle, so many bytes apart; by whole columns, which takes a tenth of the time."""
    out = bytearray(_first_records(flags, stride))
    for column, value in enumerate((cycle * _CYCLE).to_bytes(8)):
        if value:
            out[column::stride] = bytes([value]) * _PAGES_A_CYCLE
    return bytes(out)


@lru_cache(maxsize=4)
def _first_records(flags: int, stride: int) -> bytes:
    rest = bytes(stride - 8)
    return b"".join(_WORD.pack(start | flags) + rest for start in range(0, _CYCLE, PAGE_BYTES))


# -- entries


def shared_entries(head: Head, descriptor: int = -1, *, is_made: bool = False) -> dict[str, memoryview]:
    """Those of each block, in memory that several processes have: a file's, or, with no descriptor, inherited.

    ``is_made``: the file's room is made here.

    A claim of so many pages is for the file to bear: ``read_tail`` has compared it.  Raises ``OSError``.
    """
    counts = {name: length // PAGE_BYTES for name, length in head.blocks.items()}
    length = sum(counts.values()) * ENTRY_BYTES
    if is_made:
        os.ftruncate(descriptor, length)
    view, at, entries = memoryview(mmap.mmap(descriptor, length)).cast("Q"), 0, {}
    for name, count in counts.items():
        entries[name] = view[at : at + count]
        at += count
    return entries


def overlay(entries: memoryview, later: memoryview) -> None:
    """What came later takes its place; of most pages in a row it is all of them or none."""
    for at in range(0, len(entries), _OVERLAID_AT_ONCE):
        some = later[at : at + _OVERLAID_AT_ONCE]
        absent = absent_pages(some)
        if not absent:
            entries[at : at + len(some)] = some
        elif absent < len(some):
            for page, entry in enumerate(some.tolist(), at):
                if entry:
                    entries[page] = entry
