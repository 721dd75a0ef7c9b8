"""What a destination is told by its main channel, one event after another: see ``destination``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

from qmigrate.format.command import DiscardRange, PageSizes
from qmigrate.format.entry import Entry, RamPage
from qmigrate.format.ram import Pages, RamBlock
from qmigrate.format.stream import SectionHeader

__all__ = [
    "Advised",
    "BitmapAsked",
    "BlocksListed",
    "Configured",
    "Discarded",
    "EncodedCame",
    "Event",
    "Loaded",
    "PackageCame",
    "PagesCame",
    "Resumed",
    "SectionBegan",
    "SyncPoint",
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

    @classmethod
    def of(cls, entry: Entry) -> Self:
        """The pages of this entry, whose record they are."""
        assert isinstance(entry.record, Pages)
        return cls(entry.record, entry.offset, entry.view)


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
