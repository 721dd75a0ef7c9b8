"""Where a pass ends."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.capture.passes import PassCounter

PAGE = 4096


def passes_of(*runs: tuple[int, int, int]) -> int:
    """How many passes runs make that come one by one: (block, first page, page count)."""
    counter = PassCounter()
    for block, first, count in runs:
        counter.take(block, [(first * PAGE, (first + count) * PAGE)])
    return counter.count


@pytest.mark.parametrize(
    ("runs", "passes"),
    [
        ([], 0),
        ([(0, 0, 4), (0, 4, 1), (0, 9, 1), (1, 0, 1)], 1),
        ([(0, 0, 4), (0, 3, 1)], 2),  # the last page again
        ([(0, 0, 4), (0, 1, 1)], 2),
        ([(0, 0, 4), (1, 0, 1), (0, 9, 1)], 2),  # an earlier block
        ([(0, 5, 1), (0, 5, 1), (0, 5, 1)], 3),
    ],
)
def test_going_back_opens_the_next_pass(runs: list[tuple[int, int, int]], passes: int) -> None:
    assert passes_of(*runs) == passes


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)), min_size=1), st.data())
def test_it_does_not_depend_on_where_runs_were_cut_or_how_many_come_at_once(
    runs: list[tuple[int, int]], data: st.DataObject
) -> None:
    whole = passes_of(*((0, first, count) for first, count in runs))
    pages = [(0, page, 1) for first, count in runs for page in range(first, first + count)]
    assert passes_of(*pages) == whole
    counter = PassCounter()
    cuts = sorted(data.draw(st.sets(st.integers(1, len(runs)))))
    for begin, end in pairwise([0, *cuts, len(runs)]):
        if begin < end:
            counter.take(0, [(first * PAGE, (first + count) * PAGE) for first, count in runs[begin:end]])
    assert counter.count == whole
