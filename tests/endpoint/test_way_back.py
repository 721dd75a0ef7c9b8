"""What a tap makes of a way back while it passes: the same as the grammar, whatever the pieces are."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.endpoint.way_back import WayBack
from qmigrate.format.return_path import (
    Message,
    Pong,
    ReceivedBitmap,
    RequestPages,
    RequestPagesId,
    ResumeAck,
    Shut,
    SwitchoverAck,
    encode_message,
)

OPENING = Pong(token=1)
REQUEST = RequestPages(start=0x3000, length=4096)
MESSAGES: list[Message] = [
    OPENING,
    Pong(token=2),
    REQUEST,
    RequestPagesId(start=0, length=4096, block="pc.ram"),
    ReceivedBitmap(block="pc.ram", bitmap_size=4096, bitmap=b"\0\1\0\4" * 1024),
    ResumeAck(),
    SwitchoverAck(),
]
OF_PRECOPY = (OPENING, MESSAGES[-1])
HANDSHAKE = (155, 1, 29, 140, 602, 96, 69)  # lengths of what QEMU 11.1 sends; types 22, 20, then 23


def told(data: bytes, cuts: list[int] | None = None) -> WayBack:
    back = WayBack()
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts or ()), len(data)]
    for begin, end in pairwise(places):
        back.take(memoryview(data)[begin:end])
    return back


@given(st.lists(st.sampled_from(MESSAGES), max_size=8), st.booleans(), st.lists(st.integers(0, 1 << 20), max_size=20))
def test_it_is_what_the_messages_say_however_they_are_split(
    messages: list[Message], shut: bool, cuts: list[int]
) -> None:
    said = [*messages, *([Shut(value=0)] if shut else [])]
    back = told(b"".join(map(encode_message, said)), cuts)
    is_postcopy = any(message not in OF_PRECOPY for message in messages)
    assert (back.is_used, back.is_shut) == (bool(said), shut)
    assert (back.is_postcopy, back.is_broken) == (is_postcopy, is_postcopy and not shut)


def test_a_shut_that_is_not_whole_is_none() -> None:
    data = encode_message(REQUEST) + encode_message(Shut(value=0))
    assert told(data[:-1]).is_broken
    assert not told(data).is_broken


@pytest.mark.parametrize("data", [b"HTTP/1.1 200 OK\r\n\r\n", b"\0\x08\0\0", b"\0\1\xff\xff" + bytes(5000)])
def test_what_is_no_return_path_says_nothing(data: bytes) -> None:
    back = told(data + encode_message(Shut(value=0)))
    assert (back.is_used, back.is_shut, back.is_postcopy) == (False, False, False)


def test_it_holds_no_bitmap() -> None:
    back = WayBack()
    back.take(b"\0\5\0\7\6pc.ram" + (1 << 40).to_bytes(8))
    for _ in range(64):
        back.take(bytes(1 << 16))
    assert len(back._held) == 0


def in_tls(messages: list[Message], added: int = 17, handshake: tuple[int, ...] = HANDSHAKE) -> bytes:
    lengths = [*handshake, *(len(encode_message(message)) + added for message in messages)]
    types = [22, 20, *[23] * (len(lengths) - 2)]
    return b"".join(
        bytes([kind, 3, 3]) + length.to_bytes(2) + bytes(length) for kind, length in zip(types, lengths, strict=True)
    )


@pytest.mark.parametrize(("added", "handshake"), [(17, HANDSHAKE), (24, (1000, 1)), (16, (1000, 1))])
@pytest.mark.parametrize(
    ("messages", "used", "broken"),
    [
        ([], False, False),
        ([OPENING, Shut(value=0)], True, False),
        ([OPENING, Pong(token=2), MESSAGES[3], REQUEST], True, True),
        ([OPENING, Pong(token=2), MESSAGES[3], REQUEST, Shut(value=0)], True, False),
    ],
)
def test_inside_tls_it_goes_by_lengths(
    messages: list[Message], used: bool, broken: bool, added: int, handshake: tuple[int, ...]
) -> None:
    data = in_tls(messages, added, handshake)
    for back in (told(data), told(data, list(range(0, len(data), 3)))):
        assert (back.is_used, back.is_broken) == (used, broken)


def test_an_alert_that_closes_tls_is_no_message() -> None:
    assert not told(in_tls([OPENING, REQUEST, Shut(value=0)]) + b"\x17\3\3\0\x13" + bytes(19)).is_broken
