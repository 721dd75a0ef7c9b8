"""What an entry of an index of pages says: its low bits a kind, the others where, and in which of several files."""

import sys
from typing import Final

__all__ = ["ENTRY_BYTES", "FILE_SHIFT", "KIND_BITS", "MOST_FILES", "OFFSET_MASK", "Kind", "absent_pages"]

ENTRY_BYTES: Final = 8
_LOWEST_BYTE: Final = 0 if sys.byteorder == "little" else ENTRY_BYTES - 1
KIND_BITS: Final = 3
FILE_SHIFT: Final = 52  # so an offset is below 512 TiB; of the first file, mostly the only one, nothing stands above it
MOST_FILES: Final = 1 << (64 - FILE_SHIFT)
OFFSET_MASK: Final = (1 << (FILE_SHIFT - KIND_BITS)) - 1  # of an entry without its kind


class Kind:
    """What an entry of the index is; above it is an offset in bytes, above that the number of the input."""

    ABSENT: Final = 0
    ZERO: Final = 1  # behind the word of its record, where it has one in the input; else the offset is 0
    RECORD: Final = 2  # in the input, behind the word of its record
    PLACED: Final = 3  # in the input, with no word before it: of mapped-ram, of multifd
    SPILLED: Final = 4  # in the spill file


def absent_pages(entries: memoryview) -> int:
    """How many pages have not come: their entries are zero, and of no other is the byte with its kind."""
    return entries.cast("B")[_LOWEST_BYTE::ENTRY_BYTES].tobytes().count(Kind.ABSENT)
