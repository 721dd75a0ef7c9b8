"""The ``spapr/htab`` section: the hash page table of a ppc64 guest.

hw/ppc/spapr.c
"""

from collections.abc import Sequence
from typing import Final

from construct import Int16ub, Int32ub

from qmigrate.errors import StreamError
from qmigrate.format._record import (
    Record,
    wire,
)
from qmigrate.format.feed import Feed
from qmigrate.format.live_section import Entries, LiveState, payload, read_one
from qmigrate.format.stream import SectionType

__all__ = ["HtabChunk", "HtabHeader", "read_htab"]

_NO_TABLE: Final = 0xFFFFFFFF
_ENTRY_BYTES: Final = 16
_SHIFTS: Final = range(18, 47)  # hw/ppc/spapr.c: spapr_hpt_shift_for_ramsize() gives no other


class HtabHeader(Record):
    """Opens each part.  START: the table has 2**word bytes; PART, END: 0.  All: 0xffffffff, no table."""

    word: int = wire(Int32ub)


class HtabChunk(Record):
    """``valid`` entries of 16 bytes follow, then, unsent, ``invalid`` ones; all 0: the part ends.

    hw/ppc/spapr.c: htab_save_chunk()
    """

    index: int = wire(Int32ub)
    valid: int = wire(Int16ub)
    invalid: int = wire(Int16ub)


def read_htab(feed: Feed, kind: SectionType, state: LiveState, trail: Sequence[str]) -> Entries:
    """The size of a pseries guest's hash page table, then chunks of it.

    hw/ppc/spapr.c: htab_load()
    """
    header, _ = yield from feed.record(HtabHeader, trail)
    _check_htab_header(header.word, kind, state, feed.offset, trail)
    if kind is SectionType.START:
        state.htab_shift = None if header.word == _NO_TABLE else header.word
    yield from read_one(feed, HtabHeader, trail)
    if kind is SectionType.START or header.word == _NO_TABLE:
        return
    while True:
        chunk, _ = yield from feed.record(HtabChunk, trail)
        _check_htab_chunk(chunk, state, feed.offset, trail)
        yield from read_one(feed, HtabChunk, trail)
        if not (chunk.index or chunk.valid or chunk.invalid):
            return
        yield from payload(feed, chunk.valid * _ENTRY_BYTES, trail)


def _check_htab_header(word: int, kind: SectionType, state: LiveState, offset: int, trail: Sequence[str]) -> None:
    if word == _NO_TABLE:
        return
    if kind is SectionType.START:
        good, expected = word in _SHIFTS, f"a shift from {_SHIFTS[0]} to {_SHIFTS[-1]}"
    else:
        good, expected = word == 0, "0x0"
    if not good:
        raise StreamError(f"found {word:#x}, expected {expected}, or {_NO_TABLE:#x}", offset=offset, trail=trail)
    if kind is not SectionType.START and state.htab_shift is None:
        raise StreamError("chunks come, and no START gave the table's size", offset=offset, trail=trail)


def _check_htab_chunk(chunk: HtabChunk, state: LiveState, offset: int, trail: Sequence[str]) -> None:
    entries = (1 << (state.htab_shift or 0)) // _ENTRY_BYTES
    end = chunk.index + chunk.valid + chunk.invalid
    if end > entries:
        raise StreamError(f"a chunk ends at entry {end:#x} of {entries:#x}", offset=offset, trail=trail)
