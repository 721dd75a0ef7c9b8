"""RAM by block and by pass."""

from dataclasses import dataclass, field
from typing import Any

from qmigrate.analysis.records import coalesce
from qmigrate.analysis.summary import describe_block, describe_error
from qmigrate.capture.migration import KINDS, Contents, Migration
from qmigrate.capture.passes import PassCounter
from qmigrate.format.command import Packaged
from qmigrate.format.entry import Entry, RamPage
from qmigrate.format.mapped_ram import MappedBlock, MappedPages
from qmigrate.format.ram import BlockList, Pages

__all__ = ["PassCounts", "RamTally", "describe_ram", "tally_ram"]


@dataclass(slots=True)
class PassCounts:
    """What one pass sent: pages by kind, and of which blocks (by their place in the list)."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS.values(), 0))
    blocks: set[int] = field(default_factory=set)


@dataclass(slots=True)
class RamTally:
    """The runs of each block, and what each pass sent.  ``postcopy`` is what came after the switch."""

    contents: Contents
    runs: dict[str, int] = field(default_factory=dict)
    passes: list[PassCounts] = field(default_factory=list)
    postcopy: PassCounts = field(default_factory=PassCounts)
    _indexes: dict[str, int] = field(default_factory=dict)
    _counter: PassCounter = field(default_factory=PassCounter)
    _switched: bool = False

    def take(self, entry: Entry) -> None:
        """Count one coalesced record."""
        match entry.record:
            case BlockList(blocks=blocks):
                self._indexes = {block.name: index for index, block in enumerate(blocks)}
            case MappedBlock(block=block):
                self._indexes[block.name] = len(self._indexes)
            case MappedPages(block=name, runs=(run, *_)):
                self.runs[name] = self.runs.get(name, 0) + 1
            case Packaged():
                self._switched = True
            case Pages(runs=(run, *_)) as pages:
                self._pages(pages.block, run.flag, run.page_count, run.start, pages.page_size)
            case RamPage(block=block, record=record):
                self._pages(block, record.word.kind, 1, record.word.start, entry.record.page_size)

    def _pages(self, block: str, flag: int, page_count: int, start: int, page_size: int) -> None:
        self.runs[block] = self.runs.get(block, 0) + 1
        index = self._indexes[block]
        if self._switched:
            now = self.postcopy
        else:
            self._counter.take(index, [(start, start + page_count * page_size)])
            if len(self.passes) < self._counter.count:
                self.passes.append(PassCounts())
            now = self.passes[-1]
        now.counts[KINDS[flag]] += page_count
        now.blocks.add(index)


def tally_ram(migration: Migration) -> RamTally:
    """One pass over the stream.  A fault in it is in ``contents.errors``."""
    gathering = migration.gather()
    tally = RamTally(gathering.contents)
    for entry in coalesce(gathering):
        tally.take(entry)
    return tally


def describe_ram(tally: RamTally) -> dict[str, Any]:
    """As ``dissect --ram --json`` prints it: blocks as in the summary, with their runs; each pass."""
    contents = tally.contents
    return {
        "target_page_size": contents.page_size,
        "ram_blocks": [
            {**describe_block(block, contents.page_size), "runs": tally.runs.get(block.name, 0)}
            for block in contents.blocks.values()
        ],
        "passes": [_describe_pass(sent) for sent in tally.passes],
        "postcopy": _describe_pass(tally.postcopy) if tally.postcopy.blocks else None,
        "complete": contents.complete,
        "errors": [describe_error(error) for error in contents.errors],
    }


def _describe_pass(sent: PassCounts) -> dict[str, int]:
    counts = {kind: number for kind, number in sent.counts.items() if number or kind in ("normal", "zero")}
    return {**counts, "blocks": len(sent.blocks)}
