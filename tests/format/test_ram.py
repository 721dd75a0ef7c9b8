"""The records of the ram section, declared: each kind both ways, and what is refused."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import StreamError, TruncatedError
from qmigrate.format.ram import (
    BlockList,
    CompressedPage,
    NormalPage,
    RamBlock,
    RamFlag,
    RamRecord,
    RamWord,
    XbzrlePage,
    ZeroPage,
    read_pages,
)
from tests import streams
from tests.walking import run

PAGE_SIZES = [1024, 4096, 16384, 65536]
NAMES = st.binary(max_size=255).map(lambda raw: raw.decode("utf-8", "surrogateescape"))


@st.composite
def records(draw: st.DrawFn, page_size: int) -> RamRecord:
    kind = draw(st.sampled_from([RamFlag.ZERO, RamFlag.PAGE, RamFlag.XBZRLE, RamFlag.COMPRESS_PAGE, None]))
    if kind is None:
        marker = draw(st.sampled_from([RamFlag.EOS, RamFlag.HOOK, RamFlag.MULTIFD_FLUSH]))
        return RamRecord(word=RamWord(0, int(marker)), block=None, body=None)
    delta = draw(st.binary(max_size=40))
    bodies = {
        RamFlag.ZERO: ZeroPage(fill=draw(st.integers(0, 255))),
        RamFlag.PAGE: NormalPage(contents=bytes([draw(st.integers(0, 255))]) * page_size),
        RamFlag.XBZRLE: XbzrlePage(encoding=1, length=len(delta), data=delta),
        RamFlag.COMPRESS_PAGE: CompressedPage(length=len(delta), data=delta),
    }
    block = draw(st.none() | NAMES)
    start = page_size * draw(st.integers(0, (1 << 64) // page_size - 1))
    flags = int(kind) if block is not None else kind | RamFlag.CONTINUE
    return RamRecord(word=RamWord(start, flags), block=block, body=bodies[kind])


@given(st.sampled_from(PAGE_SIZES), st.data(), st.binary(max_size=9), st.integers(1, 5000))
def test_each_record_comes_back_from_its_bytes_however_they_come(
    page_size: int, data: st.DataObject, behind: bytes, step: int
) -> None:
    record = data.draw(records(page_size))
    raw = record.build(page_size=page_size)
    assert RamRecord.read(raw, page_size=page_size) == record
    assert run(lambda feed: feed.record(RamRecord, page_size=page_size), raw + behind, step) == (record, len(raw))
    cut = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(TruncatedError) as caught:
        RamRecord.read(raw[:cut], offset=0x10, page_size=page_size)
    assert caught.value.offset == 0x10 + cut


@pytest.mark.parametrize(
    ("raw", "data"),
    [
        (streams.zero(0x5000, block="pc.ram"), "0000000000005002 06 70632e72616d 00"),
        (streams.zero(0x5000, fill=7), "0000000000005022 07"),
        (streams.page(0x1000, b"\xaa" * 4096), "0000000000001028" + "aa" * 4096),
        (streams.xbzrle(0x1000, b"\1\2\3"), "0000000000001060 01 0003 010203"),
        (streams.compressed(0x1000, b"\1\2", block="a"), "0000000000001100 01 61 00000002 0102"),
        (streams.eos(), "0000000000000010"),
        (RamRecord(word=RamWord(0, 0x200), block=None, body=None).build(page_size=4096), "0000000000000200"),
    ],
)
def test_a_record_has_the_bytes_that_qemu_writes(raw: bytes, data: str) -> None:
    assert raw == bytes.fromhex(data)
    assert RamRecord.read(raw, page_size=4096).is_marker == (len(raw) == 8)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (0x400, "0x40: ram: word: page header has unknown flags 0x400"),
        (0x1C08, "0x40: ram: word: page header has unknown flags 0xc00"),
        (0x000, "0x40: ram: word: page header has the unknown combination of flags 0x0"),
        (0x001, "0x40: ram: word: page header has the unknown combination of flags 0x1"),
        (0x00A, "0x40: ram: word: page header has the unknown combination of flags 0xa"),
        (0x020, "0x40: ram: word: page header has the unknown combination of flags 0x20"),
        (0x004, "0x40: ram: word: page header has the unknown combination of flags 0x4"),
        (0x030, "0x40: ram: word: page header has the unknown combination of flags 0x30"),
        (0x1010, "0x40: ram: word: EOS comes with the offset 0x1000, expected 0"),
        (0x3200, "0x40: ram: word: MULTIFD_FLUSH comes with the offset 0x3000, expected 0"),
    ],
)
def test_flags_that_no_release_writes_are_refused(word: int, message: str) -> None:
    with pytest.raises(StreamError) as caught:
        RamRecord.read_prefix(word.to_bytes(8) + bytes(5000), offset=0x40, trail=("ram",), page_size=4096)
    assert str(caught.value) == message


def test_the_page_size_says_which_bits_are_flags() -> None:
    raw = (0x400 | RamFlag.ZERO | RamFlag.CONTINUE).to_bytes(8) + b"\0"
    assert RamRecord.read(raw, page_size=1024).word == RamWord(0x400, 0x22)
    with pytest.raises(StreamError, match="unknown flags 0x400"):
        RamRecord.read(raw, page_size=2048)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (bytes.fromhex("0000000000001060 02 0001 00"), "0x8: encoding: xbzrle encoding is 0x2, expected 0x1"),
        (
            bytes.fromhex("0000000000001060 01 1001") + bytes(4097),
            "0x9: length: xbzrle data is 4097 bytes long, expected at most 4096",
        ),
        (
            bytes.fromhex("0000000000001120 ffffffff"),
            "0x8: length: compressed data is 4294967295 bytes long, expected at most 4110",
        ),
    ],
)
def test_a_length_that_no_page_has_is_refused_before_memory_is_taken(raw: bytes, message: str) -> None:
    with pytest.raises(StreamError) as caught:
        RamRecord.read(raw, page_size=4096)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"word": RamWord(0x1001, 0x08)}, "the offset 0x1001 is not a multiple of the page's size"),
        ({"block": None}, "block is announced and missing"),
        ({"word": RamWord(0x1000, 0x28)}, "nothing announces block"),
        ({"body": ZeroPage(fill=0)}, "flags 0x8 want NormalPage, found ZeroPage"),
        ({"body": None}, "flags 0x8 want NormalPage, found NoneType"),
        ({"word": RamWord(0, 0x10), "block": None}, "flags 0x10 want NoneType, found NormalPage"),
    ],
)
def test_a_record_that_contradicts_itself_can_not_be_written(change: Mapping[str, Any], message: str) -> None:
    good = RamRecord(word=RamWord(0x1000, 0x08), block="a", body=NormalPage(contents=bytes(4096)))
    assert len(good.build(page_size=4096)) == 8 + 2 + 4096
    with pytest.raises(StreamError) as caught:
        dataclasses.replace(good, **change).build(page_size=4096)
    assert str(caught.value) == f"RamRecord can't be written: {message}"


def test_a_block_list_has_the_bytes_that_qemu_writes() -> None:
    blocks = (
        RamBlock(name="pc.ram", used_length=0x800000, page_size=0x200000, address=0),
        RamBlock(name="a", used_length=0x1000),
    )
    assert BlockList(total=0x801000, blocks=blocks).build() == bytes.fromhex(
        "0000000000801004 06 70632e72616d 0000000000800000 0000000000200000 0000000000000000 01 61 0000000000001000"
    )


@pytest.mark.parametrize(
    ("block_list", "message"),
    [
        (BlockList(total=0x1004, blocks=()), "BlockList can't be written: the total 0x1004 is not a multiple of 0x100"),
        (BlockList(total=1 << 64, blocks=()), "BlockListHeader can't be written: "),
        (BlockList(total=0, blocks=(RamBlock(name="a", used_length=-1),)), "RamBlockHead can't be written: "),
        (
            BlockList(total=0, blocks=(RamBlock(name="a", used_length=0, address=1 << 64),)),
            "RamBlockWord can't be written: ",
        ),
    ],
)
def test_a_block_list_without_room_is_refused_when_written(block_list: BlockList, message: str) -> None:
    with pytest.raises(StreamError) as caught:
        block_list.build()
    assert str(caught.value).startswith(message)


def test_pages_are_read_with_the_block_they_continue() -> None:
    data = streams.zero(0, 2, block="a") + streams.page(0x2000, block="b") + streams.page(0x3000) + streams.eos()
    found = [(at, block, record.word) for at, block, record in read_pages(data, page_size=4096, offset=0x10)]
    assert found == [
        (0x10, "a", (0, 0x02)),
        (0x1B, "a", (0x1000, 0x22)),
        (0x24, "b", (0x2000, 0x08)),
        (0x102E, "b", (0x3000, 0x28)),
    ]
    with pytest.raises(StreamError, match="0x10: the first page continues a block, and none was named"):
        list(read_pages(streams.zero(0), page_size=4096, offset=0x10))
