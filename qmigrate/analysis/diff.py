"""What differs between two captures: the machine, each device's fields, and RAM as each stream leaves it.

How a stream travelled is no difference: a precopy of many passes, a recording and a mapped-ram file of one stopped
machine are the same.  Each side's RAM is put into files without a name in ``$TMPDIR``, sparse ones, and compared
where either has data: so neither order, passes nor encodings matter, and a pipe will do.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from qmigrate.analysis.devices import plain
from qmigrate.analysis.diff_fields import ABSENT, Ignored, Unequal, unequal_fields, unequal_subsections
from qmigrate.analysis.diff_ram import BlockPages, Spool, unequal_pages
from qmigrate.analysis.summary import describe_error, missing_pages, target_page_bits
from qmigrate.capture.migration import Contents, Migration, Section
from qmigrate.errors import StreamError
from qmigrate.format.device import decode_whole, encode_state
from qmigrate.format.stream import SectionType
from qmigrate.format.vm_state import VmState
from qmigrate.format.vmdesc import Description, StructDescription
from qmigrate.format.walk import Undecoded

__all__ = ["Diff", "FieldDifference", "Side", "StructureDifference", "describe_diff", "diff", "read_side"]

_SHOWN_BYTES: Final = 16
_MOST_FAULTS: Final = 20


@dataclass(frozen=True, slots=True)
class StructureDifference:
    """Something of the machine: ``what`` it is, its ``name``, and how each side has it, None where it lacks it.

    ``counts`` is False where it only says how the stream travelled.
    """

    what: str
    name: str
    a: Any
    b: Any
    counts: bool = True


@dataclass(frozen=True, slots=True)
class FieldDifference:
    """A field's values, ``ABSENT`` on the side that lacks it; ``path`` is as ``dissect --field`` takes it.

    Of longer bytes the values begin at ``offset``, where they differ first; ``lengths`` are then those of the whole.
    """

    path: str
    a: Any
    b: Any
    offset: int | None = None
    lengths: tuple[int, int] | None = None


@dataclass(slots=True)
class Side:
    """One of the two: what its stream holds, its RAM, and the bytes of the sections that were not decoded."""

    name: str
    contents: Contents
    spool: Spool | None
    raw: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    """By the section's place in ``contents.sections``: where its bytes stand in the stream, and they."""
    spans: list[bytes] = field(default_factory=list)
    """What could not even be told apart as sections."""

    @property
    def complete(self) -> bool:
        """Did its grammar reach its end?"""
        return self.contents.complete

    def keep(self, offset: int, data: bytes) -> None:
        """What was not decoded: the data of the section whose header stands before it, or of none."""
        sections = self.contents.sections
        if sections and sections[-1].offset + sections[-1].length == offset:
            self.raw[len(sections) - 1] = (offset, data)
        else:
            self.spans.append(data)


@dataclass(slots=True)
class Diff:
    """The answer.  ``compared`` counts fields; ``not_compared`` names sections of which nothing can be said."""

    a: Side
    b: Side
    structure: list[StructureDifference] = field(default_factory=list)
    fields: list[FieldDifference] = field(default_factory=list)
    ignored: int = 0
    compared: int = 0
    not_compared: list[str] = field(default_factory=list)
    blocks: list[BlockPages] | None = None
    """None where RAM was not asked for."""

    @property
    def complete(self) -> bool:
        """Were both inputs whole?"""
        return self.a.complete and self.b.complete

    @property
    def same(self) -> bool:
        """Does nothing differ that was compared and is not ignored?"""
        return not (
            self.fields
            or any(each.counts for each in self.structure)
            or any(block.unequal for block in self.blocks or ())
        )


# -- reading


def read_side(migration: Migration, name: str, stack: ExitStack, *, ram: bool = True) -> Side:
    """Read one side once.  With ``ram``, its pages go into files without a name, which ``stack`` closes.

    Raises ``NoStreamError``, and ``SpoolError`` where ``$TMPDIR`` can't hold the pages.  A fault in the stream is in
    ``contents.errors``: what was good before it is compared.
    """
    gathering = migration.gather()
    contents = gathering.contents
    side = Side(name, contents, Spool(stack) if ram else None)
    faults: list[StreamError] = []
    for entry in gathering:
        if side.spool is not None:
            try:
                side.spool.take(entry, contents.blocks)
            except StreamError as exc:  # in what a page's data decodes to: the others are good
                if len(faults) < _MOST_FAULTS:
                    faults.append(exc)
        if isinstance(entry.record, Undecoded) and not entry.channel:
            side.keep(entry.offset, entry.record.data)
    if ram:
        faults += (StreamError(sentence) for sentence in missing_pages(contents))
    if faults:
        contents.errors += faults
        contents.complete = False
    return side


