"""Commands: each alone, with its length, whole and in pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import StreamError, TruncatedError
from qmigrate.format.command import (
    COMMANDS,
    Command,
    CommandNumber,
    DiscardRange,
    EnableColo,
    OpenReturnPath,
    Packaged,
    PageSizes,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRamDiscard,
    PostcopyResume,
    PostcopyRun,
    RecvBitmap,
    SwitchoverStart,
    encode_command,
    read_command,
)
from tests.walking import run

U32 = st.integers(0, 0xFFFFFFFF)
U64 = st.integers(0, 0xFFFFFFFFFFFFFFFF)
NAMES = st.binary(max_size=255).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
EMPTY = (OpenReturnPath, PostcopyListen, PostcopyRun, EnableColo, PostcopyResume, SwitchoverStart)


def commands() -> st.SearchStrategy[Command]:
    ranges = st.lists(st.builds(DiscardRange, start=U64, length=U64), min_size=2, max_size=20).map(tuple)
    return st.one_of(
        st.sampled_from([empty() for empty in EMPTY]),
        st.builds(Ping, token=U32),
        st.builds(PostcopyAdvise, sizes=st.none() | st.builds(PageSizes, summary=U64, target_page_size=U64)),
        st.builds(PostcopyRamDiscard, block=NAMES, ranges=ranges),
        st.builds(Packaged, length=U32),
        st.builds(RecvBitmap, block=NAMES),
    )


@given(commands(), st.binary(max_size=9), st.integers(1, 50))
def test_each_command_comes_back_from_its_bytes_however_they_come(command: Command, behind: bytes, step: int) -> None:
    data = encode_command(command)
    assert run(read_command, data) == (command, len(data))
    assert run(read_command, data + behind) == (command, len(data))
    assert run(read_command, data, 1) == (command, len(data))
    assert run(read_command, data + behind, step) == (command, len(data))


@given(commands(), st.data())
def test_a_command_that_is_cut_is_refused(command: Command, data: st.DataObject) -> None:
    whole = encode_command(command)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(TruncatedError) as caught:
        run(read_command, whole[:cut])
    assert caught.value.offset == cut


def test_every_number_has_its_command() -> None:
    assert set(COMMANDS) == set(CommandNumber)
    assert all(number == command.NUMBER for number, command in COMMANDS.items())


@pytest.mark.parametrize(
    ("command", "data"),
    [
        (OpenReturnPath(), "08 0001 0000"),
        (Ping(token=0x42), "08 0002 0004 00000042"),
        (
            PostcopyAdvise(sizes=PageSizes(summary=0x1000, target_page_size=0x1000)),
            "08 0003 0010 0000000000001000 0000000000001000",
        ),
        (PostcopyAdvise(sizes=None), "08 0003 0000"),
        (PostcopyListen(), "08 0004 0000"),
        (PostcopyRun(), "08 0005 0000"),
        (
            PostcopyRamDiscard(block="pc.ram", ranges=(DiscardRange(start=0x35E000, length=0xCA2000),)),
            "08 0006 0019 00 06 70632e72616d 00 000000000035e000 0000000000ca2000",
        ),
        (Packaged(length=0x1234), "08 0007 0004 00001234"),
        (EnableColo(), "08 0008 0000"),
        (PostcopyResume(), "08 0009 0000"),
        (RecvBitmap(block="pc.ram"), "08 000a 0007 06 70632e72616d"),
        (SwitchoverStart(), "08 000b 0000"),
    ],
    ids=lambda value: value.name if isinstance(value, Command) else "",
)
def test_a_command_has_the_bytes_that_qemu_sends(command: Command, data: str) -> None:
    assert encode_command(command) == bytes.fromhex(data)
    assert run(read_command, bytes.fromhex(data)) == (command, len(bytes.fromhex(data)))


@pytest.mark.parametrize("number", [0, 12, 0xFFFF])
def test_an_unknown_command_is_refused_with_those_that_are_known(number: int) -> None:
    with pytest.raises(StreamError) as caught:
        run(read_command, b"\x08" + number.to_bytes(2) + bytes(2))
    assert str(caught.value) == (
        f"0x1: command: found {number:#x}, expected one of OPEN_RETURN_PATH 0x1, PING 0x2, POSTCOPY_ADVISE 0x3, "
        "POSTCOPY_LISTEN 0x4, POSTCOPY_RUN 0x5, POSTCOPY_RAM_DISCARD 0x6, PACKAGED 0x7, ENABLE_COLO 0x8, "
        "POSTCOPY_RESUME 0x9, RECV_BITMAP 0xa, SWITCHOVER_START 0xb"
    )


LENGTHS = {
    CommandNumber.PING: (4, "4"),
    CommandNumber.PACKAGED: (4, "4"),
    CommandNumber.POSTCOPY_ADVISE: (16, "16 or 0"),
    CommandNumber.POSTCOPY_RAM_DISCARD: (25, "at least 20"),
    CommandNumber.RECV_BITMAP: (7, "1 to 256"),
}


@pytest.mark.parametrize("number", CommandNumber)
def test_a_wrong_length_is_refused_with_the_right_one(number: CommandNumber) -> None:
    expected = LENGTHS.get(number, (0, "0"))[1]
    for wrong in (19, 257, 0xFFFF) if expected != "at least 20" else (0, 19):
        if expected == "1 to 256" and wrong == 19:
            continue
        with pytest.raises(StreamError) as caught:
            run(read_command, b"\x08" + number.to_bytes(2) + wrong.to_bytes(2) + bytes(wrong))
        assert str(caught.value) == f"0x3: {number.name}: length is {wrong}, expected {expected}"


def discard(payload: str) -> bytes:
    data = bytes.fromhex(payload)
    return b"\x08\x00\x06" + len(data).to_bytes(2) + data


RANGE = "0000000000001000 0000000000001000"


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (f"01 01 61 00 {RANGE}", "0x5: POSTCOPY_RAM_DISCARD: version is 1, expected 0"),
        (f"00 01 61 07 {RANGE}", "0x8: POSTCOPY_RAM_DISCARD: the name ends with 0x7, expected 0x0"),
        (f"00 01 61 00 {RANGE} 00", "0x1a: POSTCOPY_RAM_DISCARD: start: the payload of 21 bytes ends here"),
        (f"00 ff 61 00 {RANGE}", "0x19: POSTCOPY_RAM_DISCARD: block: the payload of 20 bytes ends here"),
    ],
)
def test_a_discard_that_does_not_add_up_is_refused(payload: str, message: str) -> None:
    with pytest.raises(StreamError) as caught:
        run(read_command, discard(payload))
    assert str(caught.value) == message


def test_a_bitmap_request_whose_name_is_shorter_than_the_command_is_refused() -> None:
    with pytest.raises(StreamError) as caught:
        run(read_command, bytes.fromhex("08 000a 0003 01 61 00"))
    assert str(caught.value) == "0x7: RECV_BITMAP: RecvBitmap takes 2 bytes, 3 are there"


def test_a_command_that_says_another_kind_of_section_is_refused() -> None:
    with pytest.raises(StreamError, match=r"^0x0: kind: found 0x7, expected COMMAND 0x8$"):
        run(read_command, bytes.fromhex("07 0002 0004 00000001"))
