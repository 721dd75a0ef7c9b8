"""The main channel of a recovery: it goes on where the one before was broken off.

Neither header nor CONFIGURATION is sent again; what sections there are, the first channel has said.

migration/migration.c: postcopy_do_resume()
"""

from qmigrate.format.entry import Step
from qmigrate.format.feed import Feed
from qmigrate.format.ram_section import RamSection
from qmigrate.format.walk import Walker

__all__ = ["ResumedWalker"]


class ResumedWalker(Walker):
    """``run()`` gives the entries of a resumed main channel.  ``before`` has walked the one that broke."""

    def __init__(self, feed: Feed, before: Walker) -> None:
        super().__init__(feed, description=before.schema, page_size=before.page_size, limits=before.limits)
        self.capabilities, self.advised, self.footers = before.capabilities, before.advised, before.footers
        self.sections, self.live = before.sections, before.live
        self.switched = True
        if before.ram is not None:
            self.ram = RamSection(
                feed,
                page_size=before.ram.page_size,
                is_known=True,
                capabilities=self.capabilities,
                advised=self.advised,
            )
            self.ram.blocks = before.ram.blocks

    def _header(self) -> Step:
        yield from ()
