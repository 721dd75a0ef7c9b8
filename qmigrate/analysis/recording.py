"""The story of a recording, in the order in which things happened: what each connection is, what was said on it
both ways, the phases of a postcopy, and each page request with its answer.

It is told from the recording's frames as they come, so it can be followed while the tap still writes.
"""

from collections.abc import Generator, Iterator
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from qmigrate.analysis.payload import payload
from qmigrate.analysis.requests import PageRequest, Requests
from qmigrate.analysis.story import ChannelStory, Flow, Moment, Phase
from qmigrate.capture.frames import Closed, Direction, Frame, Opened, Stopped
from qmigrate.capture.recording import Recording
from qmigrate.errors import NoStreamError, StreamError, TruncatedError
from qmigrate.format.channel import Channel, ChannelKind, How, by_order, classify
from qmigrate.format.command import (
    Command,
    OpenReturnPath,
    Packaged,
    PostcopyRamDiscard,
    PostcopyRun,
    RecvBitmap,
    SwitchoverStart,
)
from qmigrate.format.entry import Configuration, Entry, RamPage
from qmigrate.format.feed import Feed
from qmigrate.format.ram import BlockList, Pages
from qmigrate.format.ram_section import RamSection
from qmigrate.format.return_path import (
    Message,
    ReceivedBitmap,
    RequestPages,
    RequestPagesId,
    ResumeAck,
    ReturnPathEntry,
    Shut,
    read_return_path,
)
from qmigrate.format.stream import EndOfFile, FileHeader, SectionHeader, SectionPart, SectionType
from qmigrate.format.stretch import intervals_of
from qmigrate.format.walk import Walker

__all__ = ["RecordingStory"]

MOST_KEPT: Final = 100_000
"""Moments, and requests, that are kept; a hostile recording may have any number."""

_PIECE: Final = 1 << 16


_Parser: TypeAlias = Generator["Entry | ReturnPathEntry | Channel | None", None, None]


@dataclass(slots=True)
class _Stream:
    """One direction of a connection while it is read."""

    story: ChannelStory
    is_forward: bool
    feed: Feed = field(default_factory=lambda: Feed(window=_PIECE, grows=True))
    parser: _Parser | None = None
    ended: bool = False
    in_end: bool = False
    group: Moment | None = None
    """Things that come by the thousand, which are told together."""


