"""Files in which each page has its place: read in one go, written back the same, and never further than they reach."""

import dataclasses
from collections.abc import Callable
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.analysis.check import check
from qmigrate.analysis.extract import extract
from qmigrate.analysis.records import coalesce, describe_record
from qmigrate.analysis.summary import oddities
from qmigrate.capture.migration import Migration
from qmigrate.errors import StreamError, TruncatedError, UnsupportedError
from qmigrate.format.entry import StreamRecord
from qmigrate.format.mapped_ram import Gap, MappedBitmap, MappedBlock, MappedPages, MappedRamHeader, mapped_runs
from qmigrate.format.ram import BlockListHeader, PageRun, RamBlock, RamFlag
from qmigrate.format.stream import SectionType
from qmigrate.format.write import encode, write
from tests import streams
from tests.streams import PAGE
from tests.walking import InMemory, entries, kept, until_fault

HEAD: Final = streams.header() + streams.configuration("q", capabilities=["mapped-ram"])
START: Final = len(HEAD)
HEADER: Final = START + 17 + 8 + 1 + 6 + 8  # behind the entry of the first block, pc.ram
PAGES: Final[list[bytes | None]] = [b"a" * PAGE, None, b"b" * PAGE, b"c" * PAGE, None]
REST: Final = streams.ram_part() + streams.ram_end() + streams.devices() + streams.eof()
BLOCKS: Final[dict[str, list[bytes | None]]] = {"pc.ram": PAGES, "rom": [b"r" * PAGE] * 65, "none": [None] * 3}


def stream(*, base: int = 0) -> bytes:
    return HEAD + streams.mapped_ram_start(BLOCKS, begin=START, base=base) + REST


def changed(at: int, word: int, size: int = 8) -> bytes:
    """The stream with another number in it."""
    data = bytearray(stream())
    data[at : at + size] = word.to_bytes(size)
    return bytes(data)


@given(
    st.builds(
        MappedRamHeader,
        **dict.fromkeys(("page_size", "bitmap_offset", "pages_offset"), st.integers(0, 2**64 - 1)),
        version=st.integers(0, 2**32 - 1),
    )
)
def test_a_header_comes_back_as_it_was(header: MappedRamHeader) -> None:
    assert MappedRamHeader.read(header.build()) == header
    assert len(header.build()) == 28


@given(st.lists(st.booleans(), max_size=300), st.data())
def test_runs_are_those_of_the_bits(present: list[bool], data: st.DataObject) -> None:
    bits = sum(1 << index for index, one in enumerate(present) if one).to_bytes(40, "little")
    first = data.draw(st.integers(0, len(present)))
    found = [one for has, _, count in mapped_runs(bits, first, len(present) - first) for one in [has] * count]
    assert (found if first < len(present) else []) == present[first:]


def test_each_page_is_at_its_place_and_the_stream_is_the_same_again(tmp_path: Any) -> None:
    data = stream()
    found = list(kept(entries(data)))
    assert b"".join(write(found)) == data
    migration = InMemory(data)
    contents = migration.contents
    assert contents.complete
    assert {name: (block.counts["normal"], block.counts["zero"]) for name, block in contents.blocks.items()} == {
        "pc.ram": (3, 2),
        "rom": (65, 0),
        "none": (0, 3),
    }
    extracted = extract(migration, tmp_path)
    for name, pages in BLOCKS.items():
        raw = (tmp_path / extracted.files[name]).read_bytes()
        assert raw == b"".join(page or bytes(PAGE) for page in pages)
    assert extracted.bytes_written == {"pc.ram": 3 * PAGE, "rom": 65 * PAGE, "none": 0}


@pytest.mark.parametrize("step", [1, 7, 4096, 4099])
def test_any_split_of_the_bytes_gives_the_same_records(step: int) -> None:
    data = streams.mapped_ram_start({"pc.ram": PAGES}, begin=START)
    whole, pieces = (
        [describe_record(entry) for entry in coalesce(kept(entries(HEAD + data + REST, size)))] for size in (None, step)
    )
    assert pieces == whole


