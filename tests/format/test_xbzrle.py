"""XBZRLE: both directions, the fast version held to the plain one, and what is refused."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import StreamError
from qmigrate.format.xbzrle import decode, decode_plainly, encode, encode_plainly

PAGE = 4096


@st.composite
def pages(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A page and what becomes of it: runs of any length stay or change, at the very front and end too."""
    size = draw(st.sampled_from([1, 2, 16, 300, PAGE, 16384]))
    old = bytearray(draw(st.randoms(use_true_random=False)).randbytes(size))
    new = bytearray(old)
    for _ in range(draw(st.integers(0, 30))):
        at = draw(st.integers(0, size - 1))
        length = draw(st.sampled_from([1, 1, 2, 127, 128, 129, 1000, size]))
        new[at : at + length] = bytes(byte ^ draw(st.integers(1, 255)) for byte in old[at : at + length][:3]) + bytes(
            255 - byte for byte in old[at : at + length][3:]
        )
    return bytes(old), bytes(new)


@given(pages())
def test_what_is_encoded_is_decoded_to_the_same_page(old_and_new: tuple[bytes, bytes]) -> None:
    old, new = old_and_new
    data = encode(old, new)
    assert data == encode_plainly(old, new)
    if data is not None:
        assert len(data) <= len(new)
        assert decode(old, data) == decode_plainly(old, data) == new
        assert decode(memoryview(old), memoryview(data)) == new


@given(st.binary(max_size=300), st.sampled_from([1, 64, PAGE]))
def test_any_bytes_make_a_page_or_are_refused_alike_by_both(data: bytes, size: int) -> None:
    fast, plain = (outcome(function, bytes(size), data) for function in (decode, decode_plainly))
    assert str(fast) == str(plain)
    if isinstance(fast, bytes):
        assert len(fast) == size
    else:
        assert fast.offset in range(0x100, 0x101 + len(data))


def outcome(function: Callable[..., bytes], old: bytes, data: bytes) -> bytes | StreamError:
    try:
        return function(old, data, offset=0x100, trail=("ram", "pc.ram"))
    except StreamError as exc:
        return exc


@given(pages(), st.data())
def test_damaged_data_makes_a_page_or_is_refused_alike_by_both(
    old_and_new: tuple[bytes, bytes], choice: st.DataObject
) -> None:
    old, new = old_and_new
    data = bytearray(encode(old, new) or b"\0\1\0")
    data[choice.draw(st.integers(0, len(data) - 1))] = choice.draw(st.integers(0, 255))
    assert str(outcome(decode, old, bytes(data))) == str(outcome(decode_plainly, old, bytes(data)))


def changed(*changes: tuple[int, bytes], size: int = PAGE) -> bytes:
    page = bytearray(size)
    for at, data in changes:
        page[at : at + len(data)] = data
    return bytes(page)


@pytest.mark.parametrize(
    ("new", "data"),
    [
        (changed(), ""),
        (changed((0, b"\x01")), "00 01 01"),
        (changed((5, b"\x01\x02")), "05 02 0102"),
        (changed((127, b"\x01")), "7f 01 01"),
        (changed((128, b"\x01")), "8001 01 01"),
        (changed((4095, b"\xff")), "ff1f 01 ff"),
        (changed((0, b"\x01"), (2, b"\x02")), "00 01 01 01 01 02"),
        (changed((0, b"\x07" * 128)), "00 8001" + "07" * 128),
    ],
)
def test_a_difference_has_the_bytes_that_qemu_writes(new: bytes, data: str) -> None:
    raw = bytes.fromhex(data)
    assert encode(bytes(PAGE), new) == encode_plainly(bytes(PAGE), new) == raw
    assert decode(bytes(PAGE), raw) == decode_plainly(bytes(PAGE), raw) == new


def test_a_difference_longer_than_its_page_is_none() -> None:
    alternating = b"\0\1" * (PAGE // 2)
    assert encode(bytes(PAGE), alternating) is None
    assert encode(bytes(PAGE), b"\1" * PAGE) is None
    # Two bytes must be free for a count of one: 4094 new bytes, behind three of counts, have no room; 4093 do.
    assert encode(bytes(PAGE), b"\1" * 4094 + b"\0\0") is None
    assert len(encode(bytes(PAGE), b"\1" * 4093 + bytes(3)) or b"") == PAGE


def test_a_run_longer_than_its_count_can_say_is_none() -> None:
    size = 1 << 15
    for new in (bytes(0x4000) + b"\1" + bytes(size - 0x4001), b"\1" * 0x4000 + bytes(size - 0x4000)):
        assert encode(bytes(size), new) is encode_plainly(bytes(size), new) is None
    new = bytes(0x3FFF) + b"\1" * 0x3FFF + bytes(2)
    data = encode(bytes(size), new)
    assert data is not None
    assert decode(bytes(size), data) == new


def test_pages_of_two_lengths_have_no_difference() -> None:
    for function in (encode, encode_plainly):
        with pytest.raises(ValueError, match="pages of 4096 and 4095 bytes"):
            function(bytes(PAGE), bytes(PAGE - 1))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("05", "0x100: ram: pc.ram: xbzrle: the data ends inside the number of bytes that stay"),
        ("85", "0x100: ram: pc.ram: xbzrle: the data ends inside the number of bytes that stay"),
        ("8001", "0x102: ram: pc.ram: xbzrle: the data ends inside the number of new bytes"),
        ("0501", "0x101: ram: pc.ram: xbzrle: the data ends inside the number of new bytes"),
        ("05 81", "0x101: ram: pc.ram: xbzrle: the data ends inside the number of new bytes"),
        ("8080 01 00", "0x100: ram: pc.ram: xbzrle: the number of bytes that stay has more than two bytes"),
        ("01 8080 00", "0x101: ram: pc.ram: xbzrle: the number of new bytes has more than two bytes"),
        ("01 00 00", "0x101: ram: pc.ram: xbzrle: a run of no new bytes"),
        ("00 00 01 01", "0x101: ram: pc.ram: xbzrle: a run of no new bytes"),
        ("01 01 ff 00 01 ff", "0x103: ram: pc.ram: xbzrle: no byte stays between two runs of new ones"),
        ("8020 01 ff", "0x102: ram: pc.ram: xbzrle: 1 new bytes, 0 are left of the page"),
        ("8120 01 ff", "0x100: ram: pc.ram: xbzrle: 4097 bytes stay, 4096 are left of the page"),
        ("ff1f 02 ffff", "0x102: ram: pc.ram: xbzrle: 2 new bytes, 1 are left of the page"),
        ("01 03 ffff", "0x101: ram: pc.ram: xbzrle: 3 new bytes, 2 are left of the data"),
        ("01 01 ff 01 02 ff", "0x104: ram: pc.ram: xbzrle: 2 new bytes, 1 are left of the data"),
    ],
)
def test_what_qemu_refuses_is_refused_with_its_place(data: str, text: str) -> None:
    for function in (decode, decode_plainly):
        with pytest.raises(StreamError) as caught:
            function(bytes(PAGE), bytes.fromhex(data), offset=0x100, trail=("ram", "pc.ram"))
        assert str(caught.value) == text