class RecordingStory:
    """What ``recording`` tells, as far as it was read.  ``advance()`` reads on; it can be called again later."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.channels: list[ChannelStory] = []
        self.phases: list[Phase] = []
        self.requests = Requests()
        self.timeline: list[Moment] = []
        self.asked: list[PageRequest] = []
        self.left_out = 0
        """How many moments and requests were not kept."""
        self.flow = Flow()
        self.last_ns = 0
        self.has_stream = False
        """Did a migration stream begin on any connection?"""
        self._streams: list[tuple[_Stream, _Stream]] = []
        self._walker: Walker | None = None
        self._switched = False
        self._main: int | None = None
        self._first_main: ChannelStory | None = None
        self._answering: set[int] = set()  # connections that have a return path, whether or not it is used
        self._now = 0
        self._told: list[Moment] = []

    def read(self) -> "RecordingStory":
        """All of it, to the end of a recording that is not growing."""
        for _ in self.advance():
            pass
        self.recording.finish()
        for _ in self.finish():
            pass
        return self

    def advance(self) -> Iterator[Moment]:
        """What is new, moment by moment."""
        for frame in self.recording.advance():
            time_ns = frame.monotonic_ns - self.recording.header.monotonic_ns
            self._now = self.last_ns = max(time_ns, self._now)  # a clock that goes back is not the tap's
            try:
                self._frame(frame)
            except StreamError as exc:  # its bytes are gone: the file was cut a moment ago
                self.recording.fault = exc
            yield from self._tell_on()

    def finish(self) -> Iterator[Moment]:
        """Nothing more will come: connections whose end was not recorded end here."""
        for forward, back in self._streams:
            self._end(forward)
            self._end(back)
        if self.phases and self.phases[-1].end_ns is None:
            self.phases[-1].end_ns = self.last_ns
        yield from self._tell_on()

    # -- frames

    def _frame(self, frame: Frame) -> None:
        match frame.body:
            case Opened() as opened:
                self._opened(frame.connection, opened)
            case Closed() as closed:
                self._closed(frame.connection, closed)
            case Stopped(reason=reason):
                self._moment(0, "", "recording stopped", {"reason": reason})
            case None:
                self._data(frame)

    def _opened(self, number: int, opened: Opened) -> None:
        unseen = Channel(kind=ChannelKind.UNKNOWN, known_by=How.NOTHING, reason="nothing was sent")
        story = ChannelStory(number, opened.peer, self._now, unseen)
        self.channels.append(story)
        pair = (_Stream(story, True), _Stream(story, False))
        for stream in pair:
            stream.parser = self._parse(stream)
        self._streams.append(pair)
        self._moment(number, "", "opened", {"peer": opened.peer} if opened.peer else {})

    def _closed(self, number: int, closed: Closed) -> None:
        for stream in self._streams[number]:
            self._end(stream)
        story = self.channels[number]
        story.closed_ns, story.error = self._now, closed.error
        details: dict[str, Any] = {"forward_bytes": closed.forward_bytes, "return_bytes": closed.return_bytes}
        self._moment(number, "", "closed", details | ({"error": closed.error} if closed.error else {}))
        if number == self._main:
            if self._phase_name in ("postcopy", "recovery"):
                self._phase("paused")
            elif self.phases and self.phases[-1].end_ns is None:
                self.phases[-1].end_ns = self._now

    def _data(self, frame: Frame) -> None:
        is_forward = frame.direction is Direction.FORWARD
        stream = self._streams[frame.connection][0 if is_forward else 1]
        self.flow.add(self._now, frame.length, is_forward=is_forward)
        if is_forward:
            stream.story.forward_bytes += frame.length
        else:
            stream.story.return_bytes += frame.length
        at, left = frame.offset, frame.length
        while left and not stream.ended:
            space = stream.feed.space()[:left]
            count = self.recording.read_into(space, at)
            stream.feed.received(count)
            at, left = at + count, left - count
            self._run(stream)

    def _end(self, stream: _Stream) -> None:
        stream.feed.end()
        self._run(stream)
        self._tell_group(stream)

    def _run(self, stream: _Stream) -> None:
        """Until it needs more bytes."""
        if stream.ended or stream.parser is None:
            return
        try:
            for item in stream.parser:
                if item is None:
                    return
                if isinstance(item, ReturnPathEntry):
                    self._message(stream, item.message)
                elif isinstance(item, Entry):
                    self._entry(stream, item)
        except (StreamError, NoStreamError) as exc:
            way = "forward" if stream.is_forward else "return"
            stream.story.faults.append(f"{way}: {exc}")
            self._tell_group(stream)
            self._moment(stream.story.number, way, "broken off", {"reason": str(exc)})
        stream.ended = True
        stream.parser = None

    # -- what is on a stream

    def _parse(self, stream: _Stream) -> _Parser:
        """First what it is, then what it says."""
        channel = yield from classify(stream.feed, blocks=self._blocks)
        story = stream.story
        others = self._mains_before(story.number) if stream.is_forward else [story.forward]
        if stream.is_forward or story.number in self._answering:
            channel = by_order(channel, is_forward=stream.is_forward, others=others)
        if not channel.is_silent:
            self._classified(stream, channel)
        yield from self._read(stream, channel)

    def _mains_before(self, number: int) -> list[Channel]:
        """The first connection known to be main, where it is before this one: all that ``by_order`` asks for."""
        first = self._first_main
        return [first.forward] if first is not None and first.number < number else []

    def _classified(self, stream: _Stream, channel: Channel) -> None:
        story = stream.story
        if stream.is_forward:
            story.forward = channel
            is_main = channel.kind in (ChannelKind.MAIN, ChannelKind.RESUMED)
            if is_main and (self._first_main is None or story.number < self._first_main.number):
                self._first_main = story
        else:
            story.back = channel
        details: dict[str, Any] = {"channel": channel.name, "known_by": channel.known_by.value}
        details["reason"] = channel.reason
        self._moment(story.number, "forward" if stream.is_forward else "return", "is", details)

    @property
    def _blocks(self) -> dict[str, int] | None:
        if self._walker is None or self._walker.ram is None:
            return None
        return self._walker.ram.blocks

    def _read(self, stream: _Stream, channel: Channel) -> _Parser:
        feed = stream.feed
        match channel.kind:
            case ChannelKind.MAIN:
                self._main = stream.story.number
                self._walker = Walker(feed)
                yield from self._walker.run()
            case ChannelKind.RESUMED if self._walker is not None:
                self._main = stream.story.number
                self._answering.add(stream.story.number)
                self._phase("recovery")
                self.requests.resumed()
                self._walker = copy(self._walker)  # that one may still wait for the end of its connection
                yield from self._walker.resume(feed)
            case ChannelKind.PREEMPT if self._walker is not None and self._walker.ram is not None:
                yield from self._preempt(feed, self._walker.ram)
            case ChannelKind.RETURN_PATH:
                yield from read_return_path(feed)
            case _:  # TLS, multifd (its packets are told by what is read as RAM), what nobody knows
                while True:
                    feed.skip(len(feed))
                    if not (yield from feed.more()):
                        return

    @staticmethod
    def _preempt(feed: Feed, main: RamSection) -> _Parser:
        section = RamSection(
            feed,
            page_size=main.page_size,
            is_known=True,
            capabilities=main.capabilities,
            advised=main.advised,
        )
        section.blocks = main.blocks
        while len(feed) or (yield from feed.more()):
            try:
                yield from section.records()
            except TruncatedError:
                if len(feed):
                    raise
                return  # no EOS ends it: 8.0 and later just close it, behind any record

    # -- what it says

    def _entry(self, stream: _Stream, entry: Entry) -> None:
        record = entry.record
        match record:
            case Pages():
                self._pages(stream, record.block, intervals_of(record.runs, record.page_size), record.page_size)
            case RamPage():
                start = record.record.word.start
                self._pages(stream, record.block, [(start, start + record.page_size)], record.page_size)
            case SectionHeader(kind=SectionType.FULL):
                self._grouped(stream, "FULL", sections=1)
            case SectionHeader() | SectionPart():
                self._section(stream, record)
            case Command():
                self._say(stream, record.name, _command(record))
                self._commanded(record)
            case FileHeader():
                self.has_stream = True
                self._say(stream, "HEADER", {})
                self._phase("precopy")
            case Configuration():
                self._say(stream, "CONFIGURATION", {"machine_type": record.machine_type})
            case BlockList():
                self._say(stream, "MEM_SIZE", {"blocks": len(record.blocks), "bytes": record.total})
            case EndOfFile():
                self._say(stream, "EOF", {})
                if self.phases:
                    self._phase("ending")

    def _section(self, stream: _Stream, record: SectionHeader | SectionPart) -> None:
        """START and END of a live section; its PARTs together."""
        if record.kind is SectionType.PART:
            self._grouped(stream, "PART", sections=1)
            return
        assert self._walker is not None
        stream.in_end = record.kind is SectionType.END
        header = self._walker.sections.get(record.section_id)
        name = record.idstr if isinstance(record, SectionHeader) else header.idstr if header else ""
        self._say(stream, record.kind.name, {"section": name})

    def _commanded(self, command: Command) -> None:
        match command:
            case SwitchoverStart() | Packaged() if self._phase_name == "precopy":
                self._phase("switchover")
            case PostcopyRamDiscard() if self._phase_name == "precopy":
                self._phase("switchover")
            case PostcopyRun():
                self._phase("postcopy")
            case OpenReturnPath() if self._main is not None:
                self._answering.add(self._main)
        if isinstance(command, Packaged):
            self._switched = True

    def _pages(self, stream: _Stream, block: str, intervals: list[tuple[int, int]], page_size: int) -> None:
        count = sum(end - start for start, end in intervals) // page_size
        alone = stream.in_end or stream.story.forward.kind is ChannelKind.PREEMPT
        self._grouped(stream, "PAGES" if alone else "PART", pages=count)
        if not self._switched:
            return
        number = stream.story.number
        for request in self.requests.passed(block, intervals, at_ns=self._now, connection=number, page_size=page_size):
            self._grouped(stream, "", answers=1)
            self._tell(Moment(self._now, number, "forward", "answer", _plain_request(request)), kept=False)

    def _message(self, stream: _Stream, message: Message) -> None:
        match message:
            case RequestPagesId() | RequestPages():
                self._requested(stream, message)
            case ReceivedBitmap(block=block, bitmap=bitmap):
                details: dict[str, Any] = {"block": block, "received": int.from_bytes(bitmap).bit_count()}
                self._say(stream, message.name, details)
            case _:
                fields = {name: int(getattr(message, name)) for name in ("token", "value") if hasattr(message, name)}
                self._say(stream, message.name, fields)
                if isinstance(message, ResumeAck):
                    self._phase("postcopy")
                elif isinstance(message, Shut) and self.phases:
                    self.phases[-1].end_ns = self._now

    def _requested(self, stream: _Stream, message: RequestPagesId | RequestPages) -> None:
        number = stream.story.number
        page_size = 4096 if self._walker is None else self._walker.page_size
        request = self.requests.asked(
            message.block if isinstance(message, RequestPagesId) else None,
            message.start,
            message.length,
            at_ns=self._now,
            connection=number,
            page_size=page_size,
        )
        self._grouped(stream, "REQ_PAGES", requests=1)
        if request is None:
            return
        if len(self.asked) < MOST_KEPT:
            self.asked.append(request)
        else:
            self.left_out += 1
        self._tell(Moment(self._now, number, "return", message.name, _plain_request(request)), kept=False)

    # -- phases and moments

    @property
    def faults(self) -> list[tuple[int, str]]:
        """What stopped making sense, and on which connection; but of those that a recovery made good."""
        resumed_ns = max(
            (each.opened_ns for each in self.channels if each.forward.kind is ChannelKind.RESUMED), default=0
        )
        return [
            (each.number, fault)
            for each in self.channels
            if each.closed_ns is None or each.closed_ns > resumed_ns
            for fault in each.faults
        ]

    @property
    def untold(self) -> list[tuple[int, str]]:
        """Connections that carried something, and nobody knows what, as ``faults`` are told."""
        channels = ((each.number, each.forward) for each in self.channels)
        return [
            (number, f"forward: {StreamError(each.doubt, offset=0, trail=(each.name,))}")
            for number, each in channels
            if each.doubt
        ]

    @property
    def bytes(self) -> int:
        """How much was recorded, of both directions."""
        return self.flow.forward + self.flow.back

    @property
    def _phase_name(self) -> str:
        return self.phases[-1].name if self.phases and self.phases[-1].end_ns is None else ""

    def _phase(self, name: str) -> None:
        if self._phase_name == name:
            return
        if self.phases and self.phases[-1].end_ns is None:
            self.phases[-1].end_ns = self._now
        self.phases.append(Phase(name, self._now))

    def _say(self, stream: _Stream, name: str, details: dict[str, Any]) -> None:
        """A moment of this stream, after those that were held together."""
        self._tell_group(stream)
        self._moment(stream.story.number, "forward" if stream.is_forward else "return", name, details)

    def _grouped(self, stream: _Stream, name: str, **counts: int) -> None:
        """One more of what is told together; without a name, of whatever is at hand."""
        group = stream.group
        if group is None or (name and group.name != name):
            self._tell_group(stream)
            way = "forward" if stream.is_forward else "return"
            group = stream.group = Moment(self._now, stream.story.number, way, name or "PAGES", {})
        details = group.details
        for key, count in counts.items():
            details[key] = details.get(key, 0) + count
        details["until_ns"] = self._now

    def _tell_group(self, stream: _Stream) -> None:
        if stream.group is not None:
            group, stream.group = stream.group, None
            self._tell(group)

    def _moment(self, connection: int, direction: str, name: str, details: dict[str, Any]) -> None:
        self._tell(Moment(self._now, connection, direction, name, details))

    def _tell(self, moment: Moment, *, kept: bool = True) -> None:
        self._told.append(moment)
        if not kept:
            return
        if len(self.timeline) < MOST_KEPT:
            self.timeline.append(moment)
        else:
            self.left_out += 1

    def _tell_on(self) -> Iterator[Moment]:
        told, self._told = self._told, []
        yield from told


def _command(command: Command) -> dict[str, Any]:
    """What it says, in numbers and names; discards summed up."""
    match command:
        case PostcopyRamDiscard(block=block, ranges=ranges):
            return {"block": block, "ranges": len(ranges), "bytes": sum(each.length for each in ranges)}
        case RecvBitmap(block=block):
            return {"block": block}
        case _:
            return dict(payload(command))


def _plain_request(request: PageRequest) -> dict[str, Any]:
    answer: dict[str, Any] = {"on_way": True} if request.on_way else {}
    if request.answered_ns is not None:
        answer = {"asked_ns": request.asked_ns, "delay_ns": request.delay_ns}
    return {"block": request.block, "start": request.start, "length": request.length, **answer}
