"""The second half of a long plain file, whose pages another process looks for, while who asked does the first."""

import os
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

from qmigrate.capture.plain_pages import PlainPages, shared_entries

if TYPE_CHECKING:
    from qmigrate.capture.plain_ends import Head, Tail

__all__ = ["Half"]

_KILL = 9
_ANSWER_BYTES = 64


class Half:
    """It has begun; ends, whatever it is at, with the block.  ``begin``: a record, and the block that it continues.

    ``entries`` are its own, as an index has them: of most pages there are none.
    """

    def __init__(self, descriptor: int, head: "Head", begin: tuple[int, str]) -> None:
        self.begin = begin
        self.entries = shared_entries(head)
        self._answer, theirs = os.pipe2(os.O_CLOEXEC)
        ours = os.getpid()
        self._process = os.fork()  # this process has no threads, and what it has is small
        if not self._process:
            _find(PlainPages(descriptor, head), begin, self.entries, theirs, ours)
        os.close(theirs)

    @classmethod
    def begun(cls, descriptor: int, head: "Head", tail: "Tail") -> "Half | None":
        """None where no record is found in the middle.  Raises ``OSError``."""
        from qmigrate.capture.one_pass import OnePass

        begin = OnePass(descriptor, head).record_near((head.pages_at + tail.devices_at) // 2)
        return None if begin is None else cls(descriptor, head, begin)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.kill(self._process, _KILL)
        os.waitpid(self._process, 0)
        os.close(self._answer)

    def found(self) -> tuple[int, int] | None:
        """Where RAM ends, and how many copies of pages it has noted; None where it could not."""
        said = os.read(self._answer, _ANSWER_BYTES).split()
        return (int(said[0]), int(said[1])) if said else None


def _find(
    pages: PlainPages, begin: tuple[int, str], entries: Mapping[str, memoryview], answer: int, parent: int
) -> NoReturn:
    """In the other process, which says nothing where that fails."""

    def end_with_it(_position: int) -> None:
        if os.getppid() != parent:
            os._exit(1)

    try:
        end = pages.index(entries, begin=begin, on_window=end_with_it)
        os.write(answer, b"%d %d" % (end, pages.page_count))
    except BaseException:
        os._exit(1)
    os._exit(0)