def test_offsets_count_from_where_the_stream_begins_in_its_file() -> None:
    migration = InMemory(stream(base=0x5000))
    assert migration.contents.complete
    assert "The stream's offsets count from 0x5000 before it: it began there in its file." in oddities(
        migration.contents
    )


def test_what_stands_in_the_place_of_a_page_without_contents_is_kept_and_not_extracted(tmp_path: Any) -> None:
    data = bytearray(stream())
    place = data.index(b"a" * PAGE) + PAGE  # of the page that has none
    data[place + 5] = 1
    checked = check(InMemory(bytes(data)))
    assert (checked.valid, checked.identical) == (True, True)
    assert checked.opaque["page contents"] == (68 + 1) * PAGE
    assert f"{PAGE} bytes of pages that were zero in the end are left in their places." in oddities(
        checked.gathering.contents
    )
    extracted = extract(InMemory(bytes(data)), tmp_path)
    assert (tmp_path / extracted.files["pc.ram"]).read_bytes()[PAGE : 2 * PAGE] == bytes(PAGE)


def test_a_gap_that_is_not_zero_comes_back() -> None:
    data = bytearray(stream())
    data[HEADER + 28 + 8 + 3] = 7
    checked = check(InMemory(bytes(data)))
    assert (checked.valid, checked.identical) == (True, True)


