"""What of a mapping has been written to: of one that claims much and holds little the rest need not be read.

To read it would bring it in, and takes 10 s for the entries of a TiB of guest.
"""

import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterator
from typing import Final

from qmigrate.capture.kind import ENTRY_BYTES

__all__ = ["touched"]

_PAGEMAP: Final = "/proc/self/pagemap"
_HIGHEST_BYTE: Final = ENTRY_BYTES - 1 if sys.byteorder == "little" else 0
# Bit 63 of an entry: the page is present; 62: it is in swap.  Documentation/admin-guide/mm/pagemap.rst
_THERE: Final = re.compile(rb"[\x40-\xff]+")
_AT_ONCE: Final = 1 << 17  # entries


def touched(memory: mmap.mmap) -> Iterator[tuple[int, int]]:
    """All that may differ from zero, as (begin, end) in bytes, in order; whole where the kernel does not tell."""
    length = len(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    first, count = address // mmap.PAGESIZE, -(-length // mmap.PAGESIZE)
    try:
        descriptor = os.open(_PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield 0, length
        return
    try:
        for at in range(0, count, _AT_ONCE):
            wanted = min(_AT_ONCE, count - at)
            entries = os.pread(descriptor, wanted * ENTRY_BYTES, (first + at) * ENTRY_BYTES)
            if len(entries) != wanted * ENTRY_BYTES:
                yield at * mmap.PAGESIZE, length
                return
            for found in _THERE.finditer(entries[_HIGHEST_BYTE::ENTRY_BYTES]):
                begin, end = (at + each for each in found.span())
                yield begin * mmap.PAGESIZE, min(end * mmap.PAGESIZE, length)
    finally:
        os.close(descriptor)
