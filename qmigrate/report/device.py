"""The state of a device: its fields as a tree, each with its offset, type and value."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple

from rich.text import Text

from qmigrate.analysis.check import is_buffer
from qmigrate.analysis.devices import arrays, plain
from qmigrate.capture.migration import Section
from qmigrate.format._record import Record
from qmigrate.format.device import encode_state
from qmigrate.format.vm_state import Field, Subsection, Value, VmState
from qmigrate.format.vmdesc import NULL_MARKERS
from qmigrate.report.names import clean
from qmigrate.report.paper import DIM, HEAD, KIND, ODD, Paper, text
from qmigrate.report.units import count

__all__ = ["write_devices", "write_value"]

_MOST_RUNS: Final = 24  # runs of equal elements that are shown of an array
_WIDEST_NAME: Final = 40
_NOT_ARMED: Final = (1 << 64) - 1
_DUMP_BYTES: Final = 16
_INDENT: Final = 2
_OFFSET_WIDTH: Final = 10
_STRUCTS: Final = frozenset({"struct", "tmp", "vstruct"})


def write_devices(sections: Sequence[Section], paper: Paper) -> None:
    """One device after the other."""
    for index, section in enumerate(sections):
        if index:
            paper.line()
        _write_device(section, paper)


def write_value(value: Any, paper: Paper) -> None:
    """A plain value for a script: one line where it is a scalar, else JSON.  Bytes are hex."""
    match value:
        case str():
            paper.verbatim(clean(value))
        case bool():
            paper.verbatim("true" if value else "false")
        case None | int():
            paper.verbatim("null" if value is None else str(value))
        case _:
            paper.verbatim(json.dumps(value, indent=2))


def _write_device(section: Section, paper: Paper) -> None:
    said = (
        f"{section.kind.name} at {section.offset:#x}, {section.length:,} bytes, section {section.section_id}, "
        f"version {section.version_id}"
    )
    paper.line(said, lead=text((clean(section.key), HEAD), "  "))
    if section.state is None:
        reason = section.reason or "the stream ends inside it"
        paper.line(text(("not decoded", ODD), f": {clean(reason)}"))
        return
    rows = list(_state_rows(section.state, 0))
    names = max((_INDENT * row.depth + Text(row.name).cell_len for row in rows if row.value is not None), default=0)
    types = max((len(row.type) for row in rows if row.value is not None), default=0)
    for row in rows:
        _write_row(row, min(names, _WIDEST_NAME), min(types, 20), paper)


# -- rows


class _Row(NamedTuple):
    """A line of the tree.  ``value`` is None where the lines below say it; ``dump`` is bytes to show below."""

    depth: int
    offset: int | None
    name: str
    type: str = ""
    value: Text | None = None
    dump: bytes = b""


def _write_row(row: _Row, names: int, types: int, paper: Paper) -> None:
    offset = "" if row.offset is None else f"{row.offset:#x}"
    place = text((f"{offset:>{_OFFSET_WIDTH}}  ", DIM), " " * (_INDENT * row.depth))
    name = text((row.name, "" if row.value is not None else KIND))
    value = row.value if row.value is not None else text()
    if paper.width is not None and paper.width < _OFFSET_WIDTH + names + types + 24:
        paper.line(text("  ").join(part for part in (name, text((row.type, DIM)), value) if part.plain), lead=place)
    else:
        room = max(names - _INDENT * row.depth - name.cell_len, 0) if row.value is not None else 0
        lead = text(place, name, " " * (room + 2), (f"{row.type:<{types}}" if value.plain else row.type, DIM), "  ")
        paper.line(value, lead=lead)
    if row.dump:
        _write_dump(row, paper)


def _write_dump(row: _Row, paper: Paper) -> None:
    """Lines of hex with the offset of each; equal lines after the first are a ``*``, as in hexdump."""
    step = _DUMP_BYTES
    while step > 4 and paper.width is not None and _OFFSET_WIDTH + 4 + 4 * step > paper.width:
        step //= 2
    previous, starred = b"", False
    for at in range(0, len(row.dump), step):
        piece = row.dump[at : at + step]
        if piece == previous and at + step < len(row.dump):
            if not starred:
                paper.line(text((f"{'*':>{_OFFSET_WIDTH}}", DIM)))
            starred = True
            continue
        previous, starred = piece, False
        offset = "" if row.offset is None else f"{row.offset + at:#x}"
        readable = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in piece)
        hex_bytes = f"{piece.hex(' '):<{3 * step - 1}}"
        paper.line(text((f"{offset:>{_OFFSET_WIDTH}}  ", DIM), hex_bytes, "  ", (readable, DIM)))


def _state_rows(state: VmState, depth: int) -> Iterator[_Row]:
    for name, fields in arrays(state.fields):
        index = 0
        for field in fields:
            shown = clean(name)
            if len(fields) > 1:
                many = field.description.count or 1
                shown += f"[{index}]" if many == 1 else f"[{index}–{index + many - 1}]"
                index += many
            yield from _field_rows(field, shown, depth)
    for subsection in state.subsections:
        yield from _subsection_rows(subsection, depth)


def _subsection_rows(subsection: Subsection, depth: int) -> Iterator[_Row]:
    yield _Row(depth, subsection.offset, clean(subsection.name), f"subsection, version {subsection.version}")
    yield from _state_rows(subsection.state, depth + 1)


def _field_rows(field: Field, name: str, depth: int) -> Iterator[_Row]:
    kind = _type_name(field)
    value = field.value
    if isinstance(value, VmState):
        yield _Row(depth, field.offset, name, clean(value.vmsd_name) or kind)
        yield from _state_rows(value, depth + 1)
    elif isinstance(value, tuple) and any(isinstance(item, VmState | tuple) for item in value):
        yield _Row(depth, field.offset, name, kind)
        yield from _elements(value, depth + 1)
    elif isinstance(value, bytes):
        yield from _bytes_rows(field, value, name, kind, depth)
    elif isinstance(value, tuple) and any(isinstance(item, bytes) for item in value):
        joined = b"".join(item for item in value if isinstance(item, bytes))
        yield from _bytes_rows(field, joined, name, kind, depth)
    elif dataclasses.is_dataclass(value):
        yield _Row(depth, field.offset, name, kind)
        yield from _inner_rows(value, depth + 1)
    else:
        yield _Row(depth, field.offset, name, kind, _scalar(value, field.type))


def _type_name(field: Field) -> str:
    description = field.description
    size = f"[{description.size}]" if is_buffer(field) else ""
    many = "" if description.count is None else f"[{description.count}]"
    return clean(description.type) + size + many


def _bytes_rows(field: Field, data: bytes, name: str, kind: str, depth: int) -> Iterator[_Row]:
    """A buffer as a dump; a type that is not decoded with the reason too."""
    said = (
        text() if is_buffer(field) or field.opaque is None else text(("not decoded", ODD), f": {clean(field.opaque)}")
    )
    if len(data) <= 8 and not said.plain:
        yield _Row(depth, field.offset, name, kind, text(data.hex(" ") or "empty"))
    else:
        yield _Row(depth, field.offset, name, kind, said, data)


def _elements(values: Sequence[Value], depth: int) -> Iterator[_Row]:
    """Structs, or a tree's nodes: of neighbours that are equal, the first is shown."""
    index = 0
    for _, group in itertools.groupby(values, key=_identity):
        same = list(group)
        until = "" if len(same) == 1 else f"–{index + len(same) - 1}"
        label = f"[{index}{until}]"
        first = same[0]
        offset = first.fields[0].offset if isinstance(first, VmState) and first.fields else None
        type_name = first.vmsd_name if isinstance(first, VmState) else ""
        equal = f"{count(len(same))} alike" if len(same) > 1 else ""
        if isinstance(first, VmState):
            yield _Row(depth, offset, label, clean("  ".join(filter(None, (type_name, equal)))))
            yield from _state_rows(first, depth + 1)
        elif isinstance(first, tuple):
            yield _Row(depth, None, label, equal)
            for part, item in zip(("key", "value"), first, strict=False):
                yield from _inner(part, item, depth + 1)
        else:
            yield _Row(depth, None, label, equal, _scalar(first, "struct"))
        index += len(same)


