"""Records to bytes: the mirror of the walk.  One changed value changes its bytes and no others."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from qmigrate.errors import StreamError
from qmigrate.format.command import (
    Command,
    DiscardRange,
    OpenReturnPath,
    Packaged,
    PageSizes,
    Ping,
    PostcopyAdvise,
    PostcopyRamDiscard,
    RecvBitmap,
)
from qmigrate.format.entry import (
    Configuration,
    ConfigurationSubsection,
    DeviceState,
    Entry,
    RamPage,
    StreamRecord,
    Trailing,
    Undecoded,
    VmDescription,
)
from qmigrate.format.ram import BlockList, PageRun, Pages, RamBlock, RamFlag, RamRecord, RamWord
from qmigrate.format.stream import (
    CapabilityName,
    ConfigurationCapabilities,
    ConfigurationTargetPageBits,
    ConfigurationUuid,
    EndOfFile,
    FileHeader,
    Footer,
    SectionHeader,
    SectionPart,
    SectionType,
    SubsectionHeader,
    VmDescriptionHeader,
)
from qmigrate.format.vm_state import Field, VmState
from qmigrate.format.write import encode, write
from tests import streams
from tests.streams import PAGE, command, described, device, field, struct_of
from tests.walking import CORPUS, corpus, entries, kept

UUID = SubsectionHeader(name="configuration/uuid", version=1).build() + bytes(range(16))
STATE = bytes.fromhex("01 fffffffe 0003 02 aabb 0000000000000007 30 cc") + bytes.fromhex(
    "05 03 642f73 00000001 09"  # subsection d/s
)
STATE_DESCRIBED = described(
    "d",
    field("flag", "bool", 1),
    field("number", "int32", 4),
    field("words", "uint8", 1, array_len=2),
    field("inner", "struct", 1, struct=struct_of("inner", field("x", "uint8", 1))),
    field("raw", "buffer", 2),
    field("bits", "bitmap", 8),
    field("null", "ptr-marker", 1),
    field("odd", "flux", 1),
    subsections=[struct_of("d/s", field("y", "uint8", 1))],
)
ADVISE = PostcopyAdvise(sizes=PageSizes(summary=PAGE, target_page_size=PAGE))
EVERYTHING = b"".join(
    (
        streams.header(),
        streams.configuration("virt-9.2", page_bits=12, capabilities=["x-ignore-shared"]) + UUID,
        command(OpenReturnPath()),
        command(Ping(token=1)),
        command(ADVISE),
        command(RecvBitmap(block="ram")),
        streams.ram_start([RamBlock(name="ram", used_length=8 * PAGE, page_size=None, address=0x7000)]),
        streams.ram_part(
            streams.page(0, block="ram"),
            streams.page(PAGE),
            streams.page(2 * PAGE),
            streams.zero(3 * PAGE, 2),
            streams.zero(5 * PAGE, block="ram"),
            streams.zero(6 * PAGE, fill=7),
            streams.xbzrle(0, b"\0\1\2"),
            RamFlag.MULTIFD_FLUSH.to_bytes(8),
        ),
        command(PostcopyRamDiscard(block="ram", ranges=(DiscardRange(start=0, length=PAGE),))),
        streams.package(command(Ping(token=3)), device("u", b"undecoded", section_id=9)),
        streams.ram_end(),
        device("d", STATE, section_id=5, instance_id=2, version_id=3),
        streams.eof(),
        streams.description(STATE_DESCRIBED | {"instance_id": 2}),
        b"behind",
    )
)


def everything() -> list[Entry]:
    return list(kept(entries(EVERYTHING)))


@pytest.mark.parametrize("stream", [EVERYTHING, streams.minimal(), streams.postcopy()])
def test_what_is_written_is_what_was_read(stream: bytes) -> None:
    assert b"".join(write(entries(stream))) == stream


@pytest.mark.parametrize("name", CORPUS)
def test_a_real_stream_is_written_as_it_was_read(name: str) -> None:
    stream = corpus(name)
    assert b"".join(write(entries(stream))) == stream


def test_every_kind_of_record_is_here() -> None:
    kinds = {type(entry.record) for entry in everything()}
    assert kinds >= {
        *(FileHeader, Configuration, SectionHeader, SectionPart, Footer, EndOfFile, VmDescriptionHeader),
        *(OpenReturnPath, Ping, PostcopyAdvise, RecvBitmap, PostcopyRamDiscard, Packaged),
        *(BlockList, Pages, RamPage, RamRecord, DeviceState, Undecoded, VmDescription, Trailing),
    }


# -- one value changed in each kind of record


def replace(**changes: Any) -> Callable[[Any], Any]:
    return lambda record: dataclasses.replace(record, **changes)


def subsection(index: int, **changes: Any) -> Callable[[Configuration], Configuration]:
    """Changes in the header or the body of one of CONFIGURATION's subsections."""

    def change(record: Configuration) -> Configuration:
        items: list[ConfigurationSubsection] = list(record.subsections)
        part = "header" if {"name", "version"} & set(changes) else "body"
        items[index] = dataclasses.replace(
            items[index], **{part: dataclasses.replace(getattr(items[index], part), **changes)}
        )
        return dataclasses.replace(record, subsections=tuple(items))

    return change


