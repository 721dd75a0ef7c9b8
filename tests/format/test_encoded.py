"""Encoded pages on main: what each record makes of the page that was there."""

import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import StreamError, UnsupportedError
from qmigrate.format import xbzrle
from qmigrate.format.encoded import apply_page, compress_page, decompress_page, page_after
from qmigrate.format.entry import RamPage
from qmigrate.format.ram import RamRecord
from tests import streams

PAGE = 4096
NOISE = random.Random(5).randbytes(PAGE)


def ram_page(raw: bytes) -> RamPage:
    return RamPage("pc.ram", PAGE, RamRecord.read(raw, page_size=PAGE))


@given(st.binary(min_size=1, max_size=64), st.integers(0, 9))
def test_a_page_comes_back_from_its_compression(pattern: bytes, level: int) -> None:
    contents = (pattern * PAGE)[:PAGE]
    data = compress_page(contents, level=level)
    assert decompress_page(data, PAGE) == contents
    assert page_after(ram_page(streams.compressed(0, data)), b"") == contents


@given(st.binary(max_size=200), st.data())
def test_hostile_data_makes_a_page_or_is_refused(data: bytes, choice: st.DataObject) -> None:
    damaged = bytearray(compress_page(NOISE))
    damaged[choice.draw(st.integers(0, len(damaged) - 1))] ^= choice.draw(st.integers(1, 255))
    for each in (data, b"\x78\x01" + data, bytes(damaged)):
        with pytest.raises(StreamError) as caught:
            decompress_page(each, PAGE, offset=9)
        assert caught.value.offset == 9


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "0x1d: ram: pc.ram: compressed: the zlib stream does not end with its data"),
        (zlib.compress(NOISE)[:-1], "0x1d: ram: pc.ram: compressed: the zlib stream does not end with its data"),
        (zlib.compress(bytes(PAGE - 1)), "0x1d: ram: pc.ram: compressed: 4095 bytes come out, a page has 4096"),
        (zlib.compress(bytes(PAGE + 1)), "0x1d: ram: pc.ram: compressed: more than a page of 4096 bytes comes out"),
        (
            zlib.compress(bytes(PAGE)) + b"xy",
            f"{0x1D + len(zlib.compress(bytes(PAGE))):#x}: ram: pc.ram: compressed: 2 bytes behind the zlib stream",
        ),
        (
            b"\x78\x00",
            "0x1d: ram: pc.ram: compressed: Error -3 while decompressing data: incorrect header check",
        ),
    ],
)
def test_what_makes_no_page_is_refused_with_its_place(data: bytes, text: str) -> None:
    with pytest.raises(StreamError) as caught:
        page_after(ram_page(streams.compressed(0, data, block="pc.ram")), b"", offset=10)
    assert str(caught.value) == text


def test_a_bomb_takes_no_more_memory_than_a_page() -> None:
    import tracemalloc

    bomb = zlib.compress(bytes(1 << 28), 9)
    tracemalloc.start()
    with pytest.raises(StreamError, match="more than a page of 4096 bytes comes out"):
        decompress_page(bomb, PAGE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(bomb) + (1 << 16)


def test_a_difference_is_applied_to_what_was_there() -> None:
    block = bytearray(NOISE * 3)
    new = NOISE[:7] + b"changed" + NOISE[14:]
    data = xbzrle.encode(NOISE, new)
    assert data is not None
    apply_page(ram_page(streams.xbzrle(PAGE, data)), block)
    assert block == NOISE + new + NOISE
    apply_page(ram_page(streams.compressed(0, compress_page(new))), block)
    apply_page(ram_page(streams.zero(2 * PAGE, block="pc.ram", fill=3)), block)
    assert block == new + new + b"\3" * PAGE
    apply_page(ram_page(streams.page(2 * PAGE, NOISE)), block)
    assert block[2 * PAGE :] == NOISE


def test_a_fault_in_a_difference_is_told_with_its_place_in_the_stream() -> None:
    page = ram_page(streams.xbzrle(PAGE, b"\1\0\0", block="pc.ram"))
    with pytest.raises(StreamError) as caught:
        page_after(page, bytes(PAGE), offset=0x1000)
    # Behind the word, the name, and three bytes of head; the second byte of the data.
    assert str(caught.value) == "0x1013: ram: pc.ram: xbzrle: a run of no new bytes"


def test_a_page_outside_its_block_is_not_applied() -> None:
    block = bytearray(PAGE)
    with pytest.raises(StreamError) as caught:
        apply_page(ram_page(streams.zero(PAGE)), block, offset=4)
    assert str(caught.value) == "0x4: ram: pc.ram: page at 0x1000, the block ends at 0x1000"
    assert block == bytes(PAGE)


def test_a_marker_is_no_page() -> None:
    with pytest.raises(UnsupportedError, match=r"0x4: ram: pc\.ram: flags 0x10 are no page"):
        page_after(ram_page(streams.eos()), bytes(PAGE), offset=4)
