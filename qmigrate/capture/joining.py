"""The channels of one migration, joined: their records in an order in which a destination may load them.

Main's records come in their order.  Multifd's packets come where main waits for them: at each MULTIFD_FLUSH, or at
each EOS where START has no such record (until 8.0), every channel gives what it has up to its next SYNC; between
channels nothing else orders pages.  After main come the pages of the preempt channel, each sent once after the switch;
then main's further connections, where a postcopy was paused and resumed; then what was said on the way back.

migration/multifd.c: multifd_recv_sync_main(); migration/savevm.c: postcopy_pause_incoming()
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qmigrate.capture.frames import Direction
from qmigrate.capture.open import Readable
from qmigrate.capture.recording import Recording
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
    found: list[Part] = []
    for readable, is_forward in readables:
        channel = _classify(readable)
        others = [part.channel for part in found]
        found.append(Part(readable, by_order(channel, is_forward=is_forward is not False, others=others), is_forward))
    mains = [part for part in found if part.channel.kind is ChannelKind.MAIN]
    if len(mains) > 1:
        raise NoStreamError(f"two main channels: {mains[0].readable.name} and {mains[1].readable.name}")
    if not mains:
        names = ", ".join(f"{part.readable.name} ({part.name})" for part in found)
        raise NoStreamError(f"no main channel among {names}")
    for part in found:
        if part.channel.kind in (ChannelKind.UNKNOWN, ChannelKind.TLS) and not part.channel.is_silent:
            raise NoStreamError(f"{part.readable.name} is no channel of a migration: {part.channel.reason}")
    return [*mains, *(part for part in found if part not in mains)]


def recorded_parts(recording: Recording) -> list[Part]:
    """The channels of the first migration in a recording, main first."""
    found = [Part(each.stream, each.channel, each.direction is Direction.FORWARD) for each in recording.channels()]
    mains = [index for index, part in enumerate(found) if part.channel.kind is ChannelKind.MAIN]
    if not mains:
        recording.main()  # raises, and says what is there
    last = mains[1] if len(mains) > 1 else len(found)
    return [found[mains[0]], *(part for part in found[:last] if part is not found[mains[0]])]


def _classify(readable: Readable) -> Channel:
    if not readable.can_rewind:
        raise NoStreamError(f"{readable.name} is a pipe: the channels of a migration are told by looking at files")
    return readable.classify()


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

    def entries(self) -> Iterator[Entry]:
        """Each record with its place in its channel.

        A fault in one channel does not keep the others from being read.  Raises ``StreamError`` at the end, of
        several ``StreamErrors``; ``NoStreamError`` where main is no stream.
        """
        main = self._parts[0][1]
        waiting = [self._multifd(number, part) for number, part in self._of(ChannelKind.MULTIFD)]
        yield from _with_multifd(self._guarded(main, self._walker.run(), self._feed), waiting)
        for kind, walk in ((ChannelKind.PREEMPT, self._walker.preempt), (ChannelKind.RESUMED, self._walker.resume)):
            for number, part in self._of(kind):
                feed = Feed()
                for entry in self._guarded(part, walk(feed), feed):
                    yield entry._replace(channel=number)
        for number, part in self._of(ChannelKind.RETURN_PATH):
            feed = Feed()
            for message in self._guarded(part, read_return_path(feed), feed):
                yield Entry(message.offset, message.length, message.message, memoryview(message.raw), 0, number)
        if len(self._faults) == 1:
            raise self._faults[0]
        if self._faults:
            raise StreamErrors(self._faults)

    def _of(self, kind: ChannelKind) -> list[tuple[int, Part]]:
        return [(number, part) for number, part in self._parts if part.channel.kind is kind]

    def _multifd(self, number: int, part: Part) -> Iterator[Entry]:
        """The packets, read once main has said how long a page is."""
        feed = Feed(window=WINDOW)
        ram = self._walker.ram
        step = read_channel(
            feed,
            page_size=self._walker.page_size if ram is None else ram.page_size,
            blocks={} if ram is None else ram.blocks,
            most_device_state=self._limits.device_state,
        )
        for entry in self._guarded(part, step, feed):
            yield Entry(entry.offset, entry.length, entry.record, entry.view, 0, number)

    def _guarded(self, part: Part, step: Generator[T | None], feed: Feed) -> Iterator[T]:
        """What ``step`` yields, fed from the part; a fault is kept for the end."""
        reader = part.readable.open_reader()
        try:
            for item in step:
                if item is None:
                    part.readable.fill(feed, reader)
                else:
                    yield item
        except StreamError as exc:
            if not (isinstance(exc, TruncatedError) and self._goes_on_elsewhere(part)):
                self._faults.append(_named(exc, part))

    def _goes_on_elsewhere(self, part: Part) -> bool:
        """Was the connection cut, and a later one took over?  Then it ends anywhere."""
        resumed = self._of(ChannelKind.RESUMED)
        return bool(resumed) and part is not resumed[-1][1]


def _with_multifd(main: Iterator[Entry], channels: Sequence[Iterator[Entry]]) -> Iterator[Entry]:
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
                yield from _until_sync(channel)
    for channel in channels:
        yield from channel


def _until_sync(channel: Iterator[Entry]) -> Iterator[Entry]:
    for entry in channel:
        yield entry
        if isinstance(entry.record, PagePacket) and entry.record.header.is_sync:
            return


def _named(fault: StreamError, part: Part) -> StreamError:
    """The same fault, with the channel that it is in, where that is not main."""
    if part.channel.kind is ChannelKind.MAIN or fault.trail[:1] == (part.name,):
        return fault
    trail = fault.trail[1:] if fault.trail[:1] in (("multifd",), ("return path",)) else fault.trail
    return type(fault)(fault.message, offset=fault.offset, trail=(part.name, *trail))
