"""Serves a saved guest over a connection: by postcopy, pages on demand and the rest in between; or all of it at once.

The loop is a blocking one in a thread of its own, over the core of ``protocol.source``: what it sends stands in a file,
so it holds no more than one piece.  A page that is asked for waits for the piece that is on its way, and for what lies
in the socket before it: both are kept short.
"""

import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from qmigrate.capture.arriving import ArrivingPages
from qmigrate.capture.saved_guest import SavedGuest
from qmigrate.endpoint.over_time import OverTime
from qmigrate.endpoint.served import Answered, Counts, End, Ended, Moment
from qmigrate.errors import StreamError
from qmigrate.format.stream import EndOfFile, VmDescriptionHeader
from qmigrate.protocol.pages_to_send import HostPages, Span
from qmigrate.protocol.source import LOADED, Ponged, Requested, Resumed, Source, Stopped

__all__ = ["Server"]

_UNSENT: Final = 1 << 17  # bytes that TCP holds unsent before it says that it takes no more
_RECEIVED: Final = 1 << 16
_ANSWERS_A_TURN: Final = 16
_IN_PEACE: Final = 1 << 18  # bytes of pages in one piece that nobody asked for
_IN_HASTE: Final = 1 << 16  # the same where somebody may ask meanwhile, whose page has to go over the same connection
_THINNEST: Final = 16  # a piece has so many times more pages at most, where the one before was of zeros
RESUME_TIMEOUT_MS: Final = 30_000
_HASTE_NS: Final = 5_000_000  # who asked so lately asks again


@dataclass
class _Lane:
    """A connection: what is to be sent over it, and the pages that this is, None where it is something else."""

    out: list[bytes | memoryview] = field(default_factory=list)
    span: Span | None = None


