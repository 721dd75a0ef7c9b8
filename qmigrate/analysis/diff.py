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
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from qmigrate.analysis.devices import plain
from qmigrate.analysis.diff_fields import ABSENT, Ignored, Unequal, field_paths, unequal_fields, unequal_subsections
from qmigrate.analysis.diff_ram import BlockPages, Spool, unequal_pages
from qmigrate.analysis.summary import describe_error, missing_pages, target_page_bits
from qmigrate.capture.migration import Block, Contents, Migration, Section
from qmigrate.errors import StreamError
from qmigrate.format.command import Command
from qmigrate.format.device import decode_whole, encode_state
from qmigrate.format.stream import ConfigurationUuid, EndOfFile, Footer, SectionHeader, SectionPart, SectionType
from qmigrate.format.vm_state import VmState
from qmigrate.format.vmdesc import Description, StructDescription
from qmigrate.format.walk import Entry, Trailing, Undecoded, VmDescription

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = [
    "Diff",
    "FieldDifference",
    "NotCompared",
    "Side",
    "StructureDifference",
    "describe_diff",
    "diff",
    "read_side",
]

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


@dataclass(frozen=True, slots=True)
class NotCompared:
    """Something of which it can't be said whether it is the same: its name, and why."""

    name: str
    reason: str


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
    live: "dict[str, _Hash]" = field(default_factory=dict)
    """Of live sections other than ram: a hash of all their records."""
    pieces: dict[str, list[bytes]] = field(default_factory=dict)
    """Of state that came over multifd channels, by ``name/instance``: a hash of each piece, in no order."""

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

    def left_out(self, block: Block) -> bool:
        """Is its RAM not in the stream, because both ends share it?"""
        shared = any(each.address is not None for each in self.contents.blocks.values())
        return shared and self.complete and not block.seen.count


@dataclass(slots=True)
class Diff:
    """The answer.  ``compared`` counts fields, ``as_bytes`` names the sections that were compared only so.

    ``ignored_nothing``: what was to be ignored, and names nothing that either side has.
    """

    a: Side
    b: Side
    structure: list[StructureDifference] = field(default_factory=list)
    fields: list[FieldDifference] = field(default_factory=list)
    ignored: int = 0
    compared: int = 0
    as_bytes: list[str] = field(default_factory=list)
    not_compared: list[NotCompared] = field(default_factory=list)
    ignored_nothing: list[str] = field(default_factory=list)
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
    live = _Live(side)
    for entry in gathering:
        live.take(entry)
        if side.spool is not None:
            try:
                side.spool.take(entry, contents.blocks)
            except StreamError as exc:  # in what a page's data decodes to: the others are good
                exc.input = contents.input_of(entry.channel)
                if len(faults) < _MOST_FAULTS:
                    faults.append(exc)
        if isinstance(entry.record, Undecoded) and not entry.channel:
            side.keep(entry.offset, entry.record.data)
        elif entry.channel:
            _keep_piece(side, entry.record)
    if ram:
        faults += (StreamError(sentence) for sentence in missing_pages(contents))
    if side.spool is not None:
        faults += map(StreamError, side.spool.doubts())
    if faults:
        contents.errors += faults
        contents.complete = False
    return side


def _keep_piece(side: Side, record: object) -> None:
    from qmigrate.format.multifd import DeviceStatePacket

    if isinstance(record, DeviceStatePacket):
        key = f"{record.header.idstr}/{record.header.instance_id}"
        side.pieces.setdefault(key, []).append(sha256(record.data).digest())


