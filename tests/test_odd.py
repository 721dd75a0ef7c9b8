"""Odd but real: what QEMU writes now and then is read, comes back the same, and ``dissect`` says what is odd about it.

Recorded streams are in ``corpus/odd``; ``live/test_odd.py`` records all kinds of all versions.  What can be had by
leaving records out of a real stream, or has no machine that writes it here, is made.
"""

import os
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from qmigrate.analysis.check import check
from qmigrate.analysis.extract import extract
from qmigrate.analysis.summary import oddities
from qmigrate.capture.migration import Migration
from qmigrate.errors import StreamError, TruncatedError
from qmigrate.format.command import OpenReturnPath, Packaged, PageSizes, Ping, PostcopyAdvise, SwitchoverStart
from qmigrate.format.entry import Configuration, DeviceState, Entry, Undecoded, VmDescription
from qmigrate.format.feed import Feed
from qmigrate.format.ram import Pages, RamBlock
from qmigrate.format.stream import Footer, SectionHeader, SectionType, VmDescriptionHeader
from qmigrate.format.stretch import intervals_of
from qmigrate.format.walk import Limits, walk
from qmigrate.format.write import encode
from tests import streams
from tests.streams import PAGE, command, described, device, field
from tests.walking import InMemory, corpus, entries, kept

RECIPES: Final = tomllib.loads((Path(__file__).parent / "corpus" / "odd" / "recipes.toml").read_text())
HEAD: Final = streams.header() + streams.configuration()
RAM: Final = streams.ram_start() + streams.ram()
DEVICES: Final = streams.devices() + streams.eof()
KIB, MIB = 1 << 10, 1 << 20

NO_CONFIGURATION: Final = "There is no CONFIGURATION section (machine types up to 2.3, or send-configuration=off)."
NO_FOOTERS: Final = "Sections have no footers (machine types up to 2.3, or send-section-footer=off)."
NO_DESCRIPTION: Final = (
    "There is no description of the devices (suppress-vmdesc=on, or it was cut off): they can't be decoded."
)
POSTCOPY: Final = "There is no description of the devices (postcopy sends none): they can't be decoded."
NO_END: Final = "The ram section has no END: a background snapshot."
ADVISED: Final = "Postcopy was advised, but the migration completed as precopy."
SWITCHOVER: Final = "SWITCHOVER_START was sent: QEMUs before 10.0 refuse it."
SAVEVM: Final = "The guest was running, and no page was sent twice: an internal snapshot (savevm), or it wrote nothing."
MAPPED: Final = "Each page has its place in the file (mapped-ram): only what the last pass left there is to be seen."
CANCELLED: Final = "The stream ends while RAM is sent: the migration was cancelled, or it failed."


def said(data: bytes) -> list[str]:
    """What is odd about a stream that is whole, valid, and the same again."""
    checked = check(InMemory(data))
    contents = checked.gathering.contents
    assert [str(error) for error in contents.errors] == []
    assert checked.differences == []
    assert checked.identical
    assert contents.length == len(data)
    return oddities(contents)


# -- recorded


EARLY = (
    "0000:00:01.0/virtio-mem-device-early/0 at {} comes before the contents of RAM: an early section "
    "(virtio-mem, 8.0 and later)."
)
SAME = "2 RAM blocks have the same length, 8 MiB: ram0, 0000:00:01.0/more."
LEFT_OUT = "The block list has addresses: x-ignore-shared leaves shared RAM out, and none of ram0 is in the stream."
HUGE = "Some RAM lies on larger pages of the host: ram0 (2 MiB)."
RECORDED: Final = {
    "arm-board-7.2": [
        "The target's pages have 1 KiB, which the stream does not announce: its records are whole only so."
    ],
    "arm-virt-11.1": ["2 RAM blocks have the same length, 64 MiB: virt.flash0, virt.flash1.", SWITCHOVER],
    "pc-bare-7.2": [NO_CONFIGURATION, NO_FOOTERS, NO_DESCRIPTION],
    "pc-huge-11.1": [HUGE, ADVISED, SWITCHOVER],
    "pc-huge-postcopy-11.1": [POSTCOPY, HUGE, SWITCHOVER],
    "pc-huge-savevm-5.2": [HUGE, SAVEVM],
    "pc-mapped-10.0": [MAPPED, SWITCHOVER],
    "pc-mapped-11.1": [MAPPED, SWITCHOVER],
    "pc-mapped-shared-11.1": [LEFT_OUT, MAPPED, SWITCHOVER],
    "pc-savevm-10.0": [SWITCHOVER, SAVEVM],
    "pc-shared-7.2": [LEFT_OUT],
    "pc-snapshot-11.1": [NO_END],
    "q35-early-10.0": [EARLY.format("0xda"), SAME, SWITCHOVER],
    "q35-early-11.1": [EARLY.format("0x18"), SAME, SWITCHOVER],
}  # fmt: skip


