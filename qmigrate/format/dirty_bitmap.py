"""The ``dirty-bitmap`` section: bitmaps of block devices, in pieces.

migration/block-dirty-bitmap.c
"""

from collections.abc import Sequence
from enum import IntFlag
from typing import IO, Any, Final

import construct
from construct import Int8ub, Int32ub, Int64ub

from qmigrate.format._record import (
    AnyConstruct,
    CountedString,
    Nested,
    Record,
    When,
    refuse,
    wire,
)
from qmigrate.format.feed import Feed
from qmigrate.format.live_section import Checked, Entries, LiveEntry, LiveState
from qmigrate.format.stream import SectionType

__all__ = ["BitmapBits", "BitmapFlag", "BitmapStart", "BitmapStartFlag", "DirtyBitmapRecord", "read_dirty_bitmap"]


class BitmapFlag(IntFlag):
    """Opens each record.  migration/block-dirty-bitmap.c: DIRTY_BITMAP_MIG_FLAG_*"""

    EOS = 0x01
    ZEROES = 0x02
    BITMAP_NAME = 0x04
    DEVICE_NAME = 0x08
    START = 0x10
    COMPLETE = 0x20
    BITS = 0x40
    EXTRA = 0x80  # would announce wider flags; no release sends it


class BitmapStartFlag(IntFlag):
    """migration/block-dirty-bitmap.c: DIRTY_BITMAP_MIG_START_FLAG_*"""

    ENABLED = 0x01
    PERSISTENT = 0x02
    AUTOLOAD = 0x04  # of old, ignored


_LONGEST_BITS: Final = 10240  # ten times what a writer puts into one record


def _check_bitmap_flags(flags: int) -> None:
    if flags & BitmapFlag.EXTRA:
        raise refuse(f"found {flags:#x}, with EXTRA {BitmapFlag.EXTRA:#x}, which no QEMU sends")


def _check_start_flags(flags: int) -> None:
    unknown = flags & ~0x07
    if unknown:
        raise refuse(f"unknown flags {unknown:#x}, expected ENABLED 0x1, PERSISTENT 0x2, AUTOLOAD 0x4")


def _check_alias(name: str) -> None:
    if not name:  # to QEMU that is a name it could not read
        raise refuse("the name is empty")


class _Bits(AnyConstruct):
    """A u64 that counts bytes, then these bytes; a size that QEMU refuses is not read."""

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> bytes:
        size = int.from_bytes(construct.stream_read(stream, 8, path))
        if size > _LONGEST_BITS:
            raise refuse(f"size is {size}, expected at most {_LONGEST_BITS}")
        return bytes(construct.stream_read(stream, size, path))

    def _build(self, obj: bytes, stream: IO[bytes], context: Any, path: str) -> Any:
        if len(obj) > _LONGEST_BITS:
            raise refuse(f"size is {len(obj)}, at most {_LONGEST_BITS} can be sent")
        stream.write(len(obj).to_bytes(8) + obj)
        return obj

    def _sizeof(self, context: Any, path: str) -> int:
        raise construct.SizeofError


class BitmapStart(Record):
    """A bitmap is announced.  ``granularity`` in bytes: 32 bits wide, whatever QEMU's comment says."""

    granularity: int = wire(Int32ub)
    flags: int = wire(Checked(_check_start_flags, Int8ub))


class BitmapBits(Record):
    """Which part of the bitmap's disk, in sectors of 512 bytes."""

    first_sector: int = wire(Int64ub)
    sector_count: int = wire(Int32ub)


def _bits_act(this: Any) -> bool:
    """Of START, COMPLETE and BITS the first acts, and has its payload."""
    acting = this.flags & (BitmapFlag.START | BitmapFlag.COMPLETE | BitmapFlag.BITS)
    return bool(acting == BitmapFlag.BITS)


class DirtyBitmapRecord(Record):
    """One record: names where they change, then what the flags say.

    ``words`` are little-endian u64 words, bit k for the k-th granule from ``bits.first_sector`` on; None with
    ZEROES, where all are clear.
    migration/block-dirty-bitmap.c: send_bitmap_header(), dirty_bitmap_load_header()
    """

    flags: int = wire(Checked(_check_bitmap_flags, Int8ub))
    node_alias: str | None = wire(
        When(lambda this: this.flags & BitmapFlag.DEVICE_NAME, Checked(_check_alias, CountedString)),
        default=None,
    )
    bitmap_alias: str | None = wire(
        When(lambda this: this.flags & BitmapFlag.BITMAP_NAME, Checked(_check_alias, CountedString)),
        default=None,
    )
    start: BitmapStart | None = wire(
        When(lambda this: this.flags & BitmapFlag.START, Nested(BitmapStart)), default=None
    )
    bits: BitmapBits | None = wire(When(_bits_act, Nested(BitmapBits)), default=None)
    words: bytes | None = wire(
        When(lambda this: _bits_act(this) and not this.flags & BitmapFlag.ZEROES, _Bits()), default=None
    )


def read_dirty_bitmap(feed: Feed, _kind: SectionType, state: LiveState, trail: Sequence[str]) -> Entries:
    """Records until one says EOS.  A name that never came cancels the bitmaps in QEMU, not the migration.

    migration/block-dirty-bitmap.c: dirty_bitmap_load()
    """
    while True:
        record, length = yield from feed.record(DirtyBitmapRecord, trail)
        at = feed.offset
        feed.skip(length)
        state.node_alias = record.node_alias or state.node_alias
        state.bitmap_alias = record.bitmap_alias or state.bitmap_alias
        yield LiveEntry(at, length, record)
        if record.flags & BitmapFlag.EOS:
            return
