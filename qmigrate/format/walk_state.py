"""What a stream has said so far, as far as it tells how to read on.

``walk`` reads by it from the top; ``early`` and ``device_sections`` read by it what has no length.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmigrate.format.command import PageSizes
from qmigrate.format.entry import Entry, StreamRecord
from qmigrate.format.feed import Feed
from qmigrate.format.ram_section import RamSection
from qmigrate.format.stream import SectionHeader
from qmigrate.format.tail import Chooser
from qmigrate.format.vmdesc import Description

if TYPE_CHECKING:
    from qmigrate.format.live import LiveState

__all__ = ["Limits", "WalkState"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is kept in memory at once, in bytes: beyond it the stream is refused."""

    device_state: int = 1 << 30
    package: int = 1 << 30


class WalkState:
    """The state of one walk.

    ``schema`` decodes device state where the stream has no description of its own, or a chooser finds one that does;
    ``page_size`` is the target's, in bytes; ``footers`` is None until the stream has shown whether sections have them;
    ``switched``: a package came, so it is a postcopy.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        description: Description | Chooser | None = None,
        page_size: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.feed = feed
        self.schema = description
        self.machine_type: str | None = None
        self.limits = limits or Limits()
        self.page_size = page_size or 4096
        self.page_size_is_known = page_size is not None
        self.capabilities: frozenset[str] = frozenset()
        self.advised: PageSizes | None = None
        self.footers: bool | None = None
        self.sections: dict[int, SectionHeader] = {}
        self.ram: RamSection | None = None
        self.ram_ended = False
        self.live: dict[int, LiveState] = {}
        self.switched = False

    def consume(self, record: StreamRecord, length: int) -> Entry:
        """Consume ``length`` bytes, which are at hand, as this record."""
        entry = Entry(self.feed.offset, length, record, self.feed.view(length))
        self.feed.skip(length)
        return entry
