"""From an address to a place in a block."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from qmigrate.uffd.pager import FaultQueue, Range
from qmigrate.uffd.userfault import Userfaultfd


@given(st.lists(st.tuples(st.integers(1, 64), st.sampled_from([4096, 1 << 21])), min_size=1, max_size=8), st.randoms())
def test_an_address_is_found_in_its_block_wherever_the_kernel_has_put_that(
    sizes: list[tuple[int, int]], chance: Random
) -> None:
    order = list(range(len(sizes)))
    chance.shuffle(order)
    ranges: dict[int, Range] = {}
    at = 1 << 30
    for number in order:
        pages, page_size = sizes[number]
        ranges[number] = Range(at, pages * page_size, page_size)
        at += pages * page_size + chance.choice([0, 1 << 21])
    queue = FaultQueue(Userfaultfd(-1), [ranges[number] for number in range(len(sizes))])
    for number, (address, length, page_size) in ranges.items():
        for start in {0, length - page_size}:
            assert queue.find(address + start + page_size - 1) == (number, start)
    assert queue.find((1 << 30) - 1) is None
    assert queue.find(at + (1 << 21)) is None
