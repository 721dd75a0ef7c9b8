"""Is a stream valid, and is it the same again when it is rebuilt from its values?"""

import os
from dataclasses import dataclass, field
from typing import Any

from qmigrate.analysis.file import answer_file
from qmigrate.analysis.summary import describe_error
from qmigrate.capture.migration import Gathering, Migration
from qmigrate.errors import StreamError
from qmigrate.format.entry import RamPage, StreamRecord
from qmigrate.format.mapped_ram import Gap, MappedPages
from qmigrate.format.ram import Pages, RamRecord
from qmigrate.format.stretch import count_pages
from qmigrate.format.tail import Chooser
from qmigrate.format.vm_state import Field, VmState
from qmigrate.format.vmdesc import Description
from qmigrate.format.walk import DeviceState, Entry, Limits, Trailing, Undecoded, VmDescription
from qmigrate.format.write import encode

__all__ = ["Checked", "Difference", "check", "check_file", "describe_check"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Where the rebuilt bytes differ first within one record."""

    offset: int
    record: str
    found: bytes
    rebuilt: bytes


@dataclass(slots=True)
class Checked:
    """The answer.  ``opaque`` counts the bytes that were taken over as they are, by what they are."""

    gathering: Gathering
    length: int = 0
    opaque: dict[str, int] = field(
        default_factory=lambda: {
            "page contents": 0,
            "buffer fields": 0,
            "fields of unknown type": 0,
            "undecoded sections": 0,
            "description": 0,
        }
    )
    opaque_types: dict[str, int] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        """Every record rebuilt from its values is the bytes it was read from."""
        return not self.differences

    @property
    def valid(self) -> bool:
        """The grammar reached its end, and nothing stands behind it; a recording's file is whole."""
        contents = self.gathering.contents
        return contents.complete and not contents.errors and not contents.trailing

    @property
    def undecoded(self) -> int:
        """How many device sections stayed bytes."""
        contents = self.gathering.contents
        sections = [section for section in contents.sections if section.kind.name == "FULL" and section.state is None]
        return len(sections) + len(contents.undecoded)


_MOST_DIFFERENCES = 20


def check(migration: Migration) -> Checked:
    """Read the stream, rebuild each record from its typed values, compare.

    Raises ``NoStreamError`` where there is no stream; a fault in it is in ``gathering.contents.errors``.
    """
    checked = Checked(migration.gather())
    for entry in checked.gathering:
        _compare(checked, entry)
        _count_opaque(checked, entry)
        checked.length += entry.length
    return checked


def _compare(checked: Checked, entry: Entry) -> None:
    if isinstance(entry.record, Trailing) and entry.record.zeros:
        return  # it is only their number that is known, and it may be large
    page_size = checked.gathering.contents.page_size
    try:
        rebuilt = encode(entry.record, contents=entry.view, page_size=page_size)
    except StreamError as exc:
        rebuilt = str(exc).encode()
    # A bytearray is compared by memcmp, a memoryview element by element.
    rebuilt = rebuilt if isinstance(rebuilt, bytearray) else bytearray(rebuilt)
    if rebuilt == entry.view or len(checked.differences) >= _MOST_DIFFERENCES:
        return
    found = bytes(entry.view)
    at = next(
        (index for index, (a, b) in enumerate(zip(found, rebuilt, strict=False)) if a != b),
        min(len(found), len(rebuilt)),
    )
    checked.differences.append(
        Difference(entry.offset + at, type(entry.record).__name__, found[at : at + 16], bytes(rebuilt[at : at + 16]))
    )


def _count_opaque(checked: Checked, entry: Entry) -> None:
    opaque = checked.opaque
    match entry.record:
        case MappedPages(runs=runs, page_size=page_size, stale=stale):
            opaque["page contents"] += count_pages(runs)[0] * page_size + stale
        case Gap(data=bytes() as data):
            opaque["page contents"] += len(data)
        case Pages(runs=runs, page_size=page_size):
            opaque["page contents"] += count_pages(runs)[0] * page_size
        case Undecoded(data=data):
            opaque["undecoded sections"] += len(data)
        case Trailing():
            opaque["undecoded sections"] += entry.length
        case VmDescription(text=text):
            opaque["description"] += len(text)
        case DeviceState(state=state):
            _count_fields(checked, state)
        case RamPage(record=RamRecord(body=body)):
            opaque["page contents"] += len(getattr(body, "data", b""))
        case _ if entry.channel:
            _count_packet(opaque, entry.record)


def _count_packet(opaque: dict[str, int], record: StreamRecord) -> None:
    """What of a multifd packet are pages, as they are or compressed, or a device's state."""
    from qmigrate.format.multifd import DeviceStatePacket, PagePacket

    match record:
        case PagePacket(header=header):
            opaque["page contents"] += header.data_length
        case DeviceStatePacket(data=data):
            opaque["undecoded sections"] += len(data)


def _count_fields(checked: Checked, state: VmState) -> None:
    for leaf in state.leaves():
        if leaf.opaque is None:
            continue
        if is_buffer(leaf):
            checked.opaque["buffer fields"] += leaf.length
        else:
            checked.opaque["fields of unknown type"] += leaf.length
            checked.opaque_types[leaf.type] = checked.opaque_types.get(leaf.type, 0) + leaf.length


def is_buffer(leaf: Field) -> bool:
    """Of a type that QEMU itself only calls bytes."""
    return leaf.type in ("buffer", "unused_buffer")


def describe_check(checked: Checked) -> dict[str, Any]:
    """As ``check --json`` prints it; lengths in bytes."""
    contents = checked.gathering.contents
    return {
        "valid": checked.valid,
        "identical": checked.identical,
        "complete": contents.complete,
        "length": checked.length,
        "opaque": dict(checked.opaque),
        "opaque_types": dict(checked.opaque_types),
        "undecoded_sections": checked.undecoded,
        "trailing": contents.trailing,
        "differences": [
            {
                "offset": difference.offset,
                "record": difference.record,
                "found": difference.found.hex(),
                "rebuilt": difference.rebuilt.hex(),
            }
            for difference in checked.differences
        ],
        "errors": [describe_error(error) for error in contents.errors],
    }


def check_file(
    path: str | os.PathLike[str],
    *,
    description: Description | Chooser | None = None,
    page_size: int | None = None,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """What ``describe_check`` says of the stream in a file, or its ``error``, after the ``file``'s name.

    A pure function of the file that can be pickled: for pools and clusters.
    """
    return answer_file(path, _answer, description=description, page_size=page_size, limits=limits)


def _answer(migration: Migration) -> dict[str, Any]:
    return describe_check(check(migration))