def test_a_bitmap_of_many_pieces_is_one_bitmap() -> None:
    count = (1 << 19) + 7  # pages: one more piece than one
    head = streams.section(SectionType.START, "ram", section_id=2, version_id=4)
    head += BlockListHeader(word=count * PAGE | RamFlag.MEM_SIZE).build()
    head += RamBlock(name="pc.ram", used_length=count * PAGE).build()
    at = START + len(head) + 28
    bitmap = bytes(1 << 16) + b"\x05" + bytes(7)
    place = -(-(at + len(bitmap)) // PAGE) * PAGE
    head += MappedRamHeader(version=1, page_size=PAGE, bitmap_offset=at, pages_offset=place).build()
    found, error = until_fault(HEAD + head + bitmap + bytes(place - at - len(bitmap)))
    assert isinstance(error, TruncatedError)
    assert [entry.record for entry in found if isinstance(entry.record, MappedBitmap)] == [
        MappedBitmap(block="pc.ram", first_page=0, length=1 << 16, bits=0),
        MappedBitmap(block="pc.ram", first_page=1 << 19, length=8, bits=5),
    ]


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (changed(HEADER, 2, 4), UnsupportedError, f"{HEADER:#x}: ram: block list: mapped-ram version 2, expected 1"),
        (
            changed(HEADER + 4, 0),
            StreamError,
            f"{HEADER + 4:#x}: ram: block list: page size is 0x0, expected a power of two from 0x100 to 0x10000",
        ),
        (
            changed(HEADER + 4, 0x2000),
            StreamError,
            f"{HEADER + 4:#x}: ram: block list: pc.ram has 0x5000 bytes, which its pages of 0x2000 bytes do not fill",
        ),
        (
            changed(HEADER + 12, 1),
            StreamError,
            f"{HEADER + 12:#x}: ram: block list: the bitmap stands at 0x1, expected {HEADER + 28:#x}, right behind "
            "its header",
        ),
        (
            changed(HEADER + 20, 0x1001),
            StreamError,
            f"{HEADER + 20:#x}: ram: block list: the pages stand at 0x1001, expected a multiple of 0x1000 from "
            f"{HEADER + 36:#x} on",
        ),
        (
            stream()[: HEADER + 30],
            TruncatedError,
            f"{HEADER + 30:#x}: ram: pc.ram: bitmap: the stream ends here, 6 bytes too soon",
        ),
        (stream()[:0x2010], TruncatedError, "0x2010: ram: pc.ram: the stream ends here, 4080 bytes too soon"),
        (changed(HEADER + 20, 1 << 62), TruncatedError, None),
        (changed(HEADER - 8, 1 << 62), StreamError, None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(data: bytes, kind: type[Exception], message: str | None) -> None:
    for step in (None, 1):
        _, error = until_fault(data, step)
        assert type(error) is kind
        assert message is None or str(error) == message


def test_a_claim_of_much_ram_takes_no_memory() -> None:
    head = streams.section(SectionType.START, "ram", section_id=2, version_id=4)
    head += BlockListHeader(word=1 << 60 | RamFlag.MEM_SIZE).build() + RamBlock(name="a", used_length=1 << 60).build()
    at = START + len(head) + 28
    place = (at + (1 << 45) + PAGE) & -PAGE
    head += MappedRamHeader(version=1, page_size=PAGE, bitmap_offset=at, pages_offset=place).build()
    _, error = until_fault(HEAD + head + bytes(100_000))
    assert isinstance(error, TruncatedError)


def replace(**changes: Any) -> Callable[[Any], Any]:
    return lambda record: dataclasses.replace(record, **changes)


def header(**changes: Any) -> Callable[[MappedBlock], MappedBlock]:
    return lambda record: dataclasses.replace(record, header=dataclasses.replace(record.header, **changes))


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        (BlockListHeader, replace(word=1 << 56 | 73 * PAGE | 4), {0: "01"}),
        (MappedBlock, replace(block=RamBlock(name="pc.rom", used_length=0x5000)), {5: "6f"}),
        (MappedBlock, header(version=2), {18: "02"}),
        (MappedBlock, header(page_size=0x101000), {24: "10"}),
        (MappedBlock, header(bitmap_offset=1 << 56 | HEADER + 28), {27: "01"}),
        (MappedBlock, header(pages_offset=1 << 56 | 0x2000), {35: "01"}),
        (MappedBitmap, replace(bits=0b1_1101), {0: "1d"}),
        (MappedPages, lambda pages: pages._replace(runs=[PageRun(0, RamFlag.ZERO, 0, 5)]), None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_one_changed_value_changes_its_bytes_and_no_others(
    kind: type, change: Callable[[Any], StreamRecord], expected: dict[int, str] | None
) -> None:
    entry = next(entry for entry in kept(entries(stream())) if type(entry.record) is kind)
    written = bytes(encode(change(entry.record), contents=entry.view))
    if expected is None:
        assert written == bytes(5 * PAGE) != entry.view
        return
    differing = {at: f"{byte:02x}" for at, byte in enumerate(written) if byte != entry.view[at]}
    assert differing == expected


@pytest.mark.parametrize(
    ("record", "contents", "message"),
    [
        (
            MappedPages("a", PAGE, [PageRun(0, RamFlag.PAGE, 0, 1)]),
            None,
            "the runs take 4096 bytes, 0 bytes of contents are given",
        ),
        (
            MappedBitmap(block="a", first_page=0, length=1, bits=256),
            None,
            "MappedBitmap can't be written: int too big to convert",
        ),
    ],
)
def test_what_has_no_room_is_refused_when_written(record: StreamRecord, contents: bytes | None, message: str) -> None:
    with pytest.raises(StreamError, match=message):
        encode(record, contents=contents)


def test_pages_without_contents_need_none() -> None:
    assert encode(MappedPages("a", PAGE, [PageRun(0, RamFlag.ZERO, 0, 2)])) == bytes(2 * PAGE)
    assert encode(Gap(length=3)) == bytes(3)


def test_a_file_is_read_as_bytes_in_memory_are(tmp_path: Any) -> None:
    path = tmp_path / "stream.mig"
    path.write_bytes(stream())
    with Migration(path) as migration:
        assert migration.contents.complete


def test_of_a_file_whose_bitmaps_were_not_written_yet_it_is_not_said_that_its_pages_were_zero() -> None:
    """As QEMU leaves it when the migration is cancelled: pages at their places, bitmaps of zeros, no END."""
    data = bytearray(HEAD + streams.mapped_ram_start(BLOCKS, begin=START))
    data[HEADER + 28 : HEADER + 36] = bytes(8)
    checked = check(InMemory(bytes(data)))
    contents = checked.gathering.contents
    assert (checked.valid, checked.identical, contents.stale) == (False, True, 3 * PAGE)
    said = oddities(contents)
    assert not [sentence for sentence in said if "zero in the end" in sentence]
    assert (
        f"{3 * PAGE} bytes stand in the places of pages that no bitmap names: the bitmaps are written when RAM ends, "
        "so which of these are good is not known."
    ) in said


def test_only_pages_that_are_not_zero_are_counted_among_those_without_contents() -> None:
    data = bytearray(stream())
    data[HEADER + 28 : HEADER + 36] = bytes(8)  # a, zero, b, c, zero: none of them named
    assert check(InMemory(bytes(data))).gathering.contents.stale == 3 * PAGE


# -- with x-ignore-shared, as 11.1 writes it


SHARED_HEAD: Final = streams.header() + streams.configuration("q", capabilities=["x-ignore-shared", "mapped-ram"])


def shared_stream(*left_out: str, base: int = 0) -> bytes:
    begin = len(SHARED_HEAD)
    start = streams.mapped_ram_start(BLOCKS, begin=begin, base=base, addresses=True, left_out=left_out)
    return SHARED_HEAD + start + REST


@pytest.mark.parametrize("left_out", [["pc.ram"], ["rom"], ["none"], ["pc.ram", "none"], list(BLOCKS)])
@pytest.mark.parametrize("base", [0, 0x5000])
def test_a_block_that_is_left_out_has_neither_bitmap_nor_pages(left_out: list[str], base: int, tmp_path: Any) -> None:
    data = shared_stream(*left_out, base=base)
    checked = check(InMemory(data))
    contents = checked.gathering.contents
    assert (checked.valid, checked.identical, contents.errors) == (True, True, [])
    assert contents.base == (base if len(left_out) < len(BLOCKS) else None)
    assert (
        f"The block list has addresses: x-ignore-shared leaves shared RAM out, and none of {', '.join(left_out)} is in "
        "the stream."
    ) in oddities(contents)
    extracted = extract(InMemory(data), tmp_path)
    for name, pages in BLOCKS.items():
        expected = b"".join(page or bytes(PAGE) for page in pages) if name not in left_out else bytes(len(pages) * PAGE)
        assert (tmp_path / extracted.files[name]).read_bytes() == expected


@pytest.mark.parametrize("step", [1, 4099])
def test_any_split_of_the_bytes_leaves_the_same_out(step: int) -> None:
    whole, pieces = (
        [describe_record(entry) for entry in coalesce(kept(entries(shared_stream("pc.ram"), size)))]
        for size in (None, step)
    )
    assert pieces == whole


def test_offsets_of_zero_are_refused_where_nothing_can_be_left_out() -> None:
    data = HEAD + streams.mapped_ram_start(BLOCKS, begin=START, left_out=["pc.ram"]) + REST
    _, fault = until_fault(data)
    assert str(fault) == (
        f"{HEADER + 12:#x}: ram: block list: the bitmap stands at 0x0, expected {HEADER + 28:#x}, "
        "right behind its header"
    )


@pytest.mark.parametrize(
    ("header", "error", "text"),
    [
        ({"version": 2}, UnsupportedError, "mapped-ram version 2, expected 1"),
        ({"page_size": 3}, StreamError, "page size is 0x3, expected a power of two from 0x100 to 0x10000"),
        ({"pages_offset": 0x100000}, StreamError, "the bitmap stands at 0x0, expected"),
    ],
)
def test_a_wrong_header_of_a_block_that_is_left_out_is_refused(
    header: dict[str, int], error: type[StreamError], text: str
) -> None:
    good = MappedRamHeader(version=1, page_size=PAGE, bitmap_offset=0, pages_offset=0)
    data = shared_stream("pc.ram").replace(good.build(), dataclasses.replace(good, **header).build())
    _, fault = until_fault(data)
    assert isinstance(fault, error)
    assert text in str(fault)
