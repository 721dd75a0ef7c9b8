"""The base of values: held to be what a frozen dataclass of the same fields is."""

import dataclasses
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest

from qmigrate.value import Value


class Point(Value):
    x: int
    y: int = 0
    marks: list[str] = field(default_factory=list)


class Named(Point):
    name: str = ""


class Other(Value):
    x: int
    y: int = 0
    marks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Generated:
    x: int
    y: int = 0
    marks: list[str] = field(default_factory=list)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((1,), {}),
        ((1, 2), {}),
        ((1, 2, ["a"]), {}),
        ((), {"x": 1}),
        ((1,), {"y": 2}),
        ((1,), {"marks": ["b"]}),
        ((), {}),
        ((1, 2, [], 4), {}),
        ((1,), {"x": 2}),
        ((1,), {"z": 2}),
    ],
)
def test_it_takes_and_refuses_what_a_frozen_dataclass_does(given: tuple[Any, ...], named: dict[str, Any]) -> None:
    try:
        generated = Generated(*given, **named)
    except TypeError:
        with pytest.raises(TypeError, match="Point"):
            Point(*given, **named)
        return
    made = Point(*given, **named)
    assert dataclasses.asdict(made) == dataclasses.asdict(generated)
    assert repr(made) == repr(generated).replace("Generated", "Point")
    assert dataclasses.asdict(dataclasses.replace(made, y=9)) == dataclasses.asdict(dataclasses.replace(generated, y=9))


def test_a_default_is_made_anew_for_each() -> None:
    assert Point(1).marks is not Point(1).marks


def test_two_are_equal_by_class_and_fields() -> None:
    assert Point(1, 2) == Point(1, 2)
    assert Point(1, 2) != Point(1, 3)
    assert Point(1, 2) != Other(1, 2)
    assert Point(1, 2) != (1, 2, [])
    assert Named(1, 2) != Point(1, 2)


def test_equal_ones_have_one_hash_and_such_as_hold_a_list_none() -> None:
    assert hash(Point(1, 2, ())) == hash(Point(1, 2, ()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unhashable"):
        hash(Point(1))


def test_it_is_frozen() -> None:
    point = Point(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del point.x
    assert point.x == 1


def test_it_is_matched_by_place_and_by_name() -> None:
    match Named(1, 2, [], "n"):
        case Named(x, y, name=name):
            assert (x, y, name) == (1, 2, "n")


def test_it_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(Named(1, name="n"))) == Named(1, name="n")