# -- comparing


def diff(a: Side, b: Side, *, ignore: Iterable[str] = ()) -> Diff:
    """What differs between both sides, but for what ``ignore`` names of devices: globs of DEVICE.FIELD."""
    found = Diff(a, b)
    _decode_by_the_other(a, b.contents.description)
    _decode_by_the_other(b, a.contents.description)
    found.structure += _machine(a, b)
    _devices(found, Ignored(ignore))
    if a.spool is not None and b.spool is not None:
        found.blocks = list(_ram(a, b))
    return found


def _decode_by_the_other(side: Side, description: Description | None) -> None:
    """What has no description (postcopy), by that of the other side, where it fits exactly."""
    if description is None:
        return
    for index, (offset, data) in side.raw.items():
        section = side.contents.sections[index]
        for device in description.devices_of(section.name, section.instance_id):
            if section.state is None:
                section.state = _decoded(device.body, data, offset)


def _decoded(body: StructDescription, data: bytes, offset: int) -> VmState | None:
    try:
        return decode_whole(body, data, begin=0, end=len(data), offset=offset)
    except StreamError:
        return None


def _machine(a: Side, b: Side) -> Iterator[StructureDifference]:
    one, other = a.contents, b.contents
    if _reached(a, b) and one.machine_type != other.machine_type:
        yield StructureDifference("machine", "machine type", one.machine_type, other.machine_type)
    for name in sorted({*one.capabilities} ^ {*other.capabilities}):
        yield StructureDifference("capability", name, name in one.capabilities, name in other.capabilities, False)
    size, its = 1 << target_page_bits(one), 1 << target_page_bits(other)
    if one.blocks and other.blocks and size != its:
        yield StructureDifference("machine", "target page size", size, its)
    if (one.blocks and other.blocks) or (a.complete and b.complete):
        for name in dict.fromkeys((*one.blocks, *other.blocks)):
            ours, theirs = (each.blocks[name].length if name in each.blocks else None for each in (one, other))
            if ours != theirs:
                yield StructureDifference("block", name, ours, theirs)


def _reached(*sides: Side) -> bool:
    """Did each come as far as CONFIGURATION, or does it have none?"""
    return all(side.complete or side.contents.configuration is not None for side in sides)


def _devices(found: Diff, ignored: Ignored) -> None:
    a, b = found.a, found.b
    theirs = _sections(b)
    ours = _sections(a)
    for key, index in ours.items():
        if key in theirs:
            _device(found, ignored, index, theirs[key])
        elif b.complete:
            _lone(found, ignored, a.contents.sections[index], "a")
    for key, index in theirs.items():
        if key not in ours and a.complete:
            _lone(found, ignored, b.contents.sections[index], "b")
    if a.spans != b.spans and found.complete:
        length, its = (sum(map(len, side.spans)) for side in (a, b))
        found.structure.append(StructureDifference("undecoded", "sections that can't be told apart", length, its))


def _sections(side: Side) -> dict[tuple[str, int, bool], int]:
    """The devices and live sections that are whole: name/instance, which of that name it is, is it live; its place."""
    seen: Counter[str] = Counter()
    places: dict[tuple[str, int, bool], int] = {}
    for index, section in enumerate(side.contents.sections):
        if section.kind == SectionType.FULL and section.whole:
            places[section.key, seen[section.key], False] = index
            seen[section.key] += 1
        elif section.kind == SectionType.START and section.name != "ram":
            places[section.key, 0, True] = index
    return places


def _lone(found: Diff, ignored: Ignored, section: Section, side: str) -> None:
    what = "device" if section.kind == SectionType.FULL else "live section"
    a, b = (section.version_id, None) if side == "a" else (None, section.version_id)
    _structure(found, ignored, section, StructureDifference(what, section.key, a, b))


def _structure(found: Diff, ignored: Ignored, section: Section, difference: StructureDifference) -> None:
    """Of a device: its name is a path."""
    if ignored.matches(section, difference.name):
        found.ignored += 1
    else:
        found.structure.append(difference)


