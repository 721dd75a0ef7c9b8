"""Device state by its description: bytes to named, typed fields, and back.

The description is interpreted by a table of types (``field_types.TYPES``), each with both ways.  Structs, arrays, lists
and trees nest.  Every byte belongs to a field; what can't be decoded is bytes, with the reason.

migration/vmstate.c, migration/vmstate-types.c
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, NoReturn

from qmigrate.errors import StreamError, TruncatedError
from qmigrate.format.field_types import (
    INTEGER_SIZES,
    NATURAL_SIZES,
    OPAQUE,
    PLAIN_BYTES,
    SIGNED,
    TYPES,
    UNSIGNED,
)
from qmigrate.format.stream import SectionType, SubsectionHeader
from qmigrate.format.vm_state import Field, Subsection, Value, VmState, as_tuple
from qmigrate.format.vmdesc import NULL_MARKERS, FieldDescription, StructDescription

__all__ = ["decode_state", "decode_whole", "encode_state"]

_NULL, _VALID = 0x30, 0x31
_MOST_EMPTY_ELEMENTS: Final = 1 << 16


def _small(name: str, *fields: tuple[str, str, int]) -> tuple[str, StructDescription]:
    return name, StructDescription(name, 1, tuple(FieldDescription(*each) for each in fields))


OPTIONAL: Final[Mapping[str, StructDescription]] = dict(
    (
        _small("cpu/msr_smi_count", ("env.msr_smi_count", "uint64", 8)),
        _small("cpu/poll_control_msr", ("env.poll_control_msr", "uint64", 8)),
    )
)
"""Subsections that a machine has or has not from one moment to the next, as x86 QEMUs of 5.2 to 11.1 describe them.

So a machine whose guest has not begun does not describe those that its firmware makes it have.
target/i386/machine.c
"""


class _Cursor:
    """A place in a section's bytes."""

    def __init__(self, data: bytes, base: int, at: int = 0, foreign: bool = False) -> None:
        self.foreign = foreign
        self.data = data
        self.base = base
        self.begin = self.at = at
        self.steps = 0

    @property
    def offset(self) -> int:
        return self.base + self.at

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int, trail: Sequence[str]) -> bytes:
        if count > self.left:
            raise TruncatedError(f"{count} bytes are described, {self.left} are there", offset=self.offset, trail=trail)
        self.at += count
        return self.data[self.at - count : self.at]

    def count(self, steps: int, trail: Sequence[str]) -> None:
        """Arrays of arrays of nothing would take no bytes and for ever."""
        self.steps += steps
        if self.steps > _MOST_EMPTY_ELEMENTS + 16 * (self.at - self.begin):
            self.fail(f"more than {_MOST_EMPTY_ELEMENTS} elements that take no bytes are described", trail)

    def fail(self, message: str, trail: Sequence[str]) -> NoReturn:
        raise StreamError(message, offset=self.offset, trail=trail)


def decode_state(
    description: StructDescription,
    data: bytes,
    *,
    offset: int,
    begin: int = 0,
    trail: Sequence[str] = (),
    foreign: bool = False,
) -> tuple[VmState, int]:
    """The state in ``data`` from ``begin`` on, which stands at ``offset`` in the stream, and its length in bytes.

    A ``foreign`` description is another stream's, of the same machine: it says which subsections there may be, and
    the bytes which there are.  Raises ``StreamError`` where the description does not fit the bytes.
    """
    cursor = _Cursor(data, offset - begin, begin, foreign)
    try:
        state = _decode_struct(description, cursor, tuple(trail))
    except RecursionError as exc:
        raise StreamError("nested too deep", offset=offset, trail=trail) from exc
    return state, cursor.at - begin