def test_each_recorded_stream_has_its_recipe() -> None:
    folder = Path(__file__).parent / "corpus" / "odd"
    assert {path.name.removesuffix(".mig.xz") for path in folder.glob("*.mig.xz")} == set(RECIPES) == set(RECORDED)


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_stream_is_whole_and_says_what_is_odd(name: str) -> None:
    data = corpus(f"odd/{name}")
    assert said(data) == RECORDED[name]
    contents = InMemory(data).contents
    undecoded = [s.key for s in contents.sections if s.kind == SectionType.FULL and s.state is None]
    assert bool(undecoded) == name.startswith(("pc-bare", "pc-huge-postcopy"))


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_stream_is_the_same_however_its_bytes_come(name: str) -> None:
    data = corpus(f"odd/{name}")
    whole, pieces = InMemory(data).contents, InMemory(data, 997).contents
    assert [(s.key, s.offset, s.length, s.state) for s in pieces.sections] == [
        (s.key, s.offset, s.length, s.state) for s in whole.sections
    ]
    assert oddities(pieces) == oddities(whole)


def test_addresses_and_page_sizes_are_those_of_the_block_list() -> None:
    for name in ("pc-shared-7.2", "pc-mapped-shared-11.1"):
        shared = InMemory(corpus(f"odd/{name}")).blocks
        assert {block.address is None for block in shared.values()} == {False}
        assert (shared["ram0"].address, shared["ram0"].seen.count) == (0, 0)
        assert shared["pc.bios"].seen.count == 64
    for name in ("pc-huge-11.1", "pc-huge-savevm-5.2"):
        blocks = InMemory(corpus(f"odd/{name}")).blocks
        assert [block.name for block in blocks.values() if block.page_size] == ["ram0"]
        assert blocks["ram0"].page_size == 2 * MIB


def test_after_the_switch_all_pages_of_a_huge_one_come_together() -> None:
    sent: list[int] = []
    switched = False
    for entry in entries(corpus("odd/pc-huge-postcopy-11.1")):
        switched = switched or isinstance(entry.record, Packaged)
        if switched and isinstance(entry.record, Pages) and entry.record.block == "ram0":
            sent += [start for begin, end in intervals_of(entry.record.runs, PAGE) for start in range(begin, end, PAGE)]
    assert len(sent) == 4 * 512
    for at in range(0, len(sent), 512):
        first = sent[at] & -(2 * MIB)
        assert sorted(sent[at : at + 512]) == list(range(first, first + 2 * MIB, PAGE))


# -- a real stream with records left out


def kept_entries(name: str) -> list[Entry]:
    return list(kept(entries(corpus(name))))


def joined(found: list[Entry]) -> bytes:
    return b"".join(encode(entry.record, contents=entry.view) for entry in found)


def stripped(name: str, *kinds: type) -> bytes:
    """The stream without the records of these kinds; a package's length is what is left in it."""
    found = [entry for entry in kept_entries(name) if not isinstance(entry.record, kinds)]
    inside = sum(entry.length for entry in found if entry.depth)
    return joined([e._replace(record=Packaged(length=inside)) if isinstance(e.record, Packaged) else e for e in found])


