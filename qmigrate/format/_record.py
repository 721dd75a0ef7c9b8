"""The record base: a class declared once is a frozen dataclass and a construct Struct.

Construct never leaks: what it raises leaves here as a ``StreamError`` with the offset of the field at fault.
"""

import dataclasses
import io
import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import IO, TYPE_CHECKING, Any, ClassVar, Self, dataclass_transform

import construct

from qmigrate.errors import StreamError, TruncatedError
from qmigrate.value import Value

if TYPE_CHECKING:
    AnyConstruct = construct.Construct[Any, Any]
    Subconstruct = construct.Subconstruct[Any, Any, Any, Any]
    Adapter = construct.Adapter[Any, Any, Any, Any]
else:
    AnyConstruct, Subconstruct, Adapter = construct.Construct, construct.Subconstruct, construct.Adapter

__all__ = [
    "CountedString",
    "EverythingLeft",
    "IfMore",
    "Known",
    "Nested",
    "Only",
    "Record",
    "Rows",
    "Several",
    "When",
    "WireError",
    "refuse",
    "wire",
]

_SUBCON = "construct"
_INTEGERS = frozenset("BHLQbhlq")  # what ``struct`` calls them


class WireError(construct.ConstructError):
    """A value on the wire that this record does not allow; ``message`` says what was found and expected."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def refuse(message: str) -> WireError:
    """The error for an adapter of ours to raise: ``Record.read`` adds the offset and the field."""
    return WireError(message)


def wire(subcon: AnyConstruct, **options: Any) -> Any:
    """A field of a record: how it stands on the wire.  ``default`` as in ``dataclasses.field``."""
    return dataclasses.field(metadata={_SUBCON: subcon}, **options)


class _At(Subconstruct):
    """Notes in an error where in the bytes the innermost failing field begins, and its name."""

    def __init__(self, subcon: AnyConstruct, name: str) -> None:
        super().__init__(subcon)
        self.field = name

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> Any:
        at = stream.tell()
        try:
            return self.subcon._parsereport(stream, context, path)
        except construct.ConstructError as exc:
            if not hasattr(exc, "place"):
                vars(exc)["place"] = (at, self.field)  # construct keeps no offset of its own
            raise


class _AtFirstUse:
    """What a class of records has, made when it is asked for: many a command uses few of them."""

    def __init__(self, name: str, make: "Callable[[type[Record]], Any]") -> None:
        self._name = name
        self._make = make

    def __get__(self, instance: object, owner: "type[Record]") -> Any:
        made = self._make(owner)
        setattr(owner, self._name, made)
        return made


def _struct_of(cls: "type[Record]") -> AnyConstruct:
    fields = dataclasses.fields(cls)
    return construct.Struct(*(f.name / _At(f.metadata[_SUBCON], f.name) for f in fields))


def _size_of(cls: "type[Record]") -> int | None:
    try:
        return int(cls._struct.sizeof())
    except (construct.ConstructError, AttributeError):  # a length that another field or the context gives
        return None


def _flat_of(cls: "type[Record]") -> struct.Struct | None:
    """The same as one ``struct``, where each field is a big-endian integer: it is read in a tenth of the time."""
    layouts = [f.metadata[_SUBCON] for f in dataclasses.fields(cls)]
    formats = [each.fmtstr if isinstance(each, construct.FormatField) else "" for each in layouts]
    if not formats or not all(each[:1] == ">" and each[1:] in _INTEGERS for each in formats):
        return None
    return struct.Struct(">" + "".join(each[1:] for each in formats))


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(wire,))
class Record(Value):
    """A piece of a stream: its fields in the order of their bytes.

    A subclass states each field as ``name: type = wire(construct)``.
    """

    _struct: ClassVar[AnyConstruct]
    _flat: ClassVar[struct.Struct | None]
    size: ClassVar[int | None]
    """In bytes, where every record of the class has the same; else None."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._struct = _AtFirstUse("_struct", _struct_of)  # type: ignore[assignment]
        cls._flat = _AtFirstUse("_flat", _flat_of)  # type: ignore[assignment]
        cls.size = _AtFirstUse("size", _size_of)  # type: ignore[assignment]

    @classmethod
    def read_prefix(
        cls, data: bytes | memoryview, *, offset: int = 0, trail: Sequence[str] = (), **context: Any
    ) -> tuple[Self, int]:
        """Read this record from the front of ``data``; also give the number of bytes it took.

        Raises ``TruncatedError`` where ``data`` is too short, ``StreamError`` where a value is wrong.
        ``offset`` is where ``data`` stands in the stream.
        """
        flat = cls._flat
        if flat is not None and len(data) >= flat.size:
            return cls(**dict(zip(cls._names, flat.unpack_from(data), strict=True))), flat.size
        return cls._read_plainly(data, offset, trail, context)

    @classmethod
    def _read_plainly(
        cls, data: bytes | memoryview, offset: int, trail: Sequence[str], context: dict[str, Any]
    ) -> tuple[Self, int]:
        """By construct, as it is declared."""
        stream = io.BytesIO(data)
        try:
            values = cls._struct.parse_stream(stream, **context)
        except construct.ConstructError as exc:
            raise _ours(exc, offset, (*trail,), len(data)) from exc
        return cls(**{name: values[name] for name in cls._names}), stream.tell()

    @classmethod
    def read(cls, data: bytes | memoryview, *, offset: int = 0, trail: Sequence[str] = (), **context: Any) -> Self:
        """Read this record from exactly ``data``; bytes left over are an error."""
        record, used = cls.read_prefix(data, offset=offset, trail=trail, **context)
        if used != len(data):
            raise StreamError(
                f"{cls.__name__} takes {used} bytes, {len(data)} are there", offset=offset + used, trail=trail
            )
        return record

    def build(self, **context: Any) -> bytes:
        """The bytes of this record.  Raises ``StreamError`` where a value has no room on the wire."""
        values = {name: getattr(self, name) for name in self._names}
        try:
            return bytes(self._struct.build(values, **context))
        except construct.ConstructError as exc:
            message = getattr(exc, "message", None) or _last_line(exc)
            raise StreamError(f"{type(self).__name__} can't be written: {message}") from exc


