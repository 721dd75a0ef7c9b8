"""Opens an input: a file, a pipe, standard input, compressed or not.

Of a recording of ``qmigrate tap`` it reads the main channel, forward.
"""

import os
import stat
from typing import TYPE_CHECKING, Final

from qmigrate.capture.packed import unpack
from qmigrate.capture.places import Places
from qmigrate.capture.readable import READ_ERRORS, Readable, unreadable
from qmigrate.capture.readers import FileReader, Look, Pipe, Reader
from qmigrate.errors import NoStreamError, about_file

if TYPE_CHECKING:
    from qmigrate.capture.recording import Recording

__all__ = ["Source"]

_RECORDING: Final = b"\x89QTAP\r\n\x1a"
_LONGEST_MAGIC: Final = 8


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
        self._pipe: Pipe | None = None
        self._latest: FileReader | None = None
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
                file = self._latest = FileReader(self._file.fileno(), self._start)
                head = os.pread(self._file.fileno(), _LONGEST_MAGIC, self._start)
            else:
                pipe = self._pipe = self._pipe or Pipe(self._file)
                head = pipe.peek(_LONGEST_MAGIC)
                file = Look(pipe) if to_look else pipe
        except OSError as exc:
            raise unreadable(exc, 0) from exc
        if head.startswith(_RECORDING):
            raise NoStreamError("a recording of qmigrate tap can't be read from a pipe: give its file")
        packed = unpack(head, file, READ_ERRORS)
        if packed is None:
            return file
        self.compression, self.read_errors = packed.compression, packed.errors
        return packed
