"""The size of the target's pages, where the stream does not announce it.

Most targets have 4 KiB.  Arm boards older than ``virt`` have 1 KiB, and say nothing of it; CONFIGURATION, ADVISE
or the machine's name tell the others.  Where they don't, the size is the one under which the first records of RAM
are records, and each page follows the one before: a source's first pass leaves none out.
"""

from collections.abc import Generator, Mapping
from enum import Enum, auto
from typing import Final

from qmigrate.errors import StreamError, TruncatedError
from qmigrate.format.feed import Feed
from qmigrate.format.ram import MARKERS, RamFlag, RamRecord

__all__ = ["SMALLEST_PAGE", "find_page_size", "page_size_of_machine"]

SMALLEST_PAGE: Final = 1 << 8
_SIZES: Final = tuple(1 << bits for bits in range(16, 7, -1))
_OF_MACHINES: Final = {
    "clipper": 8192,
    "or1k-sim": 8192,
    "sun4u": 8192,
    "sun4v": 8192,
    "niagara": 8192,
    "tricore_testboard": 16384,
    "KIT_AURIX_TC277_TRB": 16384,
}
_WITH_4_KIB: Final = ("pc-", "microvm", "isapc", "pseries", "s390-ccw", "xen")
_ENOUGH_RECORDS: Final = 64
_FIRST_LOOK: Final = 1 << 10
_MOST_AHEAD: Final = 1 << 18


def page_size_of_machine(machine_type: str) -> int | None:
    """In bytes, where the name of the machine type tells it."""
    return 4096 if machine_type.startswith(_WITH_4_KIB) else _OF_MACHINES.get(machine_type)


class _Reading(Enum):
    WRONG = auto()
    GOOD = auto()
    SHORT = auto()  # no more than two records are there
    LIKELY = auto()  # what is there is good, and more may come


def find_page_size(feed: Feed, blocks: Mapping[str, int], default: int) -> Generator[None, None, int]:
    """The size under which the records at hand are records: ``default`` if it is one, or if none is.

    ``blocks`` are the lengths by name.  Consumes nothing.
    """
    ahead = _FIRST_LOOK
    while True:
        while len(feed) < ahead and (yield from feed.more()):
            pass
        is_last = feed.ended or ahead >= _MOST_AHEAD
        reading = _read(feed, blocks, default)
        if reading is _Reading.GOOD or (is_last and reading is not _Reading.WRONG):
            return default
        if reading is _Reading.WRONG:
            readings = {size: _read(feed, blocks, size, in_order=True) for size in _SIZES}
            if is_last or not {_Reading.SHORT, _Reading.LIKELY} & set(readings.values()):
                good = (size for size in _SIZES if readings[size] in (_Reading.GOOD, _Reading.LIKELY))
                return next(good, default)
        ahead *= 4


def _read(feed: Feed, blocks: Mapping[str, int], page_size: int, *, in_order: bool = False) -> _Reading:
    """Are there records of pages of this size?  ``in_order``: and does each page follow the one before?"""
    if any(length % page_size for length in blocks.values()):
        return _Reading.WRONG
    view = feed.view(_MOST_AHEAD)
    at, block, follows = 0, "", -1
    for count in range(_ENOUGH_RECORDS):
        try:
            record, length = RamRecord.read_prefix(view[at : at + 2 * page_size + 1024], page_size=page_size)
        except TruncatedError:
            return _Reading.LIKELY if count > 2 else _Reading.SHORT
        except StreamError:
            return _Reading.WRONG
        if record.word.flags == RamFlag.EOS:
            break
        if record.word.flags not in MARKERS:
            block = block if record.block is None else record.block
            start = record.word.start
            if start + page_size > blocks.get(block, 0):
                return _Reading.WRONG
            if in_order and record.block is None and start != follows:
                return _Reading.WRONG
            follows = start + page_size
        at += length
    return _Reading.GOOD
