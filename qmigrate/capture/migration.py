"""A migration at rest: what its stream, or its streams, hold, gathered in one pass.

All else sees only this: ``with qmigrate.open(path) as migration``.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from qmigrate.capture.open import Source
from qmigrate.capture.passes import PassCounter
from qmigrate.capture.seen import SeenPages
from qmigrate.errors import NoStreamError, StreamError, StreamErrors
from qmigrate.format.command import Command, Packaged
from qmigrate.format.device import VmState, decode_state
from qmigrate.format.mapped_ram import Gap, MappedBitmap, MappedBlock, MappedPages
from qmigrate.format.ram import BlockList, BlockListHeader, Pages, RamBlock, RamFlag, RamRecord
from qmigrate.format.stream import (
    ConfigurationCapabilities,
    ConfigurationTargetPageBits,
    Footer,
    SectionHeader,
    SectionPart,
    SectionType,
)
from qmigrate.format.stretch import count_pages, intervals_of
from qmigrate.format.tail import Chooser
from qmigrate.format.vmdesc import Description
from qmigrate.format.walk import (
    Configuration,
    DeviceState,
    Entry,
    Limits,
    RamPage,
    Trailing,
    Undecoded,
    VmDescription,
)

if TYPE_CHECKING:
    from qmigrate.capture.joining import Part
    from qmigrate.format.multifd import PagePacket

__all__ = ["KINDS", "Block", "ChannelContents", "CommandPlace", "Contents", "Gathering", "Migration", "Section"]


@dataclass(slots=True)
class Section:
    """A section with its place: START, PART, END or FULL.

    ``offset`` and ``length`` are in bytes, the footer counts.  ``state`` is a FULL section's, where the
    description decoded it; else ``reason`` says why not.  ``package`` is the offset of the PACKAGED command
    that holds the section, None outside of one.  ``whole`` is False where the stream ends, or goes wrong,
    inside it.
    """

    offset: int
    kind: SectionType
    name: str
    instance_id: int
    version_id: int
    section_id: int
    length: int = 0
    state: VmState | None = None
    reason: str | None = None
    package: int | None = None
    whole: bool = False
    page_count: int = 0
    schema: str | None = None
    """Whose description decoded ``state``, where the stream has none and one was found."""
    channel: int = 0
    """Where a migration has several connections: which of them; 0 is main."""

    @property
    def key(self) -> str:
        """``name/instance``: as devices are told apart."""
        return f"{self.name}/{self.instance_id}"


@dataclass(slots=True)
class CommandPlace:
    """A command with its place; ``contents`` are a package's, in order."""

    offset: int
    length: int
    command: Command
    contents: list["CommandPlace | Section"] = field(default_factory=list)
    channel: int = 0


KINDS: Final[Mapping[int, str]] = {
    RamFlag.PAGE: "normal",
    RamFlag.ZERO: "zero",
    RamFlag.XBZRLE: "xbzrle",
    RamFlag.COMPRESS_PAGE: "compressed",
}
"""What pages are called by how they were sent, in ``counts``."""


@dataclass(slots=True)
class Block:
    """A RAM block, and how its pages were sent.  Lengths in bytes.

    ``page_size`` and ``address`` are what the block list says of it, None where it says nothing.
    """

    name: str
    length: int
    page_size: int | None
    address: int | None
    index: int
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS.values(), 0))
    again: int = 0
    """How many page records replaced an earlier one of the same page."""
    seen: SeenPages = field(default_factory=SeenPages, repr=False)


@dataclass(slots=True)
class ChannelContents:
    """One connection of several, or its way back; ``length`` in bytes.

    ``known_by`` and ``reason`` say how it is known what it is.  ``pages`` are counted by how they were sent,
    ``messages`` of a return path by their names.
    """

    name: str
    kind: str
    known_by: str
    reason: str
    input: str
    length: int = 0
    pages: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    syncs: int = 0


