"""The ``block`` section: whole disks, up to 9.0.

migration/block.c
"""

from collections.abc import Sequence
from enum import IntFlag
from typing import Final

from construct import Int64ub

from qmigrate.format._record import (
    CountedString,
    Record,
    When,
    refuse,
    wire,
)
from qmigrate.format.feed import Feed
from qmigrate.format.live_section import Checked, Entries, LiveState, payload, read_one
from qmigrate.format.stream import SectionType

__all__ = ["BlockFlag", "BlockRecord", "read_block"]

_BLOCK_BYTES: Final = 1 << 20
_SECTOR_BITS: Final = 9


class BlockFlag(IntFlag):
    """In the low bits of each word.  migration/block.c: BLK_MIG_FLAG_*"""

    DEVICE_BLOCK = 0x01
    EOS = 0x02
    PROGRESS = 0x04
    ZERO_BLOCK = 0x08


def _check_block_word(word: int) -> None:
    flags = word & ((1 << _SECTOR_BITS) - 1)
    unknown = flags & ~0x0F
    if unknown:
        raise refuse(f"unknown flags {unknown:#x}")
    if not flags & 0x07:
        raise refuse(f"found the flags {flags:#x}, expected one of DEVICE_BLOCK 0x1, EOS 0x2, PROGRESS 0x4")


class BlockRecord(Record):
    """A chunk of a disk, or a mark.  A chunk has 1 MiB, also where it ends behind the disk's end.

    ``block`` migration was deprecated in 8.2 and left in 9.1.
    migration/block.c: blk_send(), block_load()
    """

    word: int = wire(Checked(_check_block_word, Int64ub))
    device: str | None = wire(When(lambda this: this.word & BlockFlag.DEVICE_BLOCK, CountedString), default=None)

    @property
    def flags(self) -> int:
        return self.word & ((1 << _SECTOR_BITS) - 1)

    @property
    def sector(self) -> int:
        """Of 512 bytes; with PROGRESS it is the percentage."""
        return self.word >> _SECTOR_BITS


def read_block(feed: Feed, _kind: SectionType, _state: LiveState, trail: Sequence[str]) -> Entries:
    """Chunks and progress until a word says EOS.

    migration/block.c: block_load()
    """
    while True:
        record = yield from read_one(feed, BlockRecord, trail)
        if record.flags & BlockFlag.DEVICE_BLOCK and not record.flags & BlockFlag.ZERO_BLOCK:
            yield from payload(feed, _BLOCK_BYTES, trail)
        if record.flags & BlockFlag.EOS:
            return
