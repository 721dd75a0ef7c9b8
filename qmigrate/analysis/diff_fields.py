"""Which fields of a device differ, by the paths that ``dissect --field`` takes; and which shall not matter."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from qmigrate.analysis.devices import members, parts, short_names
from qmigrate.capture.migration import Section
from qmigrate.format._record import Record
from qmigrate.format.vm_state import Field, Subsection, VmState

__all__ = ["ABSENT", "Ignored", "Unequal", "field_paths", "unequal_fields", "unequal_subsections"]


class _Absent:
    """What a side has in the place of a field that only the other has."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = _Absent()


class Unequal(NamedTuple):
    """A field's path, and its two values."""

    path: str
    a: Any
    b: Any


def unequal_fields(path: str, a: VmState, b: VmState) -> Iterator[Unequal]:
    """Each field that differs, in the order of the first; what is within a subsection that both have, too."""
    ours, theirs = parts(a), parts(b)
    for name in dict.fromkeys((*ours, *theirs)):
        here = f"{path}.{name}"
        one, other = ours.get(name), theirs.get(name)
        if isinstance(one, Subsection) or isinstance(other, Subsection):
            if isinstance(one, Subsection) and isinstance(other, Subsection):
                yield from unequal_fields(here, one.state, other.state)
        elif one is None or other is None:
            yield Unequal(here, _value(one), _value(other))
        else:
            yield from _unequal(here, _value(one), _value(other))


def _value(fields: Sequence[Field] | None) -> Any:
    """The value under a name: entries of one array stand one after the other, and are one value."""
    if fields is None:
        return ABSENT
    if len(fields) == 1:
        return fields[0].value
    elements: list[Any] = []
    for field in fields:
        if field.description.count is not None and isinstance(field.value, tuple):
            elements.extend(field.value)
        else:
            elements.append(field.value)
    return tuple(elements)


def _unequal(path: str, a: Any, b: Any) -> Iterator[Unequal]:
    if isinstance(a, VmState) and isinstance(b, VmState):
        yield from unequal_fields(path, a, b)
    elif a == b and not isinstance(a, VmState):
        return
    elif _is_list(a) and _is_list(b):
        yield from _unequal_elements(path, a, b)
    elif _is_list(a) != _is_list(b) and not isinstance(a, bytes) and not isinstance(b, bytes):
        # QEMU describes an array of one element as if it were none; an array of bytes may be a buffer.
        yield from _unequal_elements(path, *(each if _is_list(each) else (each,) for each in (a, b)))
    elif type(a) is type(b) and _is_layout(a):
        for name in members(a):
            yield from _unequal(f"{path}.{name}", getattr(a, name), getattr(b, name))
    else:
        yield Unequal(path, a, b)


def _unequal_elements(path: str, a: Sequence[Any], b: Sequence[Any]) -> Iterator[Unequal]:
    for index, (one, other) in enumerate(zip(a, b, strict=False)):
        yield from _unequal(f"{path}[{index}]", one, other)
    for index in range(min(len(a), len(b)), max(len(a), len(b))):
        here = f"{path}[{index}]"
        yield Unequal(here, a[index], ABSENT) if index < len(a) else Unequal(here, ABSENT, b[index])


def _is_list(value: Any) -> bool:
    return isinstance(value, tuple | list) and not hasattr(value, "_fields")


def _is_layout(value: Any) -> bool:
    return isinstance(value, Record) or hasattr(value, "_fields") or hasattr(value, "__dataclass_fields__")


def field_paths(path: str, state: VmState) -> Iterator[str]:
    """The path of each field, of each element, and of all that they lie in."""
    for name, part in parts(state).items():
        here = f"{path}.{name}"
        yield here
        if isinstance(part, Subsection):
            yield from field_paths(here, part.state)
        else:
            yield from _paths_of_value(here, _value(part))


def _paths_of_value(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, VmState):
        yield from field_paths(path, value)
    elif _is_list(value):
        for index, element in enumerate(value):
            here = f"{path}[{index}]"
            yield here
            yield from _paths_of_value(here, element)
    elif _is_layout(value):
        for name in members(value):
            here = f"{path}.{name}"
            yield here
            yield from _paths_of_value(here, getattr(value, name))


def unequal_subsections(path: str, a: VmState, b: VmState) -> Iterator[tuple[str, int | None, int | None]]:
    """Each subsection that only one side has, or has in another version: its path, and the versions."""
    ours, theirs = dict(_subsections(path, a)), dict(_subsections(path, b))
    for name in dict.fromkeys((*ours, *theirs)):
        if ours.get(name) != theirs.get(name):
            yield name, ours.get(name), theirs.get(name)


def _subsections(path: str, state: VmState) -> Iterator[tuple[str, int]]:
    """All of them, at any depth."""
    for name, part in parts(state).items():
        here = f"{path}.{name}"
        if isinstance(part, Subsection):
            yield here, part.version
            yield from _subsections(here, part.state)
        else:
            yield from _subsections_of_value(here, _value(part))


def _subsections_of_value(path: str, value: Any) -> Iterator[tuple[str, int]]:
    if isinstance(value, VmState):
        yield from _subsections(path, value)
    elif _is_list(value):
        if any(isinstance(element, VmState | tuple) for element in value):
            for index, element in enumerate(value):
                yield from _subsections_of_value(f"{path}[{index}]", element)
    elif _is_layout(value):
        for name in members(value):
            yield from _subsections_of_value(f"{path}.{name}", getattr(value, name))


class Ignored:
    """The fields that shall not matter.  ``*`` and ``?`` in a pattern stand for any characters, and for one.

    The device is named as ``dissect`` takes it, with or without its bus path and instance; what lies below a path
    that matches is ignored with it.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = {each: re.compile(rf"{_expression(each)}(?:[./\[].*)?", re.DOTALL) for each in patterns}
        self._used: set[str] = set()

    def matches(self, section: Section, path: str) -> bool:
        """``path`` begins with the section's key."""
        found = [pattern for pattern in self._patterns if self.would_match(pattern, section, path)]
        self._used.update(found)
        return bool(found)

    def would_match(self, pattern: str, section: Section, path: str) -> bool:
        """Does this one?  It is not taken for used."""
        rest = path.removeprefix(section.key)
        names = dict.fromkeys((section.key, section.name, *short_names(section)))
        return any(self._patterns[pattern].fullmatch(f"{name}{rest}") for name in names)

    def unused(self) -> list[str]:
        """The patterns that have matched nothing so far."""
        return [pattern for pattern in self._patterns if pattern not in self._used]


def _expression(pattern: str) -> str:
    """Brackets are indexes here, so this is not fnmatch's kind of glob."""
    return re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
