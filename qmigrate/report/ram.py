"""RAM by block and by pass."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from qmigrate.analysis.records import coalesce
from qmigrate.analysis.summary import describe_block, describe_error
from qmigrate.capture.migration import Block, Contents, Gathering, Migration
from qmigrate.format.command import Packaged
from qmigrate.format.entry import Entry, RamPage
from qmigrate.format.ram import BlockList, Pages, RamFlag
from qmigrate.report.names import clean
from qmigrate.report.paper import DIM, HEAD, Paper, text
from qmigrate.report.units import count, plural, share, size

__all__ = ["plain_ram", "tally_ram", "write_ram"]

_MOST_PASSES: Final = 24  # more than these are left out of the middle: a hostile stream may have any number
_KINDS: Final = {
    RamFlag.PAGE: "normal",
    RamFlag.ZERO: "zero",
    RamFlag.XBZRLE: "xbzrle",
    RamFlag.COMPRESS_PAGE: "compressed",
}


@dataclass(slots=True)
class PassCounts:
    """What one pass sent: pages by kind, and of which blocks (by their place in the list)."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_KINDS.values(), 0))
    blocks: set[int] = field(default_factory=set)


@dataclass(slots=True)
class RamTally:
    """The runs of each block, and what each pass sent.  ``postcopy`` is what came after the switch."""

    contents: Contents
    runs: dict[str, int] = field(default_factory=dict)
    passes: list[PassCounts] = field(default_factory=list)
    postcopy: PassCounts = field(default_factory=PassCounts)
    _indexes: dict[str, int] = field(default_factory=dict)
    _at: tuple[int, int] = (-1, -1)
    _switched: bool = False

    def take(self, entry: Entry) -> None:
        """Count one coalesced record."""
        match entry.record:
            case BlockList(blocks=blocks):
                self._indexes = {block.name: index for index, block in enumerate(blocks)}
            case Packaged():
                self._switched = True
            case Pages(runs=(run, *_)) as pages:
                first, last = run.start, run.start + (run.page_count - 1) * pages.page_size
                self._pages(pages.block, run.flag, run.page_count, first, last)
            case RamPage(block=block, record=record):
                self._pages(block, record.word.kind, 1, record.word.start, record.word.start)

    def _pages(self, block: str, kind: int, page_count: int, first: int, last: int) -> None:
        self.runs[block] = self.runs.get(block, 0) + 1
        index = self._indexes[block]
        if self._switched:
            now = self.postcopy
        else:
            # As Gathering counts them: going back in the list's order opens the next pass.
            if not self.passes or (index, first) <= self._at:
                self.passes.append(PassCounts())
            self._at = (index, last)
            now = self.passes[-1]
        now.counts[_KINDS[RamFlag(kind)]] += page_count
        now.blocks.add(index)


def tally_ram(migration: Migration) -> RamTally:
    """One pass over the stream.  A fault in it is in ``contents.errors``."""
    gathering = Gathering(migration.entries())
    tally = RamTally(gathering.contents)
    for entry in coalesce(gathering):
        tally.take(entry)
    return tally


def write_ram(tally: RamTally, paper: Paper) -> None:
    """A table of the blocks, and one of the passes."""
    contents = tally.contents
    blocks = list(contents.blocks.values())
    if not blocks:
        paper.line("no RAM in this stream")
        return
    page_size = contents.page_size
    said = f"{plural(len(blocks), 'block')}, {size(sum(block.length for block in blocks))}, pages of {size(page_size)}"
    paper.line(said, lead=text(("RAM", HEAD), "  "))
    columns = list(_block_columns(blocks, tally, page_size))
    paper.table(
        ["block", *(name for name, _ in columns)],
        [[clean(block.name), *(cells[row] for _, cells in columns)] for row, block in enumerate(blocks)],
    )
    _write_passes(tally, paper)


def _block_columns(blocks: list[Block], tally: RamTally, page_size: int) -> Iterator[tuple[str, list[str]]]:
    """``sent`` counts different pages; those sent again are counted by kind as often as they came."""
    yield "size", [size(block.length) for block in blocks]
    if any(block.page_size is not None for block in blocks):
        yield "host page", ["-" if block.page_size is None else size(block.page_size) for block in blocks]
    if any(block.address is not None for block in blocks):
        yield "address", ["-" if block.address is None else f"{block.address:#x}" for block in blocks]
    yield "pages", [count(block.length // page_size) for block in blocks]
    yield "sent", [count(block.seen.count) for block in blocks]
    yield "never", [count(block.length // page_size - block.seen.count) for block in blocks]
    yield "again", [count(block.again) for block in blocks]
    for kind in _KINDS.values():
        numbers = [block.counts[kind] for block in blocks]
        if kind in ("normal", "zero") or any(numbers):
            yield kind, [count(number) for number in numbers]
    yield "zero %", [share(block.counts["zero"], sum(block.counts.values())).removesuffix(" %") for block in blocks]
    yield "runs", [count(tally.runs.get(block.name, 0)) for block in blocks]


def _write_passes(tally: RamTally, paper: Paper) -> None:
    named = [(str(number), sent) for number, sent in enumerate(tally.passes, start=1)]
    left_out = len(named) - 2 * _MOST_PASSES
    if left_out > 0:
        named = named[:_MOST_PASSES] + named[-_MOST_PASSES:]
    if tally.postcopy.blocks:
        named.append(("postcopy", tally.postcopy))
    if not named:
        return
    kinds = [
        kind for kind in _KINDS.values() if kind in ("normal", "zero") or any(sent.counts[kind] for _, sent in named)
    ]
    paper.heading("Passes", *([(f"{count(left_out)} in the middle are left out", DIM)] if left_out > 0 else []))
    paper.table(
        ["pass", "pages", *kinds, "blocks"],
        [
            [
                name,
                count(sum(sent.counts.values())),
                *(count(sent.counts[kind]) for kind in kinds),
                count(len(sent.blocks)),
            ]
            for name, sent in named
        ],
    )


def plain_ram(tally: RamTally) -> dict[str, Any]:
    """The same for JSON: blocks as in the summary, with their runs."""
    contents = tally.contents
    return {
        "target_page_size": contents.page_size,
        "ram_blocks": [
            {**describe_block(block, contents.page_size), "runs": tally.runs.get(block.name, 0)}
            for block in contents.blocks.values()
        ],
        "passes": [_plain_pass(sent) for sent in tally.passes],
        "postcopy": _plain_pass(tally.postcopy) if tally.postcopy.blocks else None,
        "complete": contents.complete,
        "errors": [describe_error(error) for error in contents.errors],
    }


def _plain_pass(sent: PassCounts) -> dict[str, int]:
    counts = {kind: number for kind, number in sent.counts.items() if number or kind in ("normal", "zero")}
    return {**counts, "blocks": len(sent.blocks)}
