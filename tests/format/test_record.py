"""The record base: one declaration, both ways; and the constructs that construct itself does not have."""

import dataclasses
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import pytest
from construct import Bytes, Float32b, Int8sb, Int8ub, Int16sb, Int16ub, Int32sb, Int32ub, Int32ul, Int64sb, Int64ub
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import StreamError, TruncatedError
from qmigrate.format._record import (
    CountedString,
    EverythingLeft,
    IfMore,
    Known,
    Nested,
    Only,
    Record,
    Rows,
    Several,
    When,
    wire,
)
from qmigrate.format.return_path import MessageHeader, Pong, RequestPages

NAMES = st.binary(max_size=255).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
U8, U16, U32 = st.integers(0, 0xFF), st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF)


class Colour(IntEnum):
    RED = 1
    BLUE = 0x10


class Point(Record):
    x: int = wire(Int16ub)
    y: int = wire(Int16ub)


class Row(NamedTuple):
    number: int
    address: int


class Everything(Record):
    """One field of each kind."""

    colour: Colour = wire(Known(Colour, Int8ub))
    mark: Colour = wire(Only(Colour.BLUE, Int8ub), default=Colour.BLUE)
    name: str = wire(CountedString)
    point: Point = wire(Nested(Point))
    count: int = wire(Int8ub)
    points: tuple[Point, ...] = wire(Several(lambda this: this.count, Nested(Point)))
    extra: int | None = wire(When(lambda this: this.colour == Colour.RED, Int32ub))
    rows: tuple[Row, ...] = wire(Rows(">HI", lambda this: this.count, Row))
    numbers: tuple[int, ...] = wire(Rows(">H", 2))
    rest: tuple[Point, ...] = wire(EverythingLeft(Nested(Point)))


class Optional(Record):
    number: int = wire(Int8ub)
    point: Point | None = wire(IfMore(Nested(Point)))


POINTS = st.builds(Point, x=U16, y=U16)


@st.composite
def everything(draw: st.DrawFn) -> Everything:
    colour = draw(st.sampled_from(Colour))
    points = draw(st.lists(POINTS, max_size=4))
    return Everything(
        colour=colour,
        name=draw(NAMES),
        point=draw(POINTS),
        count=len(points),
        points=tuple(points),
        extra=draw(U32) if colour == Colour.RED else None,
        rows=tuple(Row(draw(U16), draw(U32)) for _ in points),
        numbers=(draw(U16), draw(U16)),
        rest=tuple(draw(st.lists(POINTS, max_size=3))),
    )


@given(everything())
def test_a_record_comes_back_from_its_bytes(record: Everything) -> None:
    assert Everything.read(record.build()) == record


@given(st.builds(Optional, number=U8, point=st.none() | POINTS))
def test_an_optional_end_is_there_when_bytes_are(record: Optional) -> None:
    assert Optional.read(record.build()) == record


@given(POINTS, st.binary(max_size=8))
def test_a_prefix_is_read_whatever_stands_behind(point: Point, behind: bytes) -> None:
    assert Point.read_prefix(memoryview(point.build() + behind)) == (point, 4)


