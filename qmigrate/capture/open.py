"""Opens an input: a file, a pipe, standard input, compressed or not; and reads it into a feed.

Files are read into a reused window and never mapped: one that shrinks meanwhile is an error, not a signal.
"""

import bz2
import gzip
import lzma
import os
import stat
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, BinaryIO, Final, Protocol, Self

from qmigrate.errors import NoStreamError, StreamError
from qmigrate.format.feed import Feed
from qmigrate.format.vmdesc import Description
from qmigrate.format.walk import Entry, Limits, walk

__all__ = ["Source"]


class _Reader(Protocol):
    def readinto(self, buffer: memoryview, /) -> int | None: ...

    def close(self) -> None: ...


def _zstd(file: BinaryIO) -> _Reader:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise NoStreamError("compressed with zstd, which this Python can't read: pip install backports.zstd") from None
    return zstd.open(file)


# The first bytes, and who reads it.
_COMPRESSIONS: Final[tuple[tuple[bytes, Callable[[Any], Any]], ...]] = (
    (b"\x1f\x8b\x08", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\x00", lzma.open),
    (b"\x28\xb5\x2f\xfd", _zstd),
)
_COMPRESSION_ERRORS: Final = (EOFError, lzma.LZMAError, gzip.BadGzipFile, OSError, ValueError)


class Source:
    """An input and the bytes in it.  It closes what it opened: a path; not standard input.

    Raises ``OSError`` where the input can't be opened, ``NoStreamError`` where it is a directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = "standard input" if os.fspath(path) == "-" else os.fspath(path)
        self._is_stdin = os.fspath(path) == "-"
        raw = open(0 if self._is_stdin else path, "rb", buffering=0, closefd=not self._is_stdin)  # noqa: SIM115 - closed by close(); a Path has no descriptor
        status = os.fstat(raw.fileno())
        if stat.S_ISDIR(status.st_mode):
            raw.close()
            raise NoStreamError("a directory, expected a migration stream")
        self._file = raw
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else None
        """Of a regular file, in bytes, as it is stored; else None."""
        self.can_rewind = raw.seekable() and stat.S_ISREG(status.st_mode)
        self._start = raw.tell() if self.can_rewind else 0
        self._first = b""
        self._used = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, unless it is standard input."""
        self._file.close()

    @property
    def position(self) -> int | None:
        """How many bytes of the file were read so far, as it is stored; None of a pipe."""
        return self._file.tell() - self._start if self.can_rewind else None

    def entries(
        self,
        *,
        description: Description | None = None,
        page_size: int | None = None,
        limits: Limits | None = None,
    ) -> Iterator[Entry]:
        """Walk the input from its start; a pipe only once.

        Raises what ``walk`` does; ``StreamError`` too where reading fails midway.
        """
        reader = self._open()
        feed = Feed()
        for entry in walk(feed, description=description, page_size=page_size, limits=limits):
            if entry is None:
                self._fill(feed, reader)
            else:
                yield entry

    def _open(self) -> _Reader:
        if self._used:
            if not self.can_rewind:
                raise NoStreamError("a pipe can be read only once")
            self._file.seek(self._start)
        self._used = True
        if not self.can_rewind:
            return self._file
        head = os.pread(self._file.fileno(), 8, self._start)
        for magic, opener in _COMPRESSIONS:
            if head.startswith(magic):
                reader: _Reader = opener(self._file)
                return reader
        return self._file

    def _fill(self, feed: Feed, reader: _Reader) -> None:
        try:
            count = reader.readinto(feed.space())
        except _COMPRESSION_ERRORS as exc:
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
            raise StreamError(f"the input can't be read on: {reason}", offset=feed.offset + len(feed)) from exc
        if count:
            feed.received(count)
        else:
            feed.end()
