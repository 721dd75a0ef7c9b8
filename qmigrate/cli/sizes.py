"""Sizes on the command line: ``64M``, ``1G``, ``4096``."""

import argparse
import re
from typing import Final

__all__ = ["page_size", "size"]

_SIZE: Final = re.compile(r"(\d+|0x[0-9a-f]+)\s*(?:([kmgt])(?:i?b)?|b)?", re.ASCII | re.IGNORECASE)
_LARGEST: Final = 1 << 63
_SMALLEST_PAGE, _LARGEST_PAGE = 1 << 8, 1 << 16


def size(argument: str) -> int:
    """A number of bytes, with K, M, G or T for its binary multiples."""
    found = _SIZE.fullmatch(argument.strip())
    if found is None or len(argument) > 32:
        raise argparse.ArgumentTypeError(f"{argument!r} is no size: expected bytes, or a number with K, M, G or T")
    unit = " kmgt".index((found[2] or " ").lower())
    length = int(found[1], 16 if found[1][:2].lower() == "0x" else 10) << 10 * unit
    if length >= _LARGEST:
        raise argparse.ArgumentTypeError(f"{argument!r} is too large")
    return length


def page_size(argument: str) -> int:
    """The size of a page, in bytes."""
    length = size(argument)
    if length & (length - 1) or not _SMALLEST_PAGE <= length <= _LARGEST_PAGE:
        raise argparse.ArgumentTypeError(f"{argument!r} is no page size: expected a power of two from 256 to 64K")
    return length
