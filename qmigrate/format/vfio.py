"""The ``vfio`` section: the state of a device of the host, which only its driver knows.

hw/vfio/migration.c
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from construct import Int64ub

from qmigrate.errors import TruncatedError
from qmigrate.format._record import (
    Known,
    Only,
    Record,
    wire,
)
from qmigrate.format.feed import Feed
from qmigrate.format.live_section import Entries, LiveEntry, LiveState, Opaque, payload, read_one
from qmigrate.format.stream import Footer, SectionType

__all__ = ["VfioData", "VfioEnd", "VfioMark", "VfioTag", "read_vfio"]

_VFIO: Final = 0xFFFFFFFFEF100000
# What may stand behind a section where there are no footers.
_NOT_AT_TOP: Final = {SectionType.SUBSECTION, SectionType.VMDESCRIPTION, SectionType.CONFIGURATION}
_AFTER_SECTION: Final = frozenset(SectionType) - _NOT_AT_TOP - {SectionType.FOOTER}
_FOOTER_BYTES: Final = 5
_OPAQUE_PIECE: Final = 1 << 16  # stays in the feed's window until its end is known


class VfioTag(IntEnum):
    """hw/vfio/migration.c: VFIO_MIG_FLAG_*.  5 came with 8.1, 6 with 10.1."""

    END_OF_STATE = _VFIO + 1
    DEV_CONFIG_STATE = _VFIO + 2
    DEV_SETUP_STATE = _VFIO + 3
    DEV_DATA_STATE = _VFIO + 4
    DEV_INIT_DATA_SENT = _VFIO + 5
    DEV_CONFIG_LOAD_READY = _VFIO + 6


_END_OF_STATE: Final = VfioTag.END_OF_STATE.to_bytes(8)


class VfioMark(Record):
    """A tag alone."""

    tag: VfioTag = wire(Known(VfioTag, Int64ub))


class VfioEnd(Record):
    """The one tag that may stand here."""

    tag: VfioTag = wire(Only(VfioTag.END_OF_STATE, Int64ub), default=VfioTag.END_OF_STATE)


class VfioData(Record):
    """``length`` bytes of the device's own follow."""

    tag: VfioTag = wire(Only(VfioTag.DEV_DATA_STATE, Int64ub), default=VfioTag.DEV_DATA_STATE)
    length: int = wire(Int64ub)


def read_vfio(feed: Feed, kind: SectionType, state: LiveState, trail: Sequence[str]) -> Entries:
    """Tags, with data or an opaque configuration behind some.

    hw/vfio/migration.c: vfio_load_state()
    """
    while True:
        mark, _ = yield from feed.record(VfioMark, trail)
        inside = (*trail, mark.tag.name)
        match mark.tag:
            case VfioTag.DEV_DATA_STATE:
                data = yield from read_one(feed, VfioData, inside)
                yield from payload(feed, data.length, inside)
            case VfioTag.DEV_SETUP_STATE:
                yield from read_one(feed, VfioMark, trail)
                yield from read_one(feed, VfioEnd, inside)
                return
            case VfioTag.DEV_CONFIG_STATE:
                yield from read_one(feed, VfioMark, trail)
                yield from _vfio_configuration(feed, kind, state, inside)
                yield from read_one(feed, VfioEnd, inside)
                if kind is not SectionType.END:  # 5.2 put it into END, with the device's data behind it
                    return
            case VfioTag.END_OF_STATE | VfioTag.DEV_INIT_DATA_SENT | VfioTag.DEV_CONFIG_LOAD_READY:
                yield from read_one(feed, VfioMark, trail)
                return


def _vfio_configuration(feed: Feed, kind: SectionType, state: LiveState, trail: Sequence[str]) -> Entries:
    """Opaque bytes up to the nearest END_OF_STATE that something plausible follows.

    They are the vmstate VFIOPCIDevice without a header: nothing says how long it is.
    hw/vfio/pci.c: vfio_pci_save_config()
    """
    searched = 0
    while True:
        searched, closes = _find_end(feed, searched, kind, state)
        if closes:
            yield from _opaque(feed, searched)
            return
        if searched > _OPAQUE_PIECE:
            yield from _opaque(feed, _OPAQUE_PIECE)
            searched -= _OPAQUE_PIECE
        elif feed.ended:
            raise TruncatedError(
                "the stream ends here, before END_OF_STATE", offset=feed.offset + len(feed), trail=trail
            )
        else:
            yield from feed.more()


def _find_end(feed: Feed, searched: int, kind: SectionType, state: LiveState) -> tuple[int, bool]:
    """Where the end stands, and True; or before which position it can't stand, and False."""
    buffer, begin, end = feed.buffer
    at = buffer.find(_END_OF_STATE, begin + searched, end)
    while at >= 0:
        found = at - begin
        if found > _OPAQUE_PIECE:  # a whole piece comes first, however the bytes came in
            return found, False
        closes = _may_follow_vfio(bytes(buffer[at + 8 : min(at + 16, end)]), kind, state)
        if closes is not False:
            # None: the bytes still missing decide; where no more come, those that are there must do.
            return found, closes is True or feed.ended
        at = buffer.find(_END_OF_STATE, at + 1, end)
    return max(searched, end - begin - len(_END_OF_STATE) + 1), False


def _may_follow_vfio(behind: bytes, kind: SectionType, state: LiveState) -> bool | None:
    """Whether this can stand behind a configuration; None where it is too short to tell."""
    if kind is SectionType.END:
        tags = [tag.to_bytes(8) for tag in VfioTag]
        return behind in tags or (None if any(tag.startswith(behind) for tag in tags) else False)
    if not behind:
        return None
    if behind[0] != SectionType.FOOTER:
        return state.footers is not True and behind[0] in _AFTER_SECTION
    if state.footers is False:
        return False
    if len(behind) < _FOOTER_BYTES:
        return None
    return state.section_id in (None, Footer.read_prefix(behind)[0].section_id)


def _opaque(feed: Feed, length: int) -> Entries:
    if length:
        at = feed.offset
        data = bytes(feed.view(length))
        feed.skip(length)
        yield LiveEntry(at, length, Opaque(data=data))
