"""What readers of live sections share.

A reader consumes the data of exactly one section: from behind the section header up to the footer, or to
whatever follows where there are no footers.  It yields None while bytes are missing.  Long payloads come as
pieces behind the record that announces them, so that memory grows with what was read; all records of a
section, encoded one after the other, are its bytes again.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

from construct import GreedyBytes

from qmigrate.format._record import (
    Adapter,
    AnyConstruct,
    Record,
    wire,
)
from qmigrate.format.feed import Feed
from qmigrate.format.stream import SectionType

__all__ = [
    "PIECE",
    "Checked",
    "Entries",
    "LiveEntry",
    "LiveState",
    "Opaque",
    "Payload",
    "Reader",
    "encode",
    "payload",
    "read_one",
]


class LiveEntry(NamedTuple):
    """A record of a live section, where it begins in the stream, and how many bytes it takes."""

    offset: int
    length: int
    record: Record


@dataclass
class LiveState:
    """What one section remembers from part to part; each section of a stream has its own.

    ``section_id`` and ``footers`` (None: not known yet) are the caller's to set: they help to find the end
    of what has no length.  The names are those of the record that was read last, whether it repeated them or
    not; ``htab_shift`` is None before START, and for a guest with a radix tree.
    """

    section_id: int | None = None
    footers: bool | None = None
    node_alias: str | None = None
    bitmap_alias: str | None = None
    htab_shift: int | None = None


Entries = Generator[LiveEntry | None]
Reader = Callable[[Feed, SectionType, LiveState, Sequence[str]], Entries]
R = TypeVar("R", bound=Record)

PIECE: Final = 1 << 20


class Payload(Record):
    """Bytes that the record before announced, in pieces of at most 1 MiB."""

    data: bytes = wire(GreedyBytes)


class Opaque(Payload):
    """Bytes that have no length of their own: their end was searched for."""


class Checked(Adapter):
    """A value that stays as it is, once ``check`` has not refused it."""

    def __init__(self, check: Callable[[Any], object], subcon: AnyConstruct) -> None:
        super().__init__(subcon)
        self.check = check

    def _decode(self, obj: Any, context: Any, path: str) -> Any:
        self.check(obj)
        return obj

    def _encode(self, obj: Any, context: Any, path: str) -> Any:
        return obj


def encode(record: Record) -> bytes:
    """The bytes of any record of a live section."""
    return record.build()


def read_one(feed: Feed, cls: type[R], trail: Sequence[str]) -> Generator[LiveEntry | None, None, R]:
    """Consume one record, yield it as an entry, and give it to the reader."""
    record, length = yield from feed.record(cls, trail)
    at = feed.offset
    feed.skip(length)
    yield LiveEntry(at, length, record)
    return record


def payload(feed: Feed, count: int, trail: Sequence[str]) -> Entries:
    while count:
        at = feed.offset
        data = yield from feed.take(min(count, PIECE), trail)
        yield LiveEntry(at, len(data), Payload(data=data))
        count -= len(data)
