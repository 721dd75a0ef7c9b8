"""The destination's end of a connection: bytes and facts in, events and bytes out.

Nothing here waits or opens: an endpoint gives bytes, takes events, and sends what ``data_to_send`` gives.  What each
row of the postcopy design asks for: S1 answers on the return path; S4 ADVISE; S5 DISCARD, and the package taken out
of the stream whole; S6 the package is handed over as bytes, and reading goes on; S8 by ``phases``; S11 SHUT, and the
messages of a recovery.

The grammar is ``format.walk``'s; only the package is not looked into here: that is ``Package``'s, as another process
loads it while the stream goes on being read.

migration/savevm.c: qemu_loadvm_state(), loadvm_process_command()
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from qmigrate.errors import QmigrateError, SequenceError, StreamError, TruncatedError, UnsupportedError
from qmigrate.format.command import (
    Command,
    DiscardRange,
    OpenReturnPath,
    Packaged,
    PageSizes,
    Ping,
    PostcopyAdvise,
    PostcopyRamDiscard,
    PostcopyResume,
    RecvBitmap,
)
from qmigrate.format.entry import Configuration, Entry, RamPage, Step, Undecoded, VmDescription
from qmigrate.format.feed import Feed
from qmigrate.format.ram import BlockList, Pages, RamBlock, RamFlag, RamRecord
from qmigrate.format.ram_section import RamSection
from qmigrate.format.return_path import Message, Pong, ReceivedBitmap, ResumeAck, Shut, encode_message
from qmigrate.format.stream import EndOfFile, FileHeader, Footer, SectionHeader, SectionPart, SectionType
from qmigrate.format.tail import Chooser
from qmigrate.format.walk import Limits, Walker
from qmigrate.protocol.phases import Fact, Phase, after, turned

__all__ = [
    "Advised",
    "BitmapAsked",
    "BlocksListed",
    "Configured",
    "Destination",
    "Discarded",
    "EncodedCame",
    "Event",
    "Kept",
    "Loaded",
    "Package",
    "PackageCame",
    "PackageEvent",
    "PageChannel",
    "PagesCame",
    "Resumed",
    "SectionBegan",
    "SyncPoint",
    "devices_of",
    "package_events",
]


@dataclass(frozen=True)
class Configured:
    """CONFIGURATION: the machine type's name; ``data`` is the record as it came."""

    machine_type: str
    data: bytes


@dataclass(frozen=True)
class Advised:
    """Postcopy may come.  ``sizes`` is None where it is of dirty bitmaps only."""

    sizes: PageSizes | None


@dataclass(frozen=True)
class BlocksListed:
    """RAM's START.  ``target_page_size`` in bytes."""

    blocks: tuple[RamBlock, ...]
    target_page_size: int


@dataclass(frozen=True, slots=True)
class PagesCame:
    """Pages of one block; ``view`` holds the records, the first at ``offset`` of the stream.

    Both hold until the next event is asked for.
    """

    pages: Pages
    offset: int
    view: memoryview


@dataclass(frozen=True)
class EncodedCame:
    """A page as a delta, or compressed, before LISTEN; its record stands at ``offset``."""

    page: RamPage
    offset: int


@dataclass(frozen=True)
class SyncPoint:
    """Where there are multifd channels: here each has a SYNC, and what is before it is loaded before what follows."""


@dataclass(frozen=True)
class Discarded:
    """Forget these pages of ``block``."""

    block: str
    ranges: Sequence[DiscardRange]


@dataclass(frozen=True)
class PackageCame:
    """All of it; it stands at ``offset`` of the stream."""

    data: bytes
    offset: int
    footers: bool | None


@dataclass(frozen=True)
class SectionBegan:
    """A device's section, or a live one's other than RAM.  Inside a package too."""

    header: SectionHeader


@dataclass(frozen=True)
class BitmapAsked:
    """A recovering source asks what has come of ``block``: answer with ``send_bitmap``."""

    block: str


@dataclass(frozen=True)
class Resumed:
    """A recovered postcopy goes on: what was asked for and has not come is asked for again."""


@dataclass(frozen=True)
class Loaded:
    """All has come.  ``is_postcopy``: by postcopy, whose stream ends without a description."""

    is_postcopy: bool


Event: TypeAlias = (
    Configured
    | Advised
    | BlocksListed
    | PagesCame
    | EncodedCame
    | SyncPoint
    | Discarded
    | PackageCame
    | SectionBegan
    | BitmapAsked
    | Resumed
    | Loaded
)


