"""What one pass over a migration finds, as values."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from qmigrate.capture.seen import SeenPages
from qmigrate.errors import StreamError
from qmigrate.format.command import Command
from qmigrate.format.ram import RamFlag
from qmigrate.format.stream import (
    SectionType,
)
from qmigrate.format.vm_state import VmState
from qmigrate.format.vmdesc import Description
from qmigrate.format.walk import (
    Configuration,
)

__all__ = ["KINDS", "Block", "ChannelContents", "CommandPlace", "Contents", "Section"]


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
    lost: int = 0
    """How many pages were discarded at the switch to postcopy and did not come after it."""
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