def _identity(value: Value) -> Any:
    """What makes two elements equal: their bytes, wherever they stand."""
    if isinstance(value, VmState):
        return encode_state(value)
    if isinstance(value, tuple):
        return tuple(_identity(item) for item in value)
    return value


# -- the inside of fixed layouts, whose parts have no offsets of their own


def _inner_rows(value: Any, depth: int) -> Iterator[_Row]:
    for item in dataclasses.fields(value):
        yield from _inner(item.name, getattr(value, item.name), depth)


def _inner(name: str, value: Any, depth: int) -> Iterator[_Row]:
    match value:
        case None:  # an optional part that is not there
            return
        case VmState():
            yield _Row(depth, None, name, clean(value.vmsd_name))
            yield from _state_rows(value, depth + 1)
        case tuple() if hasattr(value, "_fields"):
            said = "  ".join(f"{key} {_number(getattr(value, key)).plain}" for key in value._fields)
            yield _Row(depth, None, name, "", text(said))
        case tuple() if any(not isinstance(item, int) for item in value):
            yield _Row(depth, None, name, f"[{len(value)}]")
            yield from _inner_elements(value, depth + 1)
        case bytes() if len(value) > 8:
            yield _Row(depth, None, name, f"[{len(value)}]", text(), value)
        case bytes():
            yield _Row(depth, None, name, "", text(value.hex(" ") or "empty"))
        case str():
            yield _Row(depth, None, name, "", text(clean(value)))
        case _ if dataclasses.is_dataclass(value):
            yield _Row(depth, None, name, type(value).__name__)
            yield from _inner_rows(value, depth + 1)
        case _:
            yield _Row(depth, None, name, "", _scalar(value, ""))


