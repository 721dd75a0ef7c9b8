"""Where the tail is over: descriptions and ends are found, decoys of them cost little."""

import struct
import time

import pytest

from qmigrate.format.closing import ClosingFinder, find_description, find_ends
from tests import streams
from tests.streams import described, device, field

BASE = 0x1000
BYTE = field("x", "uint8", 1)


def test_a_description_is_found_where_it_ends_the_data_first() -> None:
    one, two = streams.description(described("a")), streams.description(described("b"), described("c"))
    data = b"junk\0\6\0\0\0\x09{" + b"\0" + one + b"more\0" + two
    found = [(at, len(parsed.devices)) for at, parsed in find_description(data, BASE)]
    assert found == [(len(data) - len(two) - 1, 2), (11, 1)]


def test_decoys_of_descriptions_cost_little() -> None:
    count = 50_000
    decoys = b"".join(b"\0\6" + struct.pack(">I", 7 * (count - index) - 5) + b"{" for index in range(count)) + b"}"
    start = time.process_time()
    assert list(find_description(decoys, BASE)) == []
    assert time.process_time() - start < 5


def closed_after(data: bytes, step: int) -> int | None:
    """How many bytes had come when the tail was known to be over."""
    finder = ClosingFinder(base=BASE, footers=True)
    kept = bytearray()
    for at in range(0, len(data), step):
        kept += data[at : at + step]
        closed = finder.closes(kept)
        if closed is not None:
            tail, _, end = closed
            assert tail.error is None
            assert end <= len(kept)
            return end
    return None


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_the_end_is_known_once_the_description_that_decodes_all_is_here(step: int) -> None:
    state = device("a", b"\0\6\0\0\0\2{}", section_id=3)
    known = streams.description(described("a", field("data", "buffer", 8)))
    data = state + streams.eof() + known
    assert closed_after(data + b"more" * 500, step) == len(data)
    assert closed_after(data[:-1], step) is None


def test_the_end_is_not_sure_where_a_section_stays_undecoded() -> None:
    data = device("a", b"\1", section_id=3) + device("b", b"\1", section_id=4) + streams.eof()
    assert closed_after(data + streams.description(described("a", BYTE)), 100) is None
    assert closed_after(data + b"\6\0\0\0\4{no}", 100) is None


def test_decoys_of_an_end_cost_little() -> None:
    count = 50_000
    decoys = b"".join(b"\0\6" + struct.pack(">I", 7 * (count - index) - 5) + b"{" for index in range(count)) + b"}"
    start = time.process_time()
    assert closed_after(decoys, 4096) is None
    assert closed_after(b"\0\6\0\0\0\2{}" * count, 4096) is None
    assert time.process_time() - start < 5
    assert list(find_ends(b"\x7e\0\0\0\1\0\6\0\0\0\0" * count, footers=True)) == [5, 16, 27, 38]
    assert list(find_ends(bytes(100) + b"\0\6\0\0\0\0" * count, footers=True)) == []
