"""Opens an input: a file, a pipe, standard input, compressed or not; and reads it into a feed.

Of a recording of ``qmigrate tap`` it reads the main channel, forward.

Files are read into a reused window and never mapped: one that shrinks meanwhile is an error, not a signal.
"""

import bz2
import errno
import gzip
import io
import lzma
import os
import select
import stat
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol, TypeVar

from qmigrate.capture.owner import Owner
from qmigrate.capture.places import Places
from qmigrate.errors import NoStreamError, StreamError, StreamErrors, TruncatedError, about_file
from qmigrate.format.feed import Feed
from qmigrate.format.tail import Chooser
from qmigrate.format.vmdesc import Description
from qmigrate.format.walk import Entry, Limits, walk

if TYPE_CHECKING:
    from qmigrate.capture.recording import Recording
    from qmigrate.format.channel import Channel

__all__ = ["Readable", "Reader", "Source", "hole_at"]

T = TypeVar("T")


class Reader(Protocol):
    """Gives the bytes of an input in turn; none where it ends."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...

    def close(self) -> None: ...


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
_ZEROS: Final = memoryview(bytes(1 << 20))
_NO_END: Final = 1 << 63
_RECORDING: Final = b"\x89QTAP\r\n\x1a"
_LONGEST_MAGIC: Final = 8
_HEAD: Final = 1 << 16  # bytes that are read to tell what a channel is; few are needed
_HEAD_PACKED: Final = 1 << 20  # bytes: more than a block of bzip2, whose damage shows at its end
_READ_ERRORS: Final = (EOFError, OSError, ValueError)
_UNPACKED_AT_ONCE: Final = 1 << 14  # bytes: what is unpacked in the same step as a fault is lost with it


class _File(io.RawIOBase):
    """A regular file from ``position`` on.  Each has a place of its own: two walks don't disturb one another."""

    def __init__(self, descriptor: int, position: int) -> None:
        self._descriptor = descriptor
        self.position = position
        self._hole_at = position
        """Before it there are no more holes; where the next one is, if it is one, is looked for there."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._zeros(buffer) or os.preadv(self._descriptor, [buffer], self.position)
        self.position += count
        return count

    def _zeros(self, buffer: Any) -> int:
        """How many zeros of a hole were put there: from the kernel they take memory, and many times as long."""
        if self.position < self._hole_at:
            return 0
        count = min(hole_at(self._descriptor, self.position), len(buffer), len(_ZEROS))
        if count:
            buffer[:count] = _ZEROS[:count]
        else:
            self._hole_at = _sought(self._descriptor, self.position, os.SEEK_HOLE) or _NO_END
        return count

    def skip_hole(self) -> int:
        """Go on behind the hole that begins here, if one does: how many bytes it has."""
        count = hole_at(self._descriptor, self.position)
        self.position += count
        return count


def hole_at(descriptor: int, position: int) -> int:
    """How many bytes the hole has that begins at this place of a file; 0 where none does."""
    end = _sought(descriptor, position, os.SEEK_DATA)
    return 0 if end is None else max(end - position, 0)


def _sought(descriptor: int, position: int, what: int) -> int | None:
    """Where the next data, or hole, begins: the end, if there is none; None where the file system does not tell."""
    try:
        before = os.lseek(descriptor, 0, os.SEEK_CUR)  # of standard input it is not ours alone
        try:
            return os.lseek(descriptor, position, what)
        finally:
            os.lseek(descriptor, before, os.SEEK_SET)
    except OSError as exc:
        return os.fstat(descriptor).st_size if exc.errno == errno.ENXIO else None


class _Pipe(io.RawIOBase):
    """A pipe whose first bytes can be looked at before it is read.  Waits where the pipe itself would not."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw
        self._head = bytearray()

    def peek(self, count: int) -> bytes:
        """The first ``count`` bytes and what came with them, or fewer where the pipe ends."""
        while len(self._head) < count and (got := self._wait_for(part := bytearray(_HEAD))):
            self._head += part[:got]
        return bytes(self._head[:count])

    def look(self, position: int, buffer: Any) -> int:
        """The bytes at ``position``, at most one piece behind what was looked at before; they are read all the same."""
        if position == len(self._head):
            part = bytearray(len(buffer))
            self._head += part[: self._wait_for(part)]
        found = self._head[position : position + len(buffer)]
        buffer[: len(found)] = found
        return len(found)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if not self._head:
            return self._wait_for(buffer)
        count = min(len(buffer), len(self._head))
        buffer[:count] = self._head[:count]
        del self._head[:count]
        return count

    def _wait_for(self, buffer: Any) -> int:
        while (count := self._raw.readinto(buffer)) is None:  # it was made non-blocking
            select.select([self._raw], [], [])
        return count