def decode_whole(
    description: StructDescription, data: bytes, *, begin: int, end: int, offset: int, trail: Sequence[str] = ()
) -> VmState:
    """The state that is all there is from ``begin`` to ``end``, by a foreign description.

    Of a section that is nothing but a virtio device the description knows the length as it was in that stream; here
    it is what there is, where all of it decodes.  Raises ``StreamError`` where the description does not fit.
    """
    try:
        state, used = decode_state(description, data, offset=offset, begin=begin, trail=trail, foreign=True)
    except StreamError:
        used = None
    if used == end - begin:
        return state
    if [field.type for field in description.fields] == ["virtio"]:
        stretched = replace(description, fields=(replace(description.fields[0], size=end - begin),))
        state, used = decode_state(stretched, data, offset=offset, begin=begin, trail=trail, foreign=True)
        if used == end - begin and state.fields[0].opaque is None:
            return state
    raise StreamError(f"the description does not fit its {end - begin} bytes", offset=offset, trail=trail)


def _decode_struct(description: StructDescription, cursor: _Cursor, trail: tuple[str, ...]) -> VmState:
    cursor.count(1 + len(description.fields), trail)
    fields = tuple(_decode_field(field, cursor, (*trail, field.name)) for field in description.fields)
    described = _subsections_there(description, cursor, trail) if cursor.foreign else description.subsections
    subsections = tuple(_decode_subsection(item, cursor, trail) for item in described)
    return VmState(description.vmsd_name, fields, subsections)


def _subsections_there(
    description: StructDescription, cursor: _Cursor, trail: tuple[str, ...]
) -> Iterator[StructDescription]:
    """The descriptions of those that the bytes have next, by QEMU's own rule: their names begin with the vmsd's.

    migration/vmstate.c: vmstate_subsection_load()
    """
    if not description.vmsd_name:  # 5.2 and 7.2 describe a NULL so
        return
    known = {item.vmsd_name: item for item in description.subsections}
    while (name := _subsection_name(cursor)) is not None and name.startswith(description.vmsd_name):
        item = known.get(name) or OPTIONAL.get(name)
        if item is None:
            cursor.fail(f"has the subsection {name!r}, which the description does not know", trail)
        yield item


def _subsection_name(cursor: _Cursor) -> str | None:
    """Of the subsection that may stand here."""
    head = cursor.data[cursor.at : cursor.at + 2]
    if len(head) < 2 or head[0] != SectionType.SUBSECTION or not head[1]:
        return None
    return cursor.data[cursor.at + 2 : cursor.at + 2 + head[1]].decode("utf-8", "surrogateescape")


def _decode_subsection(description: StructDescription, cursor: _Cursor, trail: tuple[str, ...]) -> Subsection:
    offset = cursor.offset
    trail = (*trail, description.vmsd_name)
    header, used = SubsectionHeader.read_prefix(cursor.data[cursor.at : cursor.at + 512], offset=offset, trail=trail)
    if header.name != description.vmsd_name:
        cursor.fail(f"found subsection {header.name!r}, expected {description.vmsd_name!r}", trail)
    cursor.at += used
    return Subsection(header.name, header.version, offset, _decode_struct(description, cursor, trail))


def _decode_field(field: FieldDescription, cursor: _Cursor, trail: tuple[str, ...]) -> Field:
    offset = cursor.offset
    opaque: str | None = None
    value: Value
    match field.type:
        case "struct" | "tmp" | "vstruct":
            value = _decode_structs(field, cursor, trail)
        case "qtailq" | "qlist":
            value = _decode_list(field, cursor, trail)
        case "gtree":
            value = _decode_tree(field, cursor, trail)
        case _:
            value, opaque = _decode_leaf(field, cursor, trail)
    return Field(field, offset, cursor.offset - offset, value, opaque)


def _decode_structs(field: FieldDescription, cursor: _Cursor, trail: tuple[str, ...]) -> Value:
    if _is_old_null(field):
        return _decode_nulls(field, cursor, trail)
    if not field.elements:
        return _decode_struct(StructDescription("", 0), cursor, trail)
    count = 1 if field.count is None else field.count
    if count > max(cursor.left, _MOST_EMPTY_ELEMENTS):
        cursor.fail(f"{count} elements are described, {cursor.left} bytes are there", trail)
    values = []
    for index in range(count):
        start = cursor.at
        element = field.elements[index] if index < len(field.elements) else field.elements[0]
        here = trail if field.count is None else (*trail[:-1], f"{trail[-1]}[{index}]")
        values.append(_decode_struct(element, cursor, here))
        # Subsections count in the size, and another stream's may be others.
        if index == 0 and cursor.at - start != field.size and not cursor.foreign:
            cursor.fail(f"takes {cursor.at - start} bytes, {field.size} are described", here)
    return values[0] if field.count is None else tuple(values)


