"""Guest memory and its page map together, and how pages that came are put in place.

Before LISTEN a page is written through this process's own mapping: a later copy overwrites an earlier one.  After
LISTEN it is placed by UFFDIO_COPY, once, by whichever process has it.
"""

import itertools
import mmap
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from qmigrate.errors import QmigrateError, StreamError, UnsupportedError
from qmigrate.format.encoded import page_after
from qmigrate.format.ram import PageRun, RamBlock, RamFlag
from qmigrate.format.stretch import Stretch
from qmigrate.protocol.destination_events import EncodedCame, PagesCame
from qmigrate.protocol.page_map import BlockPages, PageMap
from qmigrate.uffd.memory import HOST_PAGE, BlockMemory, address_of, discard
from qmigrate.uffd.toucher import Histogram
from qmigrate.uffd.userfault import Placed, Userfaultfd

__all__ = ["Counts", "GuestRam", "Placer", "write_encoded", "write_pages", "write_zeros"]

_PAGE: Final = int(RamFlag.PAGE)
_STAGED: Final = 1 << 20  # bytes placed by one COPY at most, where host pages are small
_PIECE_PAGES: Final = 16  # staged at once: a page of 64 KiB fits so often
_FEW_ZEROS: Final = 8  # pages, which are copied with their neighbours; more are placed as zero pages
_MOST_MEMORY: Final = 1 << 46  # bytes: what x86 can map; one that claims more lies


@dataclass
class Counts:
    """What became of the pages that came; of target pages, but ``duplicates`` and ``discarded`` of host pages."""

    normal: int = 0
    zero: int = 0
    duplicates: int = 0
    discarded: int = 0


