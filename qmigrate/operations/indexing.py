"""A process of its own that makes the index of a saved guest: ``operations.reading`` starts it, and says why.

A plain stream is read in the quick way (``capture.plain_pages``): what stands before and behind its pages is said at
once, and the places of pages written where the one who asked sees them come.  All else, and what the quick way does not
take, is read as every stream can be; that index is written as one that is kept (``capture.kept``) into a file without a
name, what does not stand in the input into another.  What it says stands in a pipe, in lines of JSON
(``capture.arriving``), the first one of which is ``{"plain": ...}`` in the quick way.  Then it keeps a copy, where it
shall.
"""

import gc
import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from qmigrate.capture.kind import absent_pages
from qmigrate.capture.plain_ends import Head, NotPlainError, Tail, read_head, read_tail
from qmigrate.capture.plain_pages import PlainPages, overlay, shared_entries
from qmigrate.operations.half import Half

__all__ = ["Asked", "make_index"]

KEPT_NOWHERE: Final = "-"
_TOLD_EVERY: Final = 1 << 25  # bytes of the file
_CHANGED: Final = "it was changed while it was read"


@dataclass
class Asked:
    """What is to be read, and where the answer goes: descriptors, of which it closes ``spill`` and ``answer``.

    ``folder``: where the index is kept, empty for the user's cache.  ``at_once_from``: bytes; a shorter file is read
    whole before anything is said of it.
    """

    path: str
    channels: tuple[str, ...]
    folder: str
    at_once_from: int
    index: int
    pages: int
    spill: int
    answer: int
    is_answered: bool = False

    def say(self, **said: Any) -> None:
        data = memoryview(json.dumps(said).encode() + b"\n")
        while data:
            data = data[os.write(self.answer, data) :]

    def end(self) -> None:
        """All is said."""
        self.is_answered = True
        os.close(self.answer)

    def fail(self, failure: OSError | MemoryError) -> None:
        """Say why there will be no index, unless there is one: that it was not kept is no harm."""
        if self.is_answered:
            return
        if isinstance(failure, MemoryError):
            self.say(error="not enough memory")
            return
        reason, file = failure.strerror or str(failure), failure.filename
        self.say(error=reason if file in (None, self.path) else f"{file}: {reason}")