def test_a_record_is_a_frozen_dataclass_of_known_size() -> None:
    point = Point(x=1, y=2)
    assert point.build() == bytes.fromhex("0001 0002")
    assert (Point.size, Everything.size, Optional.size) == (4, None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.x = 3  # type: ignore[misc]
    assert dataclasses.replace(point, y=3) == Point(x=1, y=3)


def fault(data: bytes, cls: type[Record] = Everything) -> str:
    with pytest.raises(StreamError) as caught:
        cls.read(data, offset=0x100, trail=("ram",))
    return str(caught.value)


@pytest.mark.parametrize("length", range(4))
def test_bytes_that_end_too_soon_are_said_where_they_end(length: int) -> None:
    with pytest.raises(TruncatedError) as caught:
        Point.read(bytes(length), offset=0x100, trail=("ram",))
    assert str(caught.value) == f"0x{0x100 + length:x}: ram: {'x' if length < 2 else 'y'}: the stream ends here"


def test_a_value_that_is_none_of_its_enum_is_refused_with_those_that_are() -> None:
    assert fault(bytes([2])) == "0x100: ram: colour: found 0x2, expected one of RED 0x1, BLUE 0x10"


def test_a_value_that_is_not_the_only_one_is_refused() -> None:
    assert fault(bytes([1, 1])) == "0x101: ram: mark: found 0x1, expected BLUE 0x10"


def test_bytes_left_over_are_refused() -> None:
    assert fault(bytes(5), Point) == "0x104: ram: Point takes 4 bytes, 5 are there"


def test_an_element_that_is_cut_is_no_end_of_the_payload() -> None:
    class Points(Record):
        points: tuple[Point, ...] = wire(EverythingLeft(Nested(Point)))

    assert Points.read(bytes(8)).points == (Point(x=0, y=0),) * 2
    with pytest.raises(TruncatedError, match="0x7: y: the stream ends here"):
        Points.read(bytes(7))


def test_a_count_that_lies_takes_no_memory() -> None:
    class Many(Record):
        count: int = wire(Int32ub)
        names: tuple[str, ...] = wire(Several(lambda this: this.count, CountedString))
        table: tuple[int, ...] = wire(Rows(">Q", lambda this: this.count))

    with pytest.raises(TruncatedError, match="names: the stream ends here"):
        Many.read(b"\xff\xff\xff\xff" + bytes(10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "x" * 256}, "a counted string holds at most 255 bytes, this one has 256"),
        ({"extra": None}, "extra is announced and missing"),
        ({"colour": Colour.BLUE}, "nothing announces extra"),
        ({"rows": ()}, "a table of 1 rows can't hold 0"),
        ({"numbers": (1, 0x10000)}, "'H' format requires 0 <= number <= 65535"),
    ],
)
def test_a_value_without_room_is_refused_when_written(change: dict[str, object], message: str) -> None:
    point = Point(x=1, y=2)
    good = Everything(
        colour=Colour.RED,
        name="a",
        point=point,
        count=1,
        points=(point,),
        extra=5,
        rows=(Row(1, 2),),
        numbers=(3, 4),
        rest=(),
    )
    assert Everything.read(good.build()) == good
    with pytest.raises(StreamError) as caught:
        dataclasses.replace(good, **change).build()  # type: ignore[arg-type]
    assert str(caught.value).startswith("Everything can't be written: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [-1, 0x10000])
def test_a_number_without_room_is_refused_when_written(value: int) -> None:
    with pytest.raises(StreamError, match="Point can't be written: "):
        Point(x=value, y=0).build()


def test_bytes_of_a_wrong_length_are_refused_when_written() -> None:
    class Four(Record):
        data: bytes = wire(Bytes(4))

    with pytest.raises(StreamError, match="Four can't be written: "):
        Four(data=b"abc").build()


def test_names_keep_bytes_that_are_no_text() -> None:
    class Name(Record):
        name: str = wire(CountedString)

    record = Name.read(b"\x03a\xff\xc3")
    assert record.name == "a\udcff\udcc3"
    assert record.build() == b"\x03a\xff\xc3"


class Integers(Record):
    """Each kind that is read by ``struct``."""

    a: int = wire(Int8ub)
    b: int = wire(Int8sb)
    c: int = wire(Int16ub)
    d: int = wire(Int16sb)
    e: int = wire(Int32ub)
    f: int = wire(Int32sb)
    g: int = wire(Int64ub)
    h: int = wire(Int64sb)


class Little(Record):
    number: int = wire(Int32ul)


class Real(Record):
    number: float = wire(Float32b)


@pytest.mark.parametrize("cls", [Integers, Point, RequestPages, Pong, MessageHeader, Little, Real])
@given(data=st.binary(max_size=40))
def test_what_is_read_by_struct_is_what_construct_reads(cls: type[Record], data: bytes) -> None:
    assert _outcome(lambda: cls.read_prefix(data, offset=7, trail=("inside",))) == _outcome(
        lambda: cls._read_plainly(data, 7, ("inside",), {})
    )


def _outcome(read: Callable[[], tuple[Record, int]]) -> str:
    """As text: a NaN is not equal to itself."""
    try:
        return repr(read())
    except StreamError as exc:
        return f"{type(exc).__name__}: {exc}"


def test_integers_alone_are_read_by_struct() -> None:
    assert [cls._flat and cls._flat.size for cls in (Integers, RequestPages, MessageHeader, Little, Real)] == [
        30,
        12,
        None,
        None,
        None,
    ]
