"""RAM by block and by pass."""

from collections.abc import Iterator
from typing import Final

from qmigrate.analysis.ram import RamTally
from qmigrate.capture.migration import KINDS, Block
from qmigrate.report.names import clean
from qmigrate.report.paper import DIM, HEAD, Paper, text
from qmigrate.report.units import count, plural, share, size

__all__ = ["write_ram"]

_MOST_PASSES: Final = 24  # more than these are left out of the middle: a hostile stream may have any number


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
    for kind in KINDS.values():
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
        kind for kind in KINDS.values() if kind in ("normal", "zero") or any(sent.counts[kind] for _, sent in named)
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