def _is_old_null(field: FieldDescription) -> bool:
    """5.2 and 7.2 describe a NULL in an array of pointers as an element: one byte, with nothing in it."""
    return (
        field.size == 1
        and field.type == "struct"
        and not any(element.fields or element.subsections for element in field.elements)
    )


def _decode_null(cursor: _Cursor, trail: tuple[str, ...]) -> Value:
    byte = cursor.take(1, trail)[0]
    if byte not in (_NULL, _VALID):
        cursor.at -= 1
        cursor.fail(f"found {byte:#x}, expected a marker {_NULL:#x} or {_VALID:#x}", trail)
    return None if byte == _NULL else True


def _decode_nulls(field: FieldDescription, cursor: _Cursor, trail: tuple[str, ...]) -> Value:
    if field.count is None:
        return _decode_null(cursor, trail)
    if field.count > cursor.left:
        cursor.fail(f"{field.count} markers are described, {cursor.left} bytes are there", trail)
    return tuple(_decode_null(cursor, trail) for _ in range(field.count))


def _decode_list(field: FieldDescription, cursor: _Cursor, trail: tuple[str, ...]) -> Value:
    values: list[Value] = []
    while marker := cursor.take(1, trail)[0]:
        if marker != 1:
            cursor.at -= 1
            cursor.fail(f"found the mark {marker:#x} before an element, expected 0x1 or 0x0", trail)
        if len(values) == len(field.elements):
            cursor.fail(f"has more than the {len(values)} elements that are described", trail)
        here = (*trail[:-1], f"{trail[-1]}[{len(values)}]")
        values.append(_decode_struct(field.elements[len(values)], cursor, here))
    return tuple(values)


def _decode_tree(field: FieldDescription, cursor: _Cursor, trail: tuple[str, ...]) -> Value:
    """u32 count; for each node: 1, key (u64, or a struct), value; then 0."""
    count = int.from_bytes(cursor.take(4, trail))
    parts = len(field.elements)
    if parts not in (count, 2 * count):
        cursor.fail(f"has {count} nodes, {parts} keys and values are described", trail)
    nodes: list[Value] = []
    elements = iter(field.elements)
    for index in range(count):
        here = (*trail[:-1], f"{trail[-1]}[{index}]")
        marker = cursor.take(1, here)[0]
        if marker != 1:
            cursor.at -= 1
            cursor.fail(f"found the mark {marker:#x} before a node, expected 0x1", here)
        key: Value
        key = int.from_bytes(cursor.take(8, here)) if parts == count else _decode_struct(next(elements), cursor, here)
        nodes.append((key, _decode_struct(next(elements), cursor, here)))
    if (marker := cursor.take(1, trail)[0]) != 0:
        cursor.at -= 1
        cursor.fail(f"found the mark {marker:#x} behind the last node, expected 0x0", trail)
    return tuple(nodes)


def _decode_leaf(field: FieldDescription, cursor: _Cursor, trail: tuple[str, ...]) -> tuple[Value, str | None]:
    count = 1 if field.count is None else field.count
    if field.type in NULL_MARKERS:
        return _decode_nulls(field, cursor, trail), None
    offset = cursor.offset
    data = cursor.take(count * field.size, trail)
    if _natural_size_differs(field) and data == bytes([_NULL]) * count:
        return (None if field.count is None else (None,) * count), None
    code = _integer_code(field)
    if code is not None:
        values: tuple[Value, ...] = struct.unpack(f">{count}{code}", data)
        return (values[0] if field.count is None else values), None
    codec = TYPES.get(field.type)
    if codec is None:
        return data, OPAQUE.get(field.type, f"the type {field.type!r} is not known")
    if not data or (field.type in PLAIN_BYTES and field.count is None):
        return data, "a buffer has no inner structure"
    try:
        values = tuple(codec.decode(data[at : at + field.size]) for at in range(0, len(data), field.size or 1))
    except StreamError as exc:
        within = StreamError(exc.message, offset=None if exc.offset is None else offset + exc.offset, trail=exc.trail)
        return data, str(within)
    reason = "a buffer has no inner structure" if field.type in PLAIN_BYTES else None
    return (values[0] if field.count is None else values), reason