@dataclass
class Kept:
    """All of a stream but RAM's sections and the commands, for a stream that is to be saved.

    ``opening``: header and CONFIGURATION; ``live``: what came before the end of RAM, other live sections and early
    FULL ones; ``devices``: FULL sections after it; ``closing``: EOF and the description, where they came.
    """

    opening: bytearray = field(default_factory=bytearray)
    live: bytearray = field(default_factory=bytearray)
    devices: bytearray = field(default_factory=bytearray)
    closing: bytearray = field(default_factory=bytearray)
    footers: bool = False
    ram: SectionHeader | None = None
    ram_ended: bool = False
    _place: bytearray | None = None

    def take(self, entry: Entry) -> None:
        """Keep this entry's bytes, if they are to be kept; in the order of the stream."""
        match entry.record:
            case FileHeader() | Configuration():
                self.opening += entry.view
                return
            case Command() | BlockList() | Pages() | RamRecord() | RamPage():
                return
            case SectionHeader(kind=kind, idstr=name) as header:
                if name == "ram":
                    self.ram = header
                is_live = kind is SectionType.START or not self.ram_ended
                self._place = None if name == "ram" else self.live if is_live else self.devices
            case SectionPart(kind=kind, section_id=number):
                is_ram = self.ram is not None and number == self.ram.section_id
                self._place = None if is_ram else self.live
                self.ram_ended |= is_ram and kind is SectionType.END
            case EndOfFile():
                self._place = self.closing
            case Footer():
                self.footers = True
            case Undecoded() if self._place is None:
                # Sections that could not be told apart, right behind RAM or LISTEN: no header of theirs came.
                self._place = self.devices if self.ram_ended else self.live
        if self._place is not None:
            self._place += entry.view


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
        tail, _ = self._best_tail(data, self._tail_offset)
        if tail.error is not None:
            return False
        rest = data[tail.end + 1 :]
        return not rest or (rest[:1] == b"\x06" and len(rest) == 5 + int.from_bytes(rest[1:5]))

    def _package(self, command: Packaged) -> Step:
        if command.length > self.limits.package:
            raise UnsupportedError(
                f"a package of {command.length} bytes, the limit is {self.limits.package} (--max-package)",
                offset=self.feed.offset - 4,
                trail=(command.name,),
            )
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
        self.kept = Kept() if keep else None
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
        return None if entry is None else _pages_of(entry)

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


def _pages_of(entry: Entry) -> PagesCame:
    assert isinstance(entry.record, Pages)
    return PagesCame(entry.record, entry.offset, entry.view)


class PageChannel:
    """The preempt channel (since 7.1): RAM records alone, without sections, with a block of its own to go on with.

    ``blocks``: the length of each, in bytes.  Raises ``StreamError`` out of ``events``.
    """

    def __init__(self, blocks: Mapping[str, int], page_size: int) -> None:
        self.feed = Feed()
        self._ram = RamSection(self.feed, page_size=page_size, is_known=True, capabilities=frozenset(), advised=None)
        self._ram.blocks.update(blocks)
        self._steps: Iterator[Entry | None] = self._all_records()

    def _all_records(self) -> Step:
        """7.2 sends EOS before it closes; 8.0 and later just close."""
        while len(self.feed) or (yield from self.feed.more()):
            yield from self._ram.records(until_end=True)

    def plain_pages(self) -> PagesCame | None:
        """As of ``Destination``."""
        entry = self._ram.plain_pages()
        return None if entry is None else _pages_of(entry)

    @property
    def has_less_than_a_page(self) -> bool:
        """As of ``Destination``."""
        return self._ram.has_less_than_a_page

    def events(self) -> Iterator[PagesCame]:
        """What the bytes at hand say; ends where more are needed."""
        for entry in self._steps:
            if entry is None:
                return
            if isinstance(entry.record, Pages):
                yield _pages_of(entry)


@dataclass(frozen=True)
class Package:
    """What a package needs to be loaded: the bytes, where they stand, and what is known of the stream.

    ``schema`` is asked where sections end.
    """

    data: bytes
    offset: int = 0
    footers: bool | None = None
    schema: Chooser | None = None


PackageEvent: TypeAlias = SectionBegan | Ping | Phase


def devices_of(package: Package) -> bytes:
    """The package's device sections, without its commands.  Raises ``StreamError``."""
    kept = Kept(ram_ended=True)
    for entry in _entries_of(package):
        kept.take(entry)
    return bytes(kept.devices)


def _entries_of(package: Package) -> Iterator[Entry]:
    walker = Walker(Feed(offset=package.offset), description=package.schema)
    walker.footers = package.footers
    return (entry for entry in walker._packaged(package.data, package.offset, 1) if entry is not None)


def package_events(package: Package, phase: Phase) -> Iterator[PackageEvent]:
    """What a package says, in order: a section, a PING to be answered, the phase that LISTEN or RUN leads to.

    Nothing behind RUN is looked at.  Raises ``StreamError``; ``phase`` is the main channel's.
    """
    for entry in _entries_of(package):
        if isinstance(entry.record, SectionHeader):
            yield SectionBegan(entry.record)
        if not isinstance(entry.record, Command):
            continue
        try:
            following = after(phase, entry.record.NUMBER, inside=True)
        except SequenceError as exc:
            raise SequenceError(exc.message, offset=entry.offset) from None
        if isinstance(entry.record, Ping):
            yield entry.record
        if following is not phase:
            phase = following
            yield phase
        if phase is Phase.RUNNING:
            return
    raise TruncatedError(f"the package ends while {phase.name}, before POSTCOPY_RUN", offset=package.offset)
