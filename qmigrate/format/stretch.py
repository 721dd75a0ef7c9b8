"""Plain pages in short runs, kept as the words of their records.

An object a run costs more than all else where runs are short: a guest of 1 GiB whose pages alternate has 262,144.
So a stretch holds eight bytes a record, answers what most ask of it from them, and makes runs for who wants runs.
"""

import operator
import struct
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Final, overload

from qmigrate.format.ram import PageRun, RamFlag

__all__ = ["Stretch", "are_consecutive", "count_pages", "intervals_of", "new_run"]

_PAGE: Final = int(RamFlag.PAGE)
_ZERO: Final = int(RamFlag.ZERO)
_CONTINUE: Final = int(RamFlag.CONTINUE)
_NORMAL_WORD: Final = _PAGE | _CONTINUE  # the low bits of a plain page's word
_WORD_BYTES: Final = 8
_CYCLE: Final = 1 << 24  # bytes of RAM, after which the low three bytes of a page's offset come again


@lru_cache(maxsize=16)
def _tables(page_size: int) -> tuple[bytes, bytes]:
    """Bytes 5 and 6 of the offsets of pages that follow one another, through one cycle."""
    starts = range(0, _CYCLE, page_size)
    return bytes(start >> 16 for start in starts), bytes(start >> 8 & 0xFF for start in starts)


def new_run(offset: int, flag: int, start: int, page_count: int) -> PageRun:
    """A run, in half the time that its class takes."""
    return tuple.__new__(PageRun, (offset, flag, start, page_count))


def are_consecutive(fifth: bytes | bytearray, sixth: bytes | bytearray, page_size: int) -> bool:
    """Do offsets with these bytes follow one another page by page, if all above them and below are the same?"""
    high, low = _tables(page_size)
    first = ((fifth[0] << 16) + (sixth[0] << 8)) // page_size
    after = first + len(fifth)
    return bool(fifth == high[first:after] and sixth == low[first:after])


def count_pages(runs: Sequence[PageRun]) -> tuple[int, int]:
    """How many pages are sent as they are, and how many as ZERO."""
    if isinstance(runs, Stretch):
        return runs.normal_count, runs.page_count - runs.normal_count
    total = sum([run[3] for run in runs])
    zero = sum([page_count for _, flag, _, page_count in runs if flag == _ZERO])
    return total - zero, zero


def intervals_of(runs: Sequence[PageRun], page_size: int) -> list[tuple[int, int]]:
    """What of the block the runs cover, as (start, end) in bytes.

    In their order, whatever their kind, neighbours joined.
    """
    if isinstance(runs, Stretch):
        return runs.intervals
    intervals: list[tuple[int, int]] = []
    begin = end = runs[0][2]
    for _, _, start, page_count in runs:
        if start != end:
            intervals.append((begin, end))
            begin = start
        end = start + page_count * page_size
    intervals.append((begin, end))
    return intervals


class Stretch(Sequence[PageRun]):
    """A sequence of runs, made when they are asked for.

    ``offset`` is where the first record begins in the stream; ``words`` are the records' words, each with CONTINUE
    and either PAGE or ZERO (fill 0), big-endian as they came.
    """

    def __init__(self, offset: int, page_size: int, words: bytes) -> None:
        self.offset = offset
        self.page_size = page_size
        self.words = words

    @property
    def page_count(self) -> int:
        """How many pages, of both kinds."""
        return len(self.words) // _WORD_BYTES

    @cached_property
    def normal_count(self) -> int:
        """How many of them are sent as they are."""
        return self.words[7::_WORD_BYTES].count(_NORMAL_WORD)

    @property
    def length(self) -> int:
        """Of the records in the stream, in bytes."""
        return 9 * self.page_count + (self.page_size - 1) * self.normal_count

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The words as numbers: each an offset in the block, and flags."""
        return struct.unpack(f">{self.page_count}Q", self.words)

    @cached_property
    def intervals(self) -> list[tuple[int, int]]:
        """As ``intervals_of`` says it."""
        words, page_size = self.words, self.page_size
        first, count = int.from_bytes(words[:_WORD_BYTES]) & -page_size, self.page_count
        is_one = all(words[at::_WORD_BYTES].count(words[at]) == count for at in range(5))
        if is_one and are_consecutive(words[5::_WORD_BYTES], self._sixth, page_size):
            return [(first, first + count * page_size)]
        starts = [number & -page_size for number in self.numbers]
        cuts = _cuts(starts, page_size)
        return [
            (starts[begin], starts[end - 1] + page_size) for begin, end in zip((0, *cuts), (*cuts, count), strict=True)
        ]

    @property
    def _sixth(self) -> bytes:
        """Byte 6 of each offset."""
        return self.words[6::_WORD_BYTES]

    @cached_property
    def _runs(self) -> list[PageRun]:
        numbers, offset, index, mask = self.numbers, self.offset, 0, self.page_size - 1
        runs: list[PageRun] = []
        # A run goes on where the word grows by a page and the flags stay: elsewhere it is cut.
        for cut in (*_cuts(numbers, self.page_size), len(numbers)):
            number, count = numbers[index], cut - index
            flag = (number & mask) - _CONTINUE
            runs.append(new_run(offset, flag, number & ~mask, count))
            offset += count * (9 if flag == _ZERO else 8 + self.page_size)
            index = cut
        return runs

    def __bool__(self) -> bool:
        return bool(self.words)

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[PageRun]:
        return iter(self._runs)

    @overload
    def __getitem__(self, index: int) -> PageRun: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[PageRun]: ...

    def __getitem__(self, index: int | slice) -> PageRun | Sequence[PageRun]:
        return self._runs[index]

    def __eq__(self, other: object) -> bool:
        """Equal to any sequence of the same runs."""
        return isinstance(other, Sequence) and self._runs == list(other)

    __hash__ = None  # type: ignore[assignment]  # as a list

    def __repr__(self) -> str:
        return f"<Stretch of {self.page_count} pages at {self.offset:#x}>"


def _cuts(numbers: Sequence[int], page_size: int) -> list[int]:
    """Where one number is not the one before it and a page."""
    steps = map(operator.sub, numbers[1:], numbers)
    return [index for index, step in enumerate(steps, 1) if step != page_size]
