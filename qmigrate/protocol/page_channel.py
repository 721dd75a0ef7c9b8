"""The preempt channel (since 7.1): pages that were asked for, ahead of those on main.

migration/ram.c: ram_load_postcopy(), postcopy_preempt_thread()
"""

from collections.abc import Iterator, Mapping

from qmigrate.format.entry import Entry, Step
from qmigrate.format.feed import Feed
from qmigrate.format.ram import Pages
from qmigrate.format.ram_section import RamSection
from qmigrate.protocol.destination_events import PagesCame

__all__ = ["PageChannel"]


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
        return None if entry is None else PagesCame.of(entry)

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
                yield PagesCame.of(entry)
