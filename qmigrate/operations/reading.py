"""How a saved guest's index comes to be at hand: one that was kept, or one that a process of its own makes.

Of its own, for to read a whole file is much work, which neither the start of all else nor an answer to a page request
shall wait for; and memory that takes is gone afterwards.  It is started first of all, before what takes long to import
here: so this module needs little.
"""

import os
import stat
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from qmigrate.endpoint.own_python import environment, own_python
from qmigrate.errors import RefusedError

if TYPE_CHECKING:
    from qmigrate.capture.saved_guest import Saved

__all__ = ["Reading"]

_ANSWER_BYTES: Final = 1 << 16
_KILL: Final = 9  # to import `signal` takes longer than all else here
_OF_TERMINALS: Final = (1, 2)  # SIGHUP, SIGINT
_KEPT_NOWHERE: Final = "-"  # as `indexing` has it


class Reading:
    """A file being read.  It is opened at once (raises ``OSError``), and what is started ends with ``close()``.

    ``keep``: an index that was kept will do, and a new one is kept; in ``folder``, None for the user's cache.
    ``is_kept``: there was one.
    """

    def __init__(
        self,
        path: str,
        *,
        channels: tuple[str, ...] = (),
        keep: bool = True,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = path
        self.is_kept = False
        self._channels = channels
        self._folder = None if folder is None else os.fspath(folder)
        self._keeps = keep and not channels
        self._process: int | None = None
        self._is_made = False
        self._files: list[int] = []
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._status = os.fstat(self._file)
        try:
            for each in channels:
                os.stat(each)  # noqa: PTH116 - not there is told here, before anything is begun
            if not self._is_likely_kept():
                self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def takes(path: str) -> bool:
        """Can it be read here?  A pipe can't: it is read once."""
        try:
            return path != "-" and stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116 - a name of any kind
        except OSError:
            return True  # and then to open it tells why

    def close(self) -> None:
        """End it, whatever it is at.  What was given out stays open."""
        if self._process is not None:
            self._end()
        for descriptor in (self._file, *self._files):
            if descriptor >= 0:
                os.close(descriptor)
        self._file, self._files = -1, []

    def _end(self) -> None:
        assert self._process is not None
        if not self._is_made:  # else it has only to keep a copy, or has ended
            os.kill(self._process, _KILL)
        os.waitpid(self._process, 0)
        self._process = None

    # -- making it

    def _is_likely_kept(self) -> bool:
        """By its name and times alone: to read it takes what is not imported yet."""
        if not self._keeps:
            return False
        from qmigrate.capture.cache import cache_folder

        status = self._status
        folder = str(cache_folder("indexes")) if self._folder is None else self._folder
        try:
            kept = os.lstat(f"{folder}/{status.st_dev:x}-{status.st_ino:x}.index")
        except OSError:
            return False
        return kept.st_mtime_ns >= status.st_ctime_ns

    def _start(self) -> None:
        """Start the process that makes it."""
        import tempfile

        index = os.memfd_create("index")
        spill, name = tempfile.mkstemp(prefix="qmigrate-")
        os.unlink(name)  # noqa: PTH108 - at once: it needs no name
        answer, theirs = os.pipe2(os.O_CLOEXEC)
        self._files = [index, spill, answer]
        shared = (index, spill, theirs)
        folder = (self._folder or "") if self._keeps else _KEPT_NOWHERE
        command = own_python("qmigrate.operations.indexing", *map(str, shared), folder, self.path)
        try:
            for descriptor in shared:
                os.set_inheritable(descriptor, True)
            # What our terminal says is for us: when we want no index any more we end what makes it.
            self._process = os.posix_spawn(
                command[0], [*command, *self._channels], environment(), setsigmask=_OF_TERMINALS
            )
        finally:
            for descriptor in shared:
                os.set_inheritable(descriptor, False)
            os.close(theirs)

    # -- having it

    async def saved(self) -> "Saved":
        """The guest, whose input is open as long as it is.  Raises ``RefusedError``."""
        import asyncio

        if self._process is None:
            saved = await asyncio.to_thread(self._kept)
            if saved is not None:
                self.is_kept = True
                return saved
            self._start()
        await self._answered()
        return await asyncio.to_thread(self._made)

    def _kept(self) -> "Saved | None":
        from qmigrate.capture.kept import KeptError, KeptIndexes

        try:
            saved = KeptIndexes(self._folder).read(self._file)
        except KeptError:
            return None
        return self._owned(saved)

    def _owned(self, saved: "Saved") -> "Saved":
        saved.input, self._file = self._file, -1
        return saved

    async def _answered(self) -> None:
        import asyncio

        loop, answer = asyncio.get_running_loop(), self._files[2]
        ready = asyncio.Event()
        loop.add_reader(answer, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(answer)

    def _made(self) -> "Saved":
        import json

        from qmigrate.capture.kept import KeptError, Stamp, read_kept

        index, spill, answer = self._files
        said = os.read(answer, _ANSWER_BYTES)
        if not said:
            raise RefusedError(f"{self.path}: its index can't be made: {self._why()}")
        self._is_made = True
        if (error := json.loads(said).get("error")) is not None:
            raise RefusedError(f"{self.path}: {error}")
        try:
            return self._owned(read_kept(index, Stamp.of_status(self._status), self._file, spill=spill))
        except KeptError as exc:
            raise RefusedError(f"{self.path}: its index can't be used: {exc}") from exc

    def _why(self) -> str:
        """How the process ended, which has said nothing."""
        assert self._process is not None
        _, status = os.waitpid(self._process, 0)
        self._process = None
        code = os.waitstatus_to_exitcode(status)
        return f"what makes it was killed by signal {-code}" if code < 0 else f"what makes it ended with {code}"
