"""The destination's core, without a socket: bytes and facts in, events and bytes out."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import NoStreamError, SequenceError, StreamError, TruncatedError, UnsupportedError
from qmigrate.format.command import (
    COMMANDS,
    CommandNumber,
    DiscardRange,
    OpenReturnPath,
    Packaged,
    Ping,
    PostcopyAdvise,
    PostcopyResume,
    RecvBitmap,
)
from qmigrate.format.return_path import Message, Pong, ReceivedBitmap, ResumeAck, Shut
from qmigrate.format.walk import Limits
from qmigrate.protocol.destination import Destination
from qmigrate.protocol.destination_events import (
    Advised,
    BitmapAsked,
    BlocksListed,
    Configured,
    Discarded,
    Loaded,
    PackageCame,
    Resumed,
    SyncPoint,
)
from qmigrate.protocol.phases import ANY_TIME, INSIDE, Phase, allowed
from tests import streams
from tests.live.answers import messages_in
from tests.protocol.said import built, said_by
from tests.walking import CORPUS, corpus

PAGE = streams.PAGE


def answers_of(core: Destination) -> list[Message]:
    return messages_in(core.data_to_send())


def advanced(phase: Phase) -> Destination:
    """A core that has come to this phase, with a return path."""
    core = Destination()
    until = streams.header() + streams.configuration() + streams.command(OpenReturnPath())
    list(said_by(core, [until]))
    core.phase = phase
    return core


def test_a_precopy_is_told_from_its_header_to_its_description() -> None:
    core = Destination()
    said = list(said_by(core, [streams.minimal()]))
    assert [type(event).__name__ for event in said if not isinstance(event, tuple)] == [
        "Configured",
        "BlocksListed",
        "SyncPoint",
        "SyncPoint",
        "SyncPoint",
        "SectionBegan",
        "SectionBegan",
        "Loaded",
    ]
    assert said[-1] == Loaded(is_postcopy=False)
    assert core.data_to_send() == b""  # nothing opened a return path
    core.send_shut(0)
    assert core.data_to_send() == b""


def test_a_postcopy_is_told_and_each_ping_answered() -> None:
    core = Destination()
    said = [event for event in said_by(core, [streams.postcopy()]) if not isinstance(event, tuple | SyncPoint)]
    assert [type(event) for event in said] == [
        Configured,
        Advised,
        BlocksListed,
        Discarded,
        Discarded,
        PackageCame,
        Loaded,
    ]
    assert said[3] == Discarded("pc.ram", (DiscardRange(start=PAGE, length=2 * PAGE),))
    assert said[-1] == Loaded(is_postcopy=True)
    core.finished()
    assert core.phase is Phase.ENDED
    core.send_shut(0)
    assert answers_of(core) == [Pong(token=1), Pong(token=2), Pong(token=4), Shut(value=0)]


@given(st.lists(st.integers(0, len(streams.postcopy())), max_size=12))
def test_any_split_of_the_bytes_gives_the_same_events_and_answers(cuts: list[int]) -> None:
    whole = streams.postcopy()
    one, other = Destination(), Destination()
    edges = [0, *sorted(cuts), len(whole)]
    pieces = [whole[begin:end] for begin, end in pairwise(edges)]
    assert list(said_by(one, [whole])) == list(said_by(other, pieces))
    assert one.data_to_send() == other.data_to_send()


@pytest.mark.parametrize("name", [name for name in CORPUS if name.startswith(("pc-paused", "pc-postcopy"))])
def test_a_real_stream_is_read_to_its_end(name: str) -> None:
    core = Destination()
    *_, last = said_by(core, [corpus(name)])
    assert last == Loaded(is_postcopy="postcopy" in name)
    core.finished()


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("number", CommandNumber, ids=lambda number: number.name)
def test_a_command_that_may_not_come_now_is_refused_by_name_and_changes_nothing(
    phase: Phase, number: CommandNumber
) -> None:
    core = advanced(phase)
    core.receive_data(built(number))
    if number in allowed(phase):
        next(core.events(), None)
        return
    with pytest.raises(SequenceError) as caught:
        list(core.events())
    assert caught.value.message.startswith(f"{number.name} while {phase.name}; may come now: ")
    assert caught.value.offset is not None
    assert core.phase is phase
    assert core.data_to_send() == b""


def test_the_tables_words_are_used_up_by_these_tests() -> None:
    assert set(COMMANDS) == set(CommandNumber) > ANY_TIME | INSIDE


def test_a_package_that_claims_too_much_is_refused_before_anything_is_kept() -> None:
    core = Destination(limits=Limits(package=1 << 20))
    until = streams.header() + streams.configuration() + streams.command(PostcopyAdvise(sizes=None))
    list(said_by(core, [until]))
    core.receive_data(streams.command(Packaged(length=0xFFFFFFFF)))
    with pytest.raises(UnsupportedError, match="a package of 4294967295 bytes"):
        list(core.events())


def test_a_ping_without_a_return_path_is_refused() -> None:
    core = Destination()
    with pytest.raises(SequenceError, match="PING 0x7 came, and no OPEN_RETURN_PATH before it"):
        list(said_by(core, [streams.header() + streams.configuration() + streams.command(Ping(token=7))]))


@given(st.integers(0, len(streams.minimal()) - 1))
def test_a_connection_that_ends_early_is_truncated(length: int) -> None:
    core = Destination()
    core.receive_data(streams.minimal()[:length])
    core.receive_eof()
    with pytest.raises(Exception, match=r"the stream ends here|no migration stream|no footer"):
        list(core.events())


def paused() -> Destination:
    """A core whose postcopy broke in the middle of a page."""
    core = Destination()
    whole = streams.postcopy()
    last = whole.rindex(streams.page(PAGE, block="pc.ram"))
    list(said_by(core, [whole[: last + 100]]))
    core.receive_eof()
    with pytest.raises(TruncatedError):
        list(core.events())
    core.link_lost()
    assert core.phase is Phase.PAUSED
    core.data_to_send()
    return core


def test_a_recovery_goes_on_with_bitmaps_and_the_resume_command() -> None:
    core = paused()
    core.recover()
    assert core.phase is Phase.RECOVERING
    asked = list(said_by(core, [streams.command(RecvBitmap(block="pc.ram"))]))
    assert asked == [BitmapAsked("pc.ram")]
    core.send_bitmap("pc.ram", bytes(8))
    (answer,) = answers_of(core)
    assert isinstance(answer, ReceivedBitmap)
    assert list(said_by(core, [streams.command(PostcopyResume())])) == [Resumed()]
    assert (answers_of(core), core.phase) == ([ResumeAck()], Phase.RUNNING)
    rest = streams.ram_part(streams.page(PAGE, block="pc.ram")) + streams.ram_end() + streams.eof()
    said = [event for event in said_by(core, [rest]) if not isinstance(event, SyncPoint)]
    assert said == [("pc.ram", PAGE, 8), Loaded(is_postcopy=True)]


def test_a_recovery_that_breaks_is_paused_again() -> None:
    core = paused()
    core.recover()
    core.link_lost()
    assert core.phase.name == "PAUSED"
    core.recover()
    assert core.phase.name == "RECOVERING"


def test_a_header_on_a_recovered_connection_is_refused() -> None:
    core = paused()
    core.recover()
    with pytest.raises(StreamError, match="found 0x51, expected a section type"):
        list(said_by(core, [streams.header()]))


def test_nothing_is_recovered_that_is_not_paused() -> None:
    with pytest.raises(SequenceError, match="a new connection came while PRECOPY, which can't be"):
        Destination().recover()


def test_before_the_guest_runs_a_lost_connection_is_the_end() -> None:
    core = Destination()
    core.link_lost()
    assert core.phase is Phase.FAILED


@pytest.mark.parametrize("closing", [b"", streams.description()[:1] + bytes(4)], ids=["none", "empty"])
def test_without_a_description_that_says_something_silence_ends_a_whole_tail(closing: bytes) -> None:
    core = Destination()
    whole = streams.header() + streams.configuration() + streams.ram_start() + streams.ram() + streams.devices()
    assert Loaded(is_postcopy=False) not in list(said_by(core, [whole]))
    core.quiet()  # a device may yet come
    assert not core.feed.ended
    assert Loaded(is_postcopy=False) not in list(said_by(core, [streams.eof() + closing]))
    core.quiet()
    assert list(core.events())[-1] == Loaded(is_postcopy=False)


def test_silence_in_the_middle_of_ram_ends_nothing() -> None:
    core = Destination()
    list(said_by(core, [streams.header() + streams.configuration() + streams.ram_start()]))
    assert not core.may_be_over
    core.quiet()
    assert not core.feed.ended


def test_after_a_fault_nothing_more_is_said() -> None:
    core = Destination()
    core.receive_data(b"nothing that QEMU would send")
    core.receive_eof()
    with pytest.raises(NoStreamError):
        list(core.events())
    assert list(core.events()) == []
