"""Bytes at hand: however they come, the parser sees the same, and the window follows what is there."""

from collections.abc import Generator

import pytest
from construct import Bytes, Int16ub, Int32ub
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import TruncatedError, UnsupportedError
from qmigrate.format._record import Record, wire
from qmigrate.format.feed import Feed
from tests.walking import run


class Sized(Record):
    length: int = wire(Int32ub)
    data: bytes = wire(Bytes(lambda this: this.length))


class Pair(Record):
    one: int = wire(Int16ub)
    two: int = wire(Int16ub)


def take(*counts: int) -> "list[bytes]":
    data = bytes(range(256)) * 2

    def parse(feed: Feed) -> Generator[None, None, list[bytes]]:
        taken = []
        for count in counts:
            yield from feed.need(min(count, 3))
            assert feed.view(3).tobytes() == data[feed.offset : feed.offset + 3][:count] or count > 3
            taken.append((yield from feed.take(count)))
        return taken

    return run(parse, data, 7)


@given(st.lists(st.integers(3, 60), max_size=8))
def test_what_is_taken_is_the_stream_in_order(counts: list[int]) -> None:
    data = bytes(range(256)) * 2
    assert b"".join(take(*counts)) == data[: sum(counts)]


@given(st.binary(min_size=1, max_size=300), st.integers(1, 90), st.integers(1, 64))
def test_offset_and_view_follow_whatever_is_skipped(data: bytes, step: int, window: int) -> None:
    feed = Feed(offset=0x1000, window=window)
    for at in range(0, len(data), step):
        piece = data[at : at + step]
        feed.receive(piece)
        buffer, begin, end = feed.buffer
        assert buffer[begin:end] == feed.view() == data[feed.offset - 0x1000 : at + len(piece)]
        feed.skip(len(feed) // 2)
        assert feed.offset + len(feed) == 0x1000 + at + len(piece)


def test_what_was_just_consumed_can_be_looked_at() -> None:
    feed = Feed(window=8)
    feed.receive(b"abcdef")
    feed.skip(4)
    assert feed.behind(3).tobytes() == b"bcd"


def test_space_is_never_empty_and_the_window_grows_only_with_what_is_at_hand() -> None:
    feed = Feed(window=8)
    feed.receive(bytes(8))
    assert len(feed.space()) == 8
    for _ in range(100):
        feed.receive(bytes(8))
        feed.skip(8)
    assert len(feed.buffer[0]) == 16


def test_a_record_is_at_hand_and_not_consumed() -> None:
    feed = Feed()
    feed.receive(bytes.fromhex("00010002 ffff"))
    with pytest.raises(StopIteration) as stop:
        next(feed.record(Pair))
    assert stop.value.value == (Pair(one=1, two=2), 4)
    assert (feed.offset, len(feed)) == (0, 6)


@pytest.mark.parametrize("length", [0, 1, 1000, 1020, 1024, 5000])
@pytest.mark.parametrize("step", [None, 1, 99])
def test_a_record_of_any_length_is_read_from_pieces(length: int, step: int | None) -> None:
    record = Sized(length=length, data=b"x" * length)
    data = record.build()
    assert run(lambda feed: feed.record(Sized), data + b"behind", step) == (record, len(data))
    if length < 0x10000:
        assert run(lambda feed: feed.ahead(Sized, 3), b"ahe" + data + b"behind", step) == (record, len(data) + 3)


@pytest.mark.parametrize("step", [None, 1, 3])
def test_a_record_that_is_cut_is_said_where_the_stream_ends(step: int | None) -> None:
    for length in range(4):
        with pytest.raises(TruncatedError) as caught:
            run(lambda feed: feed.record(Pair, ("here",)), bytes(length), step)
        assert (
            str(caught.value)
            == f"0x{length:x}: here: the stream ends here, {4 - length} byte{'s' * (length < 3)} too soon"
        )
    with pytest.raises(TruncatedError, match=r"^0x5: here: data: the stream ends here$"):
        run(lambda feed: feed.record(Sized, ("here",)), bytes.fromhex("00000002 61"), step)


def test_a_length_that_lies_does_not_make_the_window_grow() -> None:
    feed = Feed()
    feed.receive(b"\xff\xff\xff\xff" + bytes(1 << 19))
    with pytest.raises(UnsupportedError, match=r"^0x0: data: this is longer than 262144 bytes$"):
        next(feed.record(Sized))
    with pytest.raises(UnsupportedError, match=r"^0x0: data: this is longer than 65536 bytes$"):
        next(feed.ahead(Sized, 0))
    assert len(feed.buffer[0]) == 1 << 20


def test_taking_more_than_there_is_says_how_much_is_missing() -> None:
    with pytest.raises(TruncatedError) as caught:
        run(lambda feed: feed.take(0xFFFFFFFF, ("PACKAGED",)), bytes(10))
    assert str(caught.value) == "0xa: PACKAGED: the stream ends here, 4294967285 of 4294967295 bytes too soon"


def test_peeking_at_the_end_is_an_error() -> None:
    assert run(lambda feed: feed.peek(), b"\x07") == 7
    with pytest.raises(TruncatedError, match=r"^0x0: a section: the stream ends here, 1 byte too soon$"):
        run(lambda feed: feed.peek(("a section",)), b"")