def sections(data: bytes) -> list[tuple[str, bytes]]:
    """Each device's key and the bytes of its state, as they are told apart."""
    found: list[tuple[str, bytes]] = []
    key = ""
    for entry in entries(data):
        if isinstance(entry.record, SectionHeader):
            key = f"{entry.record.idstr}/{entry.record.instance_id}"
        elif isinstance(entry.record, DeviceState | Undecoded):
            found.append((key, bytes(entry.view)))
    return found


FOOTERS, DESCRIPTION = (Footer,), (VmDescriptionHeader, VmDescription)
STREAMS = [f"{kind}-{version}" for kind in ("pc-paused", "q35-many") for version in ("5.2", "7.2", "10.0", "11.1")]


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize(
    ("left_out", "sentences"),
    [
        (FOOTERS, [NO_FOOTERS]),
        (DESCRIPTION, [NO_DESCRIPTION]),
        ((Configuration,), [NO_CONFIGURATION]),
        ((Footer, *DESCRIPTION), [NO_FOOTERS, NO_DESCRIPTION]),
        ((Footer, Configuration, *DESCRIPTION), [NO_CONFIGURATION, NO_FOOTERS, NO_DESCRIPTION]),
    ],
    ids=["footers", "description", "configuration", "footers+description", "all"],
)
def test_without_what_tells_them_apart_the_sections_are_those_of_the_whole_stream(
    name: str, left_out: tuple[type, ...], sentences: list[str]
) -> None:
    data = stripped(name, *left_out)
    assert sections(data) == sections(corpus(name))
    assert said(data)[: len(sentences)] == sentences
    contents = InMemory(data).contents
    has_states = VmDescription not in left_out
    assert {s.state is not None for s in contents.sections if s.kind == SectionType.FULL} == {has_states}


@pytest.mark.parametrize("version", ["5.2", "7.2", "10.0", "11.1"])
def test_sections_of_a_package_without_footers_are_those_of_the_whole_package(version: str) -> None:
    name = f"pc-postcopy-{version}"
    data = stripped(name, Footer)
    assert sections(data) == sections(corpus(name))
    assert said(data)[0] == NO_FOOTERS


@pytest.mark.parametrize("version", ["5.2", "7.2", "10.0", "11.1"])
def test_a_package_is_decoded_by_the_description_of_a_precopy_run(version: str, tmp_path: Path) -> None:
    (text,) = (e.record for e in kept_entries(f"pc-running-{version}") if isinstance(e.record, VmDescription))
    path = tmp_path / "postcopy.mig"
    for footers in (True, False):
        path.write_bytes(corpus(f"pc-postcopy-{version}") if footers else stripped(f"pc-postcopy-{version}", Footer))
        with Migration(path, description=text.description) as migration:
            full = [section for section in migration.sections if section.kind == SectionType.FULL]
            assert len(full) == 30
            assert [section.key for section in full if section.state is None] == []
            assert (
                "There is no description of the devices (postcopy sends none): another stream's was used."
                in oddities(migration.contents)
            )
        with Migration(path, description=text.description) as migration:
            assert check(migration).identical


@pytest.mark.parametrize("name", ["q35-early-10.0", "q35-early-11.1", "pc-snapshot-11.1"])
def test_early_sections_and_snapshots_need_no_footers(name: str) -> None:
    whole = corpus(f"odd/{name}")
    data = stripped(f"odd/{name}", Footer)
    assert sections(data) == sections(whole)
    assert said(data)[0] == NO_FOOTERS
    sentences = [sentence for sentence in said(data)[1:] if " comes before " not in sentence]
    assert sentences == [sentence for sentence in said(whole) if " comes before " not in sentence]
    bare = stripped(f"odd/{name}", Footer, *DESCRIPTION)
    assert sections(bare) == sections(whole)


