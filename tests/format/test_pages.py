"""The fast reader sees what the declaration says."""

import struct
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmigrate.format import pages
from qmigrate.format.ram import NormalPage, PageRun, RamFlag, RamRecord, ZeroPage, read_pages
from qmigrate.format.stretch import Stretch
from tests import streams

PAGE_SIZES = [256, 1024, 2048, 4096, 8192, 16384, 65536]


class Seen(NamedTuple):
    offset: int
    flag: int
    start: int


def expand(runs: list[PageRun], page_size: int) -> list[Seen]:
    """Each page of the runs."""
    return [
        Seen(
            run.offset + index * (8 + (page_size if run.flag == RamFlag.PAGE else 1)),
            run.flag,
            run.start + index * page_size,
        )
        for run in runs
        for index in range(run.page_count)
    ]


def declared(data: bytes, page_size: int, offset: int) -> list[Seen]:
    """Each page by the declaration alone."""
    found = read_pages(data, page_size=page_size, offset=offset, block="ram")
    return [Seen(at, record.word.kind, record.word.start) for at, _, record in found]


def scan_all(
    data: bytes | bytearray, begin: int, end: int, *, offset: int, page_size: int
) -> tuple[list[PageRun], int]:
    """What the fast reader finds, until it finds nothing more."""
    found: list[PageRun] = []
    at = begin
    while True:
        runs, after = pages.scan(data, at, end, offset=offset + at - begin, page_size=page_size)
        assert bool(runs) == (after > at)
        if not runs:
            return found, at
        last = runs[-1]
        assert (
            last.offset + last.page_count * (8 + page_size if last.flag == RamFlag.PAGE else 9)
            == offset + after - begin
        )
        found += runs
        at = after


def scanned(data: bytes, page_size: int, offset: int, *, plainly: bool = False) -> list[Seen]:
    """Each page by the fast reader, one record by the declaration wherever that stops."""
    seen: list[Seen] = []
    at = 0
    while at < len(data):
        if plainly:
            runs: list[PageRun] = []
            at = pages.scan_plainly(runs, data, at, len(data), page_size=page_size, shift=offset)
        else:
            runs, at = scan_all(data, at, len(data), offset=offset + at, page_size=page_size)
        seen += expand(runs, page_size)
        if at < len(data):
            record, length = RamRecord.read_prefix(data[at:], page_size=page_size)
            # What the fast reader leaves must be something else than what it is for.
            plain = record.block is None and isinstance(record.body, NormalPage | ZeroPage)
            assert not plain or record.body not in (ZeroPage(fill=0),)
            assert not (plain and isinstance(record.body, NormalPage))
            if not record.is_marker:
                seen.append(Seen(offset + at, record.word.kind, record.word.start))
            at += length
    return seen


