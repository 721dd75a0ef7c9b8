"""Does a plain stream in a file have each page once?  And where is one, before anybody has read them all?

A guest whose file has one pass can be served at once: no later copy of a page can exist.  To prove that without
reading the file takes what QEMU does: its first pass sends every page of every block, in the order of the block list
and of their places; only then may one come again.  A record has 9 bytes at least.  So from a place that is known to be
in the first pass, with so many pages of the block still to come, the pass is not over for 9 times as many bytes: there,
further on, is another such place.  As the block comes to its end the steps get short, and the rest is read as it comes.
Where the last page of the last block is followed by RAM's end, there was one pass.

This holds where each page is sent: not with a balloon, whose guest may tell of pages that it does not use, nor with
virtio-mem.  Where pages come in another order (a background snapshot) nothing is proven.

A record is found in the middle of a file by its word, and by what stands behind it: records of the pages that follow,
for longer than one page is.  What a guest has in its memory, a saved stream even, does not stand so.

migration/ram.c: ram_save_iterate(), find_dirty_block(), ram_init_bitmaps()
"""

import os
import re
import struct
from bisect import bisect_right, insort
from collections.abc import Sequence
from operator import attrgetter, itemgetter
from typing import Final, NamedTuple

from qmigrate.capture.kind import KIND_BITS
from qmigrate.capture.plain_ends import Head, NotPlainError
from qmigrate.capture.plain_pages import PAGE_BYTES, STEPS, PlainPages

__all__ = ["OnePass"]

_RECORD: Final = 8 + PAGE_BYTES
_SHORT: Final = 9
_FRONT: Final = 23 + 8 + 1 + 255  # what stands before a page's contents at most, at the beginning of a section
_NEXT: Final = _RECORD + _FRONT  # wherever one looks, a record that continues its block begins sooner
_AGREED: Final = 2 * _RECORD + 32  # bytes of records that follow one another, to be sure of the first
_LOOK: Final = 2 * _NEXT + _AGREED
_WORD_BYTES: Final = 8
_SHORTEST: Final = 1 << 16  # bytes; to step over less is not worth it
_WORD: Final = struct.Struct(">Q")
_EVEN: Final = b"".join(b"\\x%02x" % byte for byte in range(0, 256, 16))
_CANDIDATE: Final = re.compile(rb"(?=\x00(?s:.{5})[%b][\x22\x28])" % _EVEN)  # a word that could be a record's


_PAGE_OF: Final = attrgetter("page")


class _Place(NamedTuple):
    """Where in the file the record of a page begins, or what stands before it."""

    offset: int
    page: int