def make_index(asked: Asked) -> None:
    """Raises ``OSError`` where a file can't be read, or there is no room for it."""
    if not asked.channels:
        with open(asked.path, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor is wanted
            status = os.fstat(file.fileno())
            quick = _Quick.of(asked, file.fileno())
            if quick is not None and quick.read(status):
                return
    _make_plainly(asked)


def _is_as_it_was(descriptor: int, status: os.stat_result) -> bool:
    now = os.fstat(descriptor)
    return all(getattr(now, name) == getattr(status, name) for name in ("st_size", "st_mtime_ns", "st_ctime_ns"))


# -- the quick way


class _Quick:
    """A file that seems to be plain."""

    def __init__(self, asked: Asked, descriptor: int, head: Head, tail: Tail) -> None:
        self._asked = asked
        self._descriptor = descriptor
        self._head = head
        self._tail = tail
        self._is_told = self._is_proven = False
        self._told_at = 0

    @classmethod
    def of(cls, asked: Asked, descriptor: int) -> "_Quick | None":
        """None where it is none."""
        try:
            head = read_head(descriptor)
            return cls(asked, descriptor, head, read_tail(descriptor, head))
        except NotPlainError:
            return None

    def read(self, status: os.stat_result) -> bool:
        """False where it is none after all."""
        asked, tail = self._asked, self._tail
        is_all_sent = not tail.has_balloon and not tail.virtio_mems
        entries = shared_entries(self._head, asked.pages, is_made=True)
        if status.st_size >= asked.at_once_from:
            # Before it is proven to have one pass, which takes as long as to prepare a destination for it.
            asked.say(plain=True)
            self._is_told = True
            self._is_proven = is_all_sent and self._prove()
        try:
            end, page_count = self._index(entries, halved=asked.at_once_from <= status.st_size)
        except NotPlainError:
            return False
        absent = sum(map(absent_pages, entries.values()))
        if end != tail.devices_at or (absent and is_all_sent):
            return False
        if not _is_as_it_was(self._descriptor, status):
            asked.say(error=_CHANGED)
            return True
        is_once = page_count == sum(map(len, entries.values()))
        asked.say(plain=True, done=True, absent=absent, one_pass=is_once)
        asked.end()
        if asked.folder != KEPT_NOWHERE:
            self._keep(entries, absent, status)
        return True

    def _index(self, entries: dict[str, memoryview], *, halved: bool) -> tuple[int, int]:
        """Where RAM ends, and how many copies of pages there are.  Raises ``NotPlainError``.

        ``halved``: by two processes, where a record is found in the middle, and reading up to there meets it.  Where
        the guest runs already it shall have the other core.
        """
        pages = PlainPages(self._descriptor, self._head)
        half = Half.begun(self._descriptor, self._head, self._tail) if halved and not self._is_proven else None
        if half is None:
            end = pages.index(entries, on_window=self._tell_how_far)
            return end, pages.page_count
        with half:
            try:
                pages.index(entries, stop=half.begin[0])
            except NotPlainError:
                is_met = False
            else:
                is_met = pages.block == half.begin[1]
            found = half.found() if is_met else None
            if found is None:
                return self._index(entries, halved=False)
            for name, later in half.entries.items():
                overlay(entries[name], later)
            return found[0], found[1] + pages.page_count

    def _prove(self) -> bool:
        from qmigrate.capture.one_pass import OnePass

        once = OnePass(self._descriptor, self._head)
        is_proven = once.prove(self._tail.devices_at)
        if is_proven:
            self._asked.say(starts=once.starts)
        return is_proven

    def _tell_how_far(self, position: int) -> None:
        if self._is_told and position - self._told_at >= _TOLD_EVERY:
            self._told_at = position
            self._asked.say(at=position)

    def _keep(self, entries: dict[str, memoryview], absent: int, status: os.stat_result) -> None:
        from qmigrate.capture.kept import Stamp
        from qmigrate.capture.kept_folder import KeptIndexes
        from qmigrate.capture.placed import PlacedPages
        from qmigrate.capture.places import Input
        from qmigrate.capture.plain import blocks_of, plain_guest

        index = PlacedPages([Input.of(self._descriptor)], blocks=blocks_of(self._head), entries=entries)
        saved = plain_guest(self._head, self._tail, index)
        saved.absent = absent
        KeptIndexes(self._asked.folder or None).keep(saved, [Stamp.of_status(status)])


# -- as every stream can be read


def _make_plainly(asked: Asked) -> None:
    from qmigrate.capture.kept import Stamp, write_kept
    from qmigrate.capture.kept_folder import KeptIndexes
    from qmigrate.capture.migration import Migration
    from qmigrate.capture.saved import read_saved
    from qmigrate.capture.schemas import SchemaCache, cache_folder
    from qmigrate.errors import NoStreamError, RefusedError, StreamError

    schemas = SchemaCache(cache_folder())
    with Migration(asked.path, channels=asked.channels, description=schemas) as migration:
        descriptors = [source.descriptor for source in migration.sources]
        stamps = list(map(Stamp.of, descriptors))
        try:
            saved = read_saved(migration, spill=os.fdopen(asked.spill, "w+b"))
        except (StreamError, NoStreamError, RefusedError) as exc:
            asked.say(error=str(exc))
            return
        with saved:
            if list(map(Stamp.of, descriptors)) != stamps:
                asked.say(error=_CHANGED)
                return
            write_kept(saved, stamps, asked.index, spilled=saved.index.spilled)
            kept = None if asked.folder == KEPT_NOWHERE else KeptIndexes(asked.folder or None)
            not_kept = None if kept is None else kept.why_not(saved.index.spilled)
            asked.say(made=True, not_kept=not_kept)
            asked.end()
            if kept is not None and not_kept is None:
                kept.keep(saved, stamps)


def main(argv: list[str]) -> NoReturn:
    gc.disable()  # to import so much makes much and frees nothing, and afterwards there is little to be freed
    index, pages, spill, answer, at_once_from = map(int, argv[:5])
    folder, path, *channels = argv[5:]
    asked = Asked(path, tuple(channels), folder, at_once_from, index, pages, spill, answer)
    try:
        make_index(asked)
    except (OSError, MemoryError) as exc:
        with suppress(OSError):  # who asked is gone
            asked.fail(exc)
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
