"""What stands for the guest's work."""

from collections import Counter
from itertools import islice

import pytest

from qmigrate.cli import receive
from qmigrate.uffd.memory import BlockMemory
from qmigrate.uffd.toucher import PATTERNS, Histogram, Place, Toucher, Workload, places

SIZES = [(64 * 4096, 4096), (3 * 4096, 4096), (2 << 21, 1 << 21)]
PAGES = {Place(block, start) for block, (length, size) in enumerate(SIZES) for start in range(0, length, size)}
TIMEOUT_S = 60.0


def first(count: int, **workload: object) -> list[Place]:
    return list(islice(places(Workload(**workload), SIZES), count))  # type: ignore[arg-type]  # a test's own words


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_stays_in_memory_and_comes_to_every_page(pattern: str) -> None:
    assert set(first(20_000, pattern=pattern)) == PAGES


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_same_seed_touches_the_same_pages(pattern: str) -> None:
    assert first(500, pattern=pattern, seed=3) == first(500, pattern=pattern, seed=3)
    if pattern != "sequential":
        assert first(500, pattern=pattern, seed=3) != first(500, pattern=pattern, seed=4)


def test_sequential_goes_from_the_first_page_to_the_last() -> None:
    assert first(len(PAGES), pattern="sequential") == sorted(PAGES)


def test_zipf_comes_to_few_pages_often() -> None:
    often = Counter(first(10_000, pattern="zipf")).most_common(5)
    assert sum(count for _, count in often) > 3000


def test_most_touches_fall_into_the_working_set() -> None:
    often = Counter(first(10_000, pattern="working-set")).most_common(len(PAGES) // 10)
    assert sum(count for _, count in often) > 8500


def test_a_trace_is_touched_as_it_was_recorded_and_once() -> None:
    trace = (Place(2, 0), Place(0, 4096), Place(2, 0))
    assert first(10, trace=trace) == list(trace)


def test_no_memory_is_touched_where_there_is_none() -> None:
    assert list(places(Workload(), [])) == []


def test_the_command_offers_the_patterns_that_there_are() -> None:
    assert receive.PATTERNS == PATTERNS


def test_buckets_are_qemus() -> None:
    histogram = Histogram()
    for duration_us in (0, 1, 2, 3, 4, 1023, 1024, 1 << 40):
        histogram.add(duration_us * 1000)
    assert histogram.counts == [2, 2, 1, 0, 0, 0, 0, 0, 0, 1, 1, *[0] * 12, 1]
    assert histogram.count == 8
    assert histogram.median_bucket() == 1


def test_histograms_add_up() -> None:
    one, other = Histogram(), Histogram()
    one.add(5000)
    other.add(9_000_000)
    one.join(other)
    assert (one.count, one.longest_ns, one.total_ns) == (2, 9_000_000, 9_005_000)


def test_a_toucher_writes_what_share_it_was_told_to_and_counts() -> None:
    block = BlockMemory.create("pc.ram", 8 * 4096, 4096)
    try:
        trace = tuple(Place(0, page * 4096) for page in range(8)) * 50
        toucher = Toucher(
            Workload(trace=trace, writes=0.5, seed=1),
            [block.address],
            [(8 * 4096, 4096)],
            lambda place: place.start == 0,
        )
        toucher.start()
        toucher.join(TIMEOUT_S)
        assert not toucher.is_alive()
        assert toucher.touches == 400
        assert 120 < toucher.writes < 280
        assert toucher.histogram.count == 50
    finally:
        block.close()


def test_a_toucher_that_waits_for_its_rate_stops_when_it_is_told_to() -> None:
    block = BlockMemory.create("pc.ram", 4096, 4096)
    try:
        toucher = Toucher(Workload(rate=0.001), [block.address], [(4096, 4096)], lambda _: False)
        toucher.start()
        toucher.stop()
        toucher.join(TIMEOUT_S)
        assert not toucher.is_alive()
        assert toucher.touches <= 1
    finally:
        block.close()
