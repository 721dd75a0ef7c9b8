"""Give the bytes of an input in turn: a regular file, whose holes are not read, and a pipe that can be looked at first.

Files are read into a reused window and never mapped: one that shrinks meanwhile is an error, not a signal.
"""

import errno
import io
import os
import select
from typing import Any, Final, Protocol

__all__ = ["FileReader", "Look", "Pipe", "Reader"]

_ZEROS: Final = memoryview(bytes(1 << 20))
_NO_END: Final = 1 << 63
_BLOCK: Final = 512  # bytes, of st_blocks
_PIECE: Final = 1 << 16  # of a pipe that is looked at


class Reader(Protocol):
    """Gives the bytes of an input in turn; none where it ends."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...

    def close(self) -> None: ...


class FileReader(io.RawIOBase):
    """A regular file from ``position`` on.  Each has a place of its own: two walks don't disturb one another."""

    def __init__(self, descriptor: int, position: int) -> None:
        self._descriptor = descriptor
        self.position = position
        self._hole_at = position
        """Before it there are no more holes; where the next one is, if it is one, is looked for there."""
        self._seeker = _open_again(descriptor)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """The file itself stays open."""
        if not self.closed and self._seeker is not None:
            os.close(self._seeker)
        super().close()

    def readinto(self, buffer: Any, /) -> int:
        count = self._zeros(buffer) or os.preadv(self._descriptor, [buffer], self.position)
        self.position += count
        return count

    def _zeros(self, buffer: Any) -> int:
        """How many zeros of a hole were put there: from the kernel they take memory, and many times as long."""
        if self._seeker is None or self.position < self._hole_at:
            return 0
        count = min(self._hole(), len(buffer), len(_ZEROS))
        if count:
            buffer[:count] = _ZEROS[:count]
        else:
            self._hole_at = self._sought(os.SEEK_HOLE) or _NO_END
        return count

    def skip_hole(self) -> int:
        """Go on behind the hole that begins here, if one does: how many bytes it has."""
        count = self._hole()
        self.position += count
        return count

    def _hole(self) -> int:
        end = self._sought(os.SEEK_DATA)
        return 0 if end is None else max(end - self.position, 0)

    def _sought(self, what: int) -> int | None:
        """Where the next data, or hole, begins: the end, if there is none; None where that can't be told."""
        if self._seeker is None:
            return None
        try:
            size = os.fstat(self._seeker).st_size  # asked first: what comes meanwhile is no hole
            return os.lseek(self._seeker, self.position, what)
        except OSError as exc:
            return size if exc.errno == errno.ENXIO else None


def _open_again(descriptor: int) -> int | None:
    """A file that has holes, to look for them: who reads or writes it through this descriptor goes by its position."""
    status = os.fstat(descriptor)
    if status.st_blocks * _BLOCK >= status.st_size:
        return None
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # the file is not ours any more: its holes are read
        return None


class Pipe(io.RawIOBase):
    """A pipe whose first bytes can be looked at before it is read.  Waits where the pipe itself would not."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw
        self._head = bytearray()

    def peek(self, count: int) -> bytes:
        """The first ``count`` bytes and what came with them, or fewer where the pipe ends."""
        while len(self._head) < count and (got := self._wait_for(part := bytearray(_PIECE))):
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


class Look(io.RawIOBase):
    """A pipe's first bytes, from the first on; they are read again afterwards."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._pipe.look(self._position, buffer)
        self._position += count
        return count
