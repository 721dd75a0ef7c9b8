"""Page records read fast, as runs.

``ram.py`` declares the same records; a property test holds the two equal.  What is not a plain continuing
page (a name, a marker, a delta, a fill that is not zero) is left to it.

Long runs are found by one regular expression, and shown to be runs by comparing two bytes a record: a
few microseconds a run.  Where runs are short, the words of all records are gathered and kept as they are.  The
plain loop that does the same is kept, to hold both to it.
"""

import re
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from qmigrate.format.ram import PageRun, RamFlag
from qmigrate.format.stretch import Stretch, are_consecutive, new_run

__all__ = ["gather", "scan", "scan_plainly"]

_PAGE: Final = int(RamFlag.PAGE)
_ZERO: Final = int(RamFlag.ZERO)
_CONTINUE: Final = int(RamFlag.CONTINUE)
_SHORT_RUN: Final = 6  # pages; below, the words of all records are gathered
_WORD: Final = struct.Struct(">Q")


@lru_cache(maxsize=16)
def _pattern(page_size: int) -> re.Pattern[bytes]:
    """Normal pages as group 1, then zero pages as group 3, either of them empty.

    The words of each have their first five bytes in common (groups 2 and 4).
    """
    low = _low_bits(page_size)
    normal = b"(?s:.)%b\\x28(?s:.{%d})" % (low, page_size)
    zero = b"(?s:.)%b\\x22\\x00" % low
    # Nothing behind a repeat can fail, so none goes back.  Possessive ones, which would say so, end in wrong places
    # up to Python 3.11.4 where something behind a repeat inside of them fails (gh-106052).
    return re.compile(b"((?:((?s:.{5}))%b(?:\\2%b)*)?)((?:((?s:.{5}))%b(?:\\4%b)*)?)" % (normal, normal, zero, zero))


def _low_bits(page_size: int) -> bytes:
    """The last byte but one of a word.

    The low bits are the flags.  All flags of plain pages sit in the last byte; the one before it carries
    offset bits too where the page is smaller than 64 KiB.
    """
    return b"[" + b"".join(b"\\x%02x" % value for value in range(0, 256, max(page_size >> 8, 1))) + b"]"


@lru_cache(maxsize=16)
def _record(page_size: int) -> re.Pattern[bytes]:
    """A plain page of either kind, with its word as the group; or else all that is left, with the group empty."""
    rest = b"(?:(?<=\\x28)(?s:.{%d})|(?<=\\x22)\\x00)" % page_size
    return re.compile(b"((?s:.{6})%b[\\x28\\x22])%b|(?s:.+)" % (_low_bits(page_size), rest))


def scan(
    buffer: bytearray | bytes, begin: int, end: int, *, offset: int, page_size: int
) -> tuple[Sequence[PageRun], int]:
    """Runs of continuing NORMAL and ZERO (fill 0) pages from ``begin`` on, and where they end.

    ``offset`` is where ``begin`` stands in the stream.  There are none where the first record is anything else, or
    is not all there.  There may be more behind them: long runs and a stretch of short ones come one by one.
    """
    runs: list[PageRun] = []
    match = _pattern(page_size).match
    stride, shift = 8 + page_size, offset - begin
    position = begin
    short: tuple[int, list[PageRun]] | None = None  # where short runs began: the place, and the runs before it
    while True:
        found = match(buffer, position, end)
        assert found is not None  # both groups may be empty
        middle, after = found.end(1), found.end()
        if after == position:
            return runs, position
        before, last = len(runs), runs[-1:]
        if middle > position:
            _split(runs, buffer, position, middle, _PAGE, page_size, shift)
        if after > middle:
            _split(runs, buffer, middle, after, _ZERO, page_size, shift)
        page_count = (middle - position) // stride + (after - middle) // 9
        if page_count >= _SHORT_RUN * (len(runs) - before):
            short = None
        elif short is None:  # once is no stretch: the words' common bytes change every 16 MiB
            short = position, [*runs[: max(before - 1, 0)], *last]  # as it was: what came since may have made it longer
        else:
            position, kept = short
            if kept:
                return kept, position
            stretch = gather(buffer, position, end, offset=position + shift, page_size=page_size)
            return stretch, position + stretch.length
        position = after


def gather(buffer: bytearray | bytes, begin: int, end: int, *, offset: int, page_size: int) -> Stretch:
    """All plain pages from ``begin`` on, whatever their kind and order; ``offset`` is where that is in the stream."""
    return Stretch(offset, page_size, b"".join(_record(page_size).findall(buffer, begin, end)))


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
    fifth, sixth = buffer[begin + 5 : end : stride], buffer[begin + 6 : end : stride]
    if are_consecutive(fifth, sixth, page_size):
        run = new_run(begin + shift, flag, _WORD.unpack_from(buffer, begin)[0] - flags, len(fifth))
        if runs and runs[-1][1] == flag:
            _append(runs, run, page_size, stride)
        else:
            runs.append(run)
        return
    for at in range(begin, end, stride):
        start = _WORD.unpack_from(buffer, at)[0] - flags
        _append(runs, new_run(at + shift, flag, start, 1), page_size, stride)


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
