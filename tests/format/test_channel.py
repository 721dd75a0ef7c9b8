"""What a connection is, told from its first bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.format.channel import Channel, ChannelKind, How, by_order, classify
from qmigrate.format.command import OpenReturnPath, PostcopyResume, RecvBitmap, encode_command
from qmigrate.format.feed import Feed
from qmigrate.format.multifd import InitialPacket
from qmigrate.format.ram import RamFlag
from qmigrate.format.return_path import (
    Message,
    Pong,
    ReceivedBitmap,
    RequestPages,
    RequestPagesId,
    ResumeAck,
    ResumeAckValue,
    Shut,
    SwitchoverAck,
    encode_message,
)
from tests import streams

BLOCKS = {"pc.ram", "pc.rom"}
UUID = bytes(range(16))
MESSAGES: list[Message] = [
    Shut(value=0),
    Pong(token=1),
    RequestPagesId(start=4096, length=4096, block="pc.ram"),
    RequestPages(start=4096, length=4096),
    ReceivedBitmap(block="pc.ram", bitmap_size=8, bitmap=bytes(8)),
    ResumeAck(value=ResumeAckValue.RESUME_ACK_VALUE),
    SwitchoverAck(),
]


def page(block: str = "pc.ram", start: int = 0x3000, flags: int = RamFlag.ZERO) -> bytes:
    name = block.encode()
    return (start | flags).to_bytes(8) + bytes([len(name)]) + name + bytes(1 if flags == RamFlag.ZERO else 4096)


def told(data: bytes, *, step: int = 0, blocks: set[str] | None = BLOCKS) -> Channel:
    """What ``data`` is, given at once or ``step`` bytes at a time."""
    feed = Feed()
    answer = classify(feed, blocks=blocks)
    pieces = [data[at : at + step] for at in range(0, len(data), step)] if step else [data]
    found: object = None
    try:
        for piece in pieces:
            feed.receive(piece)
            next(answer)
        feed.end()
        next(answer)
    except StopIteration as end:
        found = end.value
    assert feed.offset == 0, "something was consumed"
    assert isinstance(found, Channel), "the stream ended, and it still asks for bytes"
    return found


MULTIFD = InitialPacket(uuid=UUID, channel_id=3).build()
KNOWN = [
    (streams.minimal(), ChannelKind.MAIN, "it begins with QEVM"),
    (MULTIFD, ChannelKind.MULTIFD, "it begins with 0x11223344, and its initial packet names channel 3"),
    (
        encode_command(RecvBitmap(block="pc.ram")),
        ChannelKind.RESUMED,
        "it begins with RECV_BITMAP of pc.ram, without a header",
    ),
    (encode_command(PostcopyResume()), ChannelKind.RESUMED, "it begins with POSTCOPY_RESUME, without a header"),
    (page(), ChannelKind.PREEMPT, "it begins with a page of pc.ram, and no section is open"),
    (page(flags=RamFlag.PAGE), ChannelKind.PREEMPT, "it begins with a page of pc.ram, and no section is open"),
    (bytes(7) + b"\x10", ChannelKind.PREEMPT, "it begins with the EOS record of RAM, and no section is open"),
    (
        bytes.fromhex("160301012d01000129"),
        ChannelKind.TLS,
        "it begins with a TLS handshake: what is inside can't be seen",
    ),
    *(
        (
            encode_message(message),
            ChannelKind.RETURN_PATH,
            f"it begins with {message.name}, of the length that it has",
        )
        for message in MESSAGES
    ),
]


@pytest.mark.parametrize(("data", "kind", "reason"), KNOWN, ids=[reason for _, _, reason in KNOWN])
@pytest.mark.parametrize("step", [0, 1, 7])
def test_each_channel_is_told_by_its_bytes_however_they_arrive(
    data: bytes, kind: ChannelKind, reason: str, step: int
) -> None:
    found = told(data, step=step)
    assert (found.kind, found.known_by, found.reason) == (kind, How.BYTES, reason)


def test_a_multifd_channel_says_which_it_is() -> None:
    found = told(MULTIFD)
    assert (found.channel_id, found.uuid, found.name) == (3, UUID, "multifd 3")


def test_an_initial_packet_that_is_cut_or_wrong_is_multifd_still() -> None:
    cut, wrong = told(MULTIFD[:20]), told(MULTIFD[:7] + b"\x02" + MULTIFD[8:])
    assert (cut.kind, cut.channel_id, cut.name) == (ChannelKind.MULTIFD, None, "multifd")
    assert cut.reason == "it begins with 0x11223344, and ends inside its initial packet"
    assert wrong.reason == (
        "it begins with 0x11223344, but its initial packet is wrong: found 0x2, expected VERSION 0x1"
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "nothing was sent"),
        (b"QEV", "3 bytes are too few to tell"),
        (b"GET / HTTP/1.0", "it begins with 47 45 54 20 2f 20 48 54, as no channel does"),
        (page("vga"), "it begins like a page record of 'vga', which no block is called"),
        (page(flags=RamFlag.PAGE | RamFlag.CONTINUE), "it begins with 00 00 00 00 00 00 30 28, as no channel does"),
        (page()[:12], "it begins like a page record, and ends inside it"),
        (encode_command(OpenReturnPath()), "it begins with OPEN_RETURN_PATH of 0 bytes, which opens no recovery"),
        (encode_command(RecvBitmap(block="x")), "it asks for the bitmap of 'x', which no block is called"),
        (encode_command(RecvBitmap(block="pc.ram"))[:9], "it begins with RECV_BITMAP, and ends inside it"),
        (b"\x08\x00\x0a\x00\x07\x05pc.ram", "it begins with a RECV_BITMAP that is wrong: "),
        (b"\x08\x00\x63\x00\x00", "it begins with 0x08, and with no command: found 0x63, expected one of"),
        (b"\x08\x00\x0a\x00", "it begins with a command, and ends inside it"),
        (b"\x00\x02\x00\x05\x00\x00\x00\x00\x00", "it begins like PONG, whose length is not 5"),
        (b"\x00\x03\x00\x13" + bytes(12) + b"\x07pc.ram", "it begins like REQ_PAGES_ID, whose length is not 19"),
        (b"\x00\x03\x00\x13" + bytes(9), "it begins like REQ_PAGES_ID, and ends inside it"),
    ],
)
def test_what_is_no_channel_is_unknown_and_says_why(data: bytes, reason: str) -> None:
    found = told(data)
    assert (found.kind, found.known_by) == (ChannelKind.UNKNOWN, How.NOTHING)
    assert found.reason.startswith(reason)


def test_without_main_any_name_will_do_for_a_block() -> None:
    assert told(page("anything"), blocks=None).kind is ChannelKind.PREEMPT
    assert told(page("\x01"), blocks=None).kind is ChannelKind.UNKNOWN


def test_order_decides_only_where_nothing_was_sent() -> None:
    main, silent, other = told(streams.minimal()), told(b""), told(b"what is this?")
    preempt = by_order(silent, is_forward=True, others=[main])
    assert (preempt.kind, preempt.known_by) == (ChannelKind.PREEMPT, How.ORDER)
    assert preempt.reason == "nothing was sent on it: beside main, preempt may stay silent"
    back = by_order(silent, is_forward=False, others=[main])
    assert (back.kind, back.known_by) == (ChannelKind.RETURN_PATH, How.ORDER)
    for is_forward in (True, False):
        assert by_order(silent, is_forward=is_forward, others=[]) is silent
        assert by_order(other, is_forward=is_forward, others=[main]) is other
        assert by_order(main, is_forward=is_forward, others=[main]) is main


@given(st.binary(max_size=300))
def test_any_bytes_get_an_answer(data: bytes) -> None:
    whole = told(data)
    assert told(data, step=1) == whole
    assert whole.reason
