"""What ``diff`` found."""

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any, Final

from rich.text import Text

from qmigrate.analysis.devices import plain
from qmigrate.analysis.diff import Diff, FieldDifference, Side, StructureDifference
from qmigrate.analysis.diff_fields import ABSENT
from qmigrate.analysis.diff_ram import BlockPages
from qmigrate.format.vm_state import VmState
from qmigrate.report.names import clean
from qmigrate.report.paper import BAD, DIM, GOOD, HEAD, KIND, ODD, Paper, text
from qmigrate.report.units import count, plural, size

__all__ = ["write_diff"]

_SHOWN_BYTES: Final = 16  # of a buffer that the other side lacks
_MOST: Final = 20  # fields, things of the structure, and ranges of a block, unless all are asked for


def write_diff(found: Diff, paper: Paper, *, everything: bool = False) -> None:
    """The verdict first, then what differs; of much the first few, unless ``everything`` is asked for."""
    for letter, side in (("A", found.a), ("B", found.b)):
        paper.line(_side(side), lead=text((letter, HEAD), "  ", (clean(side.name), HEAD), "  "))
    paper.line()
    paper.line(_verdict(found))
    most = None if everything else _MOST
    _structure(found.structure, paper, most)
    _fields(found, paper, most)
    _ram(found.blocks or [], paper, most)


def _side(side: Side) -> Text:
    machine = side.contents.machine_type
    whole = ("complete", GOOD) if side.complete else ("not complete", BAD)
    return text("no machine type" if machine is None else clean(machine), ", ", whole)


def _verdict(found: Diff) -> Text:
    counted = sum(each.counts for each in found.structure)
    as_bytes = set(found.as_bytes)
    sections = sum(each.path in as_bytes for each in found.fields)
    fields = len(found.fields) - sections
    pages = sum(block.unequal for block in found.blocks or ())
    parts = [
        plural(counted, "difference of structure", "differences of structure") if counted else "",
        plural(fields, "field") if fields else "",
        plural(sections, "section") if sections else "",
        plural(pages, "page") if pages else "",
    ]
    said = ", ".join(filter(None, parts))
    compared = [f"{plural(found.compared, 'field')} compared"]
    if found.as_bytes:
        compared.append(f"{plural(len(found.as_bytes), 'section')} as bytes")
    if found.ignored:
        compared.append(f"{plural(found.ignored, 'difference')} ignored")
    if found.blocks is None:
        compared.append("RAM not compared")
    if not found.complete:
        compared.append("as far as both inputs reach")
    if found.not_compared:
        compared.append(f"{plural(len(found.not_compared), 'thing')} not compared")
    same = ("nothing differs, but not all was compared", ODD) if found.not_compared else ("same", GOOD)
    verdict: tuple[str, str] = (f"differ: {said}", ODD) if said else same
    return text(verdict, (f"; {', '.join(compared)}", DIM))


def _rest(total: int, most: int | None, paper: Paper) -> None:
    if most is not None and total > most:
        paper.line(text((f"  … and {count(total - most)} more: --all", DIM)))


# -- structure


def _structure(differences: Sequence[StructureDifference], paper: Paper, most: int | None) -> None:
    if not differences:
        return
    paper.heading("Structure")
    for each in differences[:most]:
        remark = () if each.counts else (("  (how it travelled: no difference)", DIM),)
        lead = text("  ", (each.what, KIND), "  ")
        paper.line(text(clean(each.name), "  ", *_sides(each), *remark), lead=lead)
    _rest(len(differences), most, paper)


def _sides(each: StructureDifference) -> Iterator[str]:
    if isinstance(each.a, bool):
        yield f"in {'A' if each.a else 'B'} only"
    elif each.a is None or each.b is None:
        side, value = ("A", each.a) if each.b is None else ("B", each.b)
        if each.what != "machine" or isinstance(value, str):
            yield f"in {side} only, {_structure_value(each.what, value)}"
        else:
            yield f"{_structure_value(each.what, value)} in {side} only"
    else:
        yield f"{_structure_value(each.what, each.a)} in A, {_structure_value(each.what, each.b)} in B"


def _structure_value(what: str, value: Any) -> str:
    if what in ("block", "undecoded"):
        return size(value)
    return clean(value) if isinstance(value, str) else f"version {value}" if what != "machine" else count(value)


# -- fields


def _fields(found: Diff, paper: Paper, most: int | None) -> None:
    fields = found.fields
    if not fields:
        return
    devices = len({each.path.partition(".")[0] for each in fields})
    paper.heading("Devices", f"{plural(len(fields), 'field')} of {plural(devices, 'device')}, the first first")
    for each in fields[:most]:
        _field(each, paper)
    _rest(len(fields), most, paper)


def _field(each: FieldDifference, paper: Paper) -> None:
    """Both values in a line; bytes below each other, from the first that differs on."""
    a, b = _value(each.a, each, 0), _value(each.b, each, 1)
    if each.offset is None:
        paper.line(text(a, ("  against  ", DIM), b), lead=text("  ", clean(each.path), "  "))
        return
    paper.line(text((f"from byte {each.offset:#x} on", DIM)), lead=text("  ", clean(each.path), "  "))
    for side, value in (("A", a), ("B", b)):
        paper.line(value, lead=text(f"    {side}  "))


def _value(value: Any, each: FieldDifference, index: int) -> Text:
    match value:
        case _ if value is ABSENT:
            return text(("absent", ODD))
        case bytes():
            length = len(value) if each.lengths is None else each.lengths[index]
            more = "" if each.lengths is None and length <= _SHOWN_BYTES else f"  of {plural(length, 'byte')}"
            return text(value[:_SHOWN_BYTES].hex(" ") or "empty", (more, DIM))
        case None:
            return text("NULL")
        case bool():
            return text("true" if value else "false")
        case IntEnum():
            return text(value.name, (f"  {int(value):#x}", DIM))
        case int():
            return text(str(value), (f"  {value:#x}" if value > 9 else "", DIM))
        case VmState():
            return text(f"a struct, {clean(value.vmsd_name)}")
        case str():
            return text(clean(value))
        case tuple() | list():
            return text(plural(len(value), "element"))
        case _:
            return text(clean(str(plain(value))))


# -- RAM


def _ram(blocks: Sequence[BlockPages], paper: Paper, most: int | None) -> None:
    unequal = [block for block in blocks if block.unequal]
    if not unequal:
        return
    paper.heading("RAM", f"{count(len(unequal))} of {plural(len(blocks), 'block')}")
    columns = {"differ": [block.differing for block in unequal]}
    columns |= {
        "in A only": [block.only_in_a for block in unequal],
        "in B only": [block.only_in_b for block in unequal],
    }
    shown = {name: numbers for name, numbers in columns.items() if name == "differ" or any(numbers)}
    paper.table(
        ["block", "pages", *shown, "ranges"],
        [
            [
                clean(block.name),
                count(-(-block.length // block.page_size)),
                *(count(numbers[row]) for numbers in shown.values()),
                count(len(block.ranges) // 2),
            ]
            for row, block in enumerate(unequal)
        ],
    )
    for block in unequal:
        paper.line()
        _ranges(block, paper, most)


def _ranges(block: BlockPages, paper: Paper, most: int | None) -> None:
    total = len(block.ranges) // 2
    for index in range(total if most is None else min(total, most)):
        start, length = block.ranges[2 * index], block.ranges[2 * index + 1]
        pages = plural(-(-length // block.page_size), "page")
        paper.line(f"{start:#x}–{start + length:#x}  {pages}", lead=text("  ", clean(block.name), "  "))
    _rest(total, most, paper)