class _Look(io.RawIOBase):
    """A pipe's first bytes, from the first on; they are read again afterwards."""

    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._pipe.look(self._position, buffer)
        self._position += count
        return count


class _Unpacked:
    """What a compressed input holds.  A fault in it is raised once all that was good before it has been given."""

    def __init__(self, packed: _Packed, errors: tuple[type[Exception], ...]) -> None:
        self._packed = packed
        self._errors = errors
        self._fault: Exception | None = None

    def readinto(self, buffer: memoryview, /) -> int:
        if self._fault is not None:
            raise self._fault
        count = 0
        try:
            while count < len(buffer) and (got := self._packed.readinto1(buffer[count : count + _UNPACKED_AT_ONCE])):
                count += got
        except self._errors as exc:
            if not count:
                raise
            self._fault = exc
        return count

    def close(self) -> None:
        self._packed.close()


class Readable(Owner, ABC):
    """The bytes of one stream, wherever they are."""

    name: str
    compression: str | None = None
    """What is read is packed so, once it is read."""
    read_errors: tuple[type[Exception], ...] = _READ_ERRORS
    can_rewind: bool

    @abstractmethod
    def open_reader(self) -> Reader:
        """Read from the start."""

    def _open_to_look(self) -> Reader:
        """Read from the start, as often as one likes, before any of it is read."""
        return self.open_reader()

    @property
    @abstractmethod
    def places(self) -> Places | None:
        """Where its bytes stand in a file; None where they don't, as they are."""

    def entries(
        self,
        *,
        description: Description | Chooser | None = None,
        page_size: int | None = None,
        limits: Limits | None = None,
    ) -> Iterator[Entry]:
        """Walk the input from its start; a pipe only once.

        Raises what ``walk`` does, and what ``fed`` does.
        """
        feed = Feed()
        try:
            yield from self.fed(walk(feed, description=description, page_size=page_size, limits=limits), feed)
        except NoStreamError as exc:
            from qmigrate.capture.other import no_stream  # most inputs are streams

            better = no_stream(feed)
            if better is None:
                raise
            raise better from exc

    def fed(self, steps: Iterable[T | None], feed: Feed) -> Iterator[T]:
        """What ``steps`` yield, which parse what is in ``feed``; it is filled from the start of the input.

        Where reading fails midway, what was read before is parsed as if it ended there.  Then raises ``StreamError``,
        ``StreamErrors`` where the stream has a fault of its own besides, as mostly that it ends too soon.  And where a
        compressed file has a fault, it is read to its end to see whether it was damaged as it was packed.
        """
        reader = self.open_reader()
        unread: StreamError | None = None
        try:
            for item in steps:
                if item is not None:
                    yield item
                    continue
                try:
                    self.fill(feed, reader)
                except StreamError as exc:
                    unread = exc
                    feed.end()
        except NoStreamError:
            unread = unread or self._fault_behind(feed, reader, most=_HEAD_PACKED)
            if unread is None:
                raise
        except StreamError as exc:
            unread = unread or self._fault_behind(feed, reader)
            if unread is None:
                raise
            both = [unread, exc] if isinstance(exc, TruncatedError) else [exc, unread]
            raise StreamErrors(both) from exc
        if unread is not None:
            raise unread

    def classify(self, blocks: Collection[str] | None = None) -> "Channel":
        """Which channel of a migration it is, by its bytes alone; ``blocks``: the names that main has announced.

        Raises ``StreamError`` where not a byte can be read.
        """
        from qmigrate.format.channel import classify  # most inputs are the only one of their migration

        feed = Feed(window=_HEAD)
        answer, reader = classify(feed, blocks=blocks), self._open_to_look()
        while True:
            try:
                next(answer)
            except StopIteration as end:
                channel: Channel = end.value
                return channel
            try:
                self.fill(feed, reader)
            except StreamError:
                if not len(feed):
                    raise
                feed.end()  # what came before may tell, and the fault is met again when it is read

    def _fault_behind(self, feed: Feed, reader: Reader, *, most: int | None = None) -> StreamError | None:
        """What is wrong with a compressed file behind what is in ``feed``; in as many bytes as are unpacked at most."""
        if self.compression is None or not self.can_rewind:
            return None
        scratch = Feed(offset=feed.offset + len(feed))
        try:
            while not scratch.ended and (most is None or most > 0):
                self.fill(scratch, reader)
                most = None if most is None else most - len(scratch)
                scratch.skip(len(scratch))
        except StreamError as exc:
            return exc
        return None

    def fill(self, feed: Feed, reader: Reader) -> None:
        """Give the feed what comes next, or end it.  Raises ``StreamError`` where reading fails."""
        if feed.takes_holes and not len(feed) and isinstance(reader, _File) and (hole := reader.skip_hole()):
            feed.received_hole(hole)
            return
        try:
            count = reader.readinto(feed.space())
        except self.read_errors as exc:
            raise _unreadable(exc, feed.offset + len(feed), self.compression) from exc
        if count:
            feed.received(count)
        else:
            feed.end()


