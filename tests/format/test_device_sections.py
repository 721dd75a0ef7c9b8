"""Device state behind RAM, and in a package: each section as entries of its own, in its place."""

from qmigrate.errors import TruncatedError
from qmigrate.format.command import (
    Command,
    Ping,
    PostcopyRun,
)
from qmigrate.format.entry import DeviceState, Undecoded, VmDescription
from tests import streams
from tests.format.walked import HEAD, RAM, fault, names, of, walked
from tests.streams import command, device
from tests.walking import until_fault

MINIMAL, POSTCOPY = streams.minimal(), streams.postcopy()


# -- behind RAM


def test_a_stream_without_description_is_read() -> None:
    found = walked(HEAD + RAM + streams.devices() + streams.eof())
    assert names(found) == ["ram", "timer", "0000:00:04.0/serial"]
    assert len(of(found, Undecoded)) == 2


def test_a_stream_of_a_background_snapshot_has_no_end_of_ram() -> None:
    data = HEAD + streams.ram_start() + streams.ram_part(streams.zero(0, block="pc.ram")) + streams.devices()
    found = walked(data + streams.eof() + streams.devices_described())
    assert len(of(found, DeviceState)) == 2


# -- in a package


def test_a_package_is_walked_with_its_depth() -> None:
    found = walked(POSTCOPY)
    inside = [entry for entry in found if entry.depth]
    assert [entry.record.name for entry in inside if isinstance(entry.record, Command)] == [
        *("POSTCOPY_LISTEN", "PING", "PING", "POSTCOPY_RUN")
    ]
    assert names(inside) == ["timer", "0000:00:04.0/serial"]
    assert {record.reason for record in of(inside, Undecoded)} == {"no description in this stream"}


def test_a_package_in_a_package_is_walked_too() -> None:
    inner = command(Ping(token=3)) + device("a", b"x", section_id=3) + command(PostcopyRun())
    data = HEAD + RAM + streams.package(command(Ping(token=1)), streams.package(inner)) + streams.eof()
    assert [(entry.depth, entry.record.name) for entry in walked(data) if isinstance(entry.record, Command)] == [
        *((0, "PACKAGED"), (1, "PING"), (1, "PACKAGED"), (2, "PING"), (2, "POSTCOPY_RUN"))
    ]


def test_packages_are_not_nested_without_end() -> None:
    data = b""
    for _ in range(20):
        data = streams.package(data)
    assert "packages nested deeper than 16" in fault(HEAD + data + streams.eof())


def test_a_description_of_another_stream_decodes_the_package() -> None:
    (text,) = of(walked(MINIMAL), VmDescription)
    found = walked(POSTCOPY, description=text.description)
    assert len(of(found, DeviceState)) == 2
    assert of(found, Undecoded) == []


def test_a_stream_that_is_cut_in_a_package_gives_the_sections_before_the_cut() -> None:
    end = POSTCOPY.find(b"serial", POSTCOPY.find(b"timer")) + 30
    good, error = until_fault(POSTCOPY[:end])
    assert names(good) == ["ram", "timer"]
    assert isinstance(error, TruncatedError)
    assert "PACKAGED: the stream ends here" in str(error)