class _Live:
    """Takes live sections other than ram: a hash of their records, whatever they are."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._open: _Hash | None = None

    def take(self, entry: Entry) -> None:
        match entry.record:
            case SectionHeader() | SectionPart():
                section = self._side.contents.sections[-1]
                is_live = section.kind != SectionType.FULL and section.name != "ram"
                self._open = self._side.live.setdefault(section.key, sha256()) if is_live else None
            case Footer() | EndOfFile() | VmDescription() | Trailing() | Command():
                self._open = None
            case _ if self._open is not None:
                self._open.update(entry.view)


# -- comparing


def diff(a: Side, b: Side, *, ignore: Iterable[str] = ()) -> Diff:
    """What differs between both sides, but for what ``ignore`` names of devices: globs of DEVICE.FIELD."""
    found = Diff(a, b)
    ignored = Ignored(ignore)
    _decode_by_the_other(a, b.contents.description)
    _decode_by_the_other(b, a.contents.description)
    found.structure += _machine(a, b)
    _devices(found, ignored)
    if a.spool is not None and b.spool is not None:
        found.blocks = list(_ram(found))
    _behind_the_end(found)
    found.ignored_nothing = list(_nothing(found, ignored))
    return found


def _behind_the_end(found: Diff) -> None:
    for letter, side in (("A", found.a), ("B", found.b)):
        if side.contents.trailing:
            reason = f"{side.contents.trailing} bytes there are no part of it"
            found.not_compared.append(NotCompared(f"behind the end of {letter}'s stream", reason))


def _nothing(found: Diff, ignored: Ignored) -> Iterator[str]:
    """Patterns that match no difference, and nothing else that either side has."""
    for pattern in ignored.unused():
        if not any(
            ignored.would_match(pattern, section, path)
            for side in (found.a, found.b)
            for section in side.contents.sections
            for path in (section.key, *(() if section.state is None else field_paths(section.key, section.state)))
        ):
            yield pattern


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
    ours, theirs = _uuid(a), _uuid(b)
    if ours != theirs:  # only with validate-uuid it is sent at all
        yield StructureDifference("machine", "UUID", ours, theirs, ours is not None and theirs is not None)
    size, its = 1 << target_page_bits(one), 1 << target_page_bits(other)
    if one.blocks and other.blocks and size != its:
        yield StructureDifference("machine", "target page size", size, its)
    if (one.blocks and other.blocks) or (a.complete and b.complete):
        for name in dict.fromkeys((*one.blocks, *other.blocks)):
            length, another = (each.blocks[name].length if name in each.blocks else None for each in (one, other))
            if length != another and not any(name not in side.contents.blocks and _may_list(side) for side in (a, b)):
                yield StructureDifference("block", name, length, another)


def _may_list(side: Side) -> bool:
    """May it list further blocks behind its end?  Of mapped-ram each stands behind the pages of the one before."""
    return not side.complete and "mapped-ram" in side.contents.capabilities


def _uuid(side: Side) -> str | None:
    configuration = side.contents.configuration
    for subsection in () if configuration is None else configuration.subsections:
        if isinstance(subsection.body, ConfigurationUuid):
            return str(UUID(bytes=subsection.body.uuid))
    return None


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
            _lone(found, ignored, a.contents.sections[index], "a", b)
    for key, index in theirs.items():
        if key not in ours and a.complete:
            _lone(found, ignored, b.contents.sections[index], "b", a)
    _spans(found)
    _pieces(found, ignored)


def _pieces(found: Diff, ignored: Ignored) -> None:
    """State over multifd channels stays bytes, and how many pieces it is cut into may be how it travelled."""
    a, b = found.a, found.b
    for key in dict.fromkeys((*a.pieces, *b.pieces)):
        ours, theirs = (sorted(side.pieces.get(key, ())) for side in (a, b))
        sections = (section for side in (a, b) for section in side.contents.sections if section.key == key)
        section = next(sections, None)
        if ours == theirs:
            found.as_bytes.append(key)
        elif section is None or not ignored.matches(section, key):
            reason = "the pieces of its state that came over multifd channels are not the same on both sides"
            found.not_compared.append(NotCompared(key, reason))


_SPANS: Final = "sections that can't be told apart"


def _spans(found: Diff) -> None:
    """They are held to each other where both have them.  What is decoded of one side may be in those of the other."""
    a, b = found.a, found.b
    if a.spans == b.spans:
        found.as_bytes += [_SPANS] if a.spans else []
    elif found.complete and a.spans and b.spans:
        length, its = (sum(map(len, side.spans)) for side in (a, b))
        found.structure.append(StructureDifference("undecoded", _SPANS, length, its))
    else:
        found.not_compared.append(NotCompared(_SPANS, f"only {'A' if a.spans else 'B'} has them so"))


def _sections(side: Side) -> dict[tuple[str, int, bool], int]:
    """Whole devices, and live sections: name/instance, which of that name it is, is it live; and its place."""
    seen: Counter[str] = Counter()
    places: dict[tuple[str, int, bool], int] = {}
    for index, section in enumerate(side.contents.sections):
        if section.kind == SectionType.FULL and section.whole:
            places[section.key, seen[section.key], False] = index
            seen[section.key] += 1
        elif section.kind == SectionType.START:
            places[section.key, 0, True] = index
    return places


def _lone(found: Diff, ignored: Ignored, section: Section, side: str, lacks: Side) -> None:
    if lacks.spans:
        if not ignored.matches(section, section.key):
            reason = f"it may be among the sections of {'B' if side == 'a' else 'A'} that can't be told apart"
            found.not_compared.append(NotCompared(section.key, reason))
        return
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
        if a.name != "ram":
            _live_section(found, ignored, a)
        return
    if a.state is None or b.state is None:
        _bytes_of_device(found, ignored, a, _bytes(found.a, one), _bytes(found.b, other))
        return
    for path, version, its in unequal_subsections(a.key, a.state, b.state):
        _structure(found, ignored, a, StructureDifference("subsection", path, version, its))
    for each in unequal_fields(a.key, a.state, b.state):
        _take(found, ignored, a, each)
    found.compared += sum(1 for _ in a.state.leaves())


def _live_section(found: Diff, ignored: Ignored, a: Section) -> None:
    """What travels in passes may be the same though its records are not."""
    ours, theirs = (side.live[a.key].digest() for side in (found.a, found.b))
    if ours == theirs:
        found.as_bytes.append(a.key)
    elif not ignored.matches(a, a.key):
        reason = "its records are not the same, which may be how it travelled"
        found.not_compared.append(NotCompared(a.key, reason))


def _bytes(side: Side, index: int) -> bytes | None:
    """A section's data, decoded or not."""
    state = side.contents.sections[index].state
    if state is not None:
        return encode_state(state)
    return side.raw[index][1] if index in side.raw else None


