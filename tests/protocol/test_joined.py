"""The two ends joined in memory: whatever comes when, both hold the same in the end.

Between them are wires that hold bytes: the main channel, the preempt channel, the way back.  Hypothesis says how much
of a wire is delivered when, what the guest touches, when the package is loaded, when the link is cut (what is on the
wires is lost then) and when it is recovered.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qmigrate.errors import TruncatedError
from qmigrate.format.ram import RamFlag
from qmigrate.format.return_path import Message, RequestPages, RequestPagesId, Shut, encode_message
from qmigrate.protocol.destination import Destination
from qmigrate.protocol.destination_events import BitmapAsked, Event, Loaded, PackageCame, PagesCame, Resumed
from qmigrate.protocol.page_channel import PageChannel
from qmigrate.protocol.page_map import PageMap, PageState
from qmigrate.protocol.pages_to_send import HostPages, Span
from qmigrate.protocol.phases import Phase
from qmigrate.protocol.source import Source, Stopped
from tests import streams

PAGE = streams.PAGE
HUGE = 4 * PAGE
BLOCKS = (HostPages("rom", PAGE, PAGE), HostPages("huge", 3 * HUGE, HUGE), HostPages("pc.ram", 22 * PAGE, PAGE))
PLACES = [(number, page * block.page_size) for number, block in enumerate(BLOCKS) for page in range(block.count)]
COUNTS = st.one_of(st.integers(1, 3 * PAGE), st.just(1 << 20))  # bytes that arrive at once: some, or all
LIVE = (Phase.LISTENING, Phase.RUNNING)


def page_of(block: str, page: int) -> bytes:
    """What the saved guest has there: every third page is zero, no other is like another."""
    if page % 3 == 0:
        return bytes(PAGE)
    return f"{block} {page} ".encode().ljust(16, b".") * (PAGE // 16)


def records_of(span: Span) -> bytearray:
    pages = range(span.first, span.first + span.page_count)
    return bytearray(
        b"".join(
            streams.page(page * PAGE, page_of(span.block, page)) if page % 3 else streams.zero(page * PAGE)
            for page in pages
        )
    )


def pages_of(came: PagesCame) -> Iterator[tuple[int, bytes]]:
    """Where in its block each page goes, and its contents."""
    pages = came.pages
    name_bytes = 1 + len(pages.block) if pages.named else 0
    for run in pages.runs:
        at = run.offset - came.offset + 8 + name_bytes
        name_bytes = 0
        for number in range(run.page_count):
            if at > len(came.view) - 1:  # a run may reach beyond what was read: those come again
                return
            is_page = run.flag == RamFlag.PAGE
            contents = bytes(came.view[at : at + PAGE]) if is_page else bytes([came.view[at]]) * PAGE
            yield run.start + number * PAGE, contents
            at += 8 + PAGE if is_page else 9


@dataclass
class Gathering:
    """A host page that comes in several target pages; one of each channel."""

    place: tuple[int, int] | None = None
    pages: dict[int, bytes] = field(default_factory=dict)


class Guest:
    """The destination's memory: each host page is put in place once it is whole, and only once."""

    def __init__(self) -> None:
        numbered = PageMap.numbered((block.name, block.length, block.page_size) for block in BLOCKS)
        self.pages = PageMap(numbered, bytearray(PageMap.bytes_needed(numbered)))
        self.memory = [bytearray(b"?" * block.length) for block in BLOCKS]
        self.numbers = {block.name: number for number, block in enumerate(BLOCKS)}

    def take(self, came: PagesCame, gathering: Gathering) -> None:
        number = self.numbers[came.pages.block]
        unit = BLOCKS[number].page_size
        for start, contents in pages_of(came):
            place = number, start // unit * unit
            assert gathering.place in (None, place), "another host page is not whole yet"
            gathering.place = place
            gathering.pages[start] = contents
            if len(gathering.pages) * PAGE == unit:
                self._place(*place, b"".join(contents for _, contents in sorted(gathering.pages.items())))
                gathering.place, gathering.pages = None, {}

    def _place(self, number: int, start: int, contents: bytes) -> None:
        assert self.pages.state(number, start) is not PageState.RECEIVED, "a page comes twice after the switch"
        self.memory[number][start : start + len(contents)] = contents
        self.pages.receive(number, start, len(contents))

    def assert_is_the_sources(self) -> None:
        for block, memory in zip(BLOCKS, self.memory, strict=True):
            expected = b"".join(page_of(block.name, page) for page in range(block.length // PAGE))
            assert bytes(memory) == expected, block.name


class Ends(RuleBasedStateMachine):
    """Both, and the wires between."""

    @initialize(preempt=st.booleans(), running=st.booleans())
    def begin(self, preempt: bool, running: bool) -> None:
        """Half of them begin where RUN has been obeyed: most of what can happen comes after it."""
        self.source = Source(BLOCKS, page_size=PAGE, section_id=streams.RAM_ID, at_once=5 * PAGE)
        self.destination = Destination()
        self.guest = Guest()
        self.preempt = preempt
        self.forward, self.urgent, self.back = bytearray(), bytearray(), bytearray()
        self.gathering = [Gathering(), Gathering()]
        self.loads = False  # the package is here, and RUN not obeyed
        self.ended = self.loaded = self.stopped = False
        self.asked: int | None = None  # the block of the last request
        self.cuts = 0
        source = self.source
        self.forward += streams.header() + streams.configuration() + source.open() + source.advise()
        self.forward += source.start() + source.discards() + source.package(streams.devices())
        self._connect_urgent()
        if running:
            self.something_arrives(len(self.forward))
            self.the_package_is_loaded()

    def _connect_urgent(self) -> None:
        self.channel = PageChannel({block.name: block.length for block in BLOCKS}, PAGE)

    # -- the wires

    @rule(count=COUNTS)
    def something_arrives(self, count: int) -> None:
        self.destination.receive_data(_taken(self.forward, count))
        for event in self.destination.events():
            self._take(event)
        self.back += self.destination.data_to_send()

    def _take(self, event: Event) -> None:
        match event:
            case PagesCame():
                self.guest.take(event, self.gathering[0])
            case PackageCame():
                self.destination.listening()
                self.loads = True
            case BitmapAsked(block=block):
                self.destination.send_bitmap(block, self.guest.pages.bitmap(self.guest.numbers[block], PAGE))
            case Resumed():
                self.asked = None
                self.back += self.destination.data_to_send()
                for place in self.guest.pages.requested_missing():
                    self._ask(*place)
            case Loaded(is_postcopy=is_postcopy):
                assert is_postcopy
                self.loaded = True

    @precondition(lambda self: self.preempt and self.destination.phase in LIVE)
    @rule(count=COUNTS)
    def something_arrives_on_the_preempt_channel(self, count: int) -> None:
        self.channel.feed.receive(_taken(self.urgent, count))
        for came in self.channel.events():
            self.guest.take(came, self.gathering[1])

    @rule(count=st.one_of(st.integers(1, 64), st.just(1 << 20)))
    def something_arrives_at_the_source(self, count: int) -> None:
        self.source.receive_data(_taken(self.back, count))
        for event in self.source.events():
            self.stopped |= isinstance(event, Stopped)
        self.forward += self.source.resumed()

    # -- the guest

    @precondition(lambda self: self.destination.phase in (*LIVE, Phase.PAUSED, Phase.RECOVERING))
    @rule(place=st.sampled_from(PLACES))
    def the_guest_touches(self, place: tuple[int, int]) -> None:
        """While it is loaded too (S7); what is asked for while the link is down is asked again after it."""
        if self.guest.pages.request(*place) and self.destination.phase in LIVE:
            self._ask(*place)

    def _ask(self, number: int, start: int) -> None:
        block = BLOCKS[number]
        message: Message = RequestPagesId(start=start, length=block.page_size, block=block.name)
        if number == self.asked:
            message = RequestPages(start=start, length=block.page_size)
        self.asked = number
        self.back += encode_message(message)

    @precondition(lambda self: self.loads)
    @rule()
    def the_package_is_loaded(self) -> None:
        self.loads = False
        self.destination.running()

    # -- the source

    @precondition(lambda self: self.source.phase is Phase.RUNNING and not self.ended)
    @rule(count=st.integers(1, 8))
    def the_source_sends(self, count: int) -> None:
        for _ in range(count):
            if not self.ended:
                self._send_one()

    def _send_one(self) -> None:
        span = self.source.pages.next_in_turn() if self.preempt else self.source.pages.next_span()
        if span is not None:
            self.forward += b"".join(self.source.part(span, records_of(span)))
        elif not self.source.pages.left:
            self.urgent += self.source.end_urgent() if self.preempt else b""
            self.forward += self.source.end()
            self.ended = True

    @precondition(lambda self: self.preempt and self.source.phase is Phase.RUNNING and not self.ended)
    @rule()
    def the_source_sends_what_is_asked_for(self) -> None:
        if (span := self.source.pages.next_requested()) is not None:
            self.urgent += b"".join(self.source.urgent(span, records_of(span)))

    # -- the link

    @precondition(
        lambda self: self.destination.phase in (Phase.RUNNING, Phase.RECOVERING) and not self.loaded and self.cuts < 4
    )
    @rule()
    def the_link_is_cut(self) -> None:
        """Both notice; what has not arrived is lost."""
        self.cuts += 1
        for wire in (self.forward, self.urgent, self.back):
            wire.clear()
        self.destination.receive_eof()
        try:
            for event in self.destination.events():
                self._take(event)
        except TruncatedError:
            pass
        assert not self.loaded
        self.destination.data_to_send()
        self.destination.link_lost()
        self.source.lose()
        self.gathering = [Gathering(), Gathering()]
        self.ended = False

    @precondition(lambda self: self.destination.phase is Phase.PAUSED)
    @rule()
    def the_link_comes_back(self) -> None:
        self.forward += self.source.resume()
        self.destination.recover()
        self._connect_urgent()

    @rule()
    def all_goes_well_for_a_while(self) -> None:
        """What is on the wires arrives, and the next pages are sent and arrive."""
        for _ in range(2):
            if self.destination.phase is not Phase.PAUSED:
                self.something_arrives(len(self.forward) + 1)
            if self.loads:
                self.the_package_is_loaded()
            if self.urgent and self.destination.phase in LIVE:
                self.something_arrives_on_the_preempt_channel(len(self.urgent))
            self.something_arrives_at_the_source(len(self.back) + 1)
            if self.source.phase is Phase.RUNNING and not self.ended:
                self._send_one()
                if self.preempt:
                    self.the_source_sends_what_is_asked_for()

    # -- what must hold

    @invariant()
    def what_is_here_is_right(self) -> None:
        for number, start in PLACES:
            if not self.guest.pages.is_received(number, start):
                continue
            block = BLOCKS[number]
            here = bytes(self.guest.memory[number][start : start + block.page_size])
            first = start // PAGE
            assert here == b"".join(page_of(block.name, first + at) for at in range(block.page_size // PAGE))

    def teardown(self) -> None:
        """Nothing more happens to them: then it ends, and nothing is missing."""
        if not hasattr(self, "source"):
            return
        for _ in range(3 * len(PLACES)):
            if self.destination.phase is Phase.PAUSED:
                self.the_link_comes_back()
            self.all_goes_well_for_a_while()
            if self.loaded and not (self.forward or self.urgent or self.back):
                break
        assert self.loaded
        self.guest.assert_is_the_sources()
        assert self.guest.pages.missing_count == 0
        assert list(self.guest.pages.requested_missing()) == []
        self.destination.finished()
        assert self.destination.phase is Phase.ENDED
        self.destination.send_shut(0)
        self.back += self.destination.data_to_send()
        assert self.back == encode_message(Shut(value=0))
        self.something_arrives_at_the_source(len(self.back))
        assert self.stopped
        assert self.source.is_over


def _taken(wire: bytearray, count: int) -> bytes:
    taken = bytes(wire[:count])
    del wire[:count]
    return taken


TestEnds = Ends.TestCase
TestEnds.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


@given(st.lists(st.integers(0, 40 * PAGE), max_size=12))
def test_a_precopy_in_any_pieces_gives_the_sources_memory(cuts: list[int]) -> None:
    source, destination, guest, gathering = _new_source(), Destination(), Guest(), Gathering()
    said = bytearray(streams.header() + streams.configuration() + source.open() + source.start())
    while (span := source.pages.next_span()) is not None:
        said += b"".join(source.part(span, records_of(span)))
    said += source.finish_ram() + streams.devices() + streams.eof() + streams.devices_described()
    told: list[Event] = []
    for begin, end in pairwise([0, *sorted(min(cut, len(said)) for cut in cuts), len(said)]):
        destination.receive_data(bytes(said[begin:end]))
        for event in destination.events():
            if isinstance(event, PagesCame):
                guest.take(event, gathering)
            told.append(event)
    assert told[-1] == Loaded(is_postcopy=False)
    guest.assert_is_the_sources()


def _new_source() -> Source:
    return Source(BLOCKS, page_size=PAGE, section_id=streams.RAM_ID, at_once=5 * PAGE)
