"""The destination's end of a connection: bytes and facts in, events and bytes out.

Nothing here waits or opens: an endpoint gives bytes, takes events, and sends what ``data_to_send`` gives.  What each
row of the postcopy design asks for: S1 answers on the return path; S4 ADVISE; S5 DISCARD, and the package taken out
of the stream whole; S6 the package is handed over as bytes, and reading goes on; S8 by ``phases``; S11 SHUT, and the
messages of a recovery.

The grammar is ``format.walk``'s; only the package is not looked into here: that is ``package``'s, as another process
loads it while the stream goes on being read.  The preempt channel is ``page_channel``'s.

migration/savevm.c: qemu_loadvm_state(), loadvm_process_command()
"""

import itertools
from collections.abc import Iterator

from qmigrate.errors import QmigrateError, SequenceError, StreamError
from qmigrate.format.command import (
    Command,
    OpenReturnPath,
    Packaged,
    Ping,
    PostcopyAdvise,
    PostcopyRamDiscard,
    PostcopyResume,
    RecvBitmap,
)
from qmigrate.format.device_sections import best_tail, check_package_length
from qmigrate.format.entry import Configuration, Entry, RamPage, Step, Undecoded, VmDescription
from qmigrate.format.feed import Feed
from qmigrate.format.ram import BlockList, Pages, RamFlag, RamRecord
from qmigrate.format.return_path import Message, Pong, ReceivedBitmap, ResumeAck, Shut, encode_message
from qmigrate.format.stream import EndOfFile, SectionHeader
from qmigrate.format.walk import Walker
from qmigrate.format.walk_state import Limits
from qmigrate.protocol.destination_events import (
    Advised,
    BitmapAsked,
    BlocksListed,
    Configured,
    Discarded,
    EncodedCame,
    Event,
    Loaded,
    PackageCame,
    PagesCame,
    Resumed,
    SectionBegan,
    SyncPoint,
)
from qmigrate.protocol.phases import Fact, Phase, after, turned
from qmigrate.protocol.without_ram import WithoutRam

__all__ = ["Destination"]


class _Stream(Walker):
    """The walk, but for a package's inside; and with a copy of the tail, to see whether it could be over."""

    tail: bytearray | None = None
    _tail_offset = 0

    def _tail(self) -> Step:
        self.tail, self._tail_offset = bytearray(self.feed.view()), self.feed.offset
        yield from super()._tail()

    def tail_is_whole(self) -> bool:
        """Do all bytes of the tail make sections and EOF, alone or with a description?"""
        data = bytes(self.tail or b"")
        if not data:
            return False
        tail, _ = best_tail(self, data, self._tail_offset)
        if tail.error is not None:
            return False
        rest = data[tail.end + 1 :]
        return not rest or (rest[:1] == b"\x06" and len(rest) == 5 + int.from_bytes(rest[1:5]))

    def _package(self, command: Packaged) -> Step:
        check_package_length(self, command)
        base = self.feed.offset
        data = yield from self.feed.take(command.length, (command.name,))
        yield Entry(base, len(data), Undecoded(data, "another process loads it"), memoryview(data), 1)


