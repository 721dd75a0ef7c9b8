"""The JSON description at the end of a stream: which fields each device's section holds.

It is QEMU's own account of what it wrote, and the only one: device state has no lengths.  A description is a
value, so that one stream's can be used to read another's devices.

migration/vmstate.c: vmstate_save_vmsd_json helpers; migration/savevm.c
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, NoReturn

from qmigrate.errors import StreamError

__all__ = ["Description", "DeviceDescription", "FieldDescription", "StructDescription", "parse_description"]

_INLINE: Final = frozenset({"tmp", "vstruct", "qtailq", "qlist", "gtree"})
_DEEPEST: Final = 64  # structs in structs; QEMU's own nest less than ten deep
_MOST_OF_ONE_NAME: Final = 16  # different entries: slirp has one for each network
NULL_MARKERS: Final = frozenset({"nullptr", "ptr-marker"})


@dataclass(frozen=True, slots=True)
class StructDescription:
    """A vmsd: its fields in the order of their bytes, then the subsections that were written."""

    vmsd_name: str
    version: int
    fields: tuple["FieldDescription", ...] = ()
    subsections: tuple["StructDescription", ...] = ()


@dataclass(frozen=True, slots=True)
class FieldDescription:
    """One entry of ``fields``: ``count`` elements of ``size`` bytes each, one after the other.

    ``count`` is None where the entry is a single value (an array of one element looks the same).
    ``elements`` holds the struct, for ``tmp`` and ``vstruct`` too; one for each element of a list or tree.
    """

    name: str
    type: str
    size: int
    count: int | None = None
    index: int | None = None
    elements: tuple[StructDescription, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceDescription:
    """One FULL section.  ``vmsd_name`` is None for an old-style handler: one buffer, undivided."""

    name: str
    instance_id: int
    vmsd_name: str | None
    version: int | None
    body: StructDescription


@dataclass(frozen=True, slots=True)
class Description:
    """All of it.  ``page_size`` is the target's, in bytes."""

    page_size: int | None
    devices: tuple[DeviceDescription, ...]
    configuration: StructDescription | None = None
    _by_name: Mapping[tuple[str, int], Sequence[DeviceDescription]] = field(default_factory=dict, compare=False)

    def device(self, name: str, instance_id: int) -> DeviceDescription | None:
        """The entry for this section, or None."""
        return next(iter(self.devices_of(name, instance_id)), None)

    def devices_of(self, name: str, instance_id: int) -> Sequence[DeviceDescription]:
        """All entries for sections of this name: 5.2 and 7.2 call each network of slirp ``slirp``, 0."""
        return self._by_name.get((name, instance_id), ())


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it stands: lists and trees repeat their keys, one set for each element."""

    def get(self, key: str, default: Any = None) -> Any:
        """The first value under this key."""
        return next((value for name, value in self if name == key), default)


def parse_description(text: bytes, *, offset: int = 0) -> Description:
    """The description in ``text``, which stands at ``offset`` in the stream.

    Raises ``StreamError`` where it is not JSON, or not a description.
    """
    trail = ("description",)
    try:
        tree = json.loads(text.decode("utf-8", "surrogateescape"), object_pairs_hook=_Pairs)
    except json.JSONDecodeError as exc:
        at = len(exc.doc[: exc.pos].encode("utf-8", "surrogateescape"))
        raise StreamError(f"not JSON: {exc.msg}", offset=offset + at, trail=trail) from exc
    except RecursionError as exc:
        raise StreamError("nested too deep", offset=offset, trail=trail) from exc
    except ValueError as exc:  # a number of thousands of digits
        raise StreamError(f"not JSON: {exc}", offset=offset, trail=trail) from exc
    return _Reader(offset).description(tree)


def _by_name(devices: Sequence[DeviceDescription]) -> Mapping[tuple[str, int], Sequence[DeviceDescription]]:
    found: dict[tuple[str, int], list[DeviceDescription]] = {}
    for device in devices:
        of_this_name = found.setdefault((device.name, device.instance_id), [])
        if len(of_this_name) < _MOST_OF_ONE_NAME and device not in of_this_name:
            of_this_name.append(device)
    return found


class _Reader:
    """From JSON to our values; each thing of a wrong type is said with its place."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.depth = 0

    def fail(self, place: str, message: str) -> NoReturn:
        raise StreamError(message, offset=self.offset, trail=("description", place) if place else ("description",))

    def description(self, tree: Any) -> Description:
        top = self.object(tree, "")
        devices = tuple(
            self.device(item, f"devices[{index}]")
            for index, item in enumerate(self.list(top.get("devices"), "devices"))
        )
        configuration = top.get("configuration")
        page_size = top.get("page_size")
        return Description(
            page_size=None if page_size is None else self.number(page_size, "page_size"),
            devices=devices,
            configuration=(
                None
                if configuration is None
                else self.struct(self.object(configuration, "configuration"), "configuration")
            ),
            _by_name=_by_name(devices),
        )

    def device(self, item: Any, place: str) -> DeviceDescription:
        entry = self.object(item, place)
        name = self.string(entry.get("name"), f"{place}.name")
        vmsd_name, version = entry.get("vmsd_name"), entry.get("version")
        return DeviceDescription(
            name=name,
            instance_id=self.number(entry.get("instance_id"), f"{place}.instance_id"),
            vmsd_name=None if vmsd_name is None else self.string(vmsd_name, f"{place}.vmsd_name"),
            version=None if version is None else self.number(version, f"{place}.version"),
            body=self.struct(entry, place, name=name),
        )

    def struct(self, entry: _Pairs, place: str, *, name: str | None = None) -> StructDescription:
        if self.depth == _DEEPEST:
            self.fail("", f"structs are nested deeper than {_DEEPEST}")
        self.depth += 1
        described = self.inner(entry, place, name)
        self.depth -= 1
        return described

    def inner(self, entry: _Pairs, place: str, name: str | None) -> StructDescription:
        vmsd_name = entry.get("vmsd_name", name)
        fields = self.list(entry.get("fields", []), f"{place}.fields")
        subsections = self.list(entry.get("subsections", []), f"{place}.subsections")
        return StructDescription(
            vmsd_name=self.string(vmsd_name, f"{place}.vmsd_name"),
            version=self.number(entry.get("version", 0), f"{place}.version"),
            fields=_true_counts([self.field(item, f"{place}.fields[{index}]") for index, item in enumerate(fields)]),
            subsections=tuple(
                self.struct(self.object(item, where := f"{place}.subsections[{index}]"), where)
                for index, item in enumerate(subsections)
            ),
        )

    def field(self, item: Any, place: str) -> FieldDescription:
        entry = self.object(item, place)
        kind = self.string(entry.get("type"), f"{place}.type")
        elements: tuple[StructDescription, ...] = ()
        if kind == "struct":
            # 5.2 and 7.2 describe a NULL in an array of pointers as an empty object: without a name, even.
            inner = self.object(entry.get("struct"), f"{place}.struct")
            elements = (self.struct(inner, f"{place}.struct", name="" if not inner else None),)
        elif kind in _INLINE:
            elements = tuple(self.struct(part, place) for part in _element_groups(entry))
        count, index = entry.get("array_len"), entry.get("index")
        return FieldDescription(
            name=self.string(entry.get("name"), f"{place}.name"),
            type=kind,
            size=self.number(entry.get("size"), f"{place}.size"),
            count=None if count is None else self.number(count, f"{place}.array_len"),
            index=None if index is None else self.number(index, f"{place}.index"),
            elements=elements,
        )

    def object(self, value: Any, place: str) -> _Pairs:
        if not isinstance(value, _Pairs):
            self.fail(place, f"found {_kind(value)}, expected an object")
        return value

    def list(self, value: Any, place: str) -> Sequence[Any]:
        if not isinstance(value, list) or isinstance(value, _Pairs):
            self.fail(place, f"found {_kind(value)}, expected a list")
        return value

    def string(self, value: Any, place: str) -> str:
        if not isinstance(value, str):
            self.fail(place, f"found {_kind(value)}, expected a string")
        return value

    def number(self, value: Any, place: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
            found = value if isinstance(value, int) else _kind(value)
            self.fail(place, f"found {found}, expected a number from 0 to 2^64")
        return value


def _kind(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case _Pairs():
            return "an object"
        case list():
            return "a list"
        case str():
            return "a string"
        case bool():
            return "a boolean"
        case _:
            return "a number"


def _element_groups(entry: _Pairs) -> Iterator[_Pairs]:
    """Each ``vmsd_name, version, fields, subsections`` that stands inline in the entry."""
    group = _Pairs()
    for key, value in entry:
        if key == "vmsd_name" and group:
            yield group
            group = _Pairs()
        if key in ("vmsd_name", "version", "fields", "subsections"):
            group.append((key, value))
    if group:
        yield group


def _true_counts(fields: Sequence[FieldDescription]) -> tuple[FieldDescription, ...]:
    """Arrays of pointers with NULLs in them come as runs, and 10.0 on miscounts those.

    Where elements are alike, the first run's ``array_len`` counts the whole array.  Where each element has an
    entry of its own, a NULL's ``array_len`` means nothing; that such an entry follows another shows it.
    migration/vmstate.c: vmstate_save_state_v()
    """
    found: list[FieldDescription] = []
    at = 0
    while at < len(fields):
        end = at + 1
        while end < len(fields) and fields[end].name == fields[at].name:
            end += 1
        found.extend(_true_counts_of_array(fields[at:end]))
        at = end
    return tuple(found)


def _true_counts_of_array(runs: Sequence[FieldDescription]) -> Iterator[FieldDescription]:
    nulls = [run.type in NULL_MARKERS for run in runs]
    if len(runs) == 1 or not any(nulls):
        yield from runs
        return
    if any(here and after for here, after in pairwise(nulls)):
        for run, null in zip(runs, nulls, strict=True):
            yield _with_count(run, None) if null else run
        return
    first = runs[0]
    if not nulls[0] and first.count is not None:
        rest = sum(run.count or 1 for run in runs[1:])
        if first.count > rest:
            count = first.count - rest
            first = _with_count(first, count if count > 1 else None)
    yield first
    yield from runs[1:]


def _with_count(run: FieldDescription, count: int | None) -> FieldDescription:
    return FieldDescription(run.name, run.type, run.size, count, run.index, run.elements)