@st.composite
def sections(draw: st.DrawFn, page_size: int) -> bytes:
    """Records of any kind: runs, jumps, names, fills, markers, contents that look like records."""
    contents = st.sampled_from(
        [bytes(page_size), struct.pack(">Q", 0x28) * (page_size // 8), b"\x22" * page_size, b"\0\x22\0" * page_size]
    ).map(lambda filler: filler[:page_size])
    parts: list[bytes] = []
    start = 0
    for _ in range(draw(st.integers(0, 12))):
        if draw(st.booleans()):
            near_a_carry = st.sampled_from([(1 << 24) - 3 * page_size, (1 << 32) - page_size])
            start = draw(near_a_carry | st.integers(0, (1 << 60) // page_size).map(lambda page: page * page_size))
        count = draw(st.sampled_from([1, 1, 2, 3, 7]))
        name = draw(st.sampled_from([None, None, None, "pc.ram", ""]))
        kind = draw(st.sampled_from(["normal", "zero", "zero", "fill", "marker"]))
        if kind == "marker":
            parts.append(draw(st.sampled_from([0x10, 0x80, 0x200] if page_size > 512 else [0x10, 0x80])).to_bytes(8))
            continue
        for _ in range(count):
            if kind == "normal":
                parts.append(streams.page(start, draw(contents), block=name, page_size=page_size))
            else:
                fill = 0 if kind == "zero" else draw(st.integers(1, 255))
                parts.append(streams.zero(start, block=name, fill=fill, page_size=page_size))
            start += page_size
            name = None
    return b"".join(parts)


def test_a_run_over_16_mib_with_short_ones_behind_it_ends_where_it_is_said_to() -> None:
    boundary = 1 << 24
    long = b"".join(streams.page(start) for start in range(boundary - 20 * 4096, boundary + 4096, 4096))
    short = b"".join(streams.zero(start) + streams.page(start + 4096) for start in range(1 << 25, 1 << 26, 1 << 20))
    data = long + short
    runs, after = scan_all(data, 0, len(data), offset=0, page_size=4096)
    assert after == len(data)
    assert expand(runs, 4096) == declared(data, 4096, 0)


@settings(max_examples=200)
@given(st.sampled_from(PAGE_SIZES), st.data(), st.integers(0, 1 << 40))
def test_both_readers_see_the_same_pages(page_size: int, data: st.DataObject, offset: int) -> None:
    section = data.draw(sections(page_size))
    expected = declared(section, page_size, offset)
    assert scanned(section, page_size, offset) == expected
    assert scanned(section, page_size, offset, plainly=True) == expected


@settings(max_examples=200)
@given(st.sampled_from(PAGE_SIZES), st.data())
def test_a_window_that_ends_anywhere_hides_only_what_it_cuts(page_size: int, data: st.DataObject) -> None:
    section = data.draw(sections(page_size))
    begin = data.draw(st.integers(0, 64))
    end = data.draw(st.integers(0, len(section)))
    window = bytearray(b"\x28" * begin) + section + b"\0\0\0\0\0\0\x10\x22\0" * 8
    runs, position = scan_all(window, begin, begin + end, offset=0x1000, page_size=page_size)
    plain: list[PageRun] = []
    assert position == pages.scan_plainly(plain, window, begin, begin + end, page_size=page_size, shift=0x1000 - begin)
    assert expand(runs, page_size) == expand(plain, page_size)
    seen = expand(runs, page_size)
    assert seen == [page for page in declared(section, page_size, 0x1000) if page.offset < 0x1000 + position - begin]
    assert position - begin <= end
    assert position - begin == sum(8 + (page_size if page.flag == RamFlag.PAGE else 1) for page in seen)


RUNS = [1, 2, 3, 5, 6, 7, 255, 256, 257, 600]


@pytest.mark.parametrize("zeros", RUNS)
@pytest.mark.parametrize("normals", RUNS)
def test_runs_of_every_length_come_whole(normals: int, zeros: int) -> None:
    size = 1024
    period = streams.page(0, bytes(size), page_size=size) * normals + streams.zero(0, page_size=size) * zeros
    rounds = max(1, 900 // (normals + zeros))
    data = bytearray(period * rounds)
    at, expected = 0, []
    for index in range(rounds * (normals + zeros)):
        is_normal = index % (normals + zeros) < normals
        flag = RamFlag.PAGE if is_normal else RamFlag.ZERO
        struct.pack_into(">Q", data, at, index * size | flag | RamFlag.CONTINUE)
        if index % (normals + zeros) in (0, normals):
            expected.append(PageRun(at + 77, flag, index * size, normals if is_normal else zeros))
        at += 8 + size if is_normal else 9
    assert scan_all(data, 0, len(data), offset=77, page_size=size) == (expected, len(data))


def test_long_alternating_stretches_are_runs_of_one() -> None:
    pair = streams.page(0, bytes(1024), page_size=1024) + streams.zero(1024, page_size=1024)
    data = pair * 5000
    runs, position = pages.scan(data, 0, len(data), offset=0, page_size=1024)
    assert position == len(data)
    assert isinstance(runs, Stretch)
    assert [run.page_count for run in runs] == [1] * 10_000
    assert runs == expand_to_runs(data)


def expand_to_runs(data: bytes) -> list[PageRun]:
    runs: list[PageRun] = []
    assert pages.scan_plainly(runs, data, 0, len(data), page_size=1024, shift=0) == len(data)
    return runs


def test_pages_that_go_backwards_or_repeat_are_runs_of_one() -> None:
    starts = [5, 4, 3, 3, 3, 9, 10, 11, 2]
    data = b"".join(streams.zero(start * 4096) for start in starts)
    runs, _ = pages.scan(data, 0, len(data), offset=0, page_size=4096)
    assert [(run.start // 4096, run.page_count) for run in runs] == [
        *((5, 1), (4, 1), (3, 1), (3, 1), (3, 1), (9, 3), (2, 1))
    ]


@pytest.mark.parametrize(
    "odd",
    [
        streams.eos(),
        streams.zero(0, fill=1),
        streams.zero(0, block="a"),
        streams.page(0, block="a"),
        streams.xbzrle(0, b"abc"),
        streams.compressed(0, b"abc"),
        (0x428).to_bytes(8) + bytes(4096),
    ],
)
def test_it_stops_at_what_is_no_plain_page(odd: bytes) -> None:
    data = streams.zero(0, 3) + odd + streams.zero(0x3000)
    assert pages.scan(data, 0, len(data), offset=0, page_size=4096) == ([PageRun(0, RamFlag.ZERO, 0, 3)], 27)
