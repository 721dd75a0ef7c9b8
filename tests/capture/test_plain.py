"""What the quick way finds in a plain file is what reading all of it finds; what is not plain it does not take."""

import lzma
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qmigrate.capture.kind import absent_pages
from qmigrate.capture.migration import Migration
from qmigrate.capture.one_pass import OnePass
from qmigrate.capture.placed import PlacedPages
from qmigrate.capture.places import Input
from qmigrate.capture.plain import blocks_of, plain_guest
from qmigrate.capture.plain_ends import Head, NotPlainError, read_head, read_tail
from qmigrate.capture.plain_pages import PlainPages, overlay, shared_entries
from qmigrate.capture.saved import read_saved
from qmigrate.capture.saved_guest import SavedGuest
from qmigrate.errors import StreamError
from qmigrate.format.stream import SectionType
from qmigrate.operations.half import Half
from tests import streams
from tests.capture.test_index import whole
from tests.streams import BLOCKS, PAGE

CORPUS = Path(__file__).parents[1] / "corpus"
anew = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
PAGES = {name: length // PAGE for name, length in BLOCKS.items()}
# Of the kinds that scripts/record_corpus knows, those that write a file with nothing set.
PLAIN = sorted(each.name for each in CORPUS.glob("*-*-*.mig.xz") if each.name.split("-")[1] in ("paused", "running"))


@contextmanager
def descriptor_of(path: Path) -> Iterator[int]:
    with path.open("rb") as file:
        yield file.fileno()


def quickly(path: Path, *, window: int = 1 << 20) -> SavedGuest:
    """As ``operations.indexing`` does it.  Raises ``NotPlainError``."""
    with descriptor_of(path) as file, descriptor_of(path) as again:
        head = read_head(file)
        tail = read_tail(file, head)
        memory = os.memfd_create("entries")
        try:
            entries = shared_entries(head, memory, is_made=True)
        finally:
            os.close(memory)
        end = PlainPages(file, head, window=window).index(entries)
        absent = sum(map(absent_pages, entries.values()))
        if end != tail.devices_at or (absent and not tail.has_balloon):
            raise NotPlainError("its ends do not meet")
        saved = plain_guest(head, tail, PlacedPages([Input.of(again)], blocks=blocks_of(head), entries=entries))
        saved.absent = absent
        return saved


def plainly(path: Path) -> SavedGuest:
    with Migration(path) as migration, read_saved(migration) as saved:
        return saved


def facts(saved: SavedGuest) -> dict[str, object]:
    of_index = {block.name: bytes(saved.index.entries(block.name)) for block in saved.blocks}
    return {name: value for name, value in vars(saved).items() if name not in ("index", "input")} | of_index


@pytest.mark.parametrize("name", PLAIN)
def test_what_qemu_wrote_is_plain_and_read_the_same(name: str, tmp_path: Path) -> None:
    path = tmp_path / "stream.mig"
    path.write_bytes(lzma.decompress((CORPUS / name).read_bytes()))
    assert facts(quickly(path)) == facts(plainly(path))


@pytest.mark.parametrize("name", ["q35-many-11.1", "pc-postcopy-11.1", "odd/pc-mapped-11.1", "odd/arm-board-7.2"])
def test_what_is_not_plain_is_not_taken_or_read_the_same(name: str, tmp_path: Path) -> None:
    path = tmp_path / "stream.mig"
    path.write_bytes(lzma.decompress((CORPUS / f"{name}.mig.xz").read_bytes()))
    try:
        found = quickly(path)
    except NotPlainError:
        return
    assert facts(found) == facts(plainly(path))


@st.composite
def plain_records(draw: st.DrawFn) -> bytes:
    """All pages once, then any of both kinds, in runs and by themselves, in sections as they come."""
    out = []
    for name, count in PAGES.items():
        named: str | None = name
        for page in range(count):
            is_zero = draw(st.booleans())
            out.append(streams.zero(page * PAGE, block=named) if is_zero else streams.page(page * PAGE, block=named))
            named = None
    block = "pc.rom"
    for _ in range(draw(st.integers(0, 12))):
        name = draw(st.sampled_from(sorted(BLOCKS)))
        first = draw(st.integers(0, PAGES[name] - 1))
        named = name if name != block or draw(st.booleans()) else None
        block = name
        is_zero = draw(st.booleans())
        for page in range(first, min(first + draw(st.integers(1, 9)), PAGES[name])):
            out.append(streams.zero(page * PAGE, block=named) if is_zero else streams.page(page * PAGE, block=named))
            named = None
        if draw(st.integers(0, 3)) == 0:
            out.append(streams.eos() + streams.footer(streams.RAM_ID) + struct.pack(">BI", 2, streams.RAM_ID))
    return b"".join(out)


@anew
@given(plain_records(), st.sampled_from([1, 2 * PAGE + 100, 5 * PAGE, 1 << 20]))
def test_plain_records_are_read_as_all_records_are(tmp_path: Path, records: bytes, window: int) -> None:
    path = tmp_path / "stream.mig"
    path.write_bytes(whole(records))
    assert facts(quickly(path, window=window)) == facts(plainly(path))


@pytest.mark.parametrize(
    "records",
    [
        streams.xbzrle(0, b"\x03\x02ab"),
        streams.compressed(0, b"packed"),
        streams.zero(0, fill=1),
        streams.page(16 * PAGE, block="pc.ram"),
        streams.zero(16 * PAGE, block="pc.ram"),
        streams.page(0, block="vga.vram"),
        struct.pack(">Q", 0x200),
        struct.pack(">QB", 0x2A, 0),
        struct.pack(">Q", PAGE // 2 | 0x28) + bytes(PAGE),
    ],
    ids=["xbzrle", "compressed", "filled", "beyond", "zero beyond", "other block", "flush", "both kinds", "between"],
)
def test_other_records_are_not_taken(records: bytes, tmp_path: Path) -> None:
    all_pages = streams.zero(0, 16, block="pc.ram") + streams.zero(0, 2, block="pc.rom")
    path = tmp_path / "stream.mig"
    path.write_bytes(whole(all_pages))
    quickly(path)
    path.write_bytes(whole(all_pages + records))
    with pytest.raises(NotPlainError):
        quickly(path)


@anew
@given(st.data())
def test_what_is_damaged_is_not_taken_or_means_the_same(tmp_path: Path, data: st.DataObject) -> None:
    good = streams.minimal()
    at = data.draw(st.integers(0, len(good) - 1))
    how = data.draw(st.sampled_from(["flipped", "cut", "longer", "doubled"]))
    bad = {
        "flipped": good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :],
        "cut": good[:at],
        "longer": good + b"\0",
        "doubled": good[:at] + good[max(at - data.draw(st.integers(1, 5000)), 0) :],
    }[how]
    path = tmp_path / "stream.mig"
    path.write_bytes(bad)
    try:
        found = quickly(path)
    except NotPlainError:
        return
    try:
        expected = plainly(path)
    except StreamError as exc:
        error = exc
    else:
        assert facts(found) == facts(expected)
        return
    # Of its devices the quick way says nothing but where they are: they go out as they came, and QEMU reads them.
    assert error.offset is not None
    assert error.offset >= bad.rindex(found.devices)


def test_a_claim_of_more_pages_than_there_is_room_for_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "stream.mig"
    blocks = {"pc.ram": 1 << 50}
    parts = [streams.header(), streams.configuration(), streams.ram_start(blocks), streams.ram_end()]
    path.write_bytes(b"".join([*parts, streams.devices(), streams.eof(), streams.devices_described()]))
    with descriptor_of(path) as file:
        head = read_head(file)
        assert head.blocks == blocks
        with pytest.raises(NotPlainError, match="every page was sent"):
            read_tail(file, head)


def test_a_device_that_holds_what_looks_like_its_own_header_is_found_whole(tmp_path: Path) -> None:
    inner = streams.device("serial", b"inside", section_id=7)
    fields = (streams.field("buffer", "buffer", len(inner) + 3),)
    outer = streams.device("serial", b"abc" + inner, section_id=7)
    timer = streams.device("timer", streams.TIMER_STATE, section_id=0, version_id=2)
    described = streams.description(
        streams.described("timer", *streams.TIMER_FIELDS), streams.described("serial", *fields)
    )
    parts = [streams.header(), streams.configuration(), streams.ram_start(), streams.ram(), timer, outer]
    path = tmp_path / "stream.mig"
    path.write_bytes(b"".join([*parts, streams.eof(), described]))
    assert quickly(path).devices == timer + outer == plainly(path).devices


def test_a_tail_of_many_false_headers_is_given_up(tmp_path: Path) -> None:
    false = streams.section(SectionType.FULL, "timer", section_id=0) * 20_000
    fields = (streams.field("buffer", "buffer", len(false)),)
    timer = streams.device("timer", false, section_id=0, instance_id=9)  # not of the instance that is described
    parts = [streams.header(), streams.configuration(), streams.ram_start(), streams.ram(), timer, streams.eof()]
    path = tmp_path / "stream.mig"
    path.write_bytes(b"".join([*parts, streams.description(streams.described("timer", *fields))]))
    with pytest.raises(NotPlainError), descriptor_of(path) as file:
        read_tail(file, read_head(file))


# -- one pass

PAGE_COUNT = 20_000
BIG = {"pc.ram": PAGE_COUNT * PAGE, "pc.rom": 3 * PAGE}
SHORTEST = 1 << 10
FRONT = b"".join([streams.header(), streams.configuration(), streams.ram_start(BIG)])
ZEROS = streams.zero(0, PAGE_COUNT, block="pc.ram")
NAMED_BYTES = len("pc.ram") + 1
ROM = streams.zero(0, 3, block="pc.rom")
BETWEEN = streams.eos() + streams.footer(streams.RAM_ID) + struct.pack(">BI", 2, streams.RAM_ID)
NESTED = (streams.zero(0, 300) + streams.page(300 * PAGE) * 2)[:PAGE]  # a saved stream in the guest's own memory


@st.composite
def first_pass(draw: st.DrawFn) -> bytes:
    """Every page once, some of them with contents, what looks like records among these; in several sections."""
    filled = sorted(draw(st.sets(st.integers(1, PAGE_COUNT - 1), max_size=60)))
    if draw(st.booleans()):
        begin = draw(st.integers(1, PAGE_COUNT - 100))
        filled = sorted({*filled, *range(begin, begin + 90)})
    cuts = draw(st.sets(st.integers(1, PAGE_COUNT - 1), max_size=4))
    contents = draw(st.sampled_from([None, NESTED, bytes(PAGE)]))
    out, after = [], 0
    for page in sorted({*filled, *cuts}):
        out.append(_zeros(after, page))
        after = page
        if page in cuts:
            out.append(BETWEEN)
        if page in filled:
            out.append(streams.page(page * PAGE, contents))
            after = page + 1
    return b"".join([*out, _zeros(after, PAGE_COUNT), ROM])


def _zeros(first: int, end: int) -> bytes:
    """Out of those that are there, as to make one takes long."""
    begin = 0 if first == 0 else 9 * first + NAMED_BYTES
    return ZEROS[begin : 9 * end + (NAMED_BYTES if end else 0)]


@st.composite
def more_passes(draw: st.DrawFn) -> bytes:
    """Some pages again, as a further pass sends them."""
    pages = draw(st.lists(st.integers(0, PAGE_COUNT - 1), min_size=1, max_size=30, unique=True).map(sorted))
    if draw(st.booleans()):  # as a guest that goes on writing where it is
        begin = draw(st.integers(0, PAGE_COUNT - 1))
        pages = list(range(begin, min(begin + 2000, PAGE_COUNT)))
    named = [streams.zero(pages[0] * PAGE, block="pc.ram")]
    return b"".join([*named, *(_zeros(page, page + 1) if page else streams.zero(0) for page in pages[1:])])


@contextmanager
def stored(path: Path, *passes: bytes) -> Iterator[tuple[int, Head, int]]:
    parts = [FRONT, streams.ram_part(*passes), streams.ram_end()]
    end = sum(map(len, parts))
    path.write_bytes(b"".join([*parts, streams.devices(), streams.eof(), streams.devices_described()]))
    with descriptor_of(path) as file:
        yield file, read_head(file), end


@settings(anew, max_examples=40)
@given(first_pass())
def test_a_file_of_one_pass_is_proven_to_have_one_and_each_page_is_found(tmp_path: Path, only: bytes) -> None:
    with stored(tmp_path / "stream.mig", only) as (file, head, end):
        assert read_tail(file, head).devices_at == end
        once = OnePass(file, head, shortest=SHORTEST)
        assert once.prove(end)
        expected = {name: memoryview(bytearray(8 * length // PAGE)).cast("Q") for name, length in BIG.items()}
        PlainPages(file, head).index(expected)
        finder = OnePass(file, head, starts=once.starts, shortest=SHORTEST)
        for name, length in BIG.items():
            count, found = length // PAGE, memoryview(bytearray(8 * length // PAGE)).cast("Q")
            for page in [*range(count - 1, 0, -331), 0]:
                some = min(3, count - page)
                assert finder.find(name, page, some, found)
                assert found[page : page + some] == expected[name][page : page + some]


@settings(anew, max_examples=60)
@given(first_pass(), more_passes())
@example(ZEROS + ROM, streams.zero((PAGE_COUNT - 1) * PAGE, block="pc.ram"))
@example(ZEROS + ROM, ROM)
def test_of_a_file_of_more_passes_that_is_never_proven(tmp_path: Path, first: bytes, again: bytes) -> None:
    with stored(tmp_path / "stream.mig", first, again) as (file, head, end):
        assert not OnePass(file, head, shortest=SHORTEST).prove(end)


def test_the_proof_reads_a_part_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = [streams.page(page * PAGE) for page in range(1, 300)]
    with stored(tmp_path / "stream.mig", _zeros(0, 1), *filled, _zeros(300, PAGE_COUNT), ROM) as (file, head, end):
        once = OnePass(file, head, shortest=SHORTEST)
        steps, found = [], once._found

        def noted(block: str, before: Any, target: int) -> Any:
            steps.append(target)
            return found(block, before, target)

        monkeypatch.setattr(once, "_found", noted)
        assert once.prove(end)
        assert len(steps) > 3


def test_pages_in_another_order_are_not_proven(tmp_path: Path) -> None:
    """A background snapshot's, which sends first what the guest is about to write."""
    early = streams.zero(1000 * PAGE, block="pc.ram")
    rest = [streams.zero(0, block="pc.ram"), _zeros(1, 1000), _zeros(1001, PAGE_COUNT), ROM]
    with stored(tmp_path / "stream.mig", early, *rest) as (file, head, end):
        assert not OnePass(file, head, shortest=SHORTEST).prove(end)


def test_a_page_that_is_missing_is_no_pass(tmp_path: Path) -> None:
    with stored(tmp_path / "stream.mig", _zeros(0, 10), _zeros(11, PAGE_COUNT), ROM) as (file, head, end):
        assert not OnePass(file, head, shortest=SHORTEST).prove(end)
        assert not OnePass(file, head, shortest=1 << 40).prove(end)


# -- by halves


def entries_of(blocks: dict[str, int]) -> dict[str, memoryview]:
    return {name: memoryview(bytearray(8 * length // PAGE)).cast("Q") for name, length in blocks.items()}


@settings(anew, max_examples=40)
@given(first_pass(), more_passes(), st.floats(0.05, 0.95))
def test_in_two_halves_the_same_is_found(tmp_path: Path, first: bytes, again: bytes, share: float) -> None:
    with stored(tmp_path / "stream.mig", first, again) as (file, head, end):
        expected, found, later = entries_of(BIG), entries_of(BIG), entries_of(BIG)
        whole_pages = PlainPages(file, head)
        assert whole_pages.index(expected) == end
        begin = OnePass(file, head).record_near(head.pages_at + int((end - head.pages_at) * share))
        if begin is None:  # among the pages that come again
            return
        front, back = PlainPages(file, head), PlainPages(file, head)
        assert (front.index(found, stop=begin[0]), front.block) == begin
        assert back.index(later, begin=begin) == end
        assert front.page_count + back.page_count == whole_pages.page_count
        for name, entries in found.items():
            overlay(entries, later[name])
            assert entries == expected[name]


def test_a_place_where_no_record_begins_is_not_met(tmp_path: Path) -> None:
    with stored(tmp_path / "stream.mig", ZEROS, ROM) as (file, head, _), pytest.raises(NotPlainError):
        PlainPages(file, head).index(entries_of(BIG), stop=head.pages_at + 1004)


def test_the_second_half_is_found_by_another_process(tmp_path: Path) -> None:
    with stored(tmp_path / "stream.mig", ZEROS, ROM, ZEROS, ROM) as (file, head, end):
        half = Half.begun(file, head, read_tail(file, head))
        assert half is not None
        with half:
            back, expected = PlainPages(file, head), entries_of(BIG)
            back.index(expected, begin=half.begin)
            assert half.found() == (end, back.page_count)
            assert half.entries == expected
