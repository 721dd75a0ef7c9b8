"""Which pages came over two channels with no SYNC between, held to a model that remembers every page."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qmigrate.capture.epochs import Epochs
from qmigrate.capture.seen import SeenPages

PAGE = 4096
packets = st.lists(st.integers(0, 12), min_size=1, max_size=6)
epochs = st.lists(st.lists(st.lists(packets, max_size=3), min_size=1, max_size=3), max_size=4)


def joined(pages: list[int]) -> list[tuple[int, int]]:
    """As the pages of a packet come: in their order, neighbours as one."""
    cuts = [0, *(index for index, (one, two) in enumerate(pairwise(pages), 1) if two != one + 1), len(pages)]
    return [(pages[one] * PAGE, (pages[two - 1] + 1) * PAGE) for one, two in pairwise(cuts)]


@given(epochs)
def test_copies_are_counted_that_another_channel_has_in_the_same_epoch(course: list[list[list[list[int]]]]) -> None:
    found, seen = Epochs(), SeenPages()
    for number, channels in enumerate(course):
        earlier: set[int] = set()
        for channel, sent in enumerate(channels):
            for pages in sent:
                again = seen.add_intervals(joined(pages), PAGE)
                expected = sorted(earlier & set(pages))
                assert list(found.take(channel, number, "pc.ram", joined(pages), PAGE, again=again)) == expected
                assert list(found.take(channel, number, "pc.rom", joined(pages), PAGE, again=1)) == expected
            earlier |= {page for pages in sent for page in pages}