class Destination:
    """The main channel.  Raises ``StreamError`` out of ``events``; then nothing more can be read.

    What the guest's process does is told by ``listening()`` and ``running()``; a broken connection by
    ``receive_eof()``, a new one by ``recover()``.
    """

    def __init__(self, *, limits: Limits | None = None, keep: bool = False) -> None:
        self.phase = Phase.PRECOPY
        self.kept = WithoutRam() if keep else None
        self.return_path = False
        self.feed = Feed()
        self._stream = _Stream(self.feed, limits=limits)
        self._steps: Iterator[Entry | None] = self._stream.run()
        self._outgoing = bytearray()
        self._is_loaded = False
        self._is_over = False
        self._sync_marker: int | None = None  # MULTIFD_FLUSH; or EOS where START has none of those (until 8.0)

    # -- bytes in

    def space(self) -> memoryview:
        """Where the next bytes go."""
        return self.feed.space()

    def received(self, count: int) -> None:
        """So many bytes were written to ``space()``."""
        self.feed.received(count)
        if self._stream.tail is not None and count:
            self._stream.tail += self.feed.view()[-count:]

    def receive_data(self, data: bytes) -> None:
        """Take in ``data``."""
        while data:
            space = self.space()
            space[: len(data)] = data[: len(space)]
            self.received(min(len(data), len(space)))
            data = data[len(space) :]

    @property
    def may_be_over(self) -> bool:
        """Has the tail begun?  Where no description closes it, only silence tells its end: see ``quiet``."""
        return self._stream.tail is not None

    def quiet(self) -> None:
        """Nothing came for a while, though the source is there: it waits for SHUT, if the tail is whole.

        With suppress-vmdesc=on, with an empty description, and where a device's data does not fit its description,
        no bytes say that the stream is over.  QEMU, which decodes every device, need not ask.
        """
        if self._stream.tail_is_whole():
            self.feed.end()

    def receive_eof(self) -> None:
        """The peer says no more."""
        self.feed.end()

    # -- facts in

    def listening(self) -> None:
        """The package's LISTEN was obeyed: memory is sensitive."""
        self.phase = Phase.LISTENING

    def running(self) -> None:
        """The package's RUN was obeyed: it is loaded."""
        self.phase = Phase.RUNNING

    def link_lost(self) -> None:
        """The connection broke before the end."""
        self.phase = turned(self.phase, Fact.LINK_LOST)

    def recover(self) -> None:
        """A new connection takes the broken one's place.  Raises ``SequenceError`` where nothing is paused."""
        self.phase = turned(self.phase, Fact.LINK_CAME)
        self.feed = Feed()
        self._steps = self._stream.resume(self.feed)

    # -- bytes out

    def data_to_send(self) -> bytes:
        """What goes out on the return path now; asked for again, it is not given again."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def send_bitmap(self, block: str, bitmap: bytes) -> None:
        """Answer ``BitmapAsked``."""
        self._send(ReceivedBitmap(block=block, bitmap_size=len(bitmap), bitmap=bitmap))

    def send_shut(self, value: int) -> None:
        """The last message: 0 where all went well.  Nothing is sent where there is no return path."""
        if self.return_path:
            self._send(Shut(value=value))

    def _send(self, message: Message) -> None:
        self._outgoing += encode_message(message)

    # -- events out

    def events(self) -> Iterator[Event]:
        """What the bytes at hand say, in order; ends where more are needed, and after ``Loaded``."""
        while (entry := self._next_entry()) is not None:
            if self.kept is not None and not entry.depth:
                self.kept.take(entry)
            event = self._event(entry)
            if event is not None:
                yield event
            if isinstance(event, Loaded):
                self._steps = iter(())
                return
        if self._is_over and not self._is_loaded:
            # Only the lack of a description kept that from being told above.
            self._is_loaded = True
            yield Loaded(is_postcopy=False)

    def plain_pages(self) -> PagesCame | None:
        """The plain pages at hand, ahead of ``events()``, which tells what is behind them; None where that is next.

        The same pages that ``events()`` would give, with less work: for who has LISTENed, and is fast or late.
        """
        ram = self._stream.ram
        entry = None if ram is None else ram.plain_pages()
        return None if entry is None else PagesCame.of(entry)

    @property
    def has_less_than_a_page(self) -> bool:
        """Among pages: has ``events()`` nothing to tell before more bytes come?"""
        ram = self._stream.ram
        return ram is not None and ram.has_less_than_a_page

    def _next_entry(self) -> Entry | None:
        """None where bytes are missing, and where the walk is over.  After a fault nothing more can be read."""
        try:
            return next(self._steps)
        except StopIteration:
            self._is_over = self.feed.ended
            return None
        except QmigrateError:
            self._steps = itertools.repeat(None)
            raise

    def _event(self, entry: Entry) -> Event | None:
        match entry.record:
            case Pages() as pages:
                self._check_pages(pages, entry)
                return PagesCame(pages, entry.offset, entry.view)
            case Command() as command:
                return self._command(command, entry)
            case Undecoded(data=data) if entry.depth == 1:
                return PackageCame(data, entry.offset, self._stream.footers)
            case Configuration(machine_type=name):
                return Configured(name, bytes(entry.view))
            case BlockList(blocks=blocks):
                return BlocksListed(blocks, self._stream.page_size)
            case SectionHeader() as header if header.idstr != "ram":
                return SectionBegan(header)
            case RamPage() as page:
                return self._encoded(page, entry)
            case RamRecord(word=word) if word.flags in (RamFlag.EOS, RamFlag.MULTIFD_FLUSH):
                # The first marker of START says which it is.
                self._sync_marker = self._sync_marker or word.flags
                return SyncPoint() if word.flags == self._sync_marker else None
            case EndOfFile() if self._stream.switched:
                self._is_loaded = True
                return Loaded(is_postcopy=True)
            case VmDescription():
                self._is_loaded = True
                return Loaded(is_postcopy=False)
        return None

    def finished(self) -> None:
        """All that ``Loaded`` asked for is done."""
        self.phase = turned(self.phase, Fact.ALL_LOADED)

    def _check_pages(self, pages: Pages, entry: Entry) -> None:
        if pages.fill and self.phase in (Phase.LISTENING, Phase.RUNNING):
            raise StreamError(
                f"a zero page with the value {pages.fill:#x} in postcopy",
                offset=entry.offset,
                trail=("ram", pages.block),
            )

    def _encoded(self, page: RamPage, entry: Entry) -> EncodedCame:
        if self.phase in (Phase.LISTENING, Phase.RUNNING):
            raise StreamError(
                f"a page is sent as {RamFlag(page.record.word.kind).name} in postcopy",
                offset=entry.offset,
                trail=("ram", page.block),
            )
        return EncodedCame(page, entry.offset)

    def _command(self, command: Command, entry: Entry) -> Event | None:
        try:
            phase = after(self.phase, command.NUMBER)
        except SequenceError as exc:
            raise SequenceError(exc.message, offset=entry.offset) from None
        match command:
            case OpenReturnPath():
                self.return_path = True
            case Ping(token=token):
                self._pong(token, entry)
            case PostcopyAdvise(sizes=sizes):
                self.phase = phase
                return Advised(sizes)
            case PostcopyRamDiscard(block=block, ranges=ranges):
                self.phase = phase
                return Discarded(block, ranges)
            case RecvBitmap(block=block):
                return BitmapAsked(block)
            case PostcopyResume():
                self.phase = phase
                self._send(ResumeAck())
                return Resumed()
        return None

    def _pong(self, token: int, entry: Entry) -> None:
        if not self.return_path:
            raise SequenceError(f"PING {token:#x} came, and no OPEN_RETURN_PATH before it", offset=entry.offset)
        self._send(Pong(token=token))
