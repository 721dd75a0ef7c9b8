"""Device state as plain values, and fields by name."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntEnum
from itertools import islice
from typing import Any, TypeAlias

from qmigrate.capture.migration import Contents, Section
from qmigrate.format._record import Record
from qmigrate.format.vm_state import Field, Subsection, VmState

__all__ = ["Plain", "find_devices", "find_field", "members", "parts", "plain", "short_names"]

Plain: TypeAlias = "int | bool | str | None | list[Plain] | dict[str, Plain]"


def plain(value: Any) -> Plain:
    """Any value of a field as JSON has it: structs as dicts, arrays as lists, bytes as lower-case hex."""
    match value:
        case VmState():
            return _plain_state(value)
        case IntEnum():
            return int(value)
        case None | bool() | int() | str():
            return value
        case bytes() | bytearray():
            return bytes(value).hex()
        case tuple() | list() if not hasattr(value, "_fields"):
            return [plain(element) for element in value]
        case _:
            return {name: plain(getattr(value, name)) for name in members(value)}


def members(value: Any) -> tuple[str, ...]:
    """The names of a fixed layout's parts.  Raises ``TypeError`` of anything else."""
    match value:
        case tuple() if hasattr(value, "_fields"):
            return tuple(value._fields)
        case Record():
            return tuple(value._names)
        case _ if dataclasses.is_dataclass(value):
            return tuple(item.name for item in dataclasses.fields(value))
        case _:
            raise TypeError(f"{type(value).__name__} has no plain form")


def _plain_state(state: VmState) -> dict[str, Plain]:
    return {
        name: _plain_state(part.state) if isinstance(part, Subsection) else _plain_fields(part)
        for name, part in parts(state).items()
    }


def _plain_fields(fields: Sequence[Field]) -> Plain:
    return plain(fields[0].value) if len(fields) == 1 else _joined(fields)


def parts(state: VmState) -> dict[str, Sequence[Field] | Subsection]:
    """What stands under each name: the entries of a field, mostly one; or a subsection."""
    found: dict[str, Sequence[Field] | Subsection] = {}
    for name, fields in arrays(state.fields):
        found[_unused(name, found)] = fields
    for subsection in state.subsections:
        found[_unused(subsection.name, found)] = subsection
    return found


def arrays(fields: Sequence[Field]) -> Iterator[tuple[str, Sequence[Field]]]:
    """Entries of one array stand one after the other under one name: they are given together.

    Elsewhere QEMU tells repeated names apart itself, by a suffix ``[k]``.
    """
    at = 0
    while at < len(fields):
        end = at + 1
        while end < len(fields) and fields[end].name == fields[at].name:
            end += 1
        yield fields[at].name, fields[at:end]
        at = end


def _joined(fields: Sequence[Field]) -> list[Plain]:
    elements: list[Plain] = []
    for field in fields:
        value = plain(field.value)
        if field.description.count is not None and isinstance(value, list):
            elements.extend(value)
        else:
            elements.append(value)
    return elements


def _unused(name: str, taken: Mapping[str, object]) -> str:
    if name not in taken:
        return name
    number = 1
    while f"{name}[{number}]" in taken:
        number += 1
    return f"{name}[{number}]"


def find_devices(contents: Contents, name: str) -> list[Section]:
    """The FULL sections that ``name`` means: name/instance, the name, or what follows the bus path in either."""
    devices = [section for section in contents.sections if section.kind.name == "FULL"]
    spellings: tuple[Callable[[Section], str], ...] = (
        lambda section: section.key,
        lambda section: section.name,
        lambda section: short_names(section)[0],
        lambda section: short_names(section)[1],
    )
    for spelling in spellings:
        found = [section for section in devices if spelling(section) == name]
        if found:
            return found
    return []


_INDEX = re.compile(r"\[(\d+)\]")


def find_field(contents: Contents, path: str) -> list[tuple[Section, str, Plain]]:
    """What stands at DEVICE.FIELD, for each device that matches: (section, path in it, value).

    Names may hold dots and slashes themselves (``env.regs``, ``virtio/started``), so the longest that fits is
    taken at each step; ``[n]`` picks an element.
    """
    found = []
    for section in contents.sections:
        if section.state is None:
            continue
        names = dict.fromkeys((section.key, section.name, *short_names(section)))
        rests = [rest for name in names if (rest := _after(path, name)) is not None]
        tree = plain(section.state) if rests else None
        for rest in rests:
            if first := list(islice(_descend(tree, rest), 1)):
                found.append((section, rest, first[0]))
                break
    return found


def short_names(section: Section) -> tuple[str, ...]:
    """What a device is called without its bus path: with its instance, and without."""
    short = section.name.rpartition("/")[2]
    return (f"{short}/{section.instance_id}", short)


def _after(path: str, name: str) -> str | None:
    """What follows ``name`` in ``path``, without the separator; None where it does not begin with it."""
    if not path.startswith(name):
        return None
    rest = path[len(name) :]
    if not rest or rest[0] in "./":
        return rest[1:]
    return rest if rest[0] == "[" else None


def _descend(tree: Plain, path: str) -> Iterator[Plain]:
    if not path:
        yield tree
        return
    if isinstance(tree, dict):
        for name in sorted((name for name in tree if path.startswith(name)), key=len, reverse=True):
            rest = _after(path, name)
            if rest is not None:
                yield from _descend(tree[name], rest)
    if index := _INDEX.match(path):
        elements = tree if isinstance(tree, list) else [tree]  # QEMU describes an array of one as if it were none
        rest = path[index.end() :]
        for element in elements[int(index[1]) :][:1]:
            yield from _descend(element, rest[1:] if rest[:1] in (".", "/") else rest)
