"""What an entry of an index of pages says, in its low bits."""

from typing import Final

__all__ = ["KIND_BITS", "Kind"]

KIND_BITS: Final = 3


class Kind:
    """What an entry of the index is; its other bits are an offset in bytes."""

    ABSENT: Final = 0
    ZERO: Final = 1  # behind the word of its record, where it has one in the input; else the offset is 0
    RECORD: Final = 2  # in the input, behind the word of its record
    PLACED: Final = 3  # in the input, at its place: mapped-ram
    SPILLED: Final = 4
