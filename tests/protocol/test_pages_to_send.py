"""Which page is sent next: by itself, without a destination to ask."""

from collections.abc import Iterator

from qmigrate.format.command import DiscardRange
from qmigrate.protocol.pages_to_send import HostPages, PagesToSend, Span
from tests import streams

PAGE = streams.PAGE
HUGE = 4 * PAGE
RAM = HostPages("pc.ram", 16 * PAGE, PAGE)
SHARED = HostPages("huge", 3 * HUGE, HUGE)
ODD = HostPages("odd", 2 * HUGE + PAGE, HUGE)  # its last host page reaches beyond its end


def pages(*blocks: HostPages, at_once: int = 5 * PAGE) -> PagesToSend:
    return PagesToSend({block.name: block for block in blocks}, page_size=PAGE, at_once=at_once)


def all_spans(sending: PagesToSend) -> Iterator[Span]:
    return iter(sending.next_span, None)


def test_all_pages_are_sent_once_in_their_order() -> None:
    sending = pages(RAM, SHARED)
    assert (sending.left, sending.left_pages, sending.has_taken) == (19, 28, False)
    assert list(all_spans(sending)) == [
        *(Span("pc.ram", 0, 5), Span("pc.ram", 5, 5), Span("pc.ram", 10, 5), Span("pc.ram", 15, 1)),
        *(Span("huge", 0, 4), Span("huge", 4, 4), Span("huge", 8, 4)),
    ]
    assert (sending.left, sending.left_pages, sending.has_taken) == (0, 0, True)


def test_huge_pages_are_sent_whole_and_nothing_behind_the_end_of_a_block() -> None:
    assert list(all_spans(pages(ODD))) == [Span("odd", 0, 4), Span("odd", 4, 4), Span("odd", 8, 1)]


def test_each_block_is_discarded_whole() -> None:
    sending = pages(RAM, ODD)
    assert [list(sending.to_discard(block)) for block in (RAM, ODD)] == [
        [DiscardRange(start=0, length=16 * PAGE)],
        [DiscardRange(start=0, length=3 * HUGE)],
    ]


def test_what_is_asked_for_twice_is_sent_once() -> None:
    sending = pages(RAM)
    assert sending.ask("pc.ram", 3 * PAGE, 2 * PAGE)
    assert not sending.ask("pc.ram", 4 * PAGE, PAGE)
    assert sending.waiting == 2
    assert [sending.next_requested(), sending.next_requested(), sending.next_requested()] == [
        *(Span("pc.ram", 3, 1, requested=True), Span("pc.ram", 4, 1, requested=True), None),
    ]
    assert not sending.ask("pc.ram", 4 * PAGE, PAGE)


def test_what_is_not_at_hand_waits_and_keeps_nothing_else_from_being_sent() -> None:
    sending = pages(RAM)
    at_hand = {2, 3}
    sending.has = lambda _name, first, count, _is_wanted: set(range(first, first + count)) <= at_hand
    for page in (7, 2, 8):
        assert sending.ask("pc.ram", page * PAGE, PAGE)
    assert sending.next_requested() == Span("pc.ram", 2, 1, requested=True)
    assert (sending.next_requested(), sending.waiting) == (None, 2)
    at_hand |= {8}
    assert sending.next_requested() == Span("pc.ram", 8, 1, requested=True)
    assert sending.waiting == 1


def test_what_a_bitmap_lacks_is_to_be_sent_again_whatever_was_sent() -> None:
    sending = pages(RAM, SHARED)
    list(all_spans(sending))
    sending.ask_anew()
    bits = (1 << 16) - 1 & ~(1 << 3 | 1 << 9)
    sending.arrived("pc.ram", bits.to_bytes(8, "little"))
    sending.arrived("huge", ((1 << 12) - 1 & ~(0xF << 4)).to_bytes(8, "little"))
    assert (sending.left, sending.left_pages) == (3, 6)
    assert sorted(all_spans(sending)) == [Span("huge", 4, 4), Span("pc.ram", 3, 1), Span("pc.ram", 9, 1)]
