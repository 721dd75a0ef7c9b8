"""What a walk yields: a record, and its place in the stream."""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Self, TypeAlias

from qmigrate.errors import StreamError
from qmigrate.format._record import Record
from qmigrate.format.ram import BlockList, Pages, RamRecord
from qmigrate.format.stream import SubsectionHeader
from qmigrate.format.vm_state import VmState
from qmigrate.format.vmdesc import Description, parse_description

if TYPE_CHECKING:
    from qmigrate.format.mapped_ram import Gap, MappedBitmap, MappedBlock, MappedPages
    from qmigrate.format.multifd import ChannelRecord

__all__ = [
    "Configuration",
    "ConfigurationSubsection",
    "DeviceState",
    "Entry",
    "RamPage",
    "Step",
    "StreamRecord",
    "Trailing",
    "Undecoded",
    "VmDescription",
]


@dataclass(frozen=True, kw_only=True)
class ConfigurationSubsection:
    """One of CONFIGURATION's subsections, its body by name."""

    header: SubsectionHeader
    body: Record


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The machine type's name, and what both ends must agree on.  migration/savevm.c: vmstate_configuration"""

    machine_type: str
    subsections: tuple[ConfigurationSubsection, ...] = ()


@dataclass(frozen=True)
class DeviceState:
    """A FULL section's data, decoded by the description: where the stream has none, by that of ``schema``."""

    state: VmState
    schema: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Undecoded:
    """Bytes that were not decoded, and why."""

    data: bytes
    reason: str


@dataclass(frozen=True)
class RamPage:
    """A page record that is no plain page: xbzrle, compressed.  ``page_size`` is the target's, in bytes."""

    block: str
    page_size: int
    record: RamRecord


@dataclass(frozen=True)
class VmDescription:
    """The JSON text at the end; ``description`` is what it says.

    It is None where the text is empty, or is no description: ``fault`` then says why.
    """

    text: bytes
    description: Description | None = field(default=None, compare=False)
    fault: StreamError | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, text: bytes, *, offset: int) -> Self:
        """What ``text`` at ``offset`` says.  A destination skips it: what is wrong in it is no fault of the stream."""
        try:
            return cls(text, parse_description(text, offset=offset) if text else None)
        except StreamError as exc:
            return cls(text, fault=exc)


@dataclass(frozen=True)
class Trailing:
    """Bytes behind the stream's end; where a file has a hole, only how many ``zeros`` that is, and no view of them."""

    data: bytes = b""
    zeros: int = 0


StreamRecord: TypeAlias = (
    "Record | Configuration | DeviceState | Undecoded | BlockList | Pages | RamPage | MappedBlock | MappedBitmap | Gap "
    "| MappedPages | ChannelRecord | VmDescription | Trailing"
)


class Entry(NamedTuple):
    """A record with its place.  ``depth`` counts the packages around it.

    ``view`` is the record's bytes; it holds until the walk is resumed.  ``channel`` is the connection that it came
    over, where a migration has several: 0 is main.
    """

    offset: int
    length: int
    record: StreamRecord
    view: memoryview
    depth: int = 0
    channel: int = 0


Step: TypeAlias = Generator[Entry | None]
"""None where bytes are missing."""
