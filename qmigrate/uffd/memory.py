"""Guest memory: a memfd for each block, which several processes map.

``touch`` is the one function that reads or writes memory that may not be there yet.  It lets the GIL go: a plain
``mapping[0]`` would hold it while the kernel waits for another thread of ours, for ever.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from qmigrate.uffd.userfault import UserfaultError

__all__ = ["BlockMemory", "GuestMemory", "address_of", "discard", "touch"]

HOST_PAGE: Final = mmap.PAGESIZE
_MFD_HUGE_SHIFT: Final = 26  # linux/memfd.h: the size's logarithm stands in the flags
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 0x01, 0x02  # linux/falloc.h
_LONGEST_NAME: Final = 200  # memfd_create takes 249 bytes


@dataclass(frozen=True)
class BlockMemory:
    """One block: ``length`` and ``page_size`` in bytes, ``address`` where this process has it."""

    length: int
    page_size: int
    descriptor: int
    mapping: mmap.mmap
    address: int

    @classmethod
    def create(cls, name: str, length: int, page_size: int) -> Self:
        """A new one, empty, as sparse as can be.  Raises ``UserfaultError`` where this host can't have it."""
        try:
            descriptor = os.memfd_create(_memfd_name(name), os.MFD_CLOEXEC | _huge_flags(page_size))
        except OSError as exc:
            raise UserfaultError(f"{name}: pages of {page_size} bytes can't be had here: {exc.strerror}") from exc
        try:
            os.ftruncate(descriptor, _whole_pages(length, page_size))
            return cls.open(descriptor, length, page_size)
        except (OSError, OverflowError, ValueError, UserfaultError) as exc:
            os.close(descriptor)
            raise UserfaultError(f"{name}: {_why_not(length, page_size, exc)}") from exc

    @classmethod
    def open(cls, descriptor: int, length: int, page_size: int) -> Self:
        """One that another process made; ``descriptor`` is ours from now on."""
        mapped = _whole_pages(length, page_size)
        mapping = mmap.mmap(descriptor, mapped, mmap.MAP_SHARED)
        return cls(length, page_size, descriptor, mapping, address_of(mapping))

    @property
    def mapped_length(self) -> int:
        return len(self.mapping)

    @property
    def is_huge(self) -> bool:
        return self.page_size > HOST_PAGE and self.page_size % (1 << 20) == 0

    def close(self) -> None:
        """The mapping goes with its last user."""
        os.close(self.descriptor)


class GuestMemory:
    """All blocks of a guest, in order.  Leaving it closes the descriptors."""

    def __init__(self, blocks: Sequence[BlockMemory]) -> None:
        self.blocks = tuple(blocks)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for block in self.blocks:
            block.close()


def address_of(buffer: mmap.mmap | bytearray) -> int:
    """Where a writable buffer lies in this process.  It holds as long as the buffer is not resized."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def touch(address: int, scratch: int, length: int, *, write: bool = False) -> None:
    """Read ``length`` bytes of guest memory into ``scratch``, or write them from there; both are addresses.

    Sleeps, without the GIL, until the page is there.
    """
    if write:
        ctypes.memmove(address, scratch, length)
    else:
        ctypes.memmove(scratch, address, length)


def discard(descriptor: int, start: int, length: int) -> None:
    """Give these pages of a memfd up: whoever touches them faults again.  In bytes, whole pages.

    On shared memory MADV_DONTNEED frees nothing; a hole does, by whichever process.  Raises ``OSError``.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    mode = ctypes.c_int(_FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE)
    if libc.fallocate(ctypes.c_int(descriptor), mode, ctypes.c_int64(start), ctypes.c_int64(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _memfd_name(name: str) -> str:
    """Only for /proc: names are hostile, and a NUL would end it."""
    return ascii(name).strip("'\"")[:_LONGEST_NAME]


def _huge_flags(page_size: int) -> int:
    if page_size <= HOST_PAGE or page_size < 1 << 20:
        return 0
    return os.MFD_HUGETLB | (page_size.bit_length() - 1) << _MFD_HUGE_SHIFT


def _whole_pages(length: int, page_size: int) -> int:
    unit = max(page_size, HOST_PAGE)
    return -(-length // unit) * unit


def _why_not(length: int, page_size: int, exc: Exception) -> str:
    reason = getattr(exc, "strerror", None) or str(exc)
    if _huge_flags(page_size):
        count, kibibytes = -(-length // page_size), page_size >> 10
        return (
            f"{count} huge pages of {kibibytes} KiB are not free on this host ({reason}): the source has this block "
            f"on such pages; write {count} or more to /sys/kernel/mm/hugepages/hugepages-{kibibytes}kB/nr_hugepages"
        )
    return f"{length} bytes of memory can't be had: {reason}"
