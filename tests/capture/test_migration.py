"""What one pass over a stream gathers."""

import os
from pathlib import Path

import pytest

import qmigrate
from qmigrate.capture.migration import CommandPlace, Migration, Section
from qmigrate.errors import NoStreamError
from qmigrate.format.command import PageSizes, PostcopyAdvise
from qmigrate.format.ram import RamBlock
from qmigrate.format.stream import SectionType
from tests import streams
from tests.streams import PAGE, command, device
from tests.walking import InMemory

HEAD = streams.header() + streams.configuration()


def test_a_file_is_opened_gathered_and_closed(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(streams.minimal())
    with qmigrate.open(path) as migration:
        assert migration.machine_type == "pc-q35-10.0"
        assert list(migration.blocks) == ["pc.ram", "pc.rom"]
        assert list(migration.devices) == ["timer/0", "0000:00:04.0/serial/1"]
        assert migration.complete
        assert migration.errors == []
        assert migration.commands == []
        descriptor = migration.source._file.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_sections_follow_each_other_with_their_footers() -> None:
    contents = InMemory(streams.minimal()).contents
    assert [(section.kind.name, section.name) for section in contents.sections] == [
        *(("START", "ram"), ("PART", "ram"), ("END", "ram"), ("FULL", "timer"), ("FULL", "0000:00:04.0/serial"))
    ]
    at = len(HEAD)
    for section in contents.sections:
        assert section.offset == at
        assert section.whole
        at += section.length
    assert contents.length == len(streams.minimal())
    assert (contents.footers, contents.trailing, contents.page_size) == (True, 0, PAGE)
    assert contents.description is not None
    assert contents.description_length is not None


def test_pages_are_counted_by_block_and_kind_and_again() -> None:
    contents = InMemory(streams.minimal()).contents
    ram, rom = contents.blocks.values()
    assert (ram.counts["normal"], ram.counts["zero"], ram.again, ram.seen.count) == (4, 14, 2, 16)
    assert (rom.counts["normal"], rom.counts["zero"], rom.again, rom.seen.count) == (1, 1, 0, 2)
    assert [section.page_count for section in contents.sections[:3]] == [0, 18, 2]
    assert contents.passes == 2


@pytest.mark.parametrize("step", [7, 500])
def test_what_is_gathered_does_not_depend_on_how_the_bytes_come(step: int) -> None:
    def gathered(migration: Migration) -> object:
        contents = migration.contents
        blocks = [(block.counts, block.again, block.seen.count) for block in contents.blocks.values()]
        sections = [(section.offset, section.length, section.page_count) for section in contents.sections]
        return blocks, sections, contents.passes, contents.length

    for stream in (streams.minimal(), streams.postcopy()):
        assert gathered(InMemory(stream, step)) == gathered(InMemory(stream))


def test_odd_pages_are_counted_with_the_page_size_of_the_target() -> None:
    head = streams.header() + streams.configuration(page_bits=10)
    # The very first page of the stream is one of them.
    part = streams.ram_part(
        streams.xbzrle(0x400, b"\0\1\2", block="ram", page_size=1024),
        streams.compressed(0x800, b"zlib", page_size=1024),
    )
    data = head + streams.ram_start({"ram": 0x1000}) + part + streams.eof()
    contents = InMemory(data).contents
    assert contents.complete
    ram = contents.blocks["ram"]
    assert (ram.counts["xbzrle"], ram.counts["compressed"], ram.seen.count) == (1, 1, 2)
    assert ram.seen.add(1, 2) == 2


def test_a_package_holds_its_commands_and_sections() -> None:
    contents = InMemory(streams.postcopy()).contents
    assert [place.command.name for place in contents.commands] == [
        *("OPEN_RETURN_PATH", "PING", "POSTCOPY_ADVISE", "POSTCOPY_RAM_DISCARD", "POSTCOPY_RAM_DISCARD"),
        *("PING", "PACKAGED", "PING"),
    ]
    package = contents.commands[6]
    kinds = [item.command.name if isinstance(item, CommandPlace) else item.name for item in package.contents]
    assert kinds == ["POSTCOPY_LISTEN", "timer", "0000:00:04.0/serial", "PING", "PING", "POSTCOPY_RUN"]
    inside = [section for section in contents.sections if section.package is not None]
    assert {section.package for section in inside} == {package.offset}
    assert all(isinstance(item, CommandPlace | Section) for item in package.contents)
    assert contents.complete
    # Pages after the switch are served as they are asked for: no pass.
    assert contents.passes == 1


def test_block_page_sizes_and_addresses_are_kept() -> None:
    advise = command(PostcopyAdvise(sizes=PageSizes(summary=0x201000, target_page_size=PAGE)))
    head = streams.header() + streams.configuration(capabilities=["x-ignore-shared"])
    blocks = [RamBlock(name="huge", used_length=0x400000, page_size=0x200000, address=0x100000000)]
    contents = InMemory(head + advise + streams.ram_start(blocks) + streams.eof()).contents
    assert contents.capabilities == ("x-ignore-shared",)
    assert (contents.blocks["huge"].page_size, contents.blocks["huge"].address) == (0x200000, 0x100000000)


def test_a_fault_is_kept_with_what_was_good_before() -> None:
    data = HEAD + streams.ram_start() + streams.ram() + b"\x55"
    contents = InMemory(data).contents
    assert not contents.complete
    assert [str(error) for error in contents.errors] == [
        f"{len(data) - 1:#x}: found 0x55, expected a section type: START 0x1, PART 0x2, END 0x3, FULL 0x4, "
        "COMMAND 0x8 or EOF 0x0"
    ]
    assert [section.kind.name for section in contents.sections] == ["START", "PART", "END"]
    assert contents.blocks["pc.ram"].seen.count == 16
    assert contents.length == len(data) - 1


def test_a_section_in_which_the_stream_ends_is_not_whole() -> None:
    data = HEAD + streams.ram_start() + streams.ram_part(streams.zero(0, 4, block="pc.ram"))[:-6]
    contents = InMemory(data).contents
    start, part = contents.sections
    assert (start.whole, part.whole, part.kind) == (True, False, SectionType.PART)


def test_an_early_section_is_decoded_once_the_description_is_here() -> None:
    early = device("timer", streams.TIMER_STATE, section_id=9, version_id=2)
    described = streams.description(streams.described("timer", *streams.TIMER_FIELDS))
    contents = InMemory(HEAD + early + streams.ram_start() + streams.ram() + streams.eof() + described).contents
    assert contents.sections[0].state is not None
    assert contents.sections[0].reason is None
    wrong = streams.description(streams.described("timer", streams.field("x", "uint8", 1)))
    contents = InMemory(HEAD + early + streams.ram_start() + streams.ram() + streams.eof() + wrong).contents
    assert contents.sections[0].state is None
    assert contents.sections[0].reason == "its footer stands after 17 bytes, the description says 1"


def test_a_description_that_can_not_be_read_is_told() -> None:
    contents = InMemory(HEAD + streams.ram_start() + streams.ram() + streams.eof() + b"\6\0\0\0\2{x").contents
    assert contents.complete
    assert "not JSON" in str(contents.description_fault)


def test_bytes_behind_the_end_are_counted() -> None:
    assert InMemory(streams.minimal() + b"12345").contents.trailing == 5


def test_no_stream_at_all_is_raised() -> None:
    with pytest.raises(NoStreamError):
        _ = InMemory(b"").contents
