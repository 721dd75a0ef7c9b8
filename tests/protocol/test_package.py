"""A package by itself: what it says, in order, and what may not be in it."""

from collections.abc import Callable

import pytest

from qmigrate.errors import SequenceError, TruncatedError
from qmigrate.format.command import CommandNumber, Ping, PostcopyListen, PostcopyRun
from qmigrate.format.tail import Tail
from qmigrate.format.vmdesc import Description, parse_description
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


class _One:
    """A schema that is asked for."""

    def __init__(self, known: Description) -> None:
        self.known = known

    def choose(self, read: Callable[[Description | None], Tail], machine_type: str | None) -> Tail:  # noqa: ARG002 - the protocol's
        return read(self.known)


@pytest.mark.parametrize("before", [b"", streams.device("b", b"b", section_id=1)])
def test_sections_of_a_package_that_cannot_be_told_apart_are_kept_all_the_same(before: bytes) -> None:
    """Its guest has put a whole section, and a footer of the one around it, into a buffer."""
    inside = (
        streams.footer(3) + streams.device("false", b"f", section_id=9) + streams.device("a", b"2", section_id=3)[:-5]
    )
    sections = before + streams.device("a", inside, section_id=3) + streams.device("d", b"d", section_id=4)
    data = streams.command(PostcopyListen()) + sections + streams.command(PostcopyRun())

    def names(package: Package) -> list[str]:
        events = package_events(package, Phase.ADVISED)
        return [event.header.idstr for event in events if isinstance(event, SectionBegan)]

    assert devices_of(Package(data)) == sections
    assert names(Package(data)) == [*(["b"] if before else []), "d"]
    described = [("b", 1), ("a", len(inside)), ("d", 1)]
    known = streams.description(
        *(streams.described(name, streams.field("x", "buffer", size)) for name, size in described)
    )
    package = Package(data, schema=_One(parse_description(known[5:])))
    assert devices_of(package) == sections
    assert names(package) == [*(["b"] if before else []), "a", "d"]


def test_a_package_without_run_is_refused() -> None:
    with pytest.raises(TruncatedError, match="the package ends while LISTENING, before POSTCOPY_RUN"):
        list(package_events(Package(streams.command(PostcopyListen())), Phase.ADVISED))