def _natural_size_differs(field: FieldDescription) -> bool:
    """A NULL of 5.2 and 7.2 in an array of pointers to integers: one byte under the integer's type."""
    return field.size == 1 and NATURAL_SIZES.get(field.type, 1) != 1


def _integer_code(field: FieldDescription) -> str | None:
    code = INTEGER_SIZES.get(field.size)
    if code is None:
        return None
    if field.type in UNSIGNED:
        return code
    return code.lower() if field.type in SIGNED else None


# -- and back


def encode_state(state: VmState) -> bytes:
    """The bytes of this state, from its values.  Raises ``StreamError`` where a value has no room."""
    parts = [encode_field(field) for field in state.fields]
    for subsection in state.subsections:
        parts.append(SubsectionHeader(name=subsection.name, version=subsection.version).build())
        parts.append(encode_state(subsection.state))
    return b"".join(parts)


def encode_field(field: Field) -> bytes:
    """The bytes of one field, from its value."""
    description, value = field.description, field.value
    try:
        match description.type:
            case "struct" | "tmp" | "vstruct":
                return _encode_structs(description, as_tuple(value))
            case "qtailq" | "qlist":
                return b"".join(b"\1" + _encode_element(element) for element in as_tuple(value)) + b"\0"
            case "gtree":
                return _encode_tree(as_tuple(value))
            case _:
                return _right_size(description, _encode_leaf(field))
    except (struct.error, TypeError, ValueError, AttributeError) as exc:
        raise StreamError(f"{value!r} does not go into the type {description.type!r}: {exc}",
                          offset=field.offset, trail=(field.name,)) from exc  # fmt: skip


def _right_size(description: FieldDescription, data: bytes) -> bytes:
    expected = description.size * (1 if description.count is None else description.count)
    if len(data) != expected:
        raise ValueError(f"it takes {len(data)} bytes, {expected} are described")
    return data


def _encode_structs(description: FieldDescription, elements: tuple[Value, ...]) -> bytes:
    count = 1 if description.count is None else description.count
    if len(elements) != count:
        raise ValueError(f"it has {len(elements)} elements, {count} are described")
    return b"".join(map(_encode_element, elements))


def _encode_element(value: Value) -> bytes:
    if isinstance(value, VmState):
        return encode_state(value)
    return _encode_null(value)


def _encode_null(value: Value) -> bytes:
    if value is None or value is True:
        return bytes([_NULL if value is None else _VALID])
    raise TypeError("expected None or True")


def _encode_tree(nodes: tuple[Value, ...]) -> bytes:
    parts = [struct.pack(">I", len(nodes))]
    for node in nodes:
        key, value = as_tuple(node)
        parts.append(b"\1" + (struct.pack(">Q", key) if isinstance(key, int) else _encode_element(key)))
        parts.append(_encode_element(value))
    return b"".join(parts) + b"\0"


def _encode_leaf(field: Field) -> bytes:
    description, value = field.description, field.value
    if description.type in NULL_MARKERS:
        return b"".join(_encode_null(element) for element in as_tuple(value))
    if _natural_size_differs(description) and all(element is None for element in as_tuple(value)):
        return b"".join(map(_encode_null, as_tuple(value)))
    if field.opaque is not None:
        return b"".join(as_tuple(value))  # type: ignore[arg-type]  # what is no bytes is a TypeError, as it should be
    code = _integer_code(description)
    values = as_tuple(value) if description.count is not None else (value,)
    if code is not None:
        return struct.pack(f">{len(values)}{code}", *values)
    codec = TYPES[description.type]
    return b"".join(codec.encode(element) for element in values)