@dataclass(slots=True)
class Contents:
    """What one pass over a stream found.  ``complete``: the grammar reached its end."""

    machine_type: str | None = None
    capabilities: tuple[str, ...] = ()
    target_page_bits: int | None = None
    configuration: Configuration | None = None
    blocks: dict[str, Block] = field(default_factory=dict)
    channels: list[ChannelContents] = field(default_factory=list)
    """All connections of the migration, where more than one is known: main first."""
    sections: list[Section] = field(default_factory=list)
    commands: list[CommandPlace] = field(default_factory=list)
    undecoded: list[tuple[int, int, str]] = field(default_factory=list)
    passes: int = 0
    base: int | None = None
    """Where in its file a mapped-ram stream says that it begins; None of any other."""
    stale: int = 0
    """Bytes in the place of a page that has no contents (mapped-ram): of an earlier pass, and read by nobody."""
    page_size: int = 4096
    length: int = 0
    trailing: int = 0
    trailing_head: bytes = b""
    footers: bool | None = None
    description: Description | None = None
    description_length: int | None = None
    description_fault: StreamError | None = None
    complete: bool = False
    errors: list[StreamError] = field(default_factory=list)

    @property
    def devices(self) -> Mapping[str, VmState]:
        """The decoded state of each device, by ``name/instance``."""
        return {section.key: section.state for section in self.sections if section.state is not None}


_MAGIC_BYTES: Final = 8


class Migration:
    """A migration stream in a file or pipe.  Closes the files that it opened.

    ``channels`` are files with further connections of the same migration (multifd, preempt, resumed), in any order;
    then ``path`` may be any of them.  ``return_paths`` are files with what came back.  A recording of ``qmigrate tap``
    has them all.

    Its parts (``sections``, ``blocks``, ``devices`` and so on) come from one pass, made at the first need.
    A fault in the stream is kept in ``errors``, and what was good before it is given; ``NoStreamError`` is
    raised where there is no stream at all.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        channels: Sequence[str | os.PathLike[str]] = (),
        return_paths: Sequence[str | os.PathLike[str]] = (),
        description: Description | Chooser | None = None,
        page_size: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.source = Source(path)
        self._others: list[tuple[Source, bool | None]] = []
        try:
            self._others += [(Source(each), True) for each in channels]
            self._others += [(Source(each), False) for each in return_paths]
        except BaseException:
            self.close()
            raise
        self._description = description
        self._page_size = page_size
        self._limits = limits

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the inputs, but not standard input."""
        for source in (self.source, *(other for other, _ in self._others)):
            source.close()

    @cached_property
    def parts(self) -> "list[Part]":
        """The channels, main first; none where there is but one stream.  Raises ``NoStreamError``."""
        if self.source.recording is None and not self._others:
            return []
        from qmigrate.capture.joining import classified, recorded_parts  # most migrations are one stream

        if self.source.recording is not None:
            return recorded_parts(self.source.recording)
        return classified([(self.source, None), *self._others])

    def entries(self) -> Iterator[Entry]:
        """Each record with its place, from the start; of a pipe only once.

        Raises ``StreamError``; where the migration has several channels, once all of them are read.
        """
        if not self.parts:
            return self.source.entries(description=self._description, page_size=self._page_size, limits=self._limits)
        from qmigrate.capture.joining import Joining

        return Joining(
            self.parts, description=self._description, page_size=self._page_size, limits=self._limits
        ).entries()

    def gather(self) -> "Gathering":
        """One pass: an iterator of the entries that fills ``contents`` as it goes."""
        channels = [
            ChannelContents(
                name=part.name,
                kind=part.channel.kind.value,
                known_by=part.channel.known_by.value,
                reason=part.channel.reason,
                input=part.readable.name,
            )
            for part in self.parts
        ]
        return Gathering(self.entries(), channels)

    @cached_property
    def contents(self) -> Contents:
        """What one pass over the whole stream finds."""
        gathering = self.gather()
        for _ in gathering:
            pass
        return gathering.contents

    @property
    def machine_type(self) -> str | None:
        """As CONFIGURATION names it, e.g. ``pc-q35-10.0``; None without one."""
        return self.contents.machine_type

    @property
    def sections(self) -> list[Section]:
        """All sections in order, a package's too."""
        return self.contents.sections

    @property
    def blocks(self) -> Mapping[str, Block]:
        """The RAM blocks by name."""
        return self.contents.blocks

    @property
    def devices(self) -> Mapping[str, VmState]:
        """The decoded state of each device, by ``name/instance``."""
        return self.contents.devices

    @property
    def commands(self) -> list[CommandPlace]:
        """The commands in order, a package's nested."""
        return self.contents.commands

    @property
    def complete(self) -> bool:
        """Did the grammar reach its end?"""
        return self.contents.complete

    @property
    def errors(self) -> list[StreamError]:
        """What is wrong with the stream: empty when ``complete``."""
        return self.contents.errors


