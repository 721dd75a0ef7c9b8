"""The table of phases: what may come, and that all else changes nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import SequenceError
from qmigrate.format.command import CommandNumber
from qmigrate.protocol.phases import ANY_TIME, INSIDE, NEXT, TURNS, Fact, Phase, after, allowed, turned

phases = st.sampled_from(Phase)
commands = st.sampled_from(CommandNumber)


@given(phases, commands, st.booleans())
def test_a_command_leads_on_by_the_table_or_is_refused_by_name(
    phase: Phase, command: CommandNumber, inside: bool
) -> None:
    if command in allowed(phase, inside=inside):
        assert after(phase, command, inside=inside) is NEXT[phase].get(command, phase)
        return
    with pytest.raises(SequenceError) as caught:
        after(phase, command, inside=inside)
    assert caught.value.message.startswith(f"{command.name}{' inside a package' if inside else ''} while {phase.name};")
    for name in (number.name for number in allowed(phase, inside=inside)):
        assert name in caught.value.message


@given(phases, commands)
def test_a_command_comes_inside_a_package_or_outside_and_only_ping_in_both(
    phase: Phase, command: CommandNumber
) -> None:
    if command in allowed(phase, inside=True) & allowed(phase):
        assert command is CommandNumber.PING


def test_every_phase_has_a_row_and_every_command_a_place() -> None:
    assert set(NEXT) == set(TURNS) == set(Phase)
    named = {command for row in NEXT.values() for command in row} | ANY_TIME | INSIDE
    assert set(CommandNumber) - named == {CommandNumber.ENABLE_COLO}  # QEMU 11.1 refuses it too


@given(phases, st.sampled_from(Fact))
def test_a_fact_leads_on_by_the_table_or_cannot_be(phase: Phase, fact: Fact) -> None:
    if fact in TURNS[phase]:
        assert turned(phase, fact) is TURNS[phase][fact]
        return
    with pytest.raises(SequenceError, match=f"while {phase.name}, which can't be"):
        turned(phase, fact)


def test_the_message_says_what_could_have_come() -> None:
    with pytest.raises(SequenceError) as caught:
        after(Phase.ADVISED, CommandNumber.POSTCOPY_RUN, inside=True)
    assert str(caught.value) == ("POSTCOPY_RUN inside a package while ADVISED; may come now: PING, POSTCOPY_LISTEN")


def test_the_way_of_a_postcopy_is_in_the_table() -> None:
    phase = Phase.PRECOPY
    for command, inside in (
        (CommandNumber.OPEN_RETURN_PATH, False),
        (CommandNumber.PING, False),
        (CommandNumber.POSTCOPY_ADVISE, False),
        (CommandNumber.SWITCHOVER_START, False),
        (CommandNumber.POSTCOPY_RAM_DISCARD, False),
        (CommandNumber.POSTCOPY_RAM_DISCARD, False),
        (CommandNumber.PACKAGED, False),
        (CommandNumber.POSTCOPY_LISTEN, True),
        (CommandNumber.PING, True),
        (CommandNumber.POSTCOPY_RUN, True),
    ):
        phase = after(phase, command, inside=inside)
    assert phase is Phase.RUNNING
    phase = turned(turned(phase, Fact.LINK_LOST), Fact.LINK_CAME)
    phase = after(after(phase, CommandNumber.RECV_BITMAP), CommandNumber.POSTCOPY_RESUME)
    assert turned(phase, Fact.ALL_LOADED) is Phase.ENDED


def test_listen_may_come_without_a_discard() -> None:
    assert after(Phase.ADVISED, CommandNumber.POSTCOPY_LISTEN, inside=True) is Phase.LISTENING