def test_two_early_sections_behind_rams_start_are_both_early() -> None:
    two = device("mem-early", b"\1" * 9, section_id=9) + device("mem-early", b"\2" * 9, section_id=10, instance_id=1)
    for footers in (True, False):
        parts = [HEAD, streams.ram_start(), two, streams.ram(), DEVICES, streams.devices_described()]
        data = b"".join(parts)
        if not footers:
            data = joined([e for e in kept(entries(data)) if not isinstance(e.record, Footer)])
        assert [key for key, _ in sections(data)] == [
            *("mem-early/0", "mem-early/1", "timer/0", "0000:00:04.0/serial/1"),
        ]
        assert sum(" comes before the contents of RAM" in sentence for sentence in said(data)) == 2


@pytest.mark.parametrize("version", ["5.2", "7.2", "10.0", "11.1"])
def test_slirps_old_style_sections_are_said(version: str) -> None:
    sentences = said(corpus(f"q35-many-{version}"))
    old = "slirp/{} is an old-style section: the description knows its length, and nothing of its inside."
    if version in ("5.2", "7.2"):
        assert sentences == ["2 sections are called slirp/0: they are told apart by their order alone.", old.format(0)]
    else:
        assert sentences == [old.format(0), old.format(1), SWITCHOVER]


def test_sections_of_one_name_may_have_descriptions_of_their_own() -> None:
    # As slirp's of 5.2 and 7.2, where one network has more to save than the other.
    lengths = (131, 200, 131)
    data = HEAD + RAM + b"".join(device("slirp", bytes(n), section_id=9 + n) for n in lengths) + streams.eof()
    entries_of = [described("slirp", field("data", "buffer", length)) for length in lengths]
    described_so = data + streams.description(*entries_of)
    assert [len(state) for _, state in sections(described_so)] == list(lengths)
    assert {s.state is None for s in InMemory(described_so).sections if s.kind == SectionType.FULL} == {False}


@pytest.mark.parametrize("version", ["5.2", "7.2", "10.0", "11.1"])
def test_precopy_with_the_postcopy_capability_is_said(version: str) -> None:
    sentences = said(corpus(f"q35-advised-{version}"))
    assert sentences == [ADVISED, *([SWITCHOVER] if version in ("10.0", "11.1") else [])]