class Server:
    """One saved guest, served to one destination.  Closes neither ``saved`` nor a peer that it is given.

    ``page_sizes``: of each block, the destination's host pages in bytes.  ``on_moment`` is called from the thread that
    serves.
    """

    def __init__(
        self, saved: SavedGuest, page_sizes: Mapping[str, int], *, on_moment: Callable[[Moment], None] | None = None
    ) -> None:
        self.saved = saved
        self.counts = Counts(total=sum(block.used_length // saved.page_size for block in saved.blocks))
        self.answered = Answered()
        self.over_time = OverTime(time.monotonic_ns)
        self.is_switched = False
        self.has_run = False
        """Said by whoever hears of it: the next request is the guest's own."""
        self._core = Source(
            [
                HostPages(block.name, block.used_length, max(page_sizes[block.name], saved.page_size))
                for block in saved.blocks
            ],
            page_size=saved.page_size,
            section_id=saved.section_id,
            footers=saved.footers,
        )
        self._pages = self._core.pages
        self._arriving = saved.index if isinstance(saved.index, ArrivingPages) else None
        if self._arriving is not None and not self._arriving.is_complete:
            self._pages.has = self._arriving.has
        self._stalled = False  # what is asked for is not at hand yet
        self._on_moment = on_moment or _nobody
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._main = _Lane()
        self._urgent: _Lane | None = None
        self._asked: dict[tuple[str, int], int] = {}
        self._heard_ns = 0
        self._thinness = 1
        self._told: set[Moment] = set()
        self._resumes = False
        self._reason: Ended | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._wake)

    @property
    def has_sent_pages(self) -> bool:
        """Has any page been sent, by us or by who served it before?  Without one no guest runs a single instruction."""
        return self._resumes or self._pages.has_taken

    def stop(self) -> None:
        """End it at the next turn; may be called from any thread."""
        os.eventfd_write(self._wake, 1)

    # -- postcopy

    def serve(self, peer: socket.socket, urgent: socket.socket | None = None) -> Ended:
        """By postcopy, from the header to SHUT.  The peer blocks; it is ours until this returns.

        ``urgent``: the preempt channel, over which requested pages go.
        """
        core, saved = self._core, self.saved
        try:
            saved.index.check()  # as long as nothing has begun
        except StreamError as exc:
            return Ended(End.UNREADABLE, str(exc))
        self._main.out = [saved.opening, core.open(), core.advise(), saved.before, core.start(), saved.behind]
        self._main.out += [core.discards(), core.package(saved.devices)]
        return self._pump(peer, self._pieces(), urgent)

    def resume(self, peer: socket.socket, urgent: socket.socket | None = None) -> Ended:
        """A destination that is paused, since its connection to whoever served it broke, us or another who is gone:
        what it has not, it gets from here on.
        """
        if self.is_switched:
            self._core.lose()
        else:
            self._core.adopt()
        self.is_switched = True
        self._main.span = None
        self._asked.clear()  # what still waits asks again
        self._told -= {Moment.RESUMED, Moment.FILLED}
        self._resumes = True
        self._main.out = [self._core.resume()]
        return self._pump(peer, self._pieces_after_bitmaps(), urgent)

    def _pieces(self) -> Iterator[list[bytes | memoryview]]:
        """What goes out once that before it has; nothing for the time being where a piece is empty."""
        if not self.is_switched:
            self.is_switched = True
            self._tell(Moment.SWITCHED)
        if self._urgent is not None:
            self._urgent.out = []
        while self._pages.left:
            span = self._next_span()
            yield [] if span is None else self._core.part(span, self._records(self._main, span))
        self._finish_span(self._main)
        if self._urgent is not None:
            yield from self._until_sent(self._urgent)
            # Before END: after that a destination shuts this channel.
            self._urgent.out = [self._core.end_urgent()]
            yield from self._until_sent(self._urgent)
        self._tell(Moment.FILLED)
        yield [self._core.end()]

    def _next_span(self) -> Span | None:
        is_asked = self._urgent is None and time.perf_counter_ns() - self._heard_ns < _HASTE_NS
        self._pages.at_once = (_IN_HASTE if is_asked else _IN_PEACE) * self._thinness
        return self._pages.next_span() if self._urgent is None else self._pages.next_in_turn()

    @staticmethod
    def _until_sent(lane: _Lane) -> Iterator[list[bytes | memoryview]]:
        while lane.out:
            yield []

    def _pieces_after_bitmaps(self) -> Iterator[list[bytes | memoryview]]:
        while not (said := self._core.resumed()):
            yield []
        self.counts.pages = self.counts.total - self._pages.left_pages
        yield [said]
        while Moment.RESUMED not in self._told:
            yield []
        yield from self._pieces()

    def _records(self, lane: _Lane, span: Span) -> bytearray:
        self._finish_span(lane)
        lane.span = span
        records = self.saved.index.records(span.block, span.first, span.page_count)
        if not span.requested:
            # After pages of zeros mostly come more of them, which are short: as long a piece has more of those.
            self._thinness = min(max(span.page_count * self.saved.page_size // len(records), 1), _THINNEST)
        return records

    def _finish_span(self, lane: _Lane) -> None:
        """The latest one has been sent."""
        span, lane.span = lane.span, None
        if span is None:
            return
        self.counts.pages += span.page_count
        self.over_time.now().pages += span.page_count
        if span.requested:
            self.counts.requested += span.page_count
            asked = self._asked.pop((span.block, span.first * self.saved.page_size), None)
            if asked is not None:
                self.answered.add(time.perf_counter_ns() - asked)
            self._tell(Moment.FIRST_ANSWER)

    # -- the loop

    def _pump(
        self, peer: socket.socket, pieces: Iterator[list[bytes | memoryview]], urgent: socket.socket | None = None
    ) -> Ended:
        """Send, and hear what is said meanwhile, until one of us has had enough."""
        self._reason = None
        self._tell(Moment.CONNECTED)
        self._urgent = None if urgent is None else _Lane()
        poller = self._poller(peer, urgent)
        try:
            waits = False  # for something to be said: there is nothing to send
            while self._reason is None:
                poller.modify(peer, select.POLLIN if waits else select.POLLIN | select.POLLOUT)
                if urgent is not None:
                    poller.modify(urgent, select.POLLOUT if self._has_urgent() else 0)
                ready = self._ready(poller)
                if self._wake in ready:
                    return Ended(End.STOPPED, "it was told to stop")
                waits &= not self._hear_of_index(poller, ready)
                state = ready.get(peer.fileno(), 0)
                if state & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    self._hear(peer)
                    waits = False
                if urgent is not None:
                    urgent_state = ready.get(urgent.fileno(), 0)
                    if urgent_state or self._has_urgent():  # what was asked for just now does not wait for a turn
                        waits = False
                        urgent = self._turn_of(urgent, urgent_state, poller)
                if state & select.POLLOUT and not self._main.out:
                    self._main.out = next(pieces, [])
                    waits = not self._main.out
                if self._main.out:
                    self._send(self._main, peer)
        except StreamError as exc:
            return Ended(End.UNREADABLE, str(exc))
        except OSError as exc:
            self._hear_the_rest(peer)
            return self._reason or Ended(End.BROKEN, exc.strerror or str(exc))
        return self._reason

    def _poller(self, *peers: socket.socket | None) -> select.poll:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        if self._arriving is not None and self._arriving.news is not None:
            poller.register(self._arriving.news, select.POLLIN)
        for each in peers:
            if each is not None:
                _prepare(each)
                poller.register(each, 0)
        return poller

    def _ready(self, poller: select.poll) -> dict[int, int]:
        """What can go on, once anything can.  Raises ``OSError`` where a destination is silent that never is.

        One that was paused answers at once when it is connected anew; one that is served may say nothing for ever.
        """
        is_awaited = self._resumes and Moment.RESUMED not in self._told
        ready = dict(poller.poll(RESUME_TIMEOUT_MS if is_awaited else None))
        if not ready:
            raise OSError("the destination does not answer on its new connection")
        return ready

    def _has_urgent(self) -> bool:
        """Is there anything for the preempt channel?  Before the package is sent nothing is."""
        assert self._urgent is not None
        return bool(self._urgent.out) or (self.is_switched and self._pages.waiting > 0 and not self._stalled)

    def _hear_of_index(self, poller: select.poll, ready: Mapping[int, int]) -> bool:
        """Are more pages at hand?"""
        index = self._arriving
        if index is None or index.news is None or index.news not in ready:
            return False
        news = index.news
        index.hear()
        self._stalled = False
        if index.is_complete:
            poller.unregister(news)
            self._pages.has = None
            self._tell(Moment.INDEXED)
        return True

    def _turn_of(self, urgent: socket.socket, state: int, poller: select.poll) -> socket.socket | None:
        """Send on the preempt channel; None once it is closed, mostly as all has come.

        Else main will do; but not for a page that was under way.
        """
        if not state & (select.POLLHUP | select.POLLERR):
            self._send_urgent(urgent)
            return urgent
        poller.unregister(urgent)
        lane, self._urgent = self._urgent, None
        if lane is not None and lane.span is not None:
            raise OSError("the preempt channel broke")
        if lane is not None:
            lane.out.clear()
        return None

    def _send_urgent(self, peer: socket.socket) -> None:
        """Pages that were asked for, some at once, while the socket takes them."""
        lane = self._urgent
        assert lane is not None
        for _ in range(_ANSWERS_A_TURN):
            if not lane.out and (span := self._pages.next_requested()) is not None:
                lane.out = self._core.urgent(span, self._records(lane, span))
            if not lane.out:
                self._stalled = self._pages.waiting > 0
                return
            self._send(lane, peer)
            if lane.out:
                return
            self._finish_span(lane)
            if not self._pages.waiting:
                return

    def _send(self, lane: _Lane, peer: socket.socket) -> None:
        try:
            sent = peer.sendmsg(lane.out, [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        self.counts.sent_bytes += sent
        self.over_time.now().sent_bytes += sent
        while lane.out and sent >= len(lane.out[0]):
            sent -= len(lane.out.pop(0))
        if sent:
            lane.out[0] = memoryview(lane.out[0])[sent:]

    def _hear_the_rest(self, peer: socket.socket) -> None:
        """What it said before the connection broke may be that its devices are loaded."""
        with suppress(OSError, StreamError):
            while self._hear(peer):
                pass

    def _hear(self, peer: socket.socket) -> bool:
        """What lies there; was there anything?"""
        try:
            data = peer.recv(_RECEIVED, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if data:
            self._core.receive_data(data)
        else:
            self._core.receive_eof()
        try:
            for event in self._core.events():
                self._heard(event)
        except StreamError as exc:  # what it says can't be understood: a QEMU source pauses then
            self._reason = Ended(End.BROKEN, f"the destination says what can't be: {exc}")
        if not data and self._reason is None:
            self._reason = Ended(End.BROKEN, "the destination closed the connection")
        return bool(data)

    def _heard(self, event: object) -> None:
        match event:
            case Requested(block=block, start=start, is_new=is_new):
                self.counts.requests += 1
                self.over_time.now().requests += 1
                self._tell(Moment.SIGN if self.has_run else Moment.FIRST_REQUEST)
                self._heard_ns = time.perf_counter_ns()
                self._stalled = False
                if is_new:
                    self._asked[block, start] = self._heard_ns
            case Ponged(token=token) if token == LOADED:
                self._tell(Moment.LOADED)
            case Resumed():
                self._tell(Moment.RESUMED)
            case Stopped(value=0) if not self._pages.left:
                self._reason = Ended(End.DONE)
            case Stopped(value=value):
                self._reason = Ended(
                    End.REFUSED, f"the destination ended with {value}, {self._pages.left} pages missing"
                )

    def _tell(self, moment: Moment) -> None:
        if moment not in self._told:
            self._told.add(moment)
            self._on_moment(moment)

    # -- precopy

    def send(self, peer: socket.socket) -> Ended:
        """By precopy: all pages once, then the devices.  The guest runs when all is there."""
        core, saved = self._core, self.saved
        self._main.out = [saved.opening, core.open(), saved.before, core.start()]
        return self._pump(peer, self._all())

    def _all(self) -> Iterator[list[bytes | memoryview]]:
        core, saved = self._core, self.saved
        while self._pages.left:
            span = self._pages.next_span()
            yield [] if span is None else core.part(span, self._records(self._main, span))
        self._finish_span(self._main)
        self._tell(Moment.FILLED)
        self.is_switched = True
        description = saved.description or VmDescriptionHeader(length=0).build()
        yield [core.finish_ram(), saved.behind, saved.devices, EndOfFile().build(), description]


def _prepare(peer: socket.socket) -> None:
    """A requested page waits for all that lies in the socket before it."""
    if peer.family in (socket.AF_INET, socket.AF_INET6):
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)


def _nobody(_: Moment) -> None:
    """To whom nothing is told."""
