"""The channels of one migration, joined: their records in an order in which a destination may load them.

Main's records come in their order.  Multifd's packets come where main waits for them: at each MULTIFD_FLUSH, or at
each EOS where START has no such record (until 8.0), every channel gives what it has up to its next SYNC; between
channels nothing else orders pages.  After main come the pages of the preempt channel, each sent once after the switch;
then main's further connections, where a postcopy was paused and resumed; then what was said on the way back.

migration/multifd.c: multifd_recv_sync_main(); migration/savevm.c: postcopy_pause_incoming()
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar
from uuid import UUID

from qmigrate.capture.frames import Direction
from qmigrate.capture.readable import Readable
from qmigrate.capture.recording import RecordedStream, Recording
from qmigrate.errors import NoStreamError, StreamError, StreamErrors, TruncatedError
from qmigrate.format.channel import Channel, ChannelKind, by_order
from qmigrate.format.entry import Entry
from qmigrate.format.feed import Feed
from qmigrate.format.multifd import PagePacket
from qmigrate.format.multifd_channel import WINDOW, read_channel
from qmigrate.format.ram import RamFlag, RamRecord
from qmigrate.format.return_path import read_return_path
from qmigrate.format.tail import Chooser
from qmigrate.format.vmdesc import Description
from qmigrate.format.walk import Limits, Walker

__all__ = ["Joining", "Part", "classified", "recorded_parts"]

T = TypeVar("T")

_GOES_ON: Final = {  # a postcopy that was brought back: kinds of connections, of which each but the last was cut
    ChannelKind.MAIN: "main",
    ChannelKind.RESUMED: "main",
    ChannelKind.PREEMPT: "preempt",
}


@dataclass(frozen=True)
class Part:
    """One channel of a migration: its bytes, and what it is.  ``is_forward`` is None where nobody knows."""

    readable: Readable
    channel: Channel
    is_forward: bool | None = None

    @property
    def name(self) -> str:
        """``multifd 1``, ``preempt``."""
        return self.channel.name


def classified(readables: Iterable[tuple[Readable, bool | None]]) -> list[Part]:
    """What each input is, by its bytes or, where it has none, by the others; main first.

    Each comes with whether it is forward, None where that is not known.  Raises ``NoStreamError`` where none, or more
    than one of them is main, or where one is no channel at all.
    """
    given = [(readable, _classify(readable), is_forward) for readable, is_forward in readables]
    others = [channel for _, channel, _ in given]
    found = [
        Part(readable, by_order(channel, is_forward=is_forward is not False, others=others), is_forward)
        for readable, channel, is_forward in given
    ]
    mains = [part for part in found if part.channel.kind is ChannelKind.MAIN]
    if len(mains) > 1:
        raise NoStreamError(f"two main channels: {mains[0].readable.name} and {mains[1].readable.name}")
    if not mains:
        names = ", ".join(f"{part.readable.name} ({part.name})" for part in found)
        raise NoStreamError(f"no main channel among {names}")
    for part in found:
        if part.channel.kind in (ChannelKind.UNKNOWN, ChannelKind.TLS) and not part.channel.is_silent:
            exc = NoStreamError(f"no channel of a migration: {part.channel.reason}")
            exc.input = part.readable.name
            raise exc
    _refuse_strangers([part for part in found if part.channel.kind is ChannelKind.MULTIFD])
    return [*mains, *(part for part in found if part not in mains)]


def _refuse_strangers(parts: Sequence[Part]) -> None:
    """Multifd channels of one migration have one UUID and a number each.  migration/multifd.c: as a QEMU would."""
    first: dict[int, Part] = {}
    for part in parts:
        channel_id, uuid = part.channel.channel_id, part.channel.uuid
        if channel_id is None or uuid is None:
            continue  # it is cut, or damaged, which is told when it is read
        if (same := first.setdefault(channel_id, part)) is not part:
            raise NoStreamError(f"{same.readable.name} and {part.readable.name} are both {part.name}")
        one = next(iter(first.values()))
        if one.channel.uuid is not None and one.channel.uuid != uuid:
            raise NoStreamError(
                f"{one.readable.name} and {part.readable.name} are of two machines: they have the UUIDs "
                f"{UUID(bytes=one.channel.uuid)} and {UUID(bytes=uuid)}"
            )


def recorded_parts(recording: Recording) -> list[Part]:
    """The channels of the first migration in a recording, main first."""
    found = [Part(each.stream, each.channel, each.direction is Direction.FORWARD) for each in recording.channels()]
    mains = [index for index, part in enumerate(found) if part.channel.kind is ChannelKind.MAIN]
    if not mains:
        recording.main()  # raises, and says what is there
    last = mains[1] if len(mains) > 1 else len(found)
    return [found[mains[0]], *(part for part in found[:last] if part is not found[mains[0]])]


def _classify(readable: Readable) -> Channel:
    try:
        return readable.classify()
    except (NoStreamError, StreamError) as exc:
        exc.input = readable.name
        raise


class Joining:
    """All records of a migration whose main channel is the first of ``parts``."""

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        description: Description | Chooser | None = None,
        page_size: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._parts = list(enumerate(parts))
        self._feed = Feed()
        self._limits = limits or Limits()
        self._walker = Walker(self._feed, description=description, page_size=page_size, limits=limits)
        self._faults: list[StreamError] = []
        self._cuts: dict[str, list[StreamError]] = {"main": [], "preempt": []}

    def entries(self) -> Iterator[Entry]:
        """Each record with its place in its channel.

        A fault in one channel does not keep the others from being read.  Raises ``StreamError`` at the end, of
        several ``StreamErrors``; ``NoStreamError`` where main is no stream.
        """
        main = self._parts[0][1]
        channels = [_Multifd(part, self._multifd(number, part)) for number, part in self._of(ChannelKind.MULTIFD)]
        yield from _with_multifd(self._guarded(main, self._walker.run(), self._feed), channels)
        if not self._faults:
            self._faults += _missing(channels)
        for kind, walk in ((ChannelKind.PREEMPT, self._walker.preempt), (ChannelKind.RESUMED, self._walker.resume)):
            for number, part in self._of(kind):
                feed = Feed()
                for entry in self._guarded(part, walk(feed), feed):
                    yield entry._replace(channel=number)
                if kind is ChannelKind.PREEMPT:
                    self._faults += _unrecorded(part, feed.offset)
        for cuts in self._cuts.values():
            if len(cuts) > len(self._of(ChannelKind.RESUMED)):  # none of them has the end
                self._faults.append(cuts[-1])
        for number, part in self._of(ChannelKind.RETURN_PATH):
            feed = Feed()
            for message in self._guarded(part, read_return_path(feed), feed):
                yield Entry(message.offset, message.length, message.message, memoryview(message.raw), 0, number)
        self._faults += self._unknown()
        if len(self._faults) == 1:
            raise self._faults[0]
        if self._faults:
            raise StreamErrors(self._faults)

    def _of(self, kind: ChannelKind) -> list[tuple[int, Part]]:
        return [(number, part) for number, part in self._parts if part.channel.kind is kind]

    def _multifd(self, number: int, part: Part) -> Iterator[Entry]:
        """The packets, read once main has said how long a page is."""
        feed = Feed(window=WINDOW, grows=True)
        ram = self._walker.ram
        step = read_channel(
            feed,
            page_size=self._walker.page_size if ram is None else ram.page_size,
            blocks={} if ram is None else ram.blocks,
            most_device_state=self._limits.device_state,
        )
        for entry in self._guarded(part, step, feed):
            yield Entry(entry.offset, entry.length, entry.record, entry.view, 0, number)

    def _unknown(self) -> Iterator[StreamError]:
        """Connections of a recording that carried something, and nobody knows what: pages may be among it."""
        for _, part in self._parts:
            if part.channel.doubt:
                yield _named(StreamError(part.channel.doubt, offset=0), part)

    def _guarded(self, part: Part, step: Generator[T | None], feed: Feed) -> Iterator[T]:
        """What ``step`` yields, fed from the part; a fault is kept for the end."""
        try:
            yield from part.readable.fed(step, feed)
        except NoStreamError as exc:
            exc.input = part.readable.name
            raise
        except StreamError as exc:
            for fault in exc.errors if isinstance(exc, StreamErrors) else [exc]:
                goes_on = isinstance(fault, TruncatedError) and self._may_go_on(part)
                cuts = self._cuts[_GOES_ON[part.channel.kind]] if goes_on else self._faults
                cuts.append(_named(fault, part))

    def _may_go_on(self, part: Part) -> bool:
        """Is it one of those of which each but the last was cut, in a recovery?  Files do not tell their order."""
        return part.channel.kind in _GOES_ON and bool(self._of(ChannelKind.RESUMED))


class _Multifd:
    """A multifd channel, read as far as main waits for it."""

    def __init__(self, part: Part, entries: Iterator[Entry]) -> None:
        self.part = part
        self.packets = 0
        self.highest = -1
        """Of the numbers of its packets: one count over all channels."""
        self.fault: StreamError | None = None
        """What main waits for and the channel has not, or the other way round."""
        self._entries = entries
        self._end = 0

    def until_sync(self) -> Iterator[Entry]:
        """All packets up to the next SYNC."""
        for entry in self._entries:
            yield entry
            if self._count(entry):
                return
        if self.fault is None:
            message = "the stream ends here, main waits for another SYNC"
            self.fault = _named(TruncatedError(message, offset=self._end, trail=(self.part.name,)), self.part)

    def rest(self) -> Iterator[Entry]:
        """What is left when main has ended: until 8.2 there may be a packet, with nothing in it."""
        for entry in self._entries:
            is_sync = self._count(entry)
            if self.fault is None and (is_sync or (isinstance(entry.record, PagePacket) and entry.record.runs)):
                message = "a packet behind the last SYNC that main waits for"
                self.fault = _named(StreamError(message, offset=entry.offset, trail=(self.part.name,)), self.part)
            yield entry

    def _count(self, entry: Entry) -> bool:
        """Take the packet into account; is it a SYNC?"""
        self._end = entry.offset + entry.length
        if not isinstance(entry.record, PagePacket):
            return False
        header = entry.record.header
        self.packets += 1
        self.highest = max(self.highest, header.packet_num)
        return header.is_sync


def _with_multifd(main: Iterator[Entry], channels: Sequence[_Multifd]) -> Iterator[Entry]:
    """Main's records, and at each of its sync points all packets that it waits for there."""
    by_round: bool | None = None  # does MULTIFD_FLUSH end an epoch, or each EOS?
    for entry in main:
        yield entry
        if not channels or not isinstance(entry.record, RamRecord) or not entry.record.is_marker:
            continue
        if by_round is None:
            by_round = entry.record.word.flags == RamFlag.MULTIFD_FLUSH
        if entry.record.word.flags == (RamFlag.MULTIFD_FLUSH if by_round else RamFlag.EOS):
            for channel in channels:
                yield from channel.until_sync()
    for channel in channels:
        yield from channel.rest()