@pytest.mark.parametrize("name", ["pc-running-5.2", "q35-running-11.1"])
def test_a_migration_that_was_cancelled_is_said(name: str) -> None:
    stream = corpus(name)
    ends = [section for section in InMemory(stream).sections if section.name == "ram"][-1]
    for cut in (ends.offset // 3, ends.offset, ends.offset + 10):
        contents = InMemory(stream[:cut]).contents
        assert not contents.complete
        assert isinstance(contents.errors[0], TruncatedError)
        assert oddities(contents)[-1] == CANCELLED
    contents = InMemory(stream[: ends.offset + ends.length + 500]).contents
    assert not contents.complete
    assert CANCELLED not in oddities(contents)


# -- the description


def test_a_description_of_length_0_is_said() -> None:
    for behind in (b"", b"anything", streams.minimal()):
        data = HEAD + RAM + DEVICES + b"\6\0\0\0\0" + behind
        sentences = said(data)
        assert sentences[0] == "The description of the devices is empty: they can't be decoded."
        assert [key for key, _ in sections(data)] == ["timer/0", "0000:00:04.0/serial/1"]


# -- what follows


SECOND: Final = HEAD + RAM + streams.eof() + b"\6\0\0\0\0"
FIRSTS: Final[dict[str, bytes]] = {
    "described": streams.minimal(),
    "not-described": HEAD + RAM + DEVICES,
    "empty-description": HEAD + RAM + DEVICES + b"\6\0\0\0\0",
    "postcopy": streams.postcopy(),
    "no-footers": joined([e for e in kept(entries(streams.minimal())) if not isinstance(e.record, Footer)]),
}


@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("second", [streams.minimal(), streams.postcopy(), SECOND], ids=["precopy", "postcopy", "bare"])
def test_a_second_stream_behind_the_first_is_said(first: str, second: bytes) -> None:
    data = FIRSTS[first]
    assert sections(data + second) == sections(data)
    assert said(data + second)[-1] == (
        f"{len(second)} bytes follow the end of the stream: another stream begins at {len(data):#x}."
    )


@pytest.mark.parametrize("first", ["described", "empty-description", "postcopy", "no-footers"])
@pytest.mark.parametrize("behind", [b"x", bytes(5000), b"\0\6" * 99], ids=["x", "zeros", "like-an-end"])
def test_other_bytes_behind_the_stream_are_said(first: str, behind: bytes) -> None:
    data = FIRSTS[first]
    assert sections(data + behind) == sections(data)
    follow = "1 byte follows" if len(behind) == 1 else f"{len(behind)} bytes follow"
    assert said(data + behind)[-1] == f"{follow} the end of the stream."


def test_more_than_may_be_kept_may_follow_a_stream() -> None:
    class Long(InMemory):
        def entries(self) -> Iterator[Entry]:
            return entries(self.data, limits=Limits(device_state=len(streams.minimal())))

    contents = Long(streams.minimal() + bytes(4 * MIB)).contents
    assert (contents.complete, contents.trailing) == (True, 4 * MIB)


@pytest.mark.parametrize("name", ["pc-paused-5.2", "q35-many-11.1"])
def test_the_end_is_known_before_the_input_ends(name: str) -> None:
    """A live destination waits for nothing behind the description; and so for a pipe that stays open."""
    data = corpus(name)
    feed = Feed()
    found, given = 0, 0
    for entry in walk(feed):
        if entry is not None:
            found += entry.length
            continue
        if found == len(data):
            break
        assert given < len(data), "it waits for more than there is"
        feed.receive(data[given : given + 65_536])
        given += 65_536
    assert found == len(data)


def test_the_end_is_found_on_a_pipe_too() -> None:
    data = corpus("odd/pc-bare-7.2")
    reader, writer = os.pipe()

    def feed_it() -> None:
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(data)

    thread = threading.Thread(target=feed_it)
    thread.start()
    with Migration(f"/dev/fd/{reader}") as migration:
        assert migration.complete
        assert oddities(migration.contents) == RECORDED["pc-bare-7.2"]
    thread.join()
    os.close(reader)


# -- RAM


def test_thousands_of_empty_parts_are_said_and_take_no_time() -> None:
    data = HEAD + streams.ram_start() + streams.ram_part() * 30_000 + streams.ram() + DEVICES
    assert said(data)[1] == "30000 PART sections of ram are empty: the source waited for its downtime limit."


def test_switchover_start_is_said() -> None:
    data = HEAD + streams.ram_start() + streams.ram_part() + command(SwitchoverStart()) + streams.ram_end() + DEVICES
    assert SWITCHOVER in said(data)


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("size", [1 << bits for bits in range(10, 17)])
def test_pages_of_any_size_are_read_and_said(size: int, announced: bool) -> None:
    """Arm boards, AVR, Alpha, OpenRISC, SPARC and TriCore have pages of 1 to 16 KiB, and announce few of them."""
    pages = [
        streams.zero(0, 3, block="ram", page_size=size),
        *(streams.page(size * index, os.urandom(size), page_size=size) for index in range(3, 6)),
        streams.zero(6 * size, 2, page_size=size),
        streams.page(0, block="rom", page_size=size),
    ]
    bits = size.bit_length() - 1
    parts = [
        streams.header() + streams.configuration("a-board", page_bits=bits if announced else None),
        streams.ram_start({"ram": 8 * size, "rom": size}) + streams.ram_part(*pages) + streams.ram_end(),
        streams.devices() + streams.eof() + streams.devices_described(),
    ]
    data = b"".join(parts)
    sentences = said(data)
    contents = InMemory(data).contents
    assert contents.page_size == size
    assert [block.seen.count for block in contents.blocks.values()] == [8, 1]
    assert InMemory(data, 1 if size < 4096 else 1000).contents.page_size == size
    expected = f"The target's pages have {size // KIB} KiB"
    how = "" if announced else ", which the stream does not announce: its records are whole only so"
    assert sentences == ([] if size == 4096 else [f"{expected}{how}."])


@pytest.mark.parametrize("advised", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_page_sizes_and_addresses_in_one_list_are_told_apart(advised: bool, order: int) -> None:
    # QEMU refuses to advise postcopy with x-ignore-shared; in a snapshot of both there is no ADVISE.
    blocks = [
        RamBlock(name="huge", used_length=4 * MIB, page_size=2 * MIB, address=0),
        RamBlock(name="alike", used_length=4 * MIB, page_size=None, address=2 * MIB),
        RamBlock(name="giant", used_length=1 << 30, page_size=1 << 30, address=1 << 30),
        RamBlock(name="small", used_length=4 * PAGE, page_size=None, address=1 << 32),
    ][::order]
    sizes = PageSizes(summary=(1 << 30) | 2 * MIB | PAGE, target_page_size=PAGE)
    head = streams.header() + streams.configuration(capabilities=["x-ignore-shared"])
    advise = command(OpenReturnPath()) + command(Ping(token=1)) + command(PostcopyAdvise(sizes=sizes))
    data = head + (advise if advised else b"") + streams.ram_start(blocks) + streams.ram_end() + DEVICES
    sentences = said(data)
    found = InMemory(data).blocks.values()
    assert [(b.name, b.page_size, b.address) for b in found] == [(b.name, b.page_size, b.address) for b in blocks]
    huge = ["huge (2 MiB)", "giant (1 GiB)"][::order]
    assert f"Some RAM lies on larger pages of the host: {', '.join(huge)}." in sentences
    names = ", ".join(block.name for block in blocks)
    assert (
        f"The block list has addresses: x-ignore-shared leaves shared RAM out, and none of {names} is in the stream."
        in sentences
    )
    assert f"2 RAM blocks have the same length, 4 MiB: {', '.join(['huge', 'alike'][::order])}." in sentences


NAMES: Final = [
    "a" * 255,
    "a" * 254 + "b",
    "A" * 255,
    "%41",
    "A",
    "a",
    "../a",
    "..",
    "x/y",
    "x%2Fy",
    "[/red]",
    "\x1b[2J",
]


def test_names_of_any_kind_are_read_said_and_extracted_apart(tmp_path: Path) -> None:
    # Each block has its own page, so that what one would write over another shows.
    length = MIB
    page: Callable[[int], bytes] = lambda index: bytes([index + 1]) * PAGE  # noqa: E731
    pages = [streams.page(0, page(index), block=name) for index, name in enumerate(NAMES)]
    parts = [HEAD, streams.ram_start(dict.fromkeys(NAMES, length)), streams.ram_part(*pages), streams.ram_end()]
    data = b"".join(parts) + DEVICES + streams.devices_described()
    sentences = said(data)
    assert sentences == [f"{len(NAMES)} RAM blocks have the same length, 1 MiB: {', '.join(NAMES)}."]
    extracted = extract(InMemory(data), tmp_path / "ram")
    assert list(extracted.files) == NAMES
    written = [tmp_path / "ram" / file for file in extracted.files.values()]
    assert {path.name for path in (tmp_path / "ram").iterdir()} == {"blocks.json", *extracted.files.values()}
    assert len({file.lower() for file in extracted.files.values()}) == len(NAMES)
    for index, path in enumerate(written):
        assert path.parent == tmp_path / "ram"
        assert path.stat().st_size == length
        with path.open("rb") as file:
            assert file.read(PAGE) == page(index)


def test_a_size_that_nothing_shows_is_not_guessed_from_damage() -> None:
    data = HEAD + streams.ram_start() + streams.ram_part((0x0400 | 0x08).to_bytes(8) + bytes(2000))
    (error,) = InMemory(data).contents.errors
    assert isinstance(error, StreamError)
    assert "unknown flags 0x400" in str(error)
