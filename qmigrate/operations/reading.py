"""How a saved guest's index comes to be at hand: one that was kept, or one that a process of its own makes.

Of its own, for to read a whole file is much work, which neither the start of all else nor an answer to a page request
shall wait for; and memory that takes is gone afterwards.  It is started first of all, before what takes long to import
here: so this module needs little.
"""

import os
import stat
from typing import TYPE_CHECKING, Final

from qmigrate.capture.owner import Owner
from qmigrate.endpoint.own_python import environment, own_python
from qmigrate.errors import RefusedError

if TYPE_CHECKING:
    from qmigrate.capture.arriving import ArrivingPages
    from qmigrate.capture.saved_guest import SavedGuest

__all__ = ["Reading"]

_ANSWER_BYTES: Final = 1 << 16
_KILL: Final = 9  # to import `signal` takes longer than all else here
_OF_TERMINALS: Final = (1, 2)  # SIGHUP, SIGINT
_KEPT_NOWHERE: Final = "-"  # as `indexing` has it
_AT_ONCE_FROM: Final = 1 << 28  # bytes: to read less takes no time, and what is wrong is said before anything began
_LONGEST_LINE: Final = 1 << 20


class Reading(Owner):
    """A file being read, and its further channels.  They are opened at once (raises ``OSError``, ``RefusedError``), and
    what is started ends with ``close()``.

    ``keep``: an index that was kept will do, and a new one is kept; in ``folder``, None for the user's cache.
    ``at_once_from``: bytes; of a plain file so long the guest is given before all its pages are known
    (``capture.arriving``).  ``is_kept``: there was one.  ``not_kept``: why a new one is not kept, where it should be.
    """

    def __init__(
        self,
        path: str,
        *,
        channels: tuple[str, ...] = (),
        keep: bool = True,
        folder: str | os.PathLike[str] | None = None,
        at_once_from: int = _AT_ONCE_FROM,
    ) -> None:
        self.path = path
        self.is_kept = False
        self.not_kept: str | None = None
        self._channels = channels
        self._folder = None if folder is None else os.fspath(folder)
        self._keeps = keep
        self._process: int | None = None
        self._at_once_from = at_once_from
        self._is_made = False
        self._arriving: ArrivingPages | None = None
        self._files: list[int] = []
        self._inputs: list[int] = []
        try:
            for each in (path, *channels):
                self._inputs.append(os.open(each, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            self._statuses = [os.fstat(each) for each in self._inputs]
            for each, status in zip(channels, self._statuses[1:], strict=True):
                # To open a pipe may wait for ever; and a folder's name is told of by who reads it.
                if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                    raise RefusedError(f"{each} is no file: the channels of a migration are told by looking at files")
            if not self._is_likely_kept():
                self._start()
        except BaseException:
            self.close()
            raise

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
        for descriptor in (*self._inputs, *self._files):
            os.close(descriptor)
        self._inputs, self._files = [], []

    def _end(self) -> None:
        assert self._process is not None
        is_made = self._is_made or (self._arriving is not None and self._arriving.is_complete)
        if not is_made:  # else it has only to keep a copy, or has ended
            os.kill(self._process, _KILL)
        os.waitpid(self._process, 0)
        self._process = None

    # -- making it

    def _is_likely_kept(self) -> bool:
        """By its name and times alone: to read it takes what is not imported yet."""
        if not self._keeps:
            return False
        from qmigrate.capture.cache import cache_folder, index_name

        folder = str(cache_folder("indexes")) if self._folder is None else self._folder
        name = index_name([(status.st_dev, status.st_ino) for status in self._statuses])
        try:
            kept = os.lstat(f"{folder}/{name}.index")
        except OSError:
            return False
        return all(kept.st_mtime_ns >= status.st_ctime_ns for status in self._statuses)

    def _start(self) -> None:
        """Start the process that makes it."""
        index, pages = os.memfd_create("index"), os.memfd_create("pages")
        spill = _nameless()
        answer, theirs = os.pipe2(os.O_CLOEXEC)
        self._files = [index, pages, spill, answer]
        shared = (index, pages, spill, theirs)
        folder = (self._folder or "") if self._keeps else _KEPT_NOWHERE
        numbers = map(str, (*shared, self._at_once_from))
        command = own_python("qmigrate.operations.indexing", *numbers, folder, self.path)
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

    async def saved(self) -> "SavedGuest":
        """The guest, whose input is open as long as it is.  Raises ``RefusedError``."""
        import asyncio

        if self._process is None:
            saved = await asyncio.to_thread(self._kept)
            if saved is not None:
                self.is_kept = True
                return saved
            self._start()
        line, behind = await self._first_line()
        return await asyncio.to_thread(self._answered, line, behind)

    def _kept(self) -> "SavedGuest | None":
        from qmigrate.capture.kept import KeptError
        from qmigrate.capture.kept_folder import KeptIndexes

        try:
            saved = KeptIndexes(self._folder).read(self._inputs)
        except KeptError:
            return None
        return self._owned(saved)

    def _owned(self, saved: "SavedGuest") -> "SavedGuest":
        saved.inputs, self._inputs = self._inputs, []
        return saved

    async def _first_line(self) -> tuple[bytes, bytes]:
        """What is said first, empty where nothing is; and what has come behind it."""
        import asyncio

        loop, answer = asyncio.get_running_loop(), self._files[-1]
        ready, said = asyncio.Event(), b""
        loop.add_reader(answer, ready.set)
        try:
            while b"\n" not in said and len(said) < _LONGEST_LINE:
                await ready.wait()
                ready.clear()
                data = os.read(answer, _ANSWER_BYTES)
                if not data:
                    return b"", b""
                said += data
        finally:
            loop.remove_reader(answer)
        line, _, behind = said.partition(b"\n")
        return line, behind

    def _answered(self, line: bytes, behind: bytes) -> "SavedGuest":
        import json

        if not line:
            raise RefusedError(f"{self.path}: its index can't be made: {self._why()}")
        said = json.loads(line)
        if (error := said.get("error")) is not None:
            self._is_made = True
            raise RefusedError(f"{self.path}: {error}")
        if said.get("plain"):
            return self._plain(line + b"\n" + behind)
        self._is_made = True
        self.not_kept = said["not_kept"]
        return self._owned(self._made(self._inputs))

    def _made(self, inputs: list[int]) -> "SavedGuest":
        from qmigrate.capture.kept import KeptError, Stamp, read_kept

        index, _, spill, _ = self._files
        try:
            return read_kept(index, list(map(Stamp.of_status, self._statuses)), inputs, spill=spill)
        except (KeptError, OSError) as exc:
            raise RefusedError(f"{self.path}: its index can't be used: {exc}") from exc

    def _plain(self, heard: bytes) -> "SavedGuest":
        """Of a plain file, whose pages are all known or on their way."""
        from qmigrate.capture.arriving import ArrivingPages
        from qmigrate.capture.one_pass import OnePass
        from qmigrate.capture.plain import blocks_of, plain_guest
        from qmigrate.capture.plain_ends import NotPlainError, read_head, read_tail
        from qmigrate.capture.plain_pages import shared_entries
        from qmigrate.errors import StreamError

        inputs = self._inputs
        (file,) = inputs
        try:
            head = read_head(file)
            tail = read_tail(file, head)
        except NotPlainError as exc:
            raise RefusedError(f"{self.path}: it was changed while it was read") from exc
        _, pages, _, answer = self._files
        self._arriving = ArrivingPages(
            file,
            news=os.dup(answer),
            heard=heard,
            blocks=blocks_of(head),
            entries=shared_entries(head, pages),
            proven=lambda starts: OnePass(file, head, starts=starts),
            made=lambda: self._made(inputs),
            why_not=self._why,
        )
        saved = self._owned(plain_guest(head, tail, self._arriving))
        try:
            self._arriving.hear()
        except StreamError as exc:
            saved.close()
            raise RefusedError(f"{self.path}: {exc}") from exc
        saved.absent = self._arriving.absent_pages
        return saved

    def _why(self) -> str:
        """How the process ended, which has said nothing."""
        assert self._process is not None
        _, status = os.waitpid(self._process, 0)
        self._process = None
        code = os.waitstatus_to_exitcode(status)
        return f"what makes it was killed by signal {-code}" if code < 0 else f"what makes it ended with {code}"


def _nameless() -> int:
    """A new file in the folder for such, which has no name.  Raises ``OSError``."""
    try:
        return os.open(os.environ.get("TMPDIR") or "/tmp", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:  # no such folder, or one on a file system that has no such files
        import tempfile  # takes long to import

        descriptor, name = tempfile.mkstemp(prefix="qmigrate-")
        os.unlink(name)  # noqa: PTH108 - at once
        return descriptor
