"""The base of values: what a frozen dataclass has besides its fields, written once for all of them.

To have it generated takes half a millisecond a class, and a command imports up to a hundred of them before it does
anything.  A value is a dataclass to those who ask (``fields``, ``replace``, ``asdict``, ``is_dataclass``).
"""

import dataclasses
from typing import Any, ClassVar, NoReturn, dataclass_transform

__all__ = ["Value"]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
class Value:
    """A subclass states its fields as a dataclass does, and is frozen; two of one class are equal by their fields."""

    _names: ClassVar[tuple[str, ...]]
    _known: ClassVar[frozenset[str]]
    _defaults: ClassVar[dict[str, Any]]
    _made: ClassVar[dict[str, Any]]
    """What makes a default anew for each."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Which of the fields are given by name alone is for the type checker to say, by the base's transform.
        dataclasses.dataclass(init=False, repr=False, eq=False)(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # made one in the line above
        cls._names = tuple(f.name for f in fields)
        cls._known = frozenset(cls._names)
        cls._defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
        cls._made = {f.name: f.default_factory for f in fields if f.default_factory is not dataclasses.MISSING}

    def __init__(self, *given: Any, **values: Any) -> None:
        if given:
            values = self._named(given, values)
        if values.keys() != self._known:
            values = self._completed(values)
        self.__dict__.update(values)

    def _named(self, given: tuple[Any, ...], values: dict[str, Any]) -> dict[str, Any]:
        first = dict(zip(self._names, given, strict=False))
        if len(first) < len(given):
            raise TypeError(f"{type(self).__name__} has {len(first)} fields, {len(given)} are given")
        if twice := sorted(first.keys() & values.keys()):
            raise TypeError(f"{type(self).__name__} is given its {twice[0]} twice")
        return first | values

    def _completed(self, values: dict[str, Any]) -> dict[str, Any]:
        made = {name: make() for name, make in self._made.items() if name not in values}
        complete = self._defaults | made | values
        if wrong := sorted(complete.keys() ^ self._known):
            does = "has no" if wrong[0] in complete else "lacks its"
            raise TypeError(f"{type(self).__name__} {does} {wrong[0]}")
        return complete

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")

    def _values(self) -> tuple[Any, ...]:
        return tuple([getattr(self, name) for name in self._names])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Value) or type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._names)})"
