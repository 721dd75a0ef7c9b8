"""Give the bytes of an input in turn: a regular file, whose holes are not read, and a pipe that can be looked at first.

Files are read into a reused window and never mapped: one that shrinks meanwhile is an error, not a signal.
"""

import errno
import io
import os
import select
from typing import Any, Final, Protocol

__all__ = ["FileReader", "Look", "Pipe", "Reader", "hole_at"]

_ZEROS: Final = memoryview(bytes(1 << 20))
_NO_END: Final = 1 << 63
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