def _bytes_of_device(found: Diff, ignored: Ignored, a: Section, ours: bytes | None, theirs: bytes | None) -> None:
    """At least one side can't be decoded: its bytes are compared."""
    if ours is None or theirs is None:
        found.not_compared.append(NotCompared(a.key, "its bytes were not kept"))
        return
    found.as_bytes.append(a.key)
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


def _ram(found: Diff) -> Iterator[BlockPages]:
    a, b = found.a, found.b
    assert a.spool is not None
    assert b.spool is not None
    page_size = min(a.contents.page_size, b.contents.page_size)
    for name in a.contents.blocks:
        if name in b.contents.blocks and a.spool.has(name) and b.spool.has(name):
            one, other = ((side.contents.blocks[name], side.contents.page_size) for side in (a, b))
            lacks = [letter for letter, side, block in (("A", a, one[0]), ("B", b, other[0])) if side.left_out(block)]
            if lacks:
                reason = f"its RAM is not in {' and '.join(lacks)}: x-ignore-shared leaves it out"
                found.not_compared.append(NotCompared(name, reason))
                continue
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
        "compared_as_bytes": found.as_bytes,
        "ignored": found.ignored,
        "ignored_nothing": found.ignored_nothing,
        "not_compared": [{"name": each.name, "reason": each.reason} for each in found.not_compared],
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