def block(**changes: Any) -> Callable[[BlockList], BlockList]:
    return lambda record: dataclasses.replace(record, blocks=(dataclasses.replace(record.blocks[0], **changes),))


def run(**changes: Any) -> Callable[[Pages], Pages]:
    def change(record: Pages) -> Pages:
        first, *others = record.runs
        return record._replace(runs=[PageRun(*first)._replace(**changes), *others])

    return change


def state(name: str, value: Any) -> Callable[[DeviceState], DeviceState]:
    def in_fields(fields: tuple[Field, ...]) -> tuple[Field, ...]:
        return tuple(
            dataclasses.replace(one, value=value)
            if one.name == name
            else dataclasses.replace(one, value=in_state(one.value))
            if isinstance(one.value, VmState)
            else one
            for one in fields
        )

    def in_state(found: VmState) -> VmState:
        subsections = tuple(dataclasses.replace(item, state=in_state(item.state)) for item in found.subsections)
        return dataclasses.replace(found, fields=in_fields(found.fields), subsections=subsections)

    return lambda record: DeviceState(in_state(record.state))


def state_subsection(**changes: Any) -> Callable[[DeviceState], DeviceState]:
    def change(record: DeviceState) -> DeviceState:
        (item,) = record.state.subsections
        changed = dataclasses.replace(item, **changes)
        return DeviceState(dataclasses.replace(record.state, subsections=(changed,)))

    return change


def word(start: int, flags: int) -> Callable[[RamRecord], RamRecord]:
    return replace(word=RamWord(start, flags))


