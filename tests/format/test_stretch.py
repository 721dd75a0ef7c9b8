"""A stretch says of its pages what the runs say of them."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import StreamError
from qmigrate.format import pages
from qmigrate.format.ram import PageRun, Pages, RamFlag
from qmigrate.format.stretch import Stretch, are_consecutive, count_pages, intervals_of
from qmigrate.format.write import encode

PAGE_SIZES = [256, 1024, 4096, 65536]
KINDS = [int(RamFlag.PAGE | RamFlag.CONTINUE), int(RamFlag.ZERO | RamFlag.CONTINUE)]
PLACES = st.integers(0, 40) | st.integers((1 << 24) // 4096 - 3, (1 << 24) // 4096 + 3) | st.integers(0, (1 << 47))


@st.composite
def words(draw: st.DrawFn, page_size: int) -> list[int]:
    """Words of pages that jump, repeat, and go on."""
    found: list[int] = []
    for _ in range(draw(st.integers(1, 8))):
        first, count = draw(PLACES), draw(st.integers(1, 5))
        found += [(first + index) * page_size | draw(st.sampled_from(KINDS)) for index in range(count)]
    return found


def stream_of(numbers: list[int], page_size: int) -> bytes:
    """Their records; the pages are full of the low byte of their words, and of their place in the list."""
    parts = []
    for index, number in enumerate(numbers):
        is_normal = number & (page_size - 1) == KINDS[0]
        parts.append(number.to_bytes(8) + (bytes([index & 0xFF]) * page_size if is_normal else b"\0"))
    return b"".join(parts)


def stretch_of(numbers: list[int], page_size: int, offset: int = 0) -> Stretch:
    return Stretch(offset, page_size, struct.pack(f">{len(numbers)}Q", *numbers))


@given(st.sampled_from(PAGE_SIZES), st.data(), st.integers(0, 1 << 40))
def test_its_runs_are_those_of_the_plain_loop(page_size: int, data: st.DataObject, offset: int) -> None:
    numbers = data.draw(words(page_size))
    stream = stream_of(numbers, page_size)
    plain: list[PageRun] = []
    assert pages.scan_plainly(plain, stream, 0, len(stream), page_size=page_size, shift=offset) == len(stream)
    stretch = stretch_of(numbers, page_size, offset)
    assert stretch == plain
    assert plain == stretch
    assert (list(stretch), len(stretch), stretch[-1]) == (plain, len(plain), plain[-1])
    assert (stretch.length, stretch.page_count) == (len(stream), len(numbers))


@given(st.sampled_from(PAGE_SIZES), st.data())
def test_counts_and_intervals_are_those_of_its_runs(page_size: int, data: st.DataObject) -> None:
    stretch = stretch_of(data.draw(words(page_size)), page_size)
    runs = list(stretch)
    assert count_pages(stretch) == count_pages(runs)
    assert intervals_of(stretch, page_size) == intervals_of(runs, page_size)


@given(st.sampled_from(PAGE_SIZES), st.data())
def test_it_is_written_as_its_runs_are(page_size: int, data: st.DataObject) -> None:
    numbers = data.draw(words(page_size))
    stream, stretch = stream_of(numbers, page_size), stretch_of(numbers, page_size)
    for runs in (stretch, list(stretch)):
        assert encode(Pages("pc.ram", False, page_size, 0, runs), contents=stream) == stream
    with pytest.raises(StreamError, match=f"the runs take {len(stream)} bytes, {len(stream) - 1} bytes of contents"):
        encode(Pages("pc.ram", False, page_size, 0, stretch), contents=stream[1:])


def test_what_is_written_are_its_words_and_not_the_contents() -> None:
    numbers = [0x1000 | KINDS[0], 0x9000 | KINDS[1], 0x2000 | KINDS[0]]
    others = bytearray(stream_of([number ^ 0x4000 for number in numbers], 4096))
    others[8 + 4096 + 8] = 7  # a fill
    written = encode(Pages("pc.ram", False, 4096, 0, stretch_of(numbers, 4096)), contents=bytes(others))
    assert written == stream_of(numbers, 4096)


@given(st.sampled_from(PAGE_SIZES), PLACES, st.lists(st.integers(-1, 2), max_size=6))
def test_two_bytes_tell_whether_pages_are_consecutive(page_size: int, first: int, steps: list[int]) -> None:
    starts = [first * page_size]
    for step in steps:
        starts.append(starts[-1] + (1 if step == 2 else step) * page_size)
    if starts[0] < 0 or min(starts) < 0 or len({start >> 24 for start in starts}) > 1:
        return  # it is asked only where all above is the same
    fifth, sixth = (bytes(start >> shift & 0xFF for start in starts) for shift in (16, 8))
    expected = all(step in (1, 2) for step in steps)
    assert are_consecutive(fifth, sixth, page_size) == expected
