"""Every record that there is comes back from its bytes: a new one is drawn here by its declaration, or named here.

What a record's fields say of each other (a count, then so many) is drawn in the order of the wire.  Where a declaration
does not tell which values are good, ``FIELDS`` or ``WHOLE`` do; what stands only inside of another is in ``WITHIN``.
"""

import dataclasses
import importlib
import pkgutil
import struct
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any, Final

import construct
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import qmigrate
from qmigrate.errors import TruncatedError
from qmigrate.format import pci, virtio
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
from qmigrate.format.block import BlockRecord
from qmigrate.format.command import Command
from qmigrate.format.dirty_bitmap import BitmapStart, DirtyBitmapRecord
from qmigrate.format.multifd import PageHeader
from qmigrate.format.ram import CompressedPage, NormalPage, RamRecord, XbzrlePage, ZeroPage
from qmigrate.format.return_path import Message
from qmigrate.format.s390 import StorageAttributes, StorageAttributesMark, StorageKeys, StorageKeysMark
from tests.format.test_live import bitmap_records
from tests.format.test_multifd import headers as page_headers
from tests.format.test_pci import walkable_configs
from tests.format.test_ram import records as ram_records
from tests.format.test_virtio import devices
from tests.walking import run

PAGE: Final = 4096
NAMES: Final = st.binary(max_size=255).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
FEW: Final = st.integers(16, 40)
_BASES: Final = {Command, Message}


def record_classes() -> list[type[Record]]:
    """All of the package, but those that others are only built upon."""
    for package in ("format", "capture"):
        for module in pkgutil.iter_modules([f"{folder}/{package}" for folder in qmigrate.__path__]):
            importlib.import_module(f"qmigrate.{package}.{module.name}")
    found = {each for each in _below(Record) if each.__module__.startswith("qmigrate.")}
    return sorted(found - _BASES, key=lambda each: (each.__module__, each.__name__))


def _below(cls: type[Record]) -> Iterator[type[Record]]:
    for each in cls.__subclasses__():
        yield each
        yield from _below(each)


# -- values of a field, by how it stands on the wire


def _words_with(flags: list[int], *, bits: int) -> st.SearchStrategy[int]:
    """A number above ``bits`` bits, which are one of ``flags``."""
    return st.builds(
        lambda above, flag: above << bits | flag, st.integers(0, (1 << 64 - bits) - 1), st.sampled_from(flags)
    )


FIELDS: Final[Mapping[tuple[type[Record], str], st.SearchStrategy[Any]]] = {
    (BlockRecord, "word"): _words_with([1, 2, 3, 4, 6, 9, 0xB], bits=9),
    (BitmapStart, "flags"): st.integers(0, 7),
    (StorageAttributesMark, "word"): _words_with([1, 2, 4, 8], bits=12),
    (StorageAttributes, "word"): _words_with([1, 2, 4, 8], bits=12),
    (StorageKeysMark, "word"): _words_with([1, 2, 4], bits=12),
    (StorageKeys, "word"): _words_with([1, 2, 4], bits=12),
    (XbzrlePage, "encoding"): st.just(1),
    (XbzrlePage, "length"): FEW,
    (CompressedPage, "length"): FEW,
}
WHOLE: Final[Mapping[type[Record], st.SearchStrategy[Record]]] = {
    RamRecord: ram_records(PAGE),
    PageHeader: page_headers(PAGE),
    DirtyBitmapRecord: bitmap_records(),
}
# What is read with facts that stand elsewhere in the stream.
CONTEXT: Final[Mapping[type[Record], Mapping[str, Any]]] = {
    each: {"page_size": PAGE} for each in (RamRecord, NormalPage, ZeroPage, XbzrlePage, CompressedPage, PageHeader)
}
# Parts whose places, or whose number of elements, the whole alone knows: see the tests of both modules.
WITHIN: Final = {
    each
    for module in (pci, virtio)
    for each in vars(module).values()
    if isinstance(each, type) and issubclass(each, Record) and each.__module__ == module.__name__
}


def of_field(layout: Any, said: Any, *, counts: bool) -> st.SearchStrategy[Any]:  # noqa: PLR0912 - one row a layout
    """Values that may stand in a field; ``said``: what the fields before it hold; ``counts``: it says how many come."""
    match layout:
        case construct.FormatField(fmtstr=code):
            return FEW if counts else _integers(code)
        case Only(member=member):
            return st.just(member)
        case Known(enum=enum):
            return st.sampled_from(enum)
        case Nested(record=record):
            return drawn(record)
        case When(condition=condition, subcon=within):
            return of_field(within, said, counts=False) if condition(said) else st.none()
        case Several(count=count, subcon=within):
            how_many = count(said) if callable(count) else count
            return st.tuples(*[of_field(within, said, counts=False)] * how_many)
        case IfMore(subcon=within):
            return st.none() | of_field(within, said, counts=False)
        case EverythingLeft(subcon=within):
            return st.lists(of_field(within, said, counts=False), max_size=5).map(tuple)
        case Rows(layout=row_layout, row=None):
            row = _integers(row_layout.format[-1:])
            return st.tuples(*[row] * layout._count(said))
        case construct.Const(value=value):
            return st.just(value)
        case construct.Bytes(length=length):
            return _bytes(length(said) if callable(length) else length)
        case _ if layout is CountedString:
            return NAMES
        case _ if layout is construct.GreedyBytes:
            return st.binary(max_size=40)
    raise TypeError(f"no values are known for {layout!r}: add them here, or the record to WHOLE")