class OnePass:
    """A plain file that has one pass, or may have.  ``shortest``: of steps, in bytes.

    ``starts``: where each block begins, and RAM ends, in the file; ``prove()`` finds them.
    """

    def __init__(self, descriptor: int, head: Head, *, starts: Sequence[int] = (), shortest: int = _SHORTEST) -> None:
        self.starts = list(starts)
        self._descriptor = descriptor
        self._head = head
        self._blocks = [(name, length // PAGE_BYTES) for name, length in head.blocks.items()]
        self._shortest = shortest
        self._pages = PlainPages(descriptor, head, window=1 << 18)
        self._around = PlainPages(descriptor, head, window=_LOOK)
        self._known: dict[str, list[_Place]] = {}

    # -- the proof

    def prove(self, end: int) -> bool:
        """Is it so?  ``end``: where RAM ends.  Raises ``OSError``."""
        self.starts = []
        at, block = _Place(self._head.pages_at, 0), None
        try:
            while len(self.starts) <= len(self._blocks):
                at, block = self._read(at, block)
        except NotPlainError:
            return False
        return self.starts[-1] == end

    def _read(self, at: _Place, block: str | None) -> tuple[_Place, str | None]:
        """On from here as it comes, and then as far by steps as that goes; where that leads, and in which block."""
        runs, page, total = self._pages.runs(at.offset, block=block), at.page, self._total(block)
        while True:
            try:
                found, kind, first, count, offset = next(runs)
            except StopIteration as stop:
                _expect(page == total and len(self.starts) == len(self._blocks))
                self.starts.append(stop.value)
                return _Place(stop.value, 0), None
            if found != block:
                _expect(page == total and self._blocks[len(self.starts) :][:1] == [(found, self._total(found))])
                self.starts.append(offset - 9 - len(found.encode("utf-8", "surrogateescape")))
                block, page, total = found, 0, self._total(found)
            _expect(first == page)
            page += count
            place = _Place(_end_of(kind, count, offset), page)
            if self._step(place, total) >= self._shortest:
                while (step := self._step(place, total)) >= self._shortest:
                    place = self._found(found, place, place.offset + step)
                return place, block

    def _total(self, block: str | None) -> int:
        return 0 if block is None else self._head.blocks[block] // PAGE_BYTES

    def _step(self, at: _Place, total: int) -> int:
        """How far beyond ``at`` the first pass can't have left the block, nor what is read there reach its end."""
        return (total - at.page) * _SHORT - _LOOK

    # -- in the middle

    def record_near(self, target: int) -> tuple[int, str] | None:
        """A record that continues the longest block, whatever its page; None where there is none to be sure of.

        It is no more than a likely one: who reads up to there is to see whether it was.  Raises ``OSError``.
        """
        (_, next_longest), (longest, total) = sorted([("", 0), *self._blocks], key=itemgetter(1))[-2:]
        data = os.pread(self._descriptor, _NEXT + _WORD_BYTES, target)
        for found in _CANDIDATE.finditer(data):
            place = _Place(target + found.start(), _WORD.unpack_from(data, found.start())[0] // PAGE_BYTES)
            if next_longest <= place.page < total and self._agrees(longest, place):
                return place.offset, longest
        return None

    def _found(self, block: str, before: _Place, target: int) -> _Place:
        """A record near to ``target``, behind ``before``.  ``NotPlainError`` where there is none to be sure of."""
        # As it would be if all in between were pages with contents, and no section ended.
        skipped = (target - before.offset) // _RECORD
        guess = _Place(before.offset + skipped * _RECORD, before.page + skipped)
        if skipped and self._agrees(block, guess):
            return guess
        data = os.pread(self._descriptor, _NEXT + _WORD_BYTES, target)
        for found in _CANDIDATE.finditer(data):
            offset = target + found.start()
            place = _Place(offset, _WORD.unpack_from(data, found.start())[0] // PAGE_BYTES)
            most = before.page + (offset - before.offset) // _SHORT
            if before.page <= place.page <= most and self._agrees(block, place):
                return place
        raise NotPlainError("no record is found where one has to be")

    def _agrees(self, block: str, place: _Place) -> bool:
        """Do records stand there, of this page and of those that follow?"""
        page = place.page
        try:
            for found, kind, first, count, offset in self._around.runs(place.offset, block=block):
                if found != block or first != page:
                    return False
                page += count
                if _end_of(kind, count, offset) - place.offset >= _AGREED:
                    return True
        except NotPlainError:
            pass
        return False

    # -- one page

    def find(self, block: str, first: int, count: int, entries: memoryview) -> bool:
        """Note where these pages are, in the block's entries of an index; False where that is not found out.

        Of a file that is proven to have one pass.  Raises ``OSError``.
        """
        number = self._blocks.index((block, self._total(block)))
        known = self._known.setdefault(
            block, [_Place(self.starts[number], 0), _Place(self.starts[number + 1], self._total(block))]
        )
        try:
            return self._note(block, self._before(block, first, known), first, first + count, entries)
        except NotPlainError:
            return False

    def _before(self, block: str, page: int, known: list[_Place]) -> _Place:
        """A place that is known, or found now, not far before that page."""
        while True:
            index = bisect_right(known, page, key=_PAGE_OF)
            before, behind = known[index - 1], known[index]
            middle = (before.offset + behind.offset) // 2
            if middle - before.offset < self._shortest:
                return before
            try:
                place = self._found(block, before, middle)
            except NotPlainError:
                return before
            if not before.offset < place.offset < behind.offset:
                return before
            insort(known, place)

    def _note(self, block: str, before: _Place, page: int, end: int, entries: memoryview) -> bool:
        for found, kind, first, count, offset in self._around.runs(before.offset, block=block):
            if found != block:
                return False
            step = STEPS[kind]
            for each in range(max(page, first), min(end, first + count)):
                entries[each] = (offset << KIND_BITS | kind) + step * (each - first)
            if first + count >= end:
                return True
        return False


def _end_of(kind: int, count: int, offset: int) -> int:
    """Where a run ends whose first contents are at ``offset``."""
    return offset + (count * STEPS[kind] >> KIND_BITS) - 8


def _expect(holds: bool) -> None:
    if not holds:
        raise NotPlainError("its pages do not come once each, one after the other")
