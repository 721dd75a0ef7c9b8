"""What the grammar makes of a stream, and of one that is damaged."""

from collections.abc import Sequence
from typing import Any, Final, TypeVar

from qmigrate.analysis.records import coalesce
from qmigrate.format.entry import Entry
from qmigrate.format.stream import SectionHeader
from tests import streams
from tests.walking import entries, kept, rebuilt, until_fault

T = TypeVar("T")
HEAD: Final = streams.header() + streams.configuration()
RAM: Final = streams.ram_start() + streams.ram()


def walked(data: bytes, step: int | None = None, **options: Any) -> list[Entry]:
    """All entries; the bytes of each are where it says, none is left out, and they come back the same."""
    found = list(kept(entries(data, step, **options)))
    at = 0
    for entry in found:
        assert entry.offset == at
        assert entry.view == data[at : at + entry.length]
        at += entry.length
    assert at == len(data)
    assert rebuilt(iter(found)) == data
    return found


def of(found: Sequence[Entry], kind: type[T]) -> list[T]:
    """The records of one kind."""
    return [entry.record for entry in found if isinstance(entry.record, kind)]


def names(found: Sequence[Entry]) -> list[str]:
    """The sections' names, of those that have their own header."""
    return [header.idstr for header in of(found, SectionHeader)]


def fault(data: bytes, **options: Any) -> str:
    _, error = until_fault(data, **options)
    assert error is not None
    return str(error)


def same(found: Sequence[Entry]) -> list[tuple[int, int, object, int]]:
    """The entries with each run of pages whole, without their bytes."""
    return [(entry.offset, entry.length, entry.record, entry.depth) for entry in coalesce(found)]