def _missing(channels: Sequence[_Multifd]) -> Iterator[StreamError]:
    """That a channel is not here, or not all of it: pages that are missing then leave no other trace.

    Packets are counted over all channels.  Until 8.2 the last of a channel may be left unsent, with nothing in it.
    """
    faults = [channel.fault for channel in channels if channel.fault is not None]
    yield from faults
    ids = {channel.part.channel.channel_id for channel in channels}
    lost = [number for number in range(len(ids)) if number not in ids]
    here = ", ".join(f"{number}" for number in sorted(each for each in ids if each is not None))
    if lost:
        yield StreamError(f"multifd {lost[0]} is not among the channels that are given ({here})")
        return
    count = max((channel.highest for channel in channels), default=-1) + 1
    packets = sum(channel.packets for channel in channels)
    if not faults and count - packets > len(channels):
        yield StreamError(
            f"{count - packets} of {count} packets, by their numbers, are in none of the multifd channels that are "
            f"given ({here}): are there further ones?"
        )


def _unrecorded(part: Part, end: int) -> Iterator[StreamError]:
    """That a tap had ended before this connection did: no record is the last of preempt, so pages leave no trace."""
    stream = part.readable
    if isinstance(stream, RecordedStream) and stream.connection.closed is None:
        message = "the recording ends before this connection did: pages that came on it may be missing"
        yield TruncatedError(message, offset=end, trail=(part.name,))


def _named(fault: StreamError, part: Part) -> StreamError:
    """The same fault, with the input, and the channel that it is in, where that is not main."""
    if part.channel.kind is not ChannelKind.MAIN and fault.trail[:1] != (part.name,):
        trail = fault.trail[1:] if fault.trail[:1] in (("multifd",), ("return path",)) else fault.trail
        fault = type(fault)(fault.message, offset=fault.offset, trail=(part.name, *trail))
    fault.input = part.readable.name
    return fault
