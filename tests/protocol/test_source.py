"""The source's core, without a socket: alone, and joined with the destination's in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import SequenceError, StreamError
from qmigrate.format.command import DiscardRange, PageSizes, Ping, PostcopyListen, PostcopyRun, encode_command
from qmigrate.format.return_path import (
    Message,
    Pong,
    ReceivedBitmap,
    RequestPages,
    RequestPagesId,
    Shut,
    encode_message,
)
from qmigrate.protocol.destination import Destination
from qmigrate.protocol.destination_events import (
    Advised,
    BitmapAsked,
    BlocksListed,
    Discarded,
    Loaded,
    PackageCame,
    PagesCame,
)
from qmigrate.protocol.page_channel import PageChannel
from qmigrate.protocol.pages_to_send import HostPages, Span
from qmigrate.protocol.phases import Phase
from qmigrate.protocol.source import Ponged, Requested, Resumed, Source, Stopped
from tests import streams

T = TypeVar("T")
PAGE = streams.PAGE
HUGE = 4 * PAGE
BLOCKS = (HostPages("pc.ram", 64 * PAGE, PAGE), HostPages("huge", 8 * HUGE, HUGE), HostPages("rom", PAGE, PAGE))
COUNTS = {block.name: block.length // PAGE for block in BLOCKS}


def new_source(*blocks: HostPages) -> Source:
    return Source(blocks or BLOCKS, page_size=PAGE, section_id=streams.RAM_ID, at_once=5 * PAGE)


def records_of(span: Span) -> bytearray:
    """Pages that say which they are; every third is zero."""
    pages = range(span.first, span.first + span.page_count)
    return bytearray(
        b"".join(streams.zero(page * PAGE) if page % 3 == 0 else streams.page(page * PAGE) for page in pages)
    )


@dataclass
class Joined:
    """Both cores, and what the destination got: how often each page, and all that it was told."""

    source: Source = field(default_factory=new_source)
    destination: Destination = field(default_factory=Destination)
    came: dict[tuple[str, int], int] = field(default_factory=dict)
    told: list[object] = field(default_factory=list)
    heard: list[object] = field(default_factory=list)

    def deliver(self, data: bytes) -> None:
        """To the destination, and its answers back."""
        self.destination.receive_data(data)
        for event in self.destination.events():
            if isinstance(event, PagesCame):
                self._pages(event)
                continue
            self.told.append(event)
            if isinstance(event, PackageCame):
                self.destination.listening()
                self.destination.running()
            if isinstance(event, BitmapAsked):
                self.destination.send_bitmap(event.block, self.bitmap(event.block))
        self.answer(self.destination.data_to_send())

    def _pages(self, event: PagesCame) -> None:
        for run in event.pages.runs:
            for start in range(run.start, run.start + run.page_count * PAGE, PAGE):
                page = event.pages.block, start // PAGE
                self.came[page] = self.came.get(page, 0) + 1

    def bitmap(self, block: str) -> bytes:
        bits = sum(1 << page for name, page in self.came if name == block)
        return bits.to_bytes(-(-COUNTS[block] // 64) * 8, "little")

    def answer(self, data: bytes) -> None:
        self.source.receive_data(data)
        self.heard += self.source.events()

    def ask(self, message: Message) -> None:
        self.answer(encode_message(message))

    def begin(self) -> None:
        """Up to RUN."""
        source = self.source
        opening = streams.header() + streams.configuration()
        self.deliver(
            opening
            + source.open()
            + source.advise()
            + source.start()
            + source.discards()
            + source.package(streams.devices())
        )

    def of(self, kind: type[T]) -> list[T]:
        """What the destination was told of this kind."""
        return [event for event in self.told if isinstance(event, kind)]

    def send_next(self) -> Span | None:
        span = self.source.pages.next_span()
        if span is not None:
            self.deliver(b"".join(self.source.part(span, records_of(span))))
        return span

    def finish(self) -> None:
        while self.send_next():
            pass
        self.deliver(self.source.end())


def all_pages() -> dict[tuple[str, int], int]:
    return {(name, page): 1 for name, count in COUNTS.items() for page in range(count)}


# -- before the switch


def test_the_destination_is_told_what_a_lazy_restore_needs() -> None:
    joined = Joined()
    joined.begin()
    (listed,) = joined.of(BlocksListed)
    assert joined.of(Advised) == [Advised(PageSizes(summary=PAGE | HUGE, target_page_size=PAGE))]
    assert [(block.name, block.used_length, block.page_size) for block in listed.blocks] == [
        ("pc.ram", 64 * PAGE, None),
        ("huge", 8 * HUGE, HUGE),
        ("rom", PAGE, None),
    ]
    # Each block whole, though nothing was sent of it: without a discard 11.1 hangs.
    assert joined.of(Discarded) == [
        Discarded(block.name, (DiscardRange(start=0, length=block.length),)) for block in BLOCKS
    ]
    assert isinstance(joined.told[-1], PackageCame)
    assert joined.heard == [Ponged(1), Ponged(2), Ponged(4)]
    assert joined.source.phase is Phase.RUNNING


def test_the_package_holds_the_devices_as_they_are() -> None:
    joined = Joined()
    joined.begin()
    package = joined.told[-1]
    assert isinstance(package, PackageCame)
    said = map(encode_command, (PostcopyListen(), Ping(token=3), PostcopyRun()))
    listen, ping, run = said
    assert package.data == listen + streams.devices() + ping + run


def test_what_would_be_refused_is_not_said() -> None:
    source = new_source()
    with pytest.raises(SequenceError, match="POSTCOPY_RAM_DISCARD while PRECOPY"):
        source.discards()
    source.advise()
    with pytest.raises(SequenceError, match="POSTCOPY_ADVISE while ADVISED"):
        source.advise()


def test_the_end_is_not_said_before_all_is_sent() -> None:
    joined = Joined()
    joined.begin()
    with pytest.raises(SequenceError, match="are still to be sent"):
        joined.source.end()


def test_a_block_list_of_precopy_names_no_page_sizes() -> None:
    joined = Joined()
    joined.deliver(streams.header() + streams.configuration() + joined.source.start())
    (listed,) = joined.of(BlocksListed)
    assert [block.page_size for block in listed.blocks] == [None] * 3


# -- pages

requests = st.lists(
    st.one_of(
        st.none(),  # send the next
        st.sampled_from(BLOCKS).flatmap(
            lambda block: st.tuples(st.just(block), st.integers(0, block.count - 1), st.integers(1, 2))
        ),
    ),
    max_size=60,
)


@given(requests)
def test_each_page_comes_once_whatever_is_asked_for(moves: list[tuple[HostPages, int, int] | None]) -> None:
    joined = Joined()
    joined.begin()
    for move in moves:
        if move is None:
            joined.send_next()
            continue
        block, page, count = move
        count = min(count, block.count - page)
        ask = RequestPagesId(block=block.name, start=page * block.page_size, length=count * block.page_size)
        joined.ask(ask)
    joined.finish()
    assert joined.came == all_pages()
    assert joined.source.pages.left == 0
    assert joined.told[-1] == Loaded(is_postcopy=True)


@given(requests)
def test_what_is_asked_for_is_sent_next(moves: list[tuple[HostPages, int, int] | None]) -> None:
    joined = Joined()
    joined.begin()
    for move in moves:
        if move is None:
            joined.send_next()
            continue
        block, page, _ = move
        start, each = page * block.page_size, block.page_size // PAGE
        is_here = (block.name, start // PAGE) in joined.came
        joined.ask(RequestPagesId(block=block.name, start=start, length=block.page_size))
        assert joined.heard[-1] == Requested(block.name, start, block.page_size, is_new=not is_here)
        if not is_here:
            assert joined.source.pages.waiting == 1
            assert joined.send_next() == Span(block.name, start // PAGE, each, requested=True)
        assert joined.source.pages.waiting == 0


@given(requests)
def test_each_page_comes_once_over_either_of_two_channels(moves: list[tuple[HostPages, int, int] | None]) -> None:
    joined = Joined()
    joined.begin()
    source, urgent = joined.source, PageChannel({block.name: block.length for block in BLOCKS}, PAGE)

    def answer() -> None:
        while (span := source.pages.next_requested()) is not None:
            assert span.requested
            urgent.feed.receive(b"".join(source.urgent(span, records_of(span))))
        for event in urgent.events():
            joined._pages(event)

    for move in moves:
        if move is None:
            if (span := source.pages.next_in_turn()) is not None:
                assert not span.requested
                joined.deliver(b"".join(source.part(span, records_of(span))))
            continue
        block, page, _ = move
        joined.ask(RequestPagesId(block=block.name, start=page * block.page_size, length=block.page_size))
        answer()
    joined.finish()
    urgent.feed.receive(source.end_urgent())
    urgent.feed.end()
    answer()
    assert joined.came == all_pages()


def test_what_stands_behind_a_page_that_was_asked_for_comes_after_it() -> None:
    joined = Joined()
    joined.begin()
    joined.ask(RequestPagesId(block="pc.ram", start=40 * PAGE, length=PAGE))
    assert [joined.send_next(), joined.send_next()] == [
        Span("pc.ram", 40, 1, requested=True),
        Span("pc.ram", 41, 5),
    ]


def test_a_request_without_a_name_is_for_the_block_before() -> None:
    joined = Joined()
    joined.begin()
    with pytest.raises(StreamError, match="REQ_PAGES has no previous block"):
        joined.ask(RequestPages(start=0, length=PAGE))
    joined = Joined()
    joined.begin()
    joined.ask(RequestPagesId(block="huge", start=0, length=HUGE))
    joined.ask(RequestPages(start=HUGE, length=HUGE))
    assert [joined.send_next(), joined.send_next()] == [
        Span("huge", 0, 4, requested=True),
        Span("huge", 4, 4, requested=True),
    ]


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (RequestPagesId(block="nowhere", start=0, length=PAGE), "a request for pages of 'nowhere'"),
        (RequestPagesId(block="pc.ram", start=1, length=PAGE), "misaligned request: start 0x1"),
        (RequestPagesId(block="pc.ram", start=0, length=0), "misaligned request"),
        (RequestPagesId(block="pc.ram", start=64 * PAGE, length=PAGE), "the block ends at 0x40000"),
        (ReceivedBitmap(block="pc.ram", bitmap_size=8, bitmap=bytes(8)), "a bitmap of 'pc.ram' that was not asked"),
    ],
)
def test_a_message_that_a_source_would_refuse_is_refused(message: Message, error: str) -> None:
    joined = Joined()
    joined.begin()
    with pytest.raises(StreamError, match=error):
        joined.ask(message)
    assert joined.source.pages.waiting == 0


def test_shut_ends_it() -> None:
    joined = Joined()
    joined.begin()
    joined.finish()
    joined.ask(Shut(value=0))
    assert joined.heard[-1] == Stopped(0)
    assert joined.source.is_over


# -- a broken connection


@given(st.integers(0, 40), st.integers(0, 6), requests)
def test_what_had_not_arrived_comes_after_a_recovery(
    before: int, lost: int, moves: list[tuple[HostPages, int, int] | None]
) -> None:
    joined = Joined()
    joined.begin()
    for _ in range(before):
        joined.send_next()
    for _ in range(lost):  # taken to be sent, and lost with the connection
        joined.source.pages.next_span()
    joined.source.lose()
    joined.destination.link_lost()
    joined.destination.recover()
    joined.deliver(joined.source.resume())
    joined.deliver(joined.source.resumed())
    assert joined.heard[-1] == Resumed()
    assert joined.source.phase is joined.destination.phase is Phase.RUNNING
    for move in moves:
        if move is not None:
            joined.ask(RequestPagesId(block=move[0].name, start=move[1] * move[0].page_size, length=move[0].page_size))
        joined.send_next()
    joined.finish()
    assert joined.came == all_pages()


def test_nothing_goes_on_before_all_bitmaps_are_here() -> None:
    joined = Joined()
    joined.begin()
    joined.source.lose()
    joined.source.resume()
    joined.ask(ReceivedBitmap(block="rom", bitmap_size=8, bitmap=bytes(8)))
    assert joined.source.resumed() == b""
    with pytest.raises(StreamError, match="the bitmap has 16 bytes, expected 8"):
        joined.ask(ReceivedBitmap(block="pc.ram", bitmap_size=16, bitmap=bytes(16)))


def test_before_run_a_broken_connection_is_the_end() -> None:
    source = new_source()
    source.advise()
    source.lose()
    with pytest.raises(SequenceError, match="can't be"):
        source.resume()


def messages() -> Iterator[Message]:
    yield Pong(token=3)
    yield RequestPagesId(block="pc.ram", start=PAGE, length=PAGE)
    yield RequestPages(start=2 * PAGE, length=PAGE)
    yield Shut(value=0)


@given(st.data())
def test_any_split_of_the_return_path_gives_the_same_events(data: st.DataObject) -> None:
    said = b"".join(map(encode_message, messages()))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(said)), max_size=8)))
    joined = Joined()
    joined.begin()
    joined.heard.clear()
    for begin, end in zip([0, *cuts], [*cuts, len(said)], strict=True):
        joined.answer(said[begin:end])
    assert joined.heard == [
        Ponged(3),
        Requested("pc.ram", PAGE, PAGE, is_new=True),
        Requested("pc.ram", 2 * PAGE, PAGE, is_new=True),
        Stopped(0),
    ]