def _ours(exc: construct.ConstructError, offset: int, trail: tuple[str, ...], at_hand: int) -> StreamError:
    at, field = getattr(exc, "place", (0, ""))
    trail = (*trail, field) if field else trail
    if isinstance(exc, construct.StreamError):
        return TruncatedError("the stream ends here", offset=offset + at_hand, trail=trail)
    message = exc.message if isinstance(exc, WireError) else _last_line(exc)
    return StreamError(message, offset=offset + at, trail=trail)


def _last_line(exc: Exception) -> str:
    return str(exc).strip().splitlines()[-1] if str(exc).strip() else type(exc).__name__


class Known(Adapter):
    """An integer that must be a member of ``enum``: anything else is refused aloud."""

    def __init__(self, enum: type[IntEnum], subcon: AnyConstruct) -> None:
        super().__init__(subcon)
        self.enum = enum

    def _decode(self, obj: int, context: Any, path: str) -> IntEnum:
        try:
            return self.enum(obj)
        except ValueError:
            known = ", ".join(f"{member.name} {member.value:#x}" for member in self.enum)
            raise refuse(f"found {obj:#x}, expected one of {known}") from None

    def _encode(self, obj: int, context: Any, path: str) -> int:
        return int(obj)


class Only(Known):
    """The one member of its enum that may stand here."""

    def __init__(self, member: IntEnum, subcon: AnyConstruct) -> None:
        super().__init__(type(member), subcon)
        self.member = member

    def _decode(self, obj: int, context: Any, path: str) -> IntEnum:
        if obj != self.member:
            raise refuse(f"found {obj:#x}, expected {self.member.name} {self.member.value:#x}")
        return self.member


class _Text(Adapter):
    """Names are bytes that are usually ASCII: nothing is lost, whatever they are."""

    def _decode(self, obj: bytes, context: Any, path: str) -> str:
        return bytes(obj).decode("utf-8", "surrogateescape")

    def _encode(self, obj: str, context: Any, path: str) -> bytes:
        return obj.encode("utf-8", "surrogateescape")


class _Counted(AnyConstruct):
    """One length byte, then that many bytes.  Not ``Prefixed``: that does not say what is too long."""

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> bytes:
        length = construct.stream_read(stream, 1, path)[0]
        return bytes(construct.stream_read(stream, length, path))

    def _build(self, obj: bytes, stream: IO[bytes], context: Any, path: str) -> Any:
        if len(obj) > 0xFF:
            raise refuse(f"a counted string holds at most 255 bytes, this one has {len(obj)}")
        stream.write(bytes([len(obj)]) + obj)
        return obj

    def _sizeof(self, context: Any, path: str) -> int:
        raise construct.SizeofError


CountedString = _Text(_Counted())
"""``str8``: one length byte, then the name, not terminated."""