class GuestRam:
    """The blocks, by name and number, each with its memory; and their page map."""

    def __init__(
        self, pages: PageMap, memory: Sequence[BlockMemory], shared: tuple[int, int], target_page: int
    ) -> None:
        self.pages = pages
        self.memory = tuple(memory)
        self.target_page = target_page
        self._shared = shared
        self._asked_ns = memoryview(mmap.mmap(shared[1], 0)).cast("Q")
        self._numbers = {block.name: number for number, block in enumerate(pages.blocks)}

    @classmethod
    def create(cls, listed: Sequence[RamBlock], target_page: int) -> Self:
        """Memory for a source's block list: sparse, whatever it claims.  Raises ``QmigrateError``."""
        total = sum(block.used_length for block in listed)
        if total > _MOST_MEMORY:
            raise UnsupportedError(f"a guest of {total} bytes, expected at most {_MOST_MEMORY}", trail=("ram",))
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        if len(listed) > most:
            raise UnsupportedError(
                f"{len(listed)} blocks, each of which needs an open file: at most {most} of them (ulimit -n)",
                trail=("ram",),
            )
        memory: list[BlockMemory] = []
        for block in listed:
            unit = max(block.page_size or HOST_PAGE, target_page)
            memory.append(BlockMemory.create(block.name, block.used_length, unit))
        numbered = PageMap.numbered(
            (block.name, block.used_length, part.page_size) for block, part in zip(listed, memory, strict=True)
        )
        needed = PageMap.bytes_needed(numbered)
        shared = (_shared_bytes("page-map", needed), _shared_bytes("asked", 8 * needed))
        return cls(_shared_map(numbered, shared[0]), memory, shared, target_page)

    # -- between processes

    def described(self) -> dict[str, Any]:
        """For a message to another process; goes with ``descriptors``."""
        blocks = [[block.name, block.length, block.page_size] for block in self.pages.blocks]
        return {"blocks": blocks, "target_page": self.target_page}

    @property
    def descriptors(self) -> list[int]:
        return [*self._shared, *(block.descriptor for block in self.memory)]

    @classmethod
    def received(cls, described: dict[str, Any], descriptors: Sequence[int]) -> Self:
        """What another process described; the descriptors are ours from now on."""
        numbered = PageMap.numbered(tuple(block) for block in described["blocks"])
        memory = [
            BlockMemory.open(descriptor, block.length, block.page_size)
            for descriptor, block in zip(descriptors[2:], numbered, strict=True)
        ]
        shared = (descriptors[0], descriptors[1])
        return cls(_shared_map(numbered, shared[0]), memory, shared, described["target_page"])

    def close(self) -> None:
        """The descriptors; what is mapped stays until nobody uses it."""
        for descriptor in self.descriptors:
            os.close(descriptor)

    # -- when pages were asked for

    def asked(self, number: int, start: int) -> None:
        """This page is asked for now.  By the pager only."""
        block = self.block(number)
        self._asked_ns[block.first + start // block.page_size] = time.monotonic_ns()

    def came(self, number: int, start: int, length: int, waited: Histogram) -> None:
        """These pages are in place now: how long those took that were asked for."""
        block = self.block(number)
        for page in self.pages.requested_in(number, start, length):
            if asked_ns := self._asked_ns[block.first + page // block.page_size]:
                waited.add(time.monotonic_ns() - asked_ns)

    # -- by name

    def number(self, block: str) -> int:
        """Raises ``StreamError`` for a block that the source did not list."""
        if block not in self._numbers:
            raise StreamError(f"the block {block!r} was not listed", trail=("ram",))
        return self._numbers[block]

    def block(self, number: int) -> BlockPages:
        return self.pages.blocks[number]

    def discard(self, name: str, start: int, length: int) -> int:
        """Forget host pages, and punch holes where they were; how many.  Raises ``StreamError``."""
        number = self.number(name)
        block = self.block(number)
        trail = ("POSTCOPY_RAM_DISCARD", name)
        if start % block.page_size or length % block.page_size:
            raise StreamError(
                f"{length:#x} bytes at {start:#x}, expected multiples of the page size {block.page_size:#x}",
                trail=trail,
            )
        if not length or start + length > block.length:
            raise StreamError(f"{length:#x} bytes at {start:#x}, the block has {block.length:#x}", trail=trail)
        discard(self.memory[number].descriptor, start, length)
        self.pages.discard(number, start, length)
        return length // block.page_size


def _shared_map(numbered: Sequence[BlockPages], descriptor: int) -> PageMap:
    """Over this file, most of which may be a hole."""
    length = os.fstat(descriptor).st_size

    def next_data(at: int) -> int:
        try:
            return os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole from here on
            return length

    return PageMap(numbered, mmap.mmap(descriptor, 0), next_data=next_data)


def _shared_bytes(name: str, length: int) -> int:
    descriptor = os.memfd_create(f"qmigrate-{name}", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, max(length, 8))
    return descriptor


def _records(came: PagesCame) -> Iterator[tuple[PageRun, int]]:
    """Each run, and where in the view its first page's contents (or fill byte) stand."""
    pages, offset, length = came.pages, came.offset, len(came.view)
    name_bytes = 1 + len(pages.block.encode("utf-8", "surrogateescape")) if pages.named else 0
    for run in pages.runs:
        at = run.offset - offset + 8 + name_bytes
        # pages.scan() may let a run reach beyond the bytes that it says it has read: those pages come again.
        fit = (length - at + 8) // pages.record_bytes(run.flag)
        yield (run if run.page_count <= fit else run._replace(page_count=fit)), at
        name_bytes = 0  # only the first record of all can have a name


def write_pages(ram: GuestRam, came: PagesCame, counts: Counts) -> None:
    """Before LISTEN: through our own mapping."""
    pages, view = came.pages, came.view
    number, page_size = ram.number(pages.block), pages.page_size
    mapping = ram.memory[number].mapping
    stride = 8 + page_size
    for run, at in _records(came):
        start, length = run.start, run.page_count * page_size
        if run.flag == _PAGE:
            counts.normal += run.page_count
            for place, contents in zip(
                range(start, start + length, page_size), itertools.count(at, stride), strict=False
            ):
                mapping[place : place + page_size] = view[contents : contents + page_size]
        else:
            counts.zero += run.page_count
            write_zeros(ram, number, start, length, pages.fill)
        ram.pages.receive(number, start, length)


def write_encoded(ram: GuestRam, came: EncodedCame, counts: Counts) -> None:
    """Before LISTEN: a page sent as a delta, or compressed.  Raises ``StreamError``."""
    page = came.page
    number, start, size = ram.number(page.block), page.record.word.start, page.page_size
    mapping = ram.memory[number].mapping
    mapping[start : start + size] = page_after(page, mapping[start : start + size], offset=came.offset)
    counts.normal += 1
    ram.pages.receive(number, start, size)


def write_zeros(ram: GuestRam, number: int, start: int, length: int, fill: int) -> None:
    """Memory that nothing was written to holds zeros already, and stays a hole."""
    if not fill and not ram.pages.any_received(number, start, length):
        return
    mapping = ram.memory[number].mapping
    for at in range(start, start + length, _STAGED):
        end = min(at + _STAGED, start + length)
        mapping[at:end] = bytes([fill]) * (end - at)


class Placer:
    """After LISTEN: by UFFDIO_COPY and UFFDIO_ZEROPAGE, whole host pages, each once.

    ``addresses`` says where each block lies in the process that touches.  One for each channel: a host page that
    is larger than the target's is gathered until it is whole, and none may come between.
    """

    def __init__(self, ram: GuestRam, faults: Userfaultfd, addresses: Sequence[int], counts: Counts) -> None:
        self._ram = ram
        self._faults = faults
        self._addresses = tuple(addresses)
        self._counts = counts
        self._staging = mmap.mmap(-1, max([_STAGED, *(block.page_size for block in ram.pages.blocks)]))
        self._source = address_of(self._staging)
        self.waited = Histogram()
        """From a request to its page in place."""
        self._gathering: tuple[int, int] | None = None  # (block, start) of a host page
        self._gathered = 0
        self._only_zeros = True

    def forget(self) -> None:
        """The connection broke: what was gathered of a host page is lost, and comes again."""
        self._gathering = None

    def place(self, came: PagesCame) -> None:
        """Raises ``StreamError`` for a host page that does not come whole, ``QmigrateError`` where it can't be."""
        number, runs = self._ram.number(came.pages.block), came.pages.runs
        if self._ram.block(number).page_size > came.pages.page_size:
            self._gather(number, came)
        elif isinstance(runs, Stretch):
            self._place_stretch(number, runs, came)
        else:
            self.place_plainly(number, came)

    def place_plainly(self, number: int, came: PagesCame) -> None:
        """Run by run: what follows one another in the block is placed at once, of whichever kind.

        A call costs more than zeros.  Where runs are short this costs more than the kernel does: hence
        ``_place_stretch``, which a test holds to this.
        """
        page_size = came.pages.page_size
        begin = end = 0  # in the block: what is staged and not placed yet
        for run, at in _records(came):
            length = run.page_count * page_size
            if run.flag != _PAGE and run.page_count > _FEW_ZEROS:
                self._flush(number, begin, end)
                self._counts.zero += run.page_count
                self._zero(number, run.start, length)
                begin = end = 0
                continue
            for first in range(0, run.page_count, _PIECE_PAGES):
                count = min(_PIECE_PAGES, run.page_count - first)
                start = run.start + first * page_size
                if start != end or end - begin + count * page_size > len(self._staging):
                    self._flush(number, begin, end)
                    begin = start
                self._stage(run.flag, start - begin, count, came, at + first * (8 + page_size))
                end = start + count * page_size
        self._flush(number, begin, end)

    def _place_stretch(self, number: int, stretch: Stretch, came: PagesCame) -> None:
        """The same for short runs, page by page out of the words: no run is made, and none looked at."""
        page_size, staging, view, zeros = came.pages.page_size, self._staging, came.view, bytes(came.pages.page_size)
        words, most = iter(stretch.numbers), len(staging) // page_size * page_size
        at = stretch.offset - came.offset + 8
        stride = 8 + page_size
        for interval_start, interval_end in stretch.intervals:
            for start in range(interval_start, interval_end, most):
                length = min(most, interval_end - start)
                for place, word in zip(range(0, length, page_size), words):  # noqa: B905 - an interval's share of them
                    if word & _PAGE:
                        staging[place : place + page_size] = view[at : at + page_size]
                        at += stride
                    else:
                        staging[place : place + page_size] = zeros
                        at += 9
                self._copy(number, start, length)
        self._counts.normal += stretch.normal_count
        self._counts.zero += stretch.page_count - stretch.normal_count

    def _stage(self, flag: int, place: int, count: int, came: PagesCame, at: int) -> None:
        """``count`` pages into the staging area at ``place``; the first one's contents stand at ``at`` in the view."""
        page_size, staging, view = came.pages.page_size, self._staging, came.view
        if flag != _PAGE:
            self._counts.zero += count
            staging[place : place + count * page_size] = bytes(count * page_size)
            return
        self._counts.normal += count
        contents = at
        for inside in range(place, place + count * page_size, page_size):
            staging[inside : inside + page_size] = view[contents : contents + page_size]
            contents += 8 + page_size

    def _flush(self, number: int, begin: int, end: int) -> None:
        if begin < end:
            self._copy(number, begin, end - begin)

    def _gather(self, number: int, came: PagesCame) -> None:
        page_size, unit = came.pages.page_size, self._ram.block(number).page_size
        zeros = memoryview(bytes(page_size))
        for run, at in _records(came):
            starts = range(run.start, run.start + run.page_count * page_size, page_size)
            for start, contents in zip(starts, itertools.count(at, 8 + page_size), strict=False):
                self._begin(number, start // unit * unit, came)
                if run.flag == _PAGE:
                    self._counts.normal += 1
                    self._only_zeros = False
                    page = came.view[contents : contents + page_size]
                else:
                    self._counts.zero += 1
                    page = zeros
                self._staging[start % unit : start % unit + page_size] = page
                self._gathered += 1
                if self._gathered * page_size == unit:
                    self._place_gathered()

    def _begin(self, number: int, start: int, came: PagesCame) -> None:
        """A host page is gathered from here on.  Raises ``StreamError`` where another is not whole yet."""
        if self._gathering is None:
            self._gathering, self._gathered, self._only_zeros = (number, start), 0, True
        elif self._gathering != (number, start):
            block, other = self._gathering
            raise StreamError(
                f"a page of the host page at {start:#x}, and that at {other:#x} of {self._ram.block(block).name} is "
                "not whole yet",
                offset=came.offset,
                trail=("ram", came.pages.block),
            )

    def _place_gathered(self) -> None:
        assert self._gathering is not None
        number, start = self._gathering
        length = self._ram.block(number).page_size
        self._gathering = None
        if self._only_zeros:
            self._zero(number, start, length)
        else:
            self._copy(number, start, length)

    def zero(self, number: int, start: int) -> None:
        """One host page of zeros if it is a hole; in any case its sleepers are woken."""
        self._zero(number, start, self._ram.block(number).page_size)

    def _zero(self, number: int, start: int, length: int) -> None:
        if self._ram.memory[number].is_huge:  # the kernel has no zero page of that size
            self._staging[:length] = bytes(length)
            self._copy(number, start, length)
            return
        self._all(number, start, length, None)

    def _copy(self, number: int, start: int, length: int) -> None:
        self._all(number, start, length, self._source)

    def _all(self, number: int, start: int, length: int, source: int | None) -> None:
        """Place until all is there; a page that is there already is left as it is, and its sleepers woken."""
        unit, base = self._ram.block(number).page_size, self._addresses[number]
        end = start + length
        while start < end:
            if source is None:
                placed, done = self._faults.zero(base + start, end - start)
            else:
                placed, done = self._faults.copy(base + start, source, end - start)
            if placed is Placed.GONE:
                raise QmigrateError("the process that stands for the guest has ended")
            if placed is Placed.ALREADY:
                self._counts.duplicates += 1
                done = unit
                self._faults.wake(base + start, unit)
            if done:
                self._ram.pages.receive(number, start, done)
                self._ram.came(number, start, done, self.waited)
                start += done
                source = None if source is None else source + done