def _block(block: RamBlock, index: int) -> Block:
    return Block(
        name=block.name, length=block.used_length, page_size=block.page_size, address=block.address, index=index
    )


class Gathering:
    """Pass the entries on and gather what they hold in ``contents``, also when a fault ends them."""

    def __init__(self, entries: Iterator[Entry], channels: Sequence[ChannelContents] = ()) -> None:
        self.contents = Contents(channels=list(channels))
        self._entries = entries
        self._channel = 0
        self._open: Section | None = None
        self._headers: dict[int, SectionHeader] = {}
        self._kept: dict[int, tuple[Section, int, bytes]] = {}
        self._packages: list[CommandPlace] = []
        self._passes = PassCounter()
        self._switched = False

    def __iter__(self) -> Iterator[Entry]:
        contents = self.contents
        try:
            for entry in self._entries:
                if contents.channels:
                    self._take_of(entry, contents.channels[entry.channel])
                else:
                    self._take(entry)
                if not entry.channel:
                    contents.length = max(contents.length, entry.offset + entry.length)
                yield entry
        except NoStreamError:
            raise
        except StreamError as exc:
            errors = exc.errors if isinstance(exc, StreamErrors) else [exc]
            # A traceback would hold the reader and its window, in a circle that is freed late.
            contents.errors += [error.with_traceback(None) for error in errors]
            return
        self._close(contents.length)
        contents.complete = True

    def _take_of(self, entry: Entry, channel: ChannelContents) -> None:
        """An entry of one of several channels."""
        from qmigrate.format.multifd import PagePacket
        from qmigrate.format.return_path import Message

        if entry.channel != self._channel:
            self._channel, self._open = entry.channel, None  # a section ends with its connection
        channel.length = max(channel.length, entry.offset + entry.length)
        match entry.record:
            case PagePacket() as packet:
                self._packet(packet, channel)
            case Message() as message:
                channel.messages[message.name] += 1
            case Pages(runs=runs):
                normal, zero = count_pages(runs)
                channel.pages += Counter({name: count for name, count in (("normal", normal), ("zero", zero)) if count})
                self._take(entry)
            case RamPage(record=record):
                channel.pages[KINDS[record.word.kind]] += 1
                self._take(entry)
            case _:
                self._take(entry)

    def _packet(self, packet: "PagePacket", channel: ChannelContents) -> None:
        header = packet.header
        channel.syncs += header.is_sync
        if not header.normal_pages and not header.zero_pages:
            return
        method = header.compression.name.lower()
        channel.pages["normal" if method == "nocomp" else method] += header.normal_pages
        channel.pages["zero"] += header.zero_pages
        block = self.contents.blocks[header.block]
        block.again += block.seen.add_intervals(intervals_of(packet.runs, packet.page_size), packet.page_size)
        block.counts["normal"] += header.normal_pages
        block.counts["zero"] += header.zero_pages

    def _take(self, entry: Entry) -> None:  # noqa: PLR0912 - one row a record
        while self._packages and entry.depth < len(self._packages):
            self._packages.pop()
        record = entry.record
        match record:
            case Pages():
                self._pages(record)
            case RamPage():
                self._odd_page(record)
            case RamRecord() | BlockListHeader() | MappedBitmap() | Gap():
                pass
            case MappedBlock(block=block, header=header):
                self.contents.base = header.bitmap_offset - entry.offset - entry.length
                self.contents.blocks[block.name] = _block(block, len(self.contents.blocks))
            case MappedPages():
                self._pages(record)
                self.contents.stale += record.stale
            case SectionHeader() | SectionPart():
                self._close(entry.offset)
                self._section(entry, record)
            case Footer():
                self.contents.footers = True
                self._close(entry.offset + entry.length)
            case DeviceState(state=state, schema=schema):
                if self._open is not None:
                    self._open.state, self._open.schema = state, schema
            case Undecoded(data=data, reason=reason):
                self._undecoded(entry, data, reason)
            case BlockList():
                self._blocks(record)
            case Command():
                self._close(entry.offset)
                self._command(entry, record)
            case Configuration():
                self._configuration(record)
            case VmDescription():
                self._close(entry.offset)
                self.contents.description = record.description
                self.contents.description_fault = record.fault
                self.contents.description_length = len(record.text)
                self._decode_early()
            case Trailing(data=data):
                self.contents.trailing += len(data)
                self.contents.trailing_head += data[: _MAGIC_BYTES - len(self.contents.trailing_head)]
            case _:
                self._close(entry.offset)

    def _close(self, end: int) -> None:
        """The open section ends here: at its footer, or where the next thing begins."""
        if self._open is not None:
            self._open.length = end - self._open.offset
            self._open.whole = True
            self._open = None

    def _section(self, entry: Entry, record: SectionHeader | SectionPart) -> None:
        if isinstance(record, SectionHeader):
            self._headers[record.section_id] = record
        header = self._headers[record.section_id]
        package = self._packages[-1] if self._packages else None
        section = Section(
            offset=entry.offset,
            kind=record.kind,
            name=header.idstr,
            instance_id=header.instance_id,
            version_id=header.version_id,
            section_id=header.section_id,
            package=None if package is None else package.offset,
            length=entry.length,
            channel=entry.channel,
        )
        self._open = section
        self.contents.sections.append(section)
        if package is not None:
            package.contents.append(section)

    def _undecoded(self, entry: Entry, data: bytes, reason: str) -> None:
        if self._open is None:
            self.contents.undecoded.append((entry.offset, entry.length, reason))
        else:
            self._open.reason = reason
            self._kept[id(self._open)] = (self._open, entry.offset, data)

    def _decode_early(self) -> None:
        """Sections that came before the description, now that it is here."""
        description = self.contents.description
        if description is None:
            return
        for section, offset, data in self._kept.values():
            device = description.device(section.name, section.instance_id)
            if device is None or section.package is not None:
                continue
            try:
                state, used = decode_state(device.body, data, offset=offset, trail=(section.name,))
            except StreamError as exc:
                section.reason = f"the description does not fit: {exc}"
                continue
            if used == len(data):
                section.state, section.reason = state, None
            else:
                section.reason = f"its footer stands after {len(data)} bytes, the description says {used}"

    def _command(self, entry: Entry, command: Command) -> None:
        place = CommandPlace(entry.offset, entry.length, command, channel=entry.channel)
        holder = self._packages[-1].contents if self._packages else self.contents.commands
        holder.append(place)
        if isinstance(command, Packaged):
            self._packages.append(place)
            self._switched = True

    def _configuration(self, record: Configuration) -> None:
        self.contents.configuration = record
        self.contents.machine_type = record.machine_type
        for subsection in record.subsections:
            match subsection.body:
                case ConfigurationCapabilities() as body:
                    self.contents.capabilities = tuple(name.name for name in body.names)
                case ConfigurationTargetPageBits() as body:
                    self.contents.target_page_bits = body.target_page_bits

    def _blocks(self, record: BlockList) -> None:
        self.contents.blocks = {block.name: _block(block, index) for index, block in enumerate(record.blocks)}

    def _pages(self, pages: Pages | MappedPages) -> None:
        contents = self.contents
        block, page_size, runs = contents.blocks[pages.block], pages.page_size, pages.runs
        contents.page_size = page_size
        intervals, (normal, zero) = intervals_of(runs, page_size), count_pages(runs)
        block.again += block.seen.add_intervals(intervals, page_size)
        block.counts["normal"] += normal
        block.counts["zero"] += zero
        if not self._switched and isinstance(pages, Pages):
            self._passes.take(block.index, intervals)
            contents.passes = self._passes.count
        if self._open is not None:
            self._open.page_count += normal + zero

    def _odd_page(self, page: RamPage) -> None:
        self.contents.page_size = page.page_size
        block = self.contents.blocks[page.block]
        start = page.record.word.start
        block.counts[KINDS[page.record.word.kind]] += 1
        block.again += block.seen.add(start // page.page_size, 1)
        if not self._switched:
            self._passes.take(block.index, [(start, start + page.page_size)])
            self.contents.passes = self._passes.count
        if self._open is not None:
            self._open.page_count += 1
