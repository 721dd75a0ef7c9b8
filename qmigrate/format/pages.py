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

NORMAL: Final = int(RamFlag.PAGE | RamFlag.CONTINUE)  # 0x28
ZERO: Final = int(RamFlag.ZERO | RamFlag.CONTINUE)  # 0x22
_SHORT_RUN: Final = 4  # pages; below, the plain loop is faster
_LOOP_PAGES: Final = 512  # how long to stay in the plain loop before runs are tried again
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
            _split(runs, buffer, position, middle, RamFlag.PAGE, page_size, shift)
        if after > middle:
            _split(runs, buffer, middle, after, RamFlag.ZERO, page_size, shift)
        pages = (middle - position) // (8 + page_size) + (after - middle) // 9
        position = after
        if pages < _SHORT_RUN * (len(runs) - before):
            position = _plain(runs, buffer, position, end, page_size, shift)


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
    stride = 8 + (page_size if flag == RamFlag.PAGE else 1)
    flags = flag | RamFlag.CONTINUE
    at = begin
    while at < end:
        count = min(_PIECE, (end - at) // stride)
        words = _words(count, stride).unpack_from(buffer, at)
        first = words[0]
        if words == tuple(range(first, first + count * page_size, page_size)):
            _append(runs, at + shift, flag, first - flags, count, page_size, stride)
        else:
            for index, word in enumerate(words):
                _append(runs, at + index * stride + shift, flag, word - flags, 1, page_size, stride)
        at += count * stride


def _append(runs: list[PageRun], offset: int, flag: int, start: int, count: int, page_size: int, stride: int) -> None:
    if runs:
        last = runs[-1]
        if (
            last.flag == flag
            and last.start + last.page_count * page_size == start
            and last.offset + last.page_count * stride == offset
        ):
            runs[-1] = PageRun(last.offset, flag, last.start, last.page_count + count)
            return
    runs.append(PageRun(offset, flag, start, count))


def _plain(runs: list[PageRun], buffer: bytearray | bytes, position: int, end: int, page_size: int, shift: int) -> int:
    """One record after the other, for a while.  The plain version of the above."""
    mask = page_size - 1
    unpack = _WORD.unpack_from
    for _ in range(_LOOP_PAGES):
        if position + 9 > end:
            break
        word = unpack(buffer, position)[0]
        flags = word & mask
        if flags == NORMAL:
            stride = 8 + page_size
            if position + stride > end:
                break
        elif flags == ZERO and not buffer[position + 8]:
            stride = 9
        else:
            break
        _append(runs, position + shift, flags & ~RamFlag.CONTINUE, word - flags, 1, page_size, stride)
        position += stride
    return position