# The record, which of its kind, what is changed, and the bytes that then differ: where in the record, and to what.
CHANGES: list[tuple[type, int, Callable[[Any], StreamRecord], dict[int, str]]] = [
    (FileHeader, 0, replace(magic=0x51455600), {3: "00"}),
    (FileHeader, 0, replace(version=2), {7: "02"}),
    (Configuration, 0, replace(machine_type="virt-9.1"), {12: "31"}),
    (Configuration, 0, subsection(0, version=2), {48: "02"}),
    (Configuration, 0, subsection(0, target_page_bits=13), {52: "0d"}),
    (Configuration, 0, subsection(1, name="configuration/capabilitieS"), {80: "53"}),
    (
        Configuration,
        0,
        subsection(1, names=(CapabilityName(name="x-ignore-shareD"),)),
        {104: "44"},
    ),
    (Configuration, 0, subsection(2, uuid=bytes(15) + b"\xff"), {**{129 + i: "00" for i in range(1, 15)}, 144: "ff"}),
    (SectionHeader, 0, replace(kind=SectionType.FULL), {0: "04"}),
    (SectionHeader, 0, replace(section_id=0x01020304), {1: "01", 2: "02", 3: "03", 4: "04"}),
    (SectionHeader, 0, replace(idstr="rom"), {7: "6f"}),
    (SectionHeader, 0, replace(instance_id=1), {12: "01"}),
    (SectionHeader, 0, replace(version_id=3), {16: "03"}),
    (SectionPart, 0, replace(kind=SectionType.END), {0: "03"}),
    (SectionPart, 0, replace(section_id=3), {4: "03"}),
    (Footer, 0, replace(section_id=3), {4: "03"}),
    (VmDescriptionHeader, 0, lambda head: VmDescriptionHeader(length=head.length + 0x1000000), {1: "01"}),
    (Ping, 0, replace(token=0x42), {8: "42"}),
    (PostcopyAdvise, 0, replace(sizes=PageSizes(summary=0x1001, target_page_size=PAGE)), {12: "01"}),
    (PostcopyAdvise, 0, replace(sizes=PageSizes(summary=PAGE, target_page_size=0x1001)), {20: "01"}),
    (RecvBitmap, 0, replace(block="rom"), {7: "6f"}),
    (PostcopyRamDiscard, 0, replace(version=1), {5: "01"}),
    (PostcopyRamDiscard, 0, replace(block="rom"), {8: "6f"}),
    (PostcopyRamDiscard, 0, replace(terminator=1), {10: "01"}),
    (PostcopyRamDiscard, 0, replace(ranges=(DiscardRange(start=1, length=PAGE),)), {18: "01"}),
    (PostcopyRamDiscard, 0, replace(ranges=(DiscardRange(start=0, length=0x1001),)), {26: "01"}),
    (Packaged, 0, replace(length=0xFF), {8: "ff"}),
    (BlockList, 0, replace(total=0x10008000), {4: "10"}),
    (BlockList, 0, block(name="rom"), {10: "6f"}),
    (BlockList, 0, block(used_length=0x9000), {18: "90"}),
    (BlockList, 0, block(address=0x7001), {27: "01"}),
    (Pages, 0, run(start=0x9000), {6: "90"}),
    (Pages, 0, lambda pages: pages._replace(block="rom"), {10: "6f"}),
    (Pages, 1, run(start=0x9000), {6: "90", 4104 + 6: "a0"}),
    (Pages, 2, lambda pages: pages._replace(block="rom"), {10: "6f"}),
    (Pages, 2, lambda pages: pages._replace(fill=9), {12: "09"}),
    (Pages, 3, lambda pages: pages._replace(fill=9), {8: "09"}),
    (RamPage, 0, lambda page: dataclasses.replace(page, record=word(0x1000, 0x60)(page.record)), {6: "10"}),
    (RamRecord, 1, word(0, 0x80), {6: "00", 7: "80"}),
    (DeviceState, 0, state("flag", False), {0: "00"}),
    (DeviceState, 0, state("flag", 7), {0: "07"}),
    (DeviceState, 0, state("number", 1), {1: "00", 2: "00", 3: "00", 4: "01"}),
    (DeviceState, 0, state("words", (0, 5)), {6: "05"}),
    (DeviceState, 0, state("x", 0xFF), {7: "ff"}),
    (DeviceState, 0, state("raw", b"\xaa\x00"), {9: "00"}),
    (DeviceState, 0, state("bits", (0x17,)), {17: "17"}),
    (DeviceState, 0, state("null", True), {18: "31"}),
    (DeviceState, 0, state("odd", b"\xcd"), {19: "cd"}),
    (DeviceState, 0, state("y", 8), {29: "08"}),
    (DeviceState, 0, state_subsection(version=2), {28: "02"}),
    (DeviceState, 0, state_subsection(name="d/t"), {24: "74"}),
    (Undecoded, 0, replace(data=b"Undecoded"), {0: "55"}),
    (Trailing, 0, replace(data=b"Behind"), {0: "42"}),
]


@pytest.mark.parametrize(
    ("kind", "number", "change", "expected"), CHANGES, ids=[f"{row[0].__name__}-{n}" for n, row in enumerate(CHANGES)]
)
def test_one_changed_value_changes_its_bytes_and_no_others(
    kind: type, number: int, change: Callable[[Any], StreamRecord], expected: dict[int, str]
) -> None:
    entry = [entry for entry in everything() if type(entry.record) is kind][number]
    changed = change(entry.record)
    written = bytes(encode(changed, contents=entry.view))
    assert len(written) == entry.length
    differing = {at: f"{byte:02x}" for at, byte in enumerate(written) if byte != entry.view[at]}
    assert differing == expected


