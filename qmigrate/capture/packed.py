"""Unpacks a compressed input: gzip, bzip2, xz, zstd."""

import bz2
import gzip
import lzma
import sys
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, Final, Protocol

from qmigrate.capture.readers import Reader
from qmigrate.errors import NoStreamError

__all__ = ["Unpacked", "unpack"]

_AT_ONCE: Final = 1 << 14  # bytes: what is unpacked in the same step as a fault is lost with it


class _Packed(Protocol):
    """What unpacks, of the standard library; ``readinto1()`` gives what one step of it makes."""

    def readinto1(self, buffer: memoryview, /) -> int: ...

    def close(self) -> None: ...


def _zstd(file: BinaryIO) -> tuple[_Packed, type[Exception]]:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise NoStreamError("compressed with zstd, which this Python can't read: pip install backports.zstd") from None
    return zstd.open(file), zstd.ZstdError


def _gzip(file: BinaryIO) -> tuple[_Packed, type[Exception]]:
    return gzip.GzipFile(fileobj=file), zlib.error


def _bz2(file: BinaryIO) -> tuple[_Packed, type[Exception]]:
    return bz2.BZ2File(file), OSError


def _xz(file: BinaryIO) -> tuple[_Packed, type[Exception]]:
    return lzma.LZMAFile(file), lzma.LZMAError


# The first bytes; who reads it, and what that raises where the rest is damaged, apart from the usual.
_COMPRESSIONS: Final[tuple[tuple[bytes, Callable[[Any], tuple[_Packed, type[Exception]]]], ...]] = (
    (b"\x1f\x8b\x08", _gzip),
    (b"BZh", _bz2),
    (b"\xfd7zXZ\x00", _xz),
    (b"\x28\xb5\x2f\xfd", _zstd),
)


class Unpacked:
    """What a compressed input holds.  A fault in it is raised once all that was good before it has been given.

    ``errors``: what reading it raises where it is damaged.
    """

    def __init__(self, packed: _Packed, compression: str, errors: tuple[type[Exception], ...]) -> None:
        self.compression = compression
        self.errors = errors
        self._packed = packed
        self._fault: Exception | None = None

    def readinto(self, buffer: memoryview, /) -> int:
        if self._fault is not None:
            raise self._fault
        count = 0
        try:
            while count < len(buffer) and (got := self._packed.readinto1(buffer[count : count + _AT_ONCE])):
                count += got
        except self.errors as exc:
            if not count:
                raise
            self._fault = exc
        return count

    def close(self) -> None:
        self._packed.close()


def unpack(head: bytes, file: Reader, errors: tuple[type[Exception], ...]) -> Unpacked | None:
    """What is in ``file``, which begins with ``head``, if it is compressed; ``errors``: what reading it may raise.

    Raises ``NoStreamError`` where it is packed with what this Python can't read.
    """
    for magic, opener in _COMPRESSIONS:
        if head.startswith(magic):
            packed, error = opener(file)
            return Unpacked(packed, opener.__name__.removeprefix("_"), (*errors, error))
    return None