def _inner_elements(values: Sequence[Any], depth: int) -> Iterator[_Row]:
    index = 0
    for _, group in itertools.groupby(values):
        same = list(group)
        until = "" if len(same) == 1 else f"–{index + len(same) - 1}"
        yield from _inner(f"[{index}{until}]", same[0], depth)
        index += len(same)


# -- scalars, and arrays of them


def _scalar(value: Any, kind: str) -> Text:
    match value:
        case None:
            return text("NULL")
        case True if kind in NULL_MARKERS or kind in _STRUCTS:
            return text("not NULL")
        case bool():
            return text("true" if value else "false")
        case tuple():
            return _array(value, kind)
        case IntEnum():
            return text(value.name, (f"  {int(value):#x}", DIM))
        case int() if kind == "timer":
            return text("not armed") if value == _NOT_ARMED else text(f"{value} ns")
        case int():
            return _number(value)
        case _:
            return text(clean(str(plain(value) if isinstance(value, Record) else value)))


def _number(value: Any) -> Text:
    """Decimal, and hex where that differs."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 9:
        return text(str(value), (f"  {value:#x}", DIM))
    return text(str(value))


def _array(values: tuple[Any, ...], kind: str) -> Text:
    """Runs of equal elements, each with its count."""
    if not values:
        return text(("empty", DIM))
    numbers = [value for value in values if isinstance(value, int)]
    spell = _speller(kind, numbers)
    runs = [(value, sum(1 for _ in group)) for value, group in itertools.groupby(values)]
    shown = [spell(value) if many == 1 else f"{count(many)} × {spell(value)}" for value, many in runs[:_MOST_RUNS]]
    left = sum(many for _, many in runs[_MOST_RUNS:])
    return text(", ".join(shown), (f", … {count(left)} more" if left else "", DIM))


def _speller(kind: str, numbers: Sequence[int]) -> Callable[[Any], str]:
    """In hex, where the type is unsigned and one of the numbers is not the same in decimal."""
    if max(numbers, default=0) > 9 and min(numbers) >= 0:
        return lambda value: f"{value:#x}" if value else "0"
    return lambda value: _scalar(value, kind).plain
