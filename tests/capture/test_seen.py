"""Which pages were seen, against a plain set."""

import random
import tracemalloc
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.capture.seen import SeenPages

NEAR = st.tuples(st.integers(0, 2000), st.integers(1, 1200))
SPARSE = st.integers(0, 1 << 48).map(lambda page: (page, 1))
FAR = st.tuples(st.integers(1 << 40, (1 << 40) + 5), st.integers(1, 3))


@given(st.lists(NEAR | FAR | SPARSE, max_size=20))
def test_pages_seen_again_are_counted_as_by_a_set(added: list[tuple[int, int]]) -> None:
    seen, model = SeenPages(), set[int]()
    for first, count in added:
        pages = set(range(first, first + count))
        assert seen.add(first, count) == len(pages & model)
        model |= pages
        assert seen.count == len(model)


@given(st.lists(st.lists(NEAR | FAR, max_size=8), max_size=5), st.sampled_from([1024, 4096, 65536]))
def test_intervals_are_counted_as_their_pages_are(batches: list[list[tuple[int, int]]], page_size: int) -> None:
    by_intervals, by_pages = SeenPages(), SeenPages()
    for batch in batches:
        intervals = [(first * page_size, (first + count) * page_size) for first, count in batch]
        again = sum(by_pages.add(first, count) for first, count in batch)
        assert by_intervals.add_intervals(intervals, page_size) == again
        assert by_intervals.count == by_pages.count


@given(st.lists(NEAR | FAR | SPARSE, max_size=20), st.lists(NEAR | FAR | SPARSE, max_size=20))
def test_pages_within_ranges_are_counted_as_by_a_set(
    added: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    seen, model = SeenPages(), set[int]()
    for first, count in added:
        seen.add(first, count)
        model |= set(range(first, first + count))
    wanted = sorted({page for first, count in asked for page in range(first, first + count)})
    ranges: list[list[int]] = []
    for page in wanted:
        if ranges and ranges[-1][1] == page:
            ranges[-1][1] += 1
        else:
            ranges.append([page, page + 1])
    assert seen.within(ranges) == len(model & set(wanted))
    assert seen.within([(0, 1 << 62)]) == seen.count == len(model)


def scattered(count: int, below: int) -> Iterable[tuple[int, int]]:
    return ((page, 1) for page in random.Random(1).sample(range(below), count))


# A ZERO page is a record of 9 bytes, 72 bits.
@pytest.mark.parametrize(
    ("added", "bits_a_page"),
    [
        pytest.param(((first, 500) for first in range(0, 10_000_000, 500)), 1.5, id="as a source sends them"),
        pytest.param(scattered(100_000, 100_000), 8, id="all, in the order of a postcopy"),
        pytest.param(((page << 20, 1) for page in range(40_000)), 100, id="one here, one there"),
        pytest.param(scattered(40_000, 1 << 48), 110, id="anywhere"),
        pytest.param(((page << 13, 127) for page in range(400)), 80, id="nearly many of each chunk"),
        pytest.param(((page << 13, 128) for page in range(400)), 90, id="just as many of each chunk"),
        pytest.param((((page & 0x3FF) << 13 | page >> 10 << 3, 1) for page in range(60_000)), 100, id="by turns"),
    ],
)
def test_memory_follows_the_pages_that_were_seen(added: Iterable[tuple[int, int]], bits_a_page: float) -> None:
    tracemalloc.start()
    try:
        seen = SeenPages()
        for first, count in added:
            assert not seen.add(first, count)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 8 * peak / seen.count < bits_a_page


def test_pages_by_their_numbers_are_found_again_when_there_are_many() -> None:
    seen, pages = SeenPages(), random.Random(3).sample(range(0, 1 << 30, 17), 30_000)
    assert sum(seen.add(page, 1) for page in pages) == 0
    assert sum(seen.add(page, 1) for page in random.Random(4).sample(pages, 30_000)) == 30_000
    # All chunks change to bits: what was there by number is still there.
    chunk = pages[0] >> 13 << 13
    assert seen.add(chunk, 1 << 13) == sum(1 for page in pages if page >> 13 == chunk >> 13)
    assert seen.count == 30_000 + (1 << 13) - sum(1 for page in pages if page >> 13 == chunk >> 13)