class Nested(AnyConstruct):
    """A record inside a record."""

    def __init__(self, record: type[Record]) -> None:
        super().__init__()
        self.record = record

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> Record:
        values = self.record._struct._parsereport(stream, context, path)
        return self.record(**{name: values[name] for name in self.record._names})

    def _build(self, obj: Record, stream: IO[bytes], context: Any, path: str) -> Any:
        self.record._struct._build(
            construct.Container({name: getattr(obj, name) for name in obj._names}),
            stream,
            context,
            path,
        )
        return obj

    def _sizeof(self, context: Any, path: str) -> int:
        return int(self.record._struct._sizeof(context, path))


def _end(stream: IO[bytes]) -> int:
    at = stream.tell()
    end = stream.seek(0, io.SEEK_END)
    stream.seek(at)
    return end


class Several(construct.Array):  # type: ignore[type-arg]
    """So many elements as ``count(context)`` says, as a tuple."""

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> Any:
        return tuple(super()._parse(stream, context, path))


class When(Subconstruct):
    """Present where ``condition(context)`` holds, else None.

    Not ``If``: building, that drops a value for which there is no room.
    """

    def __init__(self, condition: Callable[[Any], Any], subcon: AnyConstruct) -> None:
        super().__init__(subcon)
        self.condition = condition

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> Any:
        return self.subcon._parsereport(stream, context, path) if self.condition(context) else None

    def _build(self, obj: Any, stream: IO[bytes], context: Any, path: str) -> Any:
        announced = bool(self.condition(context))
        if announced != (obj is not None):
            field = path.rpartition(" -> ")[2]
            raise refuse(f"{field} is announced and missing" if announced else f"nothing announces {field}")
        if announced:
            self.subcon._build(obj, stream, context, path)
        return obj

    def _sizeof(self, context: Any, path: str) -> int:
        raise construct.SizeofError


class Rows(AnyConstruct):
    """A table of so many rows as ``count(context)`` says, as a tuple, read and written in bulk.

    ``layout`` is the ``struct`` format of one row, ``row`` a NamedTuple for its integers; without one, a row
    is a single integer.  An element of ``Several`` costs some microseconds, a row here a tenth of one.
    """

    def __init__(
        self, layout: str, count: int | Callable[[Any], int], row: type[tuple[int, ...]] | None = None
    ) -> None:
        super().__init__()
        self.layout = struct.Struct(layout)
        self.count = count
        self.row = row

    def _count(self, context: Any) -> int:
        return self.count(context) if callable(self.count) else self.count

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> tuple[Any, ...]:
        data = construct.stream_read(stream, self._count(context) * self.layout.size, path)
        rows = self.layout.iter_unpack(data)
        if self.row is None:
            return tuple(value for (value,) in rows)
        return tuple(map(self.row._make, rows))  # type: ignore[attr-defined]  # each NamedTuple has it

    def _build(self, obj: Sequence[Any], stream: IO[bytes], context: Any, path: str) -> Any:
        if len(obj) != (count := self._count(context)):
            raise refuse(f"a table of {count} rows can't hold {len(obj)}")
        try:
            for row in obj:
                stream.write(self.layout.pack(*row) if self.row else self.layout.pack(row))
        except struct.error as exc:
            raise refuse(str(exc)) from exc
        return obj

    def _sizeof(self, context: Any, path: str) -> int:
        if callable(self.count):
            raise construct.SizeofError
        return self.count * self.layout.size


class IfMore(Subconstruct):
    """Present when bytes are left, else None.  For the end of a payload whose length is known."""

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> Any:
        if stream.tell() == _end(stream):
            return None
        return self.subcon._parsereport(stream, context, path)

    def _build(self, obj: Any, stream: IO[bytes], context: Any, path: str) -> Any:
        if obj is not None:
            self.subcon._build(obj, stream, context, path)
        return obj

    def _sizeof(self, context: Any, path: str) -> int:
        raise construct.SizeofError


class EverythingLeft(Subconstruct):
    """The element again and again until the payload is used up.

    Not ``GreedyRange``: that takes a corrupt element for the end.
    """

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> tuple[Any, ...]:
        end = _end(stream)
        elements = []
        while stream.tell() < end:
            elements.append(self.subcon._parsereport(stream, context, path))
        return tuple(elements)

    def _build(self, obj: Sequence[Any], stream: IO[bytes], context: Any, path: str) -> Any:
        for element in obj:
            self.subcon._build(element, stream, context, path)
        return obj

    def _sizeof(self, context: Any, path: str) -> int:
        raise construct.SizeofError
