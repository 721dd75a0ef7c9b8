"""RAM of two captures, page by page: each in sparse files without a name, compared where either has data."""

import os
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from qmigrate.analysis.ram_files import RamWriter
from qmigrate.capture.migration import Block
from qmigrate.errors import QmigrateError
from qmigrate.format.walk import Entry

__all__ = ["BlockPages", "Spool", "SpoolError", "unequal_pages"]

_PIECE: Final = 1 << 18  # bytes compared at once
_LEAST: Final = 1 << 16  # of them; every target's page goes into it
_ZEROS: Final = bytes(_PIECE)


class SpoolError(QmigrateError):
    """There is no room for the pages."""


class Spool(RamWriter):
    """RAM as a stream leaves it, in a file for each block: without a name, in ``$TMPDIR``, gone with ``stack``."""

    def __init__(self, stack: ExitStack) -> None:
        # Where the named folder can't be used, tempfile would take another one in silence, which may be small.
        self.place = os.environ.get("TMPDIR") or tempfile.gettempdir()
        super().__init__(Path(self.place), stack)

    def take(self, entry: Entry, blocks: dict[str, Block]) -> None:
        """Write the pages of a record.  Raises ``SpoolError`` where they have no room."""
        try:
            super().take(entry, blocks)
        except OSError as exc:
            raise SpoolError(
                f"{self.place}: {exc.strerror or exc}: RAM of both inputs is put there (TMPDIR names another folder)"
            ) from exc

    def has(self, block: str) -> bool:
        """Is there a file for this block?"""
        return block in self._descriptors

    def descriptor(self, block: str) -> int:
        """Of the block's file, which is as long as the block."""
        return self._descriptors[block]

    def _new_file(self, block: str) -> int:  # noqa: ARG002 - the base names its files after it
        return self.stack.enter_context(tempfile.TemporaryFile(dir=self.place, buffering=0)).fileno()


@dataclass(slots=True)
class BlockPages:
    """A block that both have: how its pages compare.  ``ranges`` are start and length of each stretch that is not
    the same, in bytes, one after the other.

    A page that only one side sent counts where it is not zero.  ``sent_by_a`` counts different pages of that side's
    size.
    """

    name: str
    length: int
    page_size: int
    differing: int = 0
    only_in_a: int = 0
    only_in_b: int = 0
    sent_by_a: int = 0
    sent_by_b: int = 0
    ranges: "array[int]" = field(default_factory=lambda: array("Q"))

    @property
    def unequal(self) -> int:
        """How many pages are not the same on both sides."""
        return self.differing + self.only_in_a + self.only_in_b

    def add(self, start: int, length: int) -> None:
        """This stretch is not the same; it goes on with the last one where it touches it."""
        ranges = self.ranges
        if ranges and ranges[-2] + ranges[-1] == start:
            ranges[-1] += length
        else:
            ranges.extend((start, length))


def unequal_pages(
    a: Spool,
    b: Spool,
    one: tuple[Block, int],
    other: tuple[Block, int],
    page_size: int,
    *,
    complete: tuple[bool, bool],
) -> BlockPages:
    """Compare a block that both sides have, as far as both reach.  ``one`` and ``other``: the block, and the size of
    its side's pages.  What a side that is not ``complete`` has not sent is not compared.
    """
    length = min(one[0].length, other[0].length)
    found = BlockPages(one[0].name, length, page_size)
    found.sent_by_a, found.sent_by_b = one[0].seen.count, other[0].seen.count
    ours, theirs = (_Sent(block, size, whole) for (block, size), whole in zip((one, other), complete, strict=True))
    descriptors = a.descriptor(found.name), b.descriptor(found.name)
    for start in _unequal_starts(descriptors, length, page_size):
        in_a, in_b = ours.sent(start), theirs.sent(start)
        if not (in_a or ours.whole) or not (in_b or theirs.whole):
            continue
        if in_a and in_b:
            found.differing += 1
        elif in_a:
            found.only_in_a += 1
        else:
            found.only_in_b += 1
        found.add(start, min(page_size, length - start))
    return found


class _Sent:
    """Which pages of a block one side sent."""

    def __init__(self, block: Block, page_size: int, whole: bool) -> None:
        self.seen, self.page_size, self.whole = block.seen, page_size, whole
        self.all = block.seen.count * page_size >= block.length

    def sent(self, start: int) -> bool:
        return self.all or start // self.page_size in self.seen


def _unequal_starts(descriptors: tuple[int, int], length: int, page_size: int) -> Iterator[int]:
    """Where each page begins that differs."""
    buffers = bytearray(_PIECE), bytearray(_PIECE)
    for begin, end, has_data in _pieces(descriptors, length):
        size = end - begin
        views = [memoryview(buffer)[:size] for buffer in buffers]
        for descriptor, view, has in zip(descriptors, views, has_data, strict=True):
            _fill(descriptor, view, begin if has else None)
        ours, theirs = buffers[0][:size], views[1]
        if ours == theirs:  # a bytearray is compared by memcmp, a memoryview element by element
            continue
        for at in range(0, size, page_size):
            if ours[at : at + page_size] != theirs[at : at + page_size]:
                yield begin + at


def _fill(descriptor: int, view: memoryview, start: int | None) -> None:
    """The file's bytes from ``start`` on, zeros where that is None.  It is as long as its block, so it goes on."""
    if start is None:
        view[:] = _ZEROS[: len(view)]
        return
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], start + done)
        if not count:
            raise SpoolError(f"a file in {tempfile.gettempdir()} has been shortened")
        done += count


def _pieces(descriptors: tuple[int, int], length: int) -> Iterator[tuple[int, int, list[bool]]]:
    """Begin and end of each piece in which either file has data, and whether each of them has any there.

    Holes are not read: the kernel would make pages for them, on most file systems.
    """
    begin, data = 0, [-1, -1]  # where each has data next
    while True:
        for index, descriptor in enumerate(descriptors):
            if data[index] < begin:
                data[index] = _next(descriptor, begin, os.SEEK_DATA, length)
        if min(data) >= length:
            return
        begin = min(data) & -_LEAST
        ends = [
            _next(descriptors[index], data[index], os.SEEK_HOLE, length) for index in (0, 1) if data[index] < length
        ]
        end = -(-min(ends) // _LEAST) * _LEAST
        end = min(max(end, begin + _LEAST), begin + _PIECE, length)
        yield begin, end, [at < end for at in data]
        begin = end


def _next(descriptor: int, begin: int, what: int, length: int) -> int:
    try:
        return os.lseek(descriptor, begin, what)
    except OSError:  # ENXIO: nothing but holes from here on
        return length