class Source(Readable):
    """An input and the bytes in it.  It closes what it opened: a path; not standard input.

    Raises ``OSError`` where the input can't be opened or read, which names it; ``NoStreamError`` where it is a
    directory, or a recording whose header is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = "standard input" if os.fspath(path) == "-" else os.fspath(path)
        self._is_stdin = os.fspath(path) == "-"
        try:
            raw = open(0 if self._is_stdin else path, "rb", buffering=0, closefd=not self._is_stdin)  # noqa: SIM115 - closed by close(); a Path has no descriptor
        except IsADirectoryError:
            raise NoStreamError("a directory, expected a migration stream") from None
        except OSError as exc:
            if exc.filename is None:  # standard input is closed
                exc.filename = self.name
            raise
        status = os.fstat(raw.fileno())
        self._file = raw
        is_device = stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)
        self.identity = None if is_device else (status.st_dev, status.st_ino)
        """By which two inputs are known to be one; None of a device, /dev/null above all."""
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else None
        """Of a regular file, in bytes, as it is stored; else None."""
        self.can_rewind = raw.seekable() and stat.S_ISREG(status.st_mode)
        self._start = raw.tell() if self.can_rewind else 0
        self._used = False
        self._pipe: _Pipe | None = None
        self._latest: _File | None = None
        self.recording: Recording | None = None
        """Where it is one of ``qmigrate tap``: main is what is read here, forward; all the rest is in it."""
        try:
            self.recording = self._recording()
        except BaseException:
            self.close()
            raise

    def _recording(self) -> "Recording | None":
        if not self.can_rewind:
            return None
        with about_file(self.name):
            if os.pread(self._file.fileno(), _LONGEST_MAGIC, 0) != _RECORDING:
                return None
        from qmigrate.capture.recording import Recording  # few inputs are one

        return Recording(f"/proc/self/fd/{self._file.fileno()}", name=self.name).read()

    def close(self) -> None:
        """Close the file, unless it is standard input."""
        if self.recording is not None:
            self.recording.close()
        self._file.close()

    @property
    def descriptor(self) -> int:
        """Of the file, as long as it is open."""
        return self._file.fileno()

    @property
    def position(self) -> int | None:
        """How many bytes of the file the latest walk has read, as it is stored; None of a pipe."""
        if not self.can_rewind or self.recording is not None:
            return None
        return 0 if self._latest is None else self._latest.position - self._start

    @property
    def in_place(self) -> tuple[int, int] | None:
        """Its descriptor and where in it the stream begins; None where its bytes stand in no file as they are."""
        if not self.can_rewind or self.recording is not None:
            return None
        self.open_reader()  # finds out whether it is packed
        return None if self.compression is not None else (self._file.fileno(), self._start)

    @property
    def places(self) -> Places | None:
        found = self.in_place
        return None if found is None else Places(*found)

    def open_reader(self) -> Reader:
        if self.recording is not None:
            return self.recording.main().open_reader()
        if self._used and not self.can_rewind:
            raise NoStreamError("no regular file, so it can be read only once")
        self._used = True
        return self._open()

    def _open_to_look(self) -> Reader:
        if self.can_rewind:
            return self.open_reader()
        if self._used:
            raise NoStreamError("a pipe can be looked at only before it is read")
        return self._open(to_look=True)

    def _open(self, *, to_look: bool = False) -> Reader:
        try:
            if self.can_rewind:
                file: Reader
                file = self._latest = _File(self._file.fileno(), self._start)
                head = os.pread(self._file.fileno(), _LONGEST_MAGIC, self._start)
            else:
                pipe = self._pipe = self._pipe or _Pipe(self._file)
                head = pipe.peek(_LONGEST_MAGIC)
                file = _Look(pipe) if to_look else pipe
        except OSError as exc:
            raise _unreadable(exc, 0) from exc
        if head.startswith(_RECORDING):
            raise NoStreamError("a recording of qmigrate tap can't be read from a pipe: give its file")
        for magic, opener in _COMPRESSIONS:
            if head.startswith(magic):
                packed, error = opener(file)
                self.compression = opener.__name__.removeprefix("_")
                self.read_errors = (*_READ_ERRORS, error)
                return _Unpacked(packed, self.read_errors)
        return file


def _unreadable(exc: Exception, offset: int, compression: str | None = None) -> StreamError:
    if isinstance(exc, OSError) and exc.strerror:  # the system's
        reason = exc.strerror
    else:
        reason = f"{compression}: {exc}" if compression else str(exc)
    return StreamError(f"the input can't be read on: {reason}", offset=offset)
