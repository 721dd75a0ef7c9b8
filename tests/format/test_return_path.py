"""The messages of the way back: each alone, and the grammar that reads them in turn."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import StreamError, TruncatedError
from qmigrate.format.feed import Feed
from qmigrate.format.return_path import (
    MESSAGES,
    Message,
    MessageType,
    Pong,
    ReceivedBitmap,
    RequestPages,
    RequestPagesId,
    ResumeAck,
    ReturnPathEntry,
    Shut,
    SwitchoverAck,
    encode_message,
    read_return_path,
)

U32 = st.integers(0, 0xFFFFFFFF)
U64 = st.integers(0, 0xFFFFFFFFFFFFFFFF)
NAMES = st.binary(max_size=255).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
PONG_1 = bytes.fromhex("0002 0004 00000001")
SHUT_0 = bytes.fromhex("0001 0004 00000000")


def collect(data: bytes, step: int | None = None, *, offset: int = 0) -> list[ReturnPathEntry]:
    """All entries of ``data``, which comes ``step`` bytes at a time."""
    feed = Feed(offset=offset)
    step = step or max(len(data), 1)
    pieces = iter([data[at : at + step] for at in range(0, len(data), step)])
    entries = []
    for entry in read_return_path(feed):
        if entry is not None:
            entries.append(entry)
            continue
        piece = next(pieces, None)
        if piece is None:
            feed.end()
        else:
            feed.receive(piece)
    return entries


def bitmaps() -> st.SearchStrategy[ReceivedBitmap]:
    return st.builds(
        lambda block, words: ReceivedBitmap(block=block, bitmap_size=8 * len(words), bitmap=b"".join(words)),
        NAMES,
        st.lists(st.binary(min_size=8, max_size=8), max_size=20),
    )


def messages() -> st.SearchStrategy[Message]:
    """Any message but SHUT, which is the last."""
    return st.one_of(
        st.builds(Pong, token=U32),
        st.builds(RequestPagesId, start=U64, length=U32, block=NAMES),
        st.builds(RequestPages, start=U64, length=U32),
        bitmaps(),
        st.just(ResumeAck()),
        st.just(SwitchoverAck()),
    )


@given(messages() | st.builds(Shut, value=U32))
def test_each_message_comes_back_from_its_bytes(message: Message) -> None:
    data = encode_message(message)
    assert collect(data) == [ReturnPathEntry(0, len(data), message, data)]


@given(st.lists(messages(), max_size=6), st.booleans(), st.integers(1, 40))
def test_any_split_of_the_bytes_gives_the_same_messages(sent: list[Message], shut: bool, step: int) -> None:
    sent = [*sent, *([Shut(value=0)] if shut else [])]
    data = b"".join(map(encode_message, sent))
    entries = collect(data, offset=0x100)
    assert [entry.message for entry in entries] == sent
    assert b"".join(encode_message(entry.message) for entry in entries) == data
    assert collect(data, 1, offset=0x100) == entries
    assert collect(data, step, offset=0x100) == entries


@pytest.mark.parametrize(
    ("message", "data"),
    [
        (Shut(value=0), SHUT_0),
        (Pong(token=0x42), bytes.fromhex("0002 0004 00000042")),
        (
            RequestPagesId(start=0x35E000, length=0x1000, block="pc.ram"),
            bytes.fromhex("0003 0013 000000000035e000 00001000 06") + b"pc.ram",
        ),
        (
            RequestPages(start=0x200000, length=0x200000),
            bytes.fromhex("0004 000c 0000000000200000 00200000"),
        ),
        (
            ReceivedBitmap(block="pc.ram", bitmap_size=8, bitmap=b"\x07" + bytes(7)),
            bytes.fromhex("0005 0007 06")
            + b"pc.ram"
            + bytes.fromhex("0000000000000008 0700000000000000 0123456789abcdef"),
        ),
        (ResumeAck(), bytes.fromhex("0006 0004 00000001")),
        (SwitchoverAck(), bytes.fromhex("0007 0000")),
    ],
    ids=lambda value: value.name if isinstance(value, Message) else "",
)
def test_a_message_has_the_bytes_that_qemu_sends(message: Message, data: bytes) -> None:
    assert encode_message(message) == data
    assert collect(data) == [ReturnPathEntry(0, len(data), message, data)]


def test_every_type_has_its_message() -> None:
    assert set(MESSAGES) == set(MessageType)


def test_a_feed_that_ends_between_messages_ends_the_reading() -> None:
    assert collect(b"") == []
    assert collect(PONG_1) == [ReturnPathEntry(0, 8, Pong(token=1), PONG_1)]


def test_a_name_that_is_no_text_is_kept() -> None:
    data = bytes.fromhex("0003 000f 0000000000000000 00001000 02 ff80")
    (entry,) = collect(data)
    assert encode_message(entry.message) == data


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            "0000 0000",
            "0x8: return path: kind: found 0x0, expected one of SHUT 0x1, PONG 0x2, REQ_PAGES_ID 0x3, "
            "REQ_PAGES 0x4, RECV_BITMAP 0x5, RESUME_ACK 0x6, SWITCHOVER_ACK 0x7",
        ),
        (
            "0008 0000",
            "0x8: return path: kind: found 0x8, expected one of SHUT 0x1, PONG 0x2, REQ_PAGES_ID 0x3, "
            "REQ_PAGES 0x4, RECV_BITMAP 0x5, RESUME_ACK 0x6, SWITCHOVER_ACK 0x7",
        ),
        ("0002 0005", "0xa: return path: PONG: length is 5, expected 4"),
        ("0001 0201", "0xa: return path: SHUT: length is 513, expected 4"),
        ("0007 0001", "0xa: return path: SWITCHOVER_ACK: length is 1, expected 0"),
        ("0003 0201", "0xa: return path: REQ_PAGES_ID: length is 513, expected 13 to 512"),
        ("0003 000c", "0xa: return path: REQ_PAGES_ID: length is 12, expected 13 to 512"),
        ("0005 0000", "0xa: return path: RECV_BITMAP: length is 0, expected 1 to 512"),
        (
            "0003 000f 0000000000000000 00001000 03 6162",
            "0xa: return path: REQ_PAGES_ID: length is 15, expected 16: 13 and a name of 3 bytes",
        ),
        (
            "0003 000f 0000000000000000 00001000 01 6162",
            "0xa: return path: REQ_PAGES_ID: length is 15, expected 14: 13 and a name of 1 byte",
        ),
        (
            "0005 0003 01 6162",
            "0xa: return path: RECV_BITMAP: length is 3, expected 2: 1 and a name of 1 byte",
        ),
        (
            "0005 0002 01 61 0000000000000009",
            "0xe: return path: RECV_BITMAP: bitmap_size: found 0x9, expected a multiple of 8",
        ),
        (
            "0005 0002 01 61 0000000000000008 0000000000000000 0123456789abcdee",
            "0x1e: return path: RECV_BITMAP: end_mark: found 0x123456789abcdee, expected END_MARK 0x123456789abcdef",
        ),
        (
            "0006 0004 00000000",
            "0xc: return path: RESUME_ACK: value: found 0x0, expected RESUME_ACK_VALUE 0x1",
        ),
    ],
)
@pytest.mark.parametrize("step", [None, 1])
def test_a_wrong_message_is_refused_with_what_was_expected(data: str, text: str, step: int | None) -> None:
    with pytest.raises(StreamError) as caught:
        collect(PONG_1 + bytes.fromhex(data), step)
    assert str(caught.value) == text
    assert caught.value.trail[0] == "return path"


def test_bytes_after_shut_are_refused() -> None:
    with pytest.raises(StreamError) as caught:
        collect(SHUT_0 + PONG_1)
    assert str(caught.value) == "0x8: return path: SHUT was the last message, and bytes follow it"


@given(messages(), st.data())
def test_a_message_cut_anywhere_is_reported_as_cut(message: Message, data: st.DataObject) -> None:
    whole = encode_message(message)
    cut = data.draw(st.integers(1, len(whole) - 1))
    with pytest.raises(TruncatedError) as caught:
        collect(whole[:cut])
    assert caught.value.offset == cut


@given(messages(), st.data())
def test_damaged_bytes_are_read_back_or_refused(message: Message, data: st.DataObject) -> None:
    stream = bytearray(encode_message(message))
    stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 0xFF))
    refused_at: int | None = 0
    try:
        entries = collect(bytes(stream))
    except StreamError as exc:
        refused_at = exc.offset
    else:
        assert b"".join(encode_message(entry.message) for entry in entries) == stream
    assert refused_at in range(len(stream) + 1)


def test_a_cut_bitmap_is_named() -> None:
    data = bytes.fromhex("0005 0002 01 61 0000000000000010 00")
    with pytest.raises(TruncatedError) as caught:
        collect(data)
    assert str(caught.value) == "0xf: return path: RECV_BITMAP: bitmap: the stream ends here, 15 of 16 bytes too soon"


def test_a_bitmap_takes_no_memory_for_what_it_claims() -> None:
    data = bytes.fromhex("0005 0002 01 61 fffffffffffffff8") + bytes(100)
    with pytest.raises(TruncatedError, match="18446744073709551508 of 18446744073709551608 bytes too soon"):
        collect(data)


def test_a_bitmap_with_a_lying_size_is_not_written() -> None:
    with pytest.raises(StreamError, match="ReceivedBitmap can't be written"):
        encode_message(ReceivedBitmap(block="a", bitmap_size=16, bitmap=bytes(8)))
