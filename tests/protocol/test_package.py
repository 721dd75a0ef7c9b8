"""A package by itself: what it says, in order, and what may not be in it."""

import pytest

from qmigrate.errors import SequenceError, TruncatedError
from qmigrate.format.command import CommandNumber, Ping, PostcopyListen, PostcopyRun
from qmigrate.protocol.destination_events import SectionBegan
from qmigrate.protocol.package import Package, devices_of, package_events
from qmigrate.protocol.phases import Phase, allowed
from tests import streams
from tests.protocol.said import built


@pytest.mark.parametrize("phase", [Phase.ADVISED, Phase.DISCARDING, Phase.PRECOPY, Phase.RUNNING])
@pytest.mark.parametrize("number", CommandNumber, ids=lambda number: number.name)
def test_a_command_that_may_not_come_in_a_package_is_refused_by_name(phase: Phase, number: CommandNumber) -> None:
    events = package_events(Package(built(number)), phase)
    if number in allowed(phase, inside=True):
        assert next(events) is not None
        return
    with pytest.raises(SequenceError, match=f"^0x[0-9a-f]+: {number.name} inside a package while {phase.name};"):
        list(events)


def test_a_package_says_when_to_listen_and_when_to_run_and_what_to_answer() -> None:
    data = b"".join(
        (
            streams.command(PostcopyListen()),
            streams.devices(),
            streams.command(Ping(token=3)),
            streams.command(Ping(token=0x42)),
            streams.command(PostcopyRun()),
        )
    )
    said = list(package_events(Package(data, offset=100), Phase.DISCARDING))
    assert [type(event) for event in said] == [Phase, SectionBegan, SectionBegan, Ping, Ping, Phase]
    assert said[0] is Phase.LISTENING
    assert said[-1] is Phase.RUNNING
    assert devices_of(Package(data)) == streams.devices()


def test_a_package_without_run_is_refused() -> None:
    with pytest.raises(TruncatedError, match="the package ends while LISTENING, before POSTCOPY_RUN"):
        list(package_events(Package(streams.command(PostcopyListen())), Phase.ADVISED))
