"""Writes a recording while it happens.  Its layout is declared in ``frames``.

A recorder never raises for a file that can't be written on: what it records goes on without it.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from qmigrate.capture.frames import (
    HEADER,
    LONGEST_PIECE,
    MOST_CONNECTIONS,
    Closed,
    Direction,
    End,
    Opened,
    Stopped,
    build_frame,
    build_header,
    data_header,
)
from qmigrate.capture.owner import Owner
from qmigrate.errors import RefusedError
from qmigrate.format._record import Record

__all__ = ["Recorder"]

_LONGEST_TEXT: Final = 255  # bytes
_MOST_UNASKED: Final = 1 << 30  # bytes of the disk that are set aside where nobody says how many
_TMPFS: Final = 0x01021994  # TMPFS_MAGIC of linux/magic.h
_MARK: Final = 4  # bytes, the first of a frame
_KEEP_SIZE: Final = 1  # FALLOC_FL_KEEP_SIZE, which os.posix_fallocate() lacks
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_fstatfs = ctypes.CDLL(None, use_errno=True).fstatfs
_fstatfs.argtypes = [ctypes.c_int, ctypes.c_char_p]


class Recorder(Owner):
    """Appends to a new file, from any thread.  Closes the file, which it opened.

    Each call has written what it was given when it returns; it was handed to the system, which keeps it when this
    process is killed.  Where that fails (a full disk) the frame at hand is taken back, ``stopped`` says why, all
    further calls do nothing, and ``on_stop`` is called once, in the thread that met it.
    ``reserve`` bytes of the disk are set aside at once: what goes there can't meet a full disk, and costs less; None
    is as much as does nobody harm, at most 1 GiB, and nothing where that can't be had.  On a tmpfs what is set aside is
    mapped, and what is recorded is copied into it, at half the cost of the file system's own way; the file is then as
    long as that until it is closed, with zeros behind what was recorded.
    With ``overwrite`` a file that is there stays as it was until ``begin()``, or until the first connection is told of.
    Raises ``OSError`` where the file can't be made, ``RefusedError`` where it is there and not empty, unless
    ``overwrite``, or is no regular file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        reserve: int | None = 0,
        on_stop: Callable[[OSError], None] | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.stopped: OSError | None = None
        self.is_gone = False
        """Once it is closed: had somebody deleted the file, and what was recorded with it?"""
        self._reserve = reserve
        self._begun = False
        self._on_stop = on_stop
        self._lock = threading.Lock()
        self._position = 0
        self._splices = True
        self._mapping: mmap.mmap | None = None
        is_new = not os.path.lexists(path)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._had_name = os.fstat(self._descriptor).st_nlink > 0  # a memfd has none
        try:
            if not self._has_content(overwrite=overwrite):
                self.begin()
        except BaseException:
            if self._begun:  # else it may be another's who was a moment sooner
                with suppress(OSError):
                    Path(path).unlink() if is_new else os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            raise

    def _has_content(self, *, overwrite: bool) -> bool:
        """Is there something that ``begin()`` will replace?  Raises ``RefusedError`` where it may not."""
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise RefusedError(f"{self.path} is no regular file: a recording is read by offsets")
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # who follows sees that we live
        except BlockingIOError:
            raise RefusedError(f"{self.path} is being written by another tap") from None
        has_content = os.fstat(self._descriptor).st_size > 0
        if has_content and not overwrite:
            raise RefusedError(f"{self.path} is there already; --overwrite replaces it")
        return has_content

    def begin(self) -> None:
        """What was there before is lost from here on; once is enough.  Raises ``OSError``, which names the file."""
        if self._begun:
            return
        self._begun = True
        try:
            os.ftruncate(self._descriptor, 0)
            self._write(build_header(**_now()))
            if self._reserve is None:
                with suppress(OSError):
                    _reserve(self._descriptor, _harmless(self._descriptor))
            elif self._reserve:
                _reserve(self._descriptor, self._reserve)
            self._map()
        except OSError as exc:
            exc.filename = self.path
            raise

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return self._position

    @property
    def is_empty(self) -> bool:
        """Did it begin, and is there nothing in it yet?"""
        return self._begun and self._position <= HEADER.size

    def opened(self, connection: int, *, peer: str, listen: str, forward: str) -> None:
        """A connection was made, the next number.  Raises ``OSError`` where ``begin()`` was not called, and fails."""
        self.begin()
        if connection >= MOST_CONNECTIONS:
            self._attempt(_refuse_connection)
        self._frame(Opened(peer=_short(peer), listen=_short(listen), forward=_short(forward)), connection)

    def closed(self, connection: int, *, forward_bytes: int, return_bytes: int, error: str = "") -> None:
        """Both its sides are closed."""
        self._frame(Closed(forward_bytes=forward_bytes, return_bytes=return_bytes, error=_short(error)), connection)

    def data(self, connection: int, direction: Direction, data: bytes | memoryview) -> None:
        """Bytes that came, at most ``LONGEST_PIECE``."""
        self._attempt(lambda: self._put(data_header(connection, direction, len(data), **_now()) + bytes(data)))

    @property
    def has_room(self) -> bool:
        """Is there any for ``data_by()``?  Once there is none, there never is again."""
        return self._mapping is not None

    def data_by(self, connection: int, direction: Direction, fill: Callable[[memoryview], int]) -> int:
        """Bytes that ``fill(room)`` writes where they will stay, from the front of the room for a piece; how many.

        0 where it wrote none, or was not called as there is no room, and ``has_room`` is False.  Its ``OSError`` is
        raised, and nothing recorded.  It must not wait: nobody else records meanwhile.
        """
        count = 0
        failed: OSError | None = None

        def write() -> None:
            nonlocal count, failed
            if not self._fits(HEADER.size + LONGEST_PIECE):
                return
            assert self._mapping is not None
            begin = self._position + HEADER.size
            with memoryview(self._mapping) as whole, whole[begin : begin + LONGEST_PIECE] as room:
                try:
                    count = fill(room)
                except OSError as exc:
                    if exc.errno == errno.EFAULT:  # the file's: somebody made it shorter
                        raise
                    failed = exc
            if count:
                self._seal(data_header(connection, direction, count, **_now()), count)

        self._attempt(write)
        if failed is not None:
            raise failed
        return count

    def data_from(self, connection: int, direction: Direction, pipe: int, count: int) -> None:
        """``count`` bytes that are in ``pipe``, taken out of it inside the kernel.  Some stay where it fails.

        It writes behind all that was set aside and mapped: ``has_room`` is False from here on.
        """

        def move() -> None:
            self._unmap()
            self._write(data_header(connection, direction, count, **_now()))
            left = count
            while left:
                left -= self._splice(pipe, left)

        self._attempt(move)

    def close(self) -> None:
        """End in good order, and close the file.  Where it never began, one that was there is left as it was."""
        if self._descriptor < 0:
            return
        if self._begun:
            self._end()
            self.is_gone = self._had_name and not os.fstat(self._descriptor).st_nlink
        os.close(self._descriptor)
        self._descriptor = -1

    # -- inside

    def _end(self) -> None:
        self._frame(End(), 0)
        if self.stopped is not None:
            with suppress(OSError):
                self._write(build_frame(End(), connection=0, **_now()))
        self._unmap()
        with suppress(OSError):
            os.ftruncate(self._descriptor, self._position)  # what was reserved and not used is given back

    def _frame(self, body: Record, connection: int) -> None:
        self._attempt(lambda: self._put(build_frame(body, connection=connection, **_now())))

    def _attempt(self, write: Callable[[], None]) -> None:
        """Write a frame whole, or, where that fails, none, and stop."""
        with self._lock:
            if self.stopped is not None or self._descriptor < 0:
                return
            begin = self._position
            try:
                write()
                return
            except OSError as exc:
                self.stopped = exc
                self._take_back(begin, exc)
        if self._on_stop is not None:
            self._on_stop(self.stopped)

    def _take_back(self, begin: int, exc: OSError) -> None:
        """What is half written would be no harm, but where it stood there is room to say why it stops."""
        self._position = begin
        with suppress(OSError):
            self._unmap()
            os.ftruncate(self._descriptor, begin)
            self._write(build_frame(Stopped(reason=_short(exc.strerror or str(exc))), connection=0, **_now()))

    # The part that is mapped is as long already as it will be, so its length does not tell how much was written:
    # a frame's mark, which is zero till then, is what is written last.

    def _map(self) -> None:
        """Map what was set aside, where that is a tmpfs: elsewhere the first touch of a page is what costs."""
        length = os.fstat(self._descriptor).st_blocks * 512 // mmap.PAGESIZE * mmap.PAGESIZE
        if length <= mmap.PAGESIZE or not _is_tmpfs(self._descriptor):
            return
        try:
            os.ftruncate(self._descriptor, length)
            self._mapping = mmap.mmap(self._descriptor, length, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError:
            os.ftruncate(self._descriptor, self._position)

    def _unmap(self) -> None:
        """From here on the file grows."""
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
            os.ftruncate(self._descriptor, self._position)

    def _fits(self, length: int) -> bool:
        """May a frame so long be written into the part that is mapped?  The first that does not fit ends it."""
        if self._mapping is None:
            return False
        if self._position + length > len(self._mapping):
            self._unmap()
            return False
        return True

    def _seal(self, front: bytes, rest_bytes: int) -> None:
        """The front of a frame into the mapped part, behind which the rest of it is already."""
        _write_at(self._descriptor, front[_MARK:], self._position + _MARK)
        _write_at(self._descriptor, front[:_MARK], self._position)
        self._position += len(front) + rest_bytes

    def _put(self, frame: bytes) -> None:
        """Write a frame whole."""
        if self._fits(len(frame)):
            self._seal(frame, 0)
        else:
            self._write(frame)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._descriptor, view, self._position)
            self._position += count
            view = view[count:]

    def _splice(self, pipe: int, count: int) -> int:
        """Move bytes on; by hand where the file system can't."""
        if self._splices:
            try:
                moved = os.splice(pipe, self._descriptor, count, offset_dst=self._position)
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    raise
                self._splices = False
            else:
                self._position += moved
                return moved
        part = os.read(pipe, count)
        self._write(part)
        return len(part)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _is_tmpfs(descriptor: int) -> bool:
    answer = ctypes.create_string_buffer(256)  # struct statfs, which begins with the type: a long, as most have it
    if _fstatfs(descriptor, answer):
        return False
    kind = int.from_bytes(answer.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)
    return kind == _TMPFS


def _harmless(descriptor: int) -> int:
    """So many bytes nobody will miss: an eighth of what is free."""
    disk = os.fstatvfs(descriptor)
    return max(1, min(_MOST_UNASKED, disk.f_bavail * disk.f_frsize // 8))


def _reserve(descriptor: int, length: int) -> None:
    """Have the file system set room aside; the file's size, by which it is read, stays.  Raises ``OSError``."""
    if _fallocate(descriptor, _KEEP_SIZE, 0, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _refuse_connection() -> None:
    """Nobody reads more.  Raises ``OSError``."""
    raise OSError(errno.EOVERFLOW, f"a recording has at most {MOST_CONNECTIONS} connections")


def _now() -> dict[str, int]:
    return {"monotonic_ns": time.monotonic_ns(), "time_ns": time.time_ns()}


def _short(text: str) -> str:
    """As much as a counted string holds."""
    return text.encode("utf-8", "surrogateescape")[:_LONGEST_TEXT].decode("utf-8", "surrogateescape")
