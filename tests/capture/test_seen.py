"""Which pages were seen, against a plain set."""

from hypothesis import given
from hypothesis import strategies as st

from qmigrate.capture.seen import SeenPages
from qmigrate.format.ram import PageRun, RamFlag

NEAR = st.tuples(st.integers(0, 2000), st.integers(1, 1200))
FAR = st.tuples(st.integers(1 << 40, (1 << 40) + 5), st.integers(1, 3))


@given(st.lists(NEAR | FAR, max_size=20))
def test_pages_seen_again_are_counted_as_by_a_set(added: list[tuple[int, int]]) -> None:
    seen, model = SeenPages(), set[int]()
    for first, count in added:
        pages = set(range(first, first + count))
        assert seen.add(first, count) == len(pages & model)
        model |= pages
        assert seen.count == len(model)


@given(st.lists(st.lists(NEAR | FAR, max_size=8), max_size=5), st.sampled_from([1024, 4096, 65536]))
def test_runs_are_counted_as_their_pages_are(batches: list[list[tuple[int, int]]], page_size: int) -> None:
    by_runs, by_pages = SeenPages(), SeenPages()
    for batch in batches:
        runs = [PageRun(0, RamFlag.PAGE, first * page_size, count) for first, count in batch]
        assert by_runs.add_runs(runs, page_size) == sum(by_pages.add(first, count) for first, count in batch)
        assert by_runs.count == by_pages.count
