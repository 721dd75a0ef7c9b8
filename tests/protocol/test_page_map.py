"""The page map against a model: a set for each of S13's maps."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from qmigrate.protocol.page_map import PageMap, PageState

TARGET = 4096
BLOCKS = PageMap.numbered([("pc.ram", 70 * 4096, 4096), ("huge", 4 << 14, 1 << 14), ("rom", 4096, 4096)])
PLACES = [(number, page * block.page_size) for number, block in enumerate(BLOCKS) for page in range(block.page_count)]


@dataclass
class Model:
    """As the text of 2014 has it."""

    received: set[tuple[int, int]] = field(default_factory=set)
    requested: set[tuple[int, int]] = field(default_factory=set)

    def state(self, place: tuple[int, int]) -> PageState:
        if place in self.received:
            return PageState.RECEIVED
        return PageState.REQUESTED if place in self.requested else PageState.MISSING


class Pages(RuleBasedStateMachine):
    """Before LISTEN pages come and are discarded; after it they come and are requested."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = bytearray(PageMap.bytes_needed(BLOCKS))
        self.listener = PageMap(BLOCKS, self.buffer)
        self.pager = PageMap(BLOCKS, self.buffer, next_data=self.next_data)  # as over a sparse file
        self.model = Model()
        self.listens = False

    def next_data(self, at: int) -> int:
        """A hole is what holds nothing but zeros."""
        return next((place for place in range(at, len(self.buffer)) if self.buffer[place]), len(self.buffer))

    @rule(place=st.sampled_from(PLACES), count=st.integers(1, 9))
    def receive(self, place: tuple[int, int], count: int) -> None:
        block, start = place
        size = BLOCKS[block].page_size
        count = min(count, BLOCKS[block].page_count - start // size)
        self.listener.receive(block, start, count * size)
        self.model.received |= {(block, start + page * size) for page in range(count)}

    @rule(place=st.sampled_from(PLACES))
    def request(self, place: tuple[int, int]) -> None:
        self.listens = True
        assert self.pager.request(*place) is (self.model.state(place) is PageState.MISSING)
        if place not in self.model.received:
            self.model.requested.add(place)

    @rule(place=st.sampled_from(PLACES), count=st.integers(1, 9))
    def discard(self, place: tuple[int, int], count: int) -> None:
        if self.listens:
            return
        block, start = place
        size = BLOCKS[block].page_size
        count = min(count, BLOCKS[block].page_count - start // size)
        gone = {(block, start + page * size) for page in range(count)}
        assert self.listener.discard(block, start, count * size) == len(gone & self.model.received)
        self.model.received -= gone

    @invariant()
    def is_as_the_model_says(self) -> None:
        for place in PLACES:
            assert self.pager.state(*place) is self.model.state(place)
        for each in (self.listener, self.pager):
            assert each.missing_count == len(PLACES) - len(self.model.received)
            assert list(each.requested_missing()) == sorted(self.model.requested - self.model.received)

    @invariant()
    def bitmaps_tell_what_came(self) -> None:
        for number, block in enumerate(BLOCKS):
            bitmap = self.listener.bitmap(number, TARGET)
            assert bitmap == self.pager.bitmap(number, TARGET)
            targets = block.length // TARGET
            assert len(bitmap) == -(-targets // 64) * 8
            for page in range(len(bitmap) * 8):
                host = page * TARGET // block.page_size * block.page_size
                expected = page < targets and (number, host) in self.model.received
                assert bool(bitmap[page // 8] >> page % 8 & 1) is expected


TestPages = Pages.TestCase

MISSING, REQUESTED, RECEIVED = PageState.MISSING, PageState.REQUESTED, PageState.RECEIVED
# fmt: off
TURNS = {  # the state before, what happens: the state after, and what the map says to it
    (MISSING,   "receive"): (RECEIVED,  None),
    (MISSING,   "request"): (REQUESTED, True),
    (MISSING,   "discard"): (MISSING,   0),
    (REQUESTED, "receive"): (RECEIVED,  None),
    (REQUESTED, "request"): (REQUESTED, False),
    (RECEIVED,  "receive"): (RECEIVED,  None),
    (RECEIVED,  "request"): (RECEIVED,  False),
    (RECEIVED,  "discard"): (MISSING,   1),
}
# fmt: on


@pytest.mark.parametrize("place", [(0, 69 * 4096), (1, 1 << 14), (2, 0)])
@pytest.mark.parametrize(("before", "what"), TURNS)
def test_each_page_takes_the_four_transitions_and_no_other(
    before: PageState, what: str, place: tuple[int, int]
) -> None:
    pages = PageMap(BLOCKS, bytearray(PageMap.bytes_needed(BLOCKS)))
    block, start = place
    size = BLOCKS[block].page_size
    if before is REQUESTED:
        pages.request(block, start)
    if before is RECEIVED:
        pages.receive(block, start, size)
    assert pages.state(block, start) is before
    said = pages.request(block, start) if what == "request" else getattr(pages, what)(block, start, size)
    assert (pages.state(block, start), said) == TURNS[before, what]
    others = [other for other in PLACES if other != place]
    assert {pages.state(*other) for other in others} == {MISSING}


@given(st.integers(0, 69), st.integers(1, 70))
def test_any_received_looks_at_the_range_alone(page: int, count: int) -> None:
    pages = PageMap(BLOCKS, bytearray(PageMap.bytes_needed(BLOCKS)))
    pages.receive(0, page * 4096, 4096)
    count = min(count, 70 - page)
    assert pages.any_received(0, page * 4096, count * 4096)
    assert not pages.any_received(0, 0, page * 4096) if page else True
    assert not pages.any_received(1, 0, 1 << 14)
