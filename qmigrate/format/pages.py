"""Page records read fast, as runs.

``ram.py`` declares the same records; a property test holds the two equal.  What is not a plain continuing
page (a name, a marker, a delta, a fill that is not zero) is left to it.

Long runs are found by one possessive regular expression, short ones by a plain loop: the expression costs
about a microsecond a run, the loop about half of one a page.
"""

import re
import struct
from functools import lru_cache
from typing import Final

from qmigrate.format.ram import PageRun, RamFlag

__all__ = ["scan"]

_PAGE: Final = int(RamFlag.PAGE)
_ZERO: Final = int(RamFlag.ZERO)
_CONTINUE: Final = int(RamFlag.CONTINUE)
_SHORT_RUN: Final = 6  # pages; below, the plain loop is faster
_LOOP_PAGES: Final = 2048  # how long to stay in the plain loop before runs are tried again
_PIECE: Final = 256  # records unpacked at once
_WORD: Final = struct.Struct(">Q")


@lru_cache(maxsize=16)
def _pattern(page_size: int) -> re.Pattern[bytes]:
    """Runs of normal pages, then runs of zero pages, either of them empty."""
    # The word's low bits are the flags; all flags sit in its last two bytes, the upper of which also carries
    # offset bits where the page is smaller than 64 KiB.
    upper = b"[" + b"".join(b"\\x%02x" % value for value in range(0, 256, max(page_size >> 8, 1))) + b"]"
    head = b"(?s:.{6})" + upper
    return re.compile(b"((?:%b\\x28(?s:.{%d}))*+)((?:%b\\x22\\x00)*+)" % (head, page_size, head))


@lru_cache(maxsize=4096)
def _words(count: int, stride: int) -> struct.Struct:
    return struct.Struct(">" + f"Q{stride - 8}x" * count)


def scan(buffer: bytearray | bytes, begin: int, end: int, *, offset: int, page_size: int) -> tuple[list[PageRun], int]:
    """The runs of continuing NORMAL and ZERO (fill 0) pages from ``begin`` on, and where they end.

    ``offset`` is where ``begin`` stands in the stream.  Stops at the first record that is anything else, or
    is not all there.
    """
    runs: list[PageRun] = []
    match = _pattern(page_size).match
    shift = offset - begin
    position = begin
    while True:
        found = match(buffer, position, end)
        assert found is not None  # both groups may be empty
        middle, after = found.end(1), found.end(2)
        if after == position:
            return runs, position
        before = len(runs)
        if middle > position:
            _split(runs, buffer, position, middle, _PAGE, page_size, shift)
        if after > middle:
            _split(runs, buffer, middle, after, _ZERO, page_size, shift)
        page_count = (middle - position) // (8 + page_size) + (after - middle) // 9
        position = after
        if page_count < _SHORT_RUN * max(1, len(runs) - before):
            position = scan_plainly(runs, buffer, position, end, page_size=page_size, shift=shift)


def _split(
    runs: list[PageRun],
    buffer: bytearray | bytes,
    begin: int,
    end: int,
    flag: int,
    page_size: int,
    shift: int,
) -> None:
    """Records of one kind from ``begin`` to ``end``: cut where the offset in the block jumps."""
    stride = 8 + (page_size if flag == _PAGE else 1)
    flags = flag | _CONTINUE
    at = begin
    while at < end:
        count = min(_PIECE, (end - at) // stride)
        words = _words(count, stride).unpack_from(buffer, at)
        first = words[0]
        if words == tuple(range(first, first + count * page_size, page_size)):
            _append(runs, PageRun(at + shift, flag, first - flags, count), page_size, stride)
        else:
            for index, word in enumerate(words):
                _append(runs, PageRun(at + index * stride + shift, flag, word - flags, 1), page_size, stride)
        at += count * stride


def _append(runs: list[PageRun], run: PageRun, page_size: int, stride: int) -> None:
    """Add a run, or make the last one longer where this goes on with it."""
    if runs:
        offset, flag, start, count = runs[-1]
        if (flag, start + count * page_size, offset + count * stride) == (run.flag, run.start, run.offset):
            runs[-1] = PageRun(offset, flag, start, count + run.page_count)
            return
    runs.append(run)


def scan_plainly(
    runs: list[PageRun], buffer: bytearray | bytes, position: int, end: int, *, page_size: int, shift: int
) -> int:
    """One record after the other, for a while: the plain version of ``scan``.  Adds to ``runs``."""
    mask = page_size - 1
    unpack = _WORD.unpack_from
    normal_stride, normal, zero = 8 + page_size, _PAGE | _CONTINUE, _ZERO | _CONTINUE
    last_place = end - 9  # the last one at which the shorter record fits
    following = -1  # the word that would go on with the run
    offset = flag = start = count = 0
    for _ in range(_LOOP_PAGES):
        if position > last_place:
            break
        word = unpack(buffer, position)[0]
        flags = word & mask
        if flags == normal:
            if position + normal_stride > end:
                break
            stride = normal_stride
        elif flags == zero and not buffer[position + 8]:
            stride = 9
        else:
            break
        if word == following:
            count += 1
        else:
            if count:
                _append(runs, PageRun(offset, flag, start, count), page_size, normal_stride if flag == _PAGE else 9)
            offset, flag, start, count = position + shift, flags - _CONTINUE, word - flags, 1
        following = word + page_size
        position += stride
    if count:
        _append(runs, PageRun(offset, flag, start, count), page_size, normal_stride if flag == _PAGE else 9)
    return position
