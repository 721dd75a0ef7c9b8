"""Sections of s390x: storage keys, storage attributes, and the clock.

hw/s390x/s390-skeys.c, s390-stattrib.c, tod.c
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from construct import Int8ub, Int64ub

from qmigrate.errors import StreamError
from qmigrate.format._record import (
    AnyConstruct,
    Known,
    Nested,
    Record,
    When,
    wire,
)
from qmigrate.format.feed import Feed
from qmigrate.format.live_section import Checked, Entries, LiveState, payload, read_one
from qmigrate.format.stream import SectionType

__all__ = [
    "StorageAttributes",
    "StorageAttributesFlag",
    "StorageAttributesMark",
    "StorageKeys",
    "StorageKeysFlag",
    "StorageKeysMark",
    "TodClock",
    "TodPresence",
    "TodValue",
    "read_storage_attributes",
    "read_storage_keys",
    "read_tod_clock",
]

_FRAME_FLAGS: Final = 0xFFF  # below a guest frame's address


class StorageAttributesFlag(IntEnum):
    """hw/s390x/s390-stattrib.c: STATTR_FLAG_*"""

    EOS = 1
    MORE = 2
    ERROR = 4
    DONE = 8


class StorageKeysFlag(IntEnum):
    """hw/s390x/s390-skeys.c: S390_SKEYS_SAVE_FLAG_*"""

    EOS = 1
    SKEYS = 2
    ERROR = 4


def _frame_word(enum: type[IntEnum]) -> AnyConstruct:
    """A guest frame's address with a flag below: one of ``enum``, alone."""
    flag = Known(enum, Int64ub)
    return Checked(lambda word: flag._decode(word & _FRAME_FLAGS, None, ""), Int64ub)


class StorageAttributesMark(Record):
    """Where attributes begin, or a mark.  DONE: the destination applies what came."""

    word: int = wire(_frame_word(StorageAttributesFlag))


class StorageAttributes(StorageAttributesMark):
    """``count`` bytes follow, one for each guest frame."""

    count: int = wire(Int64ub)


class StorageKeysMark(Record):
    """Where keys begin, or the end: EOS, or ERROR where the source could not read them all."""

    word: int = wire(_frame_word(StorageKeysFlag))


class StorageKeys(StorageKeysMark):
    """``count`` keys follow, one byte for each guest frame."""

    count: int = wire(Int64ub)


def read_storage_attributes(feed: Feed, _kind: SectionType, _state: LiveState, trail: Sequence[str]) -> Entries:
    """hw/s390x/s390-stattrib.c: cmma_load()"""
    while True:
        mark, _ = yield from feed.record(StorageAttributesMark, trail)
        match mark.word & _FRAME_FLAGS:
            case StorageAttributesFlag.MORE:
                attributes = yield from read_one(feed, StorageAttributes, trail)
                yield from payload(feed, attributes.count, trail)
            case StorageAttributesFlag.ERROR:
                raise StreamError("ERROR: the source could not read all attributes", offset=feed.offset, trail=trail)
            case flag:
                yield from read_one(feed, StorageAttributesMark, trail)
                if flag == StorageAttributesFlag.EOS:
                    return


def read_storage_keys(feed: Feed, _kind: SectionType, _state: LiveState, trail: Sequence[str]) -> Entries:
    """ERROR ends it as EOS does: the bytes are good, though a destination fails.

    hw/s390x/s390-skeys.c: s390_storage_keys_load()
    """
    while True:
        mark, _ = yield from feed.record(StorageKeysMark, trail)
        if mark.word & _FRAME_FLAGS != StorageKeysFlag.SKEYS:
            yield from read_one(feed, StorageKeysMark, trail)
            return
        keys = yield from read_one(feed, StorageKeys, trail)
        yield from payload(feed, keys.count, trail)


class TodPresence(IntEnum):
    """hw/s390x/tod.c: S390_TOD_CLOCK_VALUE_*"""

    MISSING = 0
    PRESENT = 1


class TodValue(Record):
    """The guest's clock: 72 bits."""

    high: int = wire(Int8ub)
    low: int = wire(Int64ub)


class TodClock(Record):
    """The time of day, unless the source could not read it.  hw/s390x/tod.c: s390_tod_save()"""

    presence: TodPresence = wire(Known(TodPresence, Int8ub))
    value: TodValue | None = wire(When(lambda this: this.presence, Nested(TodValue)), default=None)


def read_tod_clock(feed: Feed, _kind: SectionType, _state: LiveState, trail: Sequence[str]) -> Entries:
    """hw/s390x/tod.c: s390_tod_load()"""
    yield from read_one(feed, TodClock, trail)