def test_the_text_of_the_description_is_written_as_it_is() -> None:
    entry = next(entry for entry in everything() if isinstance(entry.record, VmDescription))
    assert encode(VmDescription(b"{}")) == b"{}"
    assert encode(entry.record) == bytes(entry.view)


# -- pages


def pages(*runs: tuple[int, int, int], named: bool = False, fill: int = 0, name: str = "ram") -> Pages:
    """Runs of (flag, start, count)."""
    return Pages(name, named, PAGE, fill, [PageRun(0, *one) for one in runs])


def test_zero_pages_need_no_contents() -> None:
    zeros = pages((RamFlag.ZERO, 0, 3), (RamFlag.ZERO, 0x8000, 1), named=True)
    assert encode(zeros) == streams.zero(0, 3, block="ram") + streams.zero(0x8000)
    assert encode(pages((RamFlag.ZERO, 0x1000, 2), fill=5)) == streams.zero(0x1000, 2, fill=5)


def test_a_run_of_another_kind_has_other_bytes() -> None:
    normal = streams.page(0x1000, b"x" * PAGE) + streams.page(0x2000, b"y" * PAGE)
    assert encode(pages((RamFlag.PAGE, 0x1000, 2)), contents=normal) == normal
    assert encode(pages((RamFlag.ZERO, 0x1000, 2))) == streams.zero(0x1000, 2)


def test_a_name_of_any_length_is_written() -> None:
    for name in ("", "a", "x" * 255, "\udcff"):
        raw = streams.page(0x1000, block=name)
        assert encode(pages((RamFlag.PAGE, 0x1000, 1), named=True, name=name), contents=raw) == raw


@pytest.mark.parametrize(
    ("record", "contents", "message"),
    [
        (pages((RamFlag.PAGE, 0, 1)), None, "the runs take 4104 bytes, 0 bytes of contents are given"),
        (pages((RamFlag.PAGE, 0, 1)), bytes(4103), "the runs take 4104 bytes, 4103 bytes of contents are given"),
        (pages((RamFlag.ZERO, 0, 1), named=True), bytes(9), "the runs take 13 bytes, 9 bytes of contents are given"),
        (pages((RamFlag.ZERO, 0x1001, 1)), None, "the offset 0x1001 is not a multiple of the page's size"),
        (pages((RamFlag.ZERO, 0, 1), named=True, name="x" * 256), None, "holds at most 255 bytes"),
        (pages((RamFlag.ZERO, 0, 1), fill=256), None, "the runs can't be written: "),
        (pages((RamFlag.ZERO, 0, 1), fill=256, named=True), None, "the runs can't be written: "),
        (pages((RamFlag.ZERO, 1 << 64, 1)), None, "the runs can't be written: "),
        (pages((RamFlag.ZERO, 1 << 64, 1), named=True), None, "the runs can't be written: "),
    ],
)
def test_pages_without_room_are_refused(record: Pages, contents: bytes | None, message: str) -> None:
    with pytest.raises(StreamError) as caught:
        encode(record, contents=contents)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "record",
    [
        Ping(token=1 << 32),
        RecvBitmap(block="x" * 256),
        SectionHeader(kind=SectionType.FULL, section_id=-1, idstr="a", instance_id=0, version_id=0),
        Configuration(
            machine_type="a",
            subsections=(
                ConfigurationSubsection(
                    header=SubsectionHeader(name="configuration/uuid", version=1), body=ConfigurationUuid(uuid=b"short")
                ),
            ),
        ),
        Configuration(
            machine_type="a",
            subsections=(
                ConfigurationSubsection(
                    header=SubsectionHeader(name="c", version=1), body=ConfigurationTargetPageBits(target_page_bits=-1)
                ),
            ),
        ),
        ConfigurationCapabilities(count=0, names=(CapabilityName(name="a"),)),
    ],
)
def test_a_value_without_room_is_refused(record: "StreamRecord | Command") -> None:
    with pytest.raises(StreamError, match="can't be written: "):
        encode(record)
