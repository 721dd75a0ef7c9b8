"""Streams in memory, driven through the grammar: whole, in pieces, and up to their first fault."""

import lzma
from collections.abc import Callable, Generator, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from qmigrate.capture.migration import Migration
from qmigrate.errors import NoStreamError, StreamError
from qmigrate.format.entry import Entry
from qmigrate.format.feed import Feed
from qmigrate.format.walk import walk
from qmigrate.format.write import encode

T = TypeVar("T")
CORPUS = sorted(path.name.removesuffix(".mig.xz") for path in (Path(__file__).parent / "corpus").glob("*.mig.xz"))


@lru_cache(maxsize=2)
def corpus(name: str) -> bytes:
    """A stream of the corpus."""
    with lzma.open(Path(__file__).parent / "corpus" / f"{name}.mig.xz") as file:
        return file.read()


def entries(data: bytes, step: int | None = None, **options: Any) -> Iterator[Entry]:
    """Walk ``data``, which comes ``step`` bytes at a time, or as fast as it is taken."""
    feed = Feed()
    at, whole = 0, memoryview(data)
    for entry in walk(feed, **options):
        if entry is not None:
            yield entry
            continue
        space = feed.space()
        count = min(len(space), len(data) - at, step or len(data))
        space[:count] = whole[at : at + count]
        feed.received(count)
        at += count
        if not count:
            feed.end()


def kept(found: Iterator[Entry]) -> Iterator[Entry]:
    """The same entries with bytes that last."""
    for entry in found:
        yield entry._replace(view=memoryview(bytes(entry.view)))


def until_fault(data: bytes, step: int | None = None, **options: Any) -> tuple[list[Entry], Exception | None]:
    """All entries that are good, and the fault that ends them."""
    good: list[Entry] = []
    try:
        for entry in kept(entries(data, step, **options)):
            good.append(entry)
    except (StreamError, NoStreamError) as exc:
        return good, exc
    return good, None


def rebuilt(found: Iterator[Entry]) -> bytes:
    """What ``write`` makes of the entries."""
    return b"".join(encode(entry.record, contents=entry.view) for entry in found)


def run(parse: Callable[[Feed], Generator[None, None, T]], data: bytes, step: int | None = None) -> T:
    """What a parser over a feed returns for ``data``; the feed ends behind it."""
    feed = Feed(window=64)
    parser, at = parse(feed), 0
    while True:
        try:
            next(parser)
        except StopIteration as stop:
            value: T = stop.value
            return value
        piece = data[at : at + (step or len(data))]
        at += len(piece)
        if piece:
            feed.receive(piece)
        else:
            feed.end()


class InMemory(Migration):
    """A migration whose stream is these bytes."""

    parts = []  # noqa: RUF012 - one stream, no channels
    sources = []  # noqa: RUF012 - and no file
    recording_faults = []  # noqa: RUF012

    def __init__(self, data: bytes, step: int | None = None) -> None:
        self.data = data
        self.step = step

    def entries(self) -> Iterator[Entry]:
        return entries(self.data, self.step)
