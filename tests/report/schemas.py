"""Data held to a schema that is shipped, and that schema to being one that says anything."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema

__all__ = ["faults", "not_missed", "not_refused"]

UNKNOWN = "unheard-of"


def faults(data: object, schema: Mapping[str, Any]) -> list[str]:
    """What in ``data`` is not as the schema has it."""
    return [f"{each.json_path}: {each.message}" for each in jsonschema.Draft202012Validator(schema).iter_errors(data)]


def not_missed(data: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """The objects in ``data`` that lack something where the schema has nothing against it."""
    found = []
    for place, whole, part in _objects(data):
        for name in list(part):
            value = part.pop(name)
            if not faults(whole, schema):
                found.append(f"{place}.{name}")
            part[name] = value
    return found


def not_refused(data: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """The objects in ``data`` that may have a member which the schema does not know."""
    found = []
    for place, whole, part in _objects(data):
        part[UNKNOWN] = 1
        if not faults(whole, schema):
            found.append(place)
        del part[UNKNOWN]
    return found


def _objects(data: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each object in a copy of ``data``: where it is, the copy, and the object; of a list's the first alone."""
    whole = copy.deepcopy(data)

    def inside(place: str, value: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
        if isinstance(value, dict):
            yield place, whole, value
            for name in list(value):
                yield from inside(f"{place}.{name}", value[name])
        elif isinstance(value, list) and value:
            yield from inside(f"{place}[]", value[0])

    return inside("$", whole)
