"""Page records read fast, as runs.

``ram.py`` declares the same records; a property test holds the two equal.  What is not a plain continuing
page (a name, a marker, a delta, a fill that is not zero) is left to it.

Long runs are found by one possessive regular expression, a few microseconds a run.  Where runs are short, the
words of a whole stretch are gathered first, whatever their kind, and cut into runs together.  The plain loop
that does the same is kept, to hold both to it.
"""

import operator
import re
import struct
from functools import lru_cache
from typing import Final

from qmigrate.format.ram import PageRun, RamFlag

__all__ = ["scan", "scan_plainly"]

_PAGE: Final = int(RamFlag.PAGE)
_ZERO: Final = int(RamFlag.ZERO)
_CONTINUE: Final = int(RamFlag.CONTINUE)
_SHORT_RUN: Final = 6  # pages; below, the plain loop is faster
_STRETCH: Final = 2048  # records that are gathered before runs are tried again
_PIECE: Final = 256  # records unpacked at once
_WORD: Final = struct.Struct(">Q")


@lru_cache(maxsize=16)
def _pattern(page_size: int) -> re.Pattern[bytes]:
    """Runs of normal pages, then runs of zero pages, either of them empty."""
    head = _head(page_size)
    return re.compile(b"((?:%b\\x28(?s:.{%d}))*+)((?:%b\\x22\\x00)*+)" % (head, page_size, head))


def _head(page_size: int) -> bytes:
    """A word but for its last byte.

    The low bits are the flags.  All flags of plain pages sit in the last byte; the one before it carries
    offset bits too where the page is smaller than 64 KiB.
    """
    return b"(?s:.{6})[" + b"".join(b"\\x%02x" % value for value in range(0, 256, max(page_size >> 8, 1))) + b"]"


@lru_cache(maxsize=16)
def _mixed_patterns(page_size: int) -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """A stretch of plain pages of both kinds; and one of them, with its word as the group."""
    head = _head(page_size)
    rest = b"(?:(?<=\\x28)(?s:.{%d})|(?<=\\x22)\\x00)" % page_size
    stretch = b"(?:%b[\\x28\\x22]%b){0,%d}+" % (head, rest, _STRETCH)
    return re.compile(stretch), re.compile(b"(%b[\\x28\\x22])%b" % (head, rest))


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
            position = _scan_mixed(runs, buffer, position, end, page_size, shift)


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


def _scan_mixed(
    runs: list[PageRun], buffer: bytearray | bytes, position: int, end: int, page_size: int, shift: int
) -> int:
    """A stretch of short runs.  Adds to ``runs``."""
    stretch, record = _mixed_patterns(page_size)
    found = stretch.match(buffer, position, end)
    assert found is not None  # it may be empty
    heads = record.findall(buffer, position, found.end())
    if not heads:
        return position
    words = struct.unpack(f">{len(heads)}Q", b"".join(heads))
    # A run goes on where the word grows by a page and the flags stay: elsewhere it is cut.
    steps = map(operator.sub, words[1:], words)
    cuts = [index for index, step in enumerate(steps, 1) if step != page_size]
    offset, index, mask = position + shift, 0, page_size - 1
    flag_of = {_PAGE | _CONTINUE: (_PAGE, 8 + page_size), _ZERO | _CONTINUE: (_ZERO, 9)}
    fresh: list[PageRun] = []
    for cut in (*cuts, len(words)):
        word = words[index]
        flag, stride = flag_of[word & mask]
        fresh.append(PageRun(offset, flag, word & ~mask, cut - index))
        offset += (cut - index) * stride
        index = cut
    _append(runs, fresh[0], page_size, flag_of[fresh[0].flag | _CONTINUE][1])
    runs += fresh[1:]
    return found.end()


def scan_plainly(
    runs: list[PageRun], buffer: bytearray | bytes, position: int, end: int, *, page_size: int, shift: int
) -> int:
    """One record after the other: the plain version of ``scan``.  Adds to ``runs``, returns where they end."""
    mask = page_size - 1
    unpack = _WORD.unpack_from
    normal_stride, normal, zero = 8 + page_size, _PAGE | _CONTINUE, _ZERO | _CONTINUE
    last_place = end - 9  # the last one at which the shorter record fits
    following = -1  # the word that would go on with the run
    offset = flag = start = count = 0
    while position <= last_place:
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
