"""A migration at rest: what its stream holds, gathered in one pass.

All else sees only this: ``with qmigrate.open(path) as migration``.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Final, Self

from qmigrate.capture.open import Source
from qmigrate.capture.passes import PassCounter
from qmigrate.capture.seen import SeenPages
from qmigrate.errors import NoStreamError, StreamError
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

__all__ = ["KINDS", "Block", "CommandPlace", "Contents", "Gathering", "Migration", "Section"]


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
class Contents:
    """What one pass over a stream found.  ``complete``: the grammar reached its end."""

    machine_type: str | None = None
    capabilities: tuple[str, ...] = ()
    target_page_bits: int | None = None
    configuration: Configuration | None = None
    blocks: dict[str, Block] = field(default_factory=dict)
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


_ZERO: Final = int(RamFlag.ZERO)
_MAGIC_BYTES: Final = 8


class Migration:
    """A migration stream in a file or pipe.  Closes the file that it opened.

    Its parts (``sections``, ``blocks``, ``devices`` and so on) come from one pass, made at the first need.
    A fault in the stream is kept in ``errors``, and what was good before it is given; ``NoStreamError`` is
    raised where there is no stream at all.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        description: Description | None = None,
        page_size: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.source = Source(path)
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
        """Close the input, unless it is standard input."""
        self.source.close()

    def entries(self) -> Iterator[Entry]:
        """Each record with its place, from the start; of a pipe only once.  Raises ``StreamError``."""
        return self.source.entries(description=self._description, page_size=self._page_size, limits=self._limits)

    @cached_property
    def contents(self) -> Contents:
        """What one pass over the whole stream finds."""
        gathering = Gathering(self.entries())
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

    def __init__(self, entries: Iterator[Entry]) -> None:
        self.contents = Contents()
        self._entries = entries
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
                self._take(entry)
                contents.length = max(contents.length, entry.offset + entry.length)
                yield entry
        except NoStreamError:
            raise
        except StreamError as exc:
            contents.errors.append(exc)
            return
        self._close(contents.length)
        contents.complete = True

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
            case DeviceState(state=state):
                if self._open is not None:
                    self._open.state = state
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
        place = CommandPlace(entry.offset, entry.length, command)
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
        block.again += block.seen.add_runs(runs, page_size)
        total = sum([run[3] for run in runs])
        zero = sum([count for _, flag, _, count in runs if flag == _ZERO])
        block.counts["normal"] += total - zero
        block.counts["zero"] += zero
        if not self._switched and isinstance(pages, Pages):
            starts = [run[2] for run in runs]
            ends = [start + page_count * page_size for _, _, start, page_count in runs]
            self._passes.take(block.index, starts, ends)
            contents.passes = self._passes.count
        if self._open is not None:
            self._open.page_count += total

    def _odd_page(self, page: RamPage) -> None:
        self.contents.page_size = page.page_size
        block = self.contents.blocks[page.block]
        start = page.record.word.start
        block.counts[KINDS[page.record.word.kind]] += 1
        block.again += block.seen.add(start // page.page_size, 1)
        if not self._switched:
            self._passes.take(block.index, [start], [start + page.page_size])
            self.contents.passes = self._passes.count
        if self._open is not None:
            self._open.page_count += 1