def _device(found: Diff, ignored: Ignored, one: int, other: int) -> None:
    a, b = found.a.contents.sections[one], found.b.contents.sections[other]
    if a.version_id != b.version_id:
        _structure(found, ignored, a, StructureDifference("device", a.key, a.version_id, b.version_id))
    if a.kind == SectionType.START:
        found.not_compared.append(a.key)
        return
    if a.state is None or b.state is None:
        _bytes_of_device(found, ignored, a, _bytes(found.a, one), _bytes(found.b, other))
        return
    for path, version, its in unequal_subsections(a.key, a.state, b.state):
        _structure(found, ignored, a, StructureDifference("subsection", path, version, its))
    for each in unequal_fields(a.key, a.state, b.state):
        _take(found, ignored, a, each)
    found.compared += sum(1 for _ in a.state.leaves())


def _bytes(side: Side, index: int) -> bytes | None:
    """A section's data, decoded or not."""
    state = side.contents.sections[index].state
    if state is not None:
        return encode_state(state)
    return side.raw[index][1] if index in side.raw else None


def _bytes_of_device(found: Diff, ignored: Ignored, a: Section, ours: bytes | None, theirs: bytes | None) -> None:
    """At least one side can't be decoded: its bytes are compared."""
    if ours is None or theirs is None:
        found.not_compared.append(a.key)
        return
    found.compared += 1
    if ours != theirs:
        _take(found, ignored, a, Unequal(a.key, ours, theirs))


def _take(found: Diff, ignored: Ignored, section: Section, unequal: Unequal) -> None:
    if ignored.matches(section, unequal.path):
        found.ignored += 1
    else:
        found.fields.append(_shortened(unequal))


def _shortened(unequal: Unequal) -> FieldDifference:
    path, a, b = unequal
    if not isinstance(a, bytes) or not isinstance(b, bytes) or max(len(a), len(b)) <= _SHOWN_BYTES:
        return FieldDifference(path, a, b)
    at = first_difference(a, b)
    return FieldDifference(path, a[at : at + _SHOWN_BYTES], b[at : at + _SHOWN_BYTES], at, (len(a), len(b)))


def first_difference(a: bytes, b: bytes) -> int:
    """The first offset at which they differ; that of the shorter one's end where it is the longer one's begin."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(a), len(b)))


def _ram(a: Side, b: Side) -> Iterator[BlockPages]:
    assert a.spool is not None
    assert b.spool is not None
    page_size = min(a.contents.page_size, b.contents.page_size)
    for name in a.contents.blocks:
        if name in b.contents.blocks and a.spool.has(name) and b.spool.has(name):
            one, other = ((side.contents.blocks[name], side.contents.page_size) for side in (a, b))
            yield unequal_pages(a.spool, b.spool, one, other, page_size, complete=(a.complete, b.complete))


# -- as a plain value


def describe_diff(found: Diff) -> dict[str, Any]:
    """As ``diff --json`` prints it, under the names of ``report/diff.schema.json``."""
    described: dict[str, Any] = {
        "format_version": 1,
        "same": found.same,
        "complete": found.complete,
        "a": _describe_side(found.a),
        "b": _describe_side(found.b),
        "structure": [
            {"what": each.what, "name": each.name, "a": each.a, "b": each.b, "counts": each.counts}
            for each in found.structure
        ],
        "fields_compared": found.compared,
        "fields": [_describe_field(each) for each in found.fields],
        "ignored": found.ignored,
        "not_compared": found.not_compared,
    }
    if found.blocks is not None:
        described["ram_blocks"] = [_describe_block(block) for block in found.blocks]
    return described


def _describe_side(side: Side) -> dict[str, Any]:
    contents = side.contents
    return {
        "file": side.name,
        "machine_type": contents.machine_type,
        "complete": contents.complete,
        "errors": [describe_error(error) for error in contents.errors],
    }


def _describe_field(each: FieldDifference) -> dict[str, Any]:
    described: dict[str, Any] = {"path": each.path}
    values: Mapping[str, Any] = {"a": each.a, "b": each.b}
    described |= {side: plain(value) for side, value in values.items() if value is not ABSENT}
    if each.offset is not None and each.lengths is not None:
        described |= {"offset": each.offset, "a_length": each.lengths[0], "b_length": each.lengths[1]}
    return described


def _describe_block(block: BlockPages) -> dict[str, Any]:
    return {
        "name": block.name,
        "length": block.length,
        "page_size": block.page_size,
        "pages": {
            "differing": block.differing,
            "only_in_a": block.only_in_a,
            "only_in_b": block.only_in_b,
            "sent_by_a": block.sent_by_a,
            "sent_by_b": block.sent_by_b,
        },
        "ranges": [{"start": start, "length": length} for start, length in _pairs(block.ranges)],
    }


def _pairs(ranges: "array[int]") -> Iterator[Sequence[int]]:
    return zip(ranges[::2], ranges[1::2], strict=True)