def _integers(code: str) -> st.SearchStrategy[int]:
    bits = 8 * struct.calcsize(f">{code[-1]}")
    return st.integers(0, (1 << bits) - 1) if code[-1].isupper() else st.integers(-(1 << bits - 1), (1 << bits - 1) - 1)


def _bytes(size: int) -> st.SearchStrategy[bytes]:
    """So many; of a page not each by itself."""
    few = min(size, 48)
    return st.binary(min_size=few, max_size=few).map(lambda drawn: (drawn * (size // max(few, 1) + 1))[:size])


@st.composite
def drawn(draw: st.DrawFn, cls: type[Record]) -> Any:
    """A record, field by field."""
    if cls in WHOLE:
        return draw(WHOLE[cls])
    said = construct.Container(_params=construct.Container(CONTEXT.get(cls, {})))
    counts = _names_in(cls)
    for name, layout in _layouts(cls).items():
        values = FIELDS.get((cls, name))
        said[name] = draw(of_field(layout, said, counts=name in counts) if values is None else values)
    return cls(**{name: said[name] for name in cls._names})


def _layouts(cls: type[Record]) -> dict[str, Any]:
    return {each.name: each.metadata["construct"] for each in dataclasses.fields(cls)}


def _names_in(cls: type[Record]) -> set[str]:
    """The fields by which a later one knows how many there are."""
    functions = [getattr(layout, name, None) for layout in _layouts(cls).values() for name in ("count", "length")]
    codes = [function.__code__ for function in functions if callable(function)]
    return {name for code in codes if isinstance(code, CodeType) for name in code.co_names}


ALONE: Final = [each for each in record_classes() if each not in WITHIN]


@pytest.mark.parametrize("cls", ALONE, ids=lambda cls: cls.__name__)
def test_a_record_comes_back_from_its_bytes_however_they_come(cls: type[Record]) -> None:
    context = dict(CONTEXT.get(cls, {}))

    @settings(max_examples=30, deadline=None)
    @given(drawn(cls), st.binary(max_size=9), st.integers(1, 40), st.data())
    def check(record: Record, behind: bytes, step: int, data: st.DataObject) -> None:
        raw = record.build(**context)
        assert cls.read(raw, **context) == record
        assert cls.read(raw, **context).build(**context) == raw
        if _takes_all(cls):
            return
        assert run(lambda feed: feed.record(cls, **context), raw + behind, step) == (record, len(raw))
        if raw:
            cut = data.draw(st.integers(0, len(raw) - 1))
            with pytest.raises(TruncatedError) as caught:
                cls.read(raw[:cut], offset=0x10, **context)
            assert caught.value.offset == 0x10 + cut

    check()


def _takes_all(cls: type[Record]) -> bool:
    """Up to the end of what it is given, so its end must be known."""
    last = list(_layouts(cls).values())[-1:]
    return any(isinstance(each, IfMore | EverythingLeft) or each is construct.GreedyBytes for each in last)


# -- those that stand in another


WHOLES: Final = {pci: walkable_configs().map(pci.decode_pci_config), virtio: devices()}


def _in(value: Any) -> Iterator[type[Record]]:
    """The classes of all records in a value."""
    if isinstance(value, Record):
        yield type(value)
        for each in vars(value).values():
            yield from _in(each)
    elif isinstance(value, tuple):
        for each in value:
            if isinstance(each, Record | tuple):
                yield from _in(each)


def test_each_part_is_drawn_within_a_whole() -> None:
    """Those wholes come back from their bytes: tests/format/test_pci.py, test_virtio.py."""
    missing = set(WITHIN)
    for whole in WHOLES.values():

        @settings(max_examples=400, deadline=None, database=None, phases=[Phase.generate], derandomize=True)
        @given(whole)
        def look(value: Record) -> None:
            missing.difference_update(_in(value))

        look()
    assert missing == set()


# -- and a new one


def test_a_field_of_which_no_values_are_known_is_told() -> None:
    class New(Record):
        number: int = wire(construct.VarInt)

    with pytest.raises(TypeError, match="no values are known for <VarInt>: add them here, or the record to WHOLE"):
        of_field(_layouts(New)["number"], construct.Container(), counts=False)


def test_all_records_are_there() -> None:
    """A module that is no longer found would leave its records untested."""
    modules = {each.__module__.rpartition(".")[2] for each in record_classes()}
    assert modules >= {"stream", "command", "ram", "return_path", "multifd", "mapped_ram", "pci", "vfio"}
    assert len(ALONE) > 70
