"""Two captures compared: the machine, each field, each page as the streams leave it."""

import json
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qmigrate.report
from qmigrate.analysis.devices import find_field, plain
from qmigrate.analysis.diff import Diff, describe_diff, diff, read_side
from qmigrate.analysis.diff_fields import ABSENT
from qmigrate.analysis.diff_ram import SpoolError
from qmigrate.format.command import PostcopyListen, PostcopyRun
from qmigrate.format.stream import SectionType, SubsectionHeader
from tests import streams
from tests.capture.test_joining import of_two, state
from tests.streams import PAGE, TIMER_FIELDS, described, description, device, field, struct_of
from tests.walking import CORPUS, InMemory, corpus

HEAD = streams.header() + streams.configuration()


def compared(a: bytes, b: bytes, *, ram: bool = True, ignore: tuple[str, ...] = ()) -> Diff:
    with ExitStack() as stack:
        one, other = (read_side(InMemory(data), name, stack, ram=ram) for name, data in (("a", a), ("b", b)))
        found = diff(one, other, ignore=ignore)
    validator().validate(describe_diff(found))
    return found


@cache
def validator() -> Any:
    schema = json.loads((Path(qmigrate.report.__file__).parent / "diff.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def stream(*devices: bytes, known: bytes, ram: bytes = b"") -> bytes:
    return HEAD + streams.ram_start() + (ram or streams.ram()) + b"".join(devices) + streams.eof() + known


def timer(ticks: int, *, flag: bool = True, unused: bytes = bytes(8), **more: Any) -> bytes:
    return device("timer", struct.pack(">q8s?", ticks, unused, flag), section_id=0, version_id=2, **more)


TIMER = description(described("timer", *TIMER_FIELDS))


def paths(found: Diff) -> list[str]:
    return [each.path for each in found.fields]


# -- the same


def test_a_stream_is_the_same_as_itself() -> None:
    found = compared(streams.minimal(), streams.minimal())
    assert found.same
    assert found.complete
    assert (found.structure, found.fields, found.ignored, found.not_compared) == ([], [], 0, [])
    assert found.compared == 12
    assert [block.unequal for block in found.blocks or []] == [0, 0]


def mapped(pages: dict[str, list[bytes | None]]) -> bytes:
    head = streams.header() + streams.configuration(capabilities=["mapped-ram"])
    start = streams.mapped_ram_start(pages, begin=len(head))
    return (
        head
        + start
        + streams.ram_part()
        + streams.ram_end()
        + streams.devices()
        + streams.eof()
        + streams.devices_described()
    )


def contents_of(start: int) -> bytes:
    return struct.pack(">Q", start) * (PAGE // 8)


def test_many_passes_and_a_place_for_each_page_are_the_same() -> None:
    pages: list[bytes | None] = [contents_of(at * PAGE) if at in (4, 5) else None for at in range(16)]
    found = compared(streams.minimal(), mapped({"pc.ram": pages, "pc.rom": [contents_of(0), None]}))
    assert found.same
    # How it travelled is told, and is no difference.
    assert [(each.what, each.name, each.a, each.b, each.counts) for each in found.structure] == [
        ("capability", "mapped-ram", False, True, False)
    ]


def test_what_counts_is_the_last_copy_of_a_page() -> None:
    last = streams.ram_part(streams.page(0, block="pc.ram"), streams.page(0, b"x" * PAGE)) + streams.ram_end(
        streams.zero(PAGE, block="pc.ram")
    )
    once = streams.ram_part(streams.page(0, b"x" * PAGE, block="pc.ram")) + streams.ram_end()
    both = [stream(timer(1), known=TIMER, ram=ram) for ram in (last, once)]
    assert compared(*both).same


# -- fields


def test_each_field_that_differs_is_named_with_both_values_in_the_streams_order() -> None:
    found = compared(stream(timer(1), known=TIMER), stream(timer(-7, flag=False), known=TIMER))
    assert [(each.path, each.a, each.b) for each in found.fields] == [
        ("timer/0.cpu_ticks_offset", 1, -7),
        ("timer/0.flag", True, False),
    ]
    assert not found.same


def test_a_path_is_what_dissect_takes_for_the_field() -> None:
    inner = struct_of("inner", field("x", "uint8", 1), field("y.z", "uint8", 1, array_len=2))
    known = description(described("a/b.c", field("s", "struct", 3, array_len=2, struct=inner), instance_id=4))
    a, b = (
        stream(device("a/b.c", data, section_id=3, instance_id=4), known=known)
        for data in (b"\1\2\3\4\5\6", b"\1\2\x33\x44\5\x66")
    )
    found = compared(a, b)
    assert paths(found) == ["a/b.c/4.s[0].y.z[1]", "a/b.c/4.s[1].x", "a/b.c/4.s[1].y.z[1]"]
    for each in found.fields:
        assert [value for _, _, value in find_field(found.a.contents, each.path)] == [plain(each.a)]
        assert [value for _, _, value in find_field(found.b.contents, each.path)] == [plain(each.b)]


@pytest.mark.parametrize("names", [("pc-running-11.1", "pc-paused-11.1"), ("q35-many-7.2", "q35-many-11.1")])
def test_the_paths_of_real_machines_are_what_dissect_takes(names: tuple[str, str]) -> None:
    found = compared(*map(corpus, names), ram=False)
    assert len(found.fields) > 10
    for each in found.fields[:: max(len(found.fields) // 40, 1)]:
        # 5.2 to 7.2 call several devices alike; a long buffer's values are pieces of it.
        for side, value in ((found.a, each.a), (found.b, each.b)):
            if value is not ABSENT and each.offset is None:
                assert plain(value) in [tree for _, _, tree in find_field(side.contents, each.path)], each.path


def test_long_bytes_are_shown_from_where_they_differ_first() -> None:
    known = description(described("a", field("data", "buffer", 100)))
    data = bytes(range(100))
    changed = data[:70] + b"\xff" + data[71:]
    both = [stream(device("a", each, section_id=3), known=known) for each in (data, changed)]
    (each,) = compared(*both).fields
    assert (each.path, each.offset, each.lengths) == ("a/0.data", 70, (100, 100))
    assert (each.a, each.b) == (data[70:86], changed[70:86])


def test_a_field_that_one_side_lacks_is_absent_there() -> None:
    less = description(described("timer", *TIMER_FIELDS[:2]))
    short = device("timer", struct.pack(">q8s", 1, bytes(8)), section_id=0, version_id=2)
    found = compared(stream(timer(1), known=TIMER), stream(short, known=less))
    assert [(each.path, each.a, each.b) for each in found.fields] == [("timer/0.flag", True, ABSENT)]
    assert describe_diff(found)["fields"] == [{"path": "timer/0.flag", "a": True}]


def test_arrays_of_different_lengths_differ_in_the_elements_that_one_lacks() -> None:
    both = [
        stream(
            device("a", bytes(length), section_id=3),
            known=description(described("a", field("x", "uint8", 1, array_len=length))),
        )
        for length in (2, 3)
    ]
    assert [(each.path, each.a, each.b) for each in compared(*both).fields] == [("a/0.x[2]", ABSENT, 0)]


@pytest.mark.parametrize("is_struct", [False, True])
def test_an_array_of_one_is_held_to_the_first_of_many(is_struct: bool) -> None:
    """QEMU does not describe it as an array: so it is when one machine has one CPU and the other has several."""
    pair = struct_of("pair", field("y", "uint8", 1))
    one = field("x", "struct", 1, struct=pair) if is_struct else field("x", "uint8", 1)
    knowns = [description(described("a", one)), description(described("a", one | {"array_len": 3}))]
    for first in (b"\1", b"\5"):
        data = (b"\1", first + b"\2\3")
        both = [stream(device("a", each, section_id=3), known=known) for each, known in zip(data, knowns, strict=True)]
        found = compared(*both)
        inner = ".y" if is_struct else ""
        differs = [] if first == b"\1" else [f"a/0.x[0]{inner}"]
        assert paths(found) == [*differs, "a/0.x[1]", "a/0.x[2]"]
        assert paths(compared(*reversed(both))) == paths(found)
        contents = found.a.contents
        assert [value for *_, value in find_field(contents, f"a.x[0]{inner}")] == [1]
        assert find_field(contents, f"a.x[1]{inner}") == []


def test_a_buffer_is_not_held_to_the_elements_of_an_array() -> None:
    kinds = (field("x", "buffer", 2), field("x", "uint8", 1, array_len=2))
    both = [
        stream(device("a", data, section_id=3), known=description(described("a", kind)))
        for data, kind in zip((b"ab", b"cd"), kinds, strict=True)
    ]
    assert paths(compared(*both)) == ["a/0.x"]


@given(st.binary(min_size=6, max_size=6), st.binary(min_size=6, max_size=6))
def test_fields_differ_exactly_where_their_bytes_do(one: bytes, other: bytes) -> None:
    pair = struct_of("pair", field("x", "uint8", 1), field("y", "uint8", 1))
    known = description(described("a", field("s", "struct", 2, array_len=3, struct=pair)))
    found = compared(*(stream(device("a", data, section_id=3), known=known) for data in (one, other)), ram=False)
    expected = [f"a/0.s[{at // 2}].{'xy'[at % 2]}" for at in range(6) if one[at] != other[at]]
    assert paths(found) == expected
    assert found.same == (one == other)


# -- what shall not matter


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("timer.cpu_ticks_offset", ["timer/0.flag", "0000:00:04.0/serial/1.lines[1].irq"]),
        ("timer/0.*", ["0000:00:04.0/serial/1.lines[1].irq"]),
        ("timer", ["0000:00:04.0/serial/1.lines[1].irq"]),
        ("serial.lines", ["timer/0.cpu_ticks_offset", "timer/0.flag"]),
        ("serial/1.lines[1].irq", ["timer/0.cpu_ticks_offset", "timer/0.flag"]),
        ("0000:00:04.0/serial.lines[?]", ["timer/0.cpu_ticks_offset", "timer/0.flag"]),
        ("*.lines[*].irq", ["timer/0.cpu_ticks_offset", "timer/0.flag"]),
        ("*", []),
        # No kind of set, and no beginning of a name.
        ("serial.lines[12].irq", ["timer/0.cpu_ticks_offset", "timer/0.flag", "0000:00:04.0/serial/1.lines[1].irq"]),
        ("time", ["timer/0.cpu_ticks_offset", "timer/0.flag", "0000:00:04.0/serial/1.lines[1].irq"]),
    ],
)
def test_what_is_ignored_is_named_as_dissect_names_it(pattern: str, left: list[str]) -> None:
    changed = bytearray(streams.SERIAL_STATE)
    changed[-3] ^= 1
    serial = device("0000:00:04.0/serial", bytes(changed), section_id=7, instance_id=1, version_id=3)
    other = HEAD + streams.ram_start() + streams.ram() + timer(1, flag=False) + serial
    found = compared(streams.minimal(), other + streams.eof() + streams.devices_described(), ignore=(pattern,))
    assert paths(found) == left
    assert found.ignored == 3 - len(left)
    assert found.same == (not left)


# -- structure


def test_what_one_machine_lacks_is_told() -> None:
    blocks = {"pc.ram": 16 * PAGE, "vga": PAGE}
    ram = streams.ram_part(streams.zero(0, 16, block="pc.ram"), streams.zero(0, block="vga")) + streams.ram_end()
    head = streams.header() + streams.configuration("pc-i440fx-7.2")
    b = head + streams.ram_start(blocks) + ram + timer(-5) + streams.eof() + TIMER
    found = compared(streams.minimal(), b)
    assert [(each.what, each.name, each.a, each.b) for each in found.structure] == [
        ("machine", "machine type", "pc-q35-10.0", "pc-i440fx-7.2"),
        ("block", "pc.rom", 2 * PAGE, None),
        ("block", "vga", None, PAGE),
        ("device", "0000:00:04.0/serial/1", 3, None),
    ]
    assert all(each.counts for each in found.structure)


def test_another_version_and_a_subsection_are_told() -> None:
    extra = struct_of("timer/more", field("x", "uint8", 1))
    with_extra = description(described("timer", *TIMER_FIELDS, subsections=[extra]))
    data = struct.pack(">q8s?", 1, bytes(8), True) + b"\5\x0atimer/more\0\0\0\1\x07"
    found = compared(
        stream(timer(1), known=TIMER), stream(device("timer", data, section_id=0, version_id=3), known=with_extra)
    )
    assert [(each.what, each.name, each.a, each.b) for each in found.structure] == [
        ("device", "timer/0", 2, 3),
        ("subsection", "timer/0.timer/more", None, 1),
    ]
    assert found.fields == []


def test_what_is_ignored_of_devices_may_be_absent_too() -> None:
    without = HEAD + streams.ram_start() + streams.ram() + timer(-5) + streams.eof() + TIMER
    for pattern, same in (("serial", True), ("*/serial/1", True), ("serial.id", False)):
        found = compared(streams.minimal(), without, ignore=(pattern,))
        assert (found.same, found.ignored) == (same, int(same))


def test_blocks_of_other_lengths_are_compared_as_far_as_both_go() -> None:
    both = [
        HEAD + streams.ram_start({"a": length}) + streams.ram_part(streams.page(PAGE, fill, block="a"))
        + streams.ram_end() + timer(1) + streams.eof() + TIMER
        for length, fill in ((2 * PAGE, b"1" * PAGE), (3 * PAGE, b"2" * PAGE))
    ]  # fmt: skip
    found = compared(*both)
    assert [(each.what, each.a, each.b) for each in found.structure] == [("block", 2 * PAGE, 3 * PAGE)]
    (block,) = found.blocks or []
    assert (block.length, list(block.ranges)) == (2 * PAGE, [PAGE, PAGE])


def test_sections_of_one_name_are_told_apart_by_their_order() -> None:
    known = description(described("slirp", field("x", "uint8", 1)))
    both = [
        stream(device("slirp", one, section_id=3), device("slirp", b"\2", section_id=4), known=known)
        for one in (b"\1", b"\7")
    ]
    assert [(each.path, each.a, each.b) for each in compared(*both).fields] == [("slirp/0.x", 1, 7)]
    fewer = stream(device("slirp", b"\1", section_id=3), known=known)
    assert [(each.what, each.name) for each in compared(both[0], fewer).structure] == [("device", "slirp/0")]


# -- without a description


def postcopy(*devices: bytes) -> bytes:
    package = streams.package(streams.command(PostcopyListen()), *devices, streams.command(PostcopyRun()))
    return HEAD + streams.ram_start() + streams.ram() + package + streams.ram_end() + streams.eof()


def test_a_side_without_a_description_is_decoded_by_that_of_the_other() -> None:
    for a, b in (
        (stream(timer(1), known=TIMER), postcopy(timer(2))),
        (postcopy(timer(1)), stream(timer(2), known=TIMER)),
    ):
        found = compared(a, b)
        assert [(each.path, each.a, each.b) for each in found.fields] == [("timer/0.cpu_ticks_offset", 1, 2)]


def test_sections_that_nobody_decodes_are_compared_byte_by_byte() -> None:
    found = compared(postcopy(timer(1)), postcopy(timer(1)))
    assert (found.same, found.compared, found.as_bytes) == (True, 0, ["timer/0"])
    (each,) = compared(postcopy(timer(1)), postcopy(timer(2))).fields
    assert (each.path, each.offset, each.lengths) == ("timer/0", 7, (17, 17))


def test_an_undecoded_section_is_held_to_the_bytes_of_a_decoded_one() -> None:
    odd = device("timer", bytes(3), section_id=0, version_id=2)
    (each,) = compared(stream(timer(1), known=TIMER), postcopy(odd)).fields
    assert (each.path, each.lengths) == ("timer/0", (17, 3))


# -- what can't be compared


# a ends at its first footer, or goes on to the second one: format/test_tail.py
TWO_READINGS = (
    device("a", b"1", section_id=3)
    + device("c", b"2", section_id=9)
    + device("a", b"3", section_id=3)
    + device("d", b"d", section_id=4)
)


def test_sections_that_are_no_ones_field_are_said_to_be_compared_as_bytes() -> None:
    described = describe_diff(compared(postcopy(timer(1)), postcopy(timer(1))))
    assert (described["same"], described["compared_as_bytes"]) == (True, ["timer/0"])
    decoded = describe_diff(compared(stream(timer(1), known=TIMER), postcopy(timer(1))))
    assert (decoded["same"], decoded["compared_as_bytes"], decoded["fields_compared"]) == (True, [], 3)


def live(records: bytes, name: str = "dirty-bitmap", kind: SectionType = SectionType.START) -> bytes:
    opened = streams.section(kind, name, section_id=9) if kind is SectionType.START else b"\3\0\0\0\x09"
    return opened + records + streams.footer(9)


def with_live(*sections: bytes) -> bytes:
    return HEAD + b"".join(sections) + streams.ram_start() + streams.ram() + timer(1) + streams.eof() + TIMER


BITMAP = bytes.fromhex("1c 02 6e30 03 626d31 00010000 01 01")
BITMAP_END = bytes.fromhex("24 03 626d31 01")


def test_live_sections_are_the_same_where_their_records_are() -> None:
    one = with_live(live(BITMAP))
    found = compared(one, one)
    assert (found.same, found.as_bytes, found.not_compared) == (True, ["dirty-bitmap/0"], [])


def test_live_sections_that_travelled_otherwise_are_not_said_to_be_the_same() -> None:
    one, other = (with_live(live(BITMAP.replace(b"bm1", name))) for name in (b"bm1", b"bm2"))
    found = compared(one, other)
    assert found.same  # as far as it can be told
    (each,) = found.not_compared
    assert (each.name, each.reason) == ("dirty-bitmap/0", "its records are not the same, which may be how it travelled")
    assert compared(one, other, ignore=("dirty-bitmap",)).not_compared == []
    (lone,) = compared(one, with_live()).structure
    assert (lone.what, lone.name, lone.a, lone.b) == ("live section", "dirty-bitmap/0", 1, None)


def test_device_state_over_channels_is_the_same_where_its_pieces_are(tmp_path: Path) -> None:
    def held_to(*epochs: Sequence[bytes]) -> Diff:
        with ExitStack() as stack:
            sides = []
            for name, given_epochs in (("a", [[state(b"one"), state(b"two")]]), ("b", epochs)):
                (tmp_path / name).mkdir(exist_ok=True)
                with of_two(tmp_path / name, *given_epochs) as migration:
                    sides.append(read_side(migration, name, stack))
            return diff(*sides)

    found = held_to([state(b"two"), b""], [b"", state(b"one")])
    assert (found.same, found.as_bytes[2:], found.not_compared) == (True, ["0000:00:05.0/vfio/0"], [])
    for other in (state(b"twx"), b"", state(b"two") + state(b"two")):
        found = held_to([state(b"one"), other])
        (each,) = found.not_compared
        reason = "the pieces of its state that came over multifd channels are not the same on both sides"
        assert (each.name, each.reason, found.as_bytes[2:]) == ("0000:00:05.0/vfio/0", reason, [])


def test_ram_that_is_left_out_is_not_said_to_be_the_same() -> None:
    """x-ignore-shared: it is in a file that both ends share."""
    shared = corpus("odd/pc-shared-7.2")
    found = compared(shared, shared)
    (each,) = found.not_compared
    assert (each.name, each.reason) == ("ram0", "its RAM is not in A and B: x-ignore-shared leaves it out")
    assert "ram0" not in [block.name for block in found.blocks or []]
    assert len(found.blocks or []) == len(found.a.contents.blocks) - 1
    assert compared(shared, shared, ram=False).not_compared == []


def test_bytes_behind_the_end_are_not_said_to_be_the_same() -> None:
    found = compared(streams.minimal(), streams.minimal() + b"more")
    (each,) = found.not_compared
    assert (each.name, each.reason) == ("behind the end of B's stream", "4 bytes there are no part of it")


def test_of_sections_that_cannot_be_told_apart_nothing_is_said_to_be_missing() -> None:
    """The span of the one may well hold what the other has."""
    unclear = postcopy(TWO_READINGS)
    assert InMemory(unclear).contents.undecoded
    found = compared(unclear, unclear)
    assert (found.same, found.as_bytes) == (True, ["d/0", "sections that can't be told apart"])
    clear = postcopy(device("a", b"1", section_id=3), device("c", b"2", section_id=9), device("d", b"d", section_id=4))
    for pair in ((clear, unclear), (unclear, clear)):
        found = compared(*pair)
        assert found.structure == []
        assert {"a/0", "c/0", "sections that can't be told apart"} == {each.name for each in found.not_compared}
    (each,) = compared(unclear, postcopy(TWO_READINGS.replace(b"2", b"7"))).structure
    assert (each.what, each.counts) == ("undecoded", True)


# -- the machine


def test_machines_of_other_uuids_differ_where_both_tell_theirs() -> None:
    def of(uuid: bytes) -> bytes:
        told = SubsectionHeader(name="configuration/uuid", version=1).build() + uuid if uuid else b""
        return HEAD + told + streams.ram_start() + streams.ram() + streams.devices() + streams.eof() + known

    known = streams.devices_described()
    (each,) = compared(of(bytes(16)), of(bytes(15) + b"\1")).structure
    assert (each.what, each.name, each.a) == ("machine", "UUID", "00000000-0000-0000-0000-000000000000")
    assert each.counts
    found = compared(of(bytes(16)), of(b""))
    assert [(each.b, each.counts) for each in found.structure] == [(None, False)]  # only how it travelled
    assert found.same


def test_another_instance_of_ram_is_told() -> None:
    """No destination would take it."""
    other = streams.minimal().replace(b"\3ram\0\0\0\0", b"\3ram\0\0\0\1", 1)
    assert [(each.what, each.name) for each in compared(streams.minimal(), other).structure] == [
        ("live section", "ram/0"),
        ("live section", "ram/1"),
    ]


# -- patterns that name nothing


@pytest.mark.parametrize(
    ("pattern", "is_something"),
    [
        ("timer", True),
        ("timer.flag", True),  # the same on both sides
        ("serial.lines[1].irq", True),
        ("serial.lines", True),
        ("*.fifo[15]", True),
        ("serial.fifo[16]", False),
        ("timer.flags", False),
        ("tim", False),
        ("time?.flag", True),
        ("", False),
    ],
)
def test_what_is_to_be_ignored_and_is_nowhere_is_told(pattern: str, is_something: bool) -> None:
    found = compared(streams.minimal(), streams.minimal(), ignore=(pattern, "*.cpu_ticks_offset"))
    assert found.ignored_nothing == ([] if is_something else [pattern])


# -- damaged


def test_blocks_that_a_cut_mapped_file_has_not_listed_yet_are_not_missing() -> None:
    whole = mapped({"pc.ram": [contents_of(0), contents_of(PAGE)], "pc.rom": [contents_of(0)]})
    cut = whole[: whole.index(b"pc.rom") - PAGE]
    for pair in ((whole, cut), (cut, whole)):
        found = compared(*pair)
        assert (found.complete, found.structure) == (False, [])
    shorter = mapped({"pc.ram": [contents_of(0)]})
    assert [(each.name, each.a, each.b) for each in compared(shorter, cut).structure] == [("pc.ram", PAGE, 2 * PAGE)]


def test_of_a_stream_that_ends_early_what_is_there_is_compared() -> None:
    whole = streams.minimal()
    for cut in range(30, len(whole), 997):
        found = compared(whole, whole[:cut])
        assert found.same, cut
        assert not found.complete
    first = stream(timer(1), known=TIMER)
    second = stream(timer(2), known=TIMER)[:-1]
    found = compared(first, second)
    assert paths(found) == ["timer/0.cpu_ticks_offset"]
    assert [error.message for error in found.b.contents.errors] == ["the stream ends here, in the description"]


def test_pages_that_an_incomplete_side_has_not_sent_are_no_difference() -> None:
    whole = stream(timer(1), known=TIMER, ram=streams.ram_part(streams.page(0, b"1" * PAGE, block="pc.ram"),
                   streams.page(PAGE, b"2" * PAGE)) + streams.ram_end())  # fmt: skip
    cut = HEAD + streams.ram_start() + streams.ram_part(streams.page(0, b"x" * PAGE, block="pc.ram"))
    found = compared(whole, cut)
    assert [(block.name, list(block.ranges)) for block in found.blocks or []] == [("pc.ram", [0, PAGE]), ("pc.rom", [])]
    assert compared(cut, whole).blocks is not None


# -- RAM


def test_pages_that_only_one_side_sent_count_where_they_are_not_zero() -> None:
    ram = streams.ram_part(streams.zero(0, 2, block="pc.ram"), streams.page(2 * PAGE)) + streams.ram_end()
    none = streams.ram_part(streams.page(0, bytes(PAGE), block="pc.rom")) + streams.ram_end()
    found = compared(stream(timer(1), known=TIMER, ram=ram), stream(timer(1), known=TIMER, ram=none))
    block = (found.blocks or [])[0]
    assert (block.differing, block.only_in_a, block.only_in_b) == (0, 1, 0)
    assert (block.sent_by_a, block.sent_by_b) == (3, 0)
    assert list(block.ranges) == [2 * PAGE, PAGE]
    assert not found.same


BLOCK_PAGES = 70


@given(st.data())
def test_ranges_are_the_pages_that_differ(data: st.DataObject) -> None:
    fill = st.sampled_from([b"\0", b"1", b"2"])
    sides = [data.draw(st.lists(fill, min_size=BLOCK_PAGES, max_size=BLOCK_PAGES)) for _ in "ab"]
    if data.draw(st.booleans()):  # mostly the same
        changed = data.draw(st.sets(st.integers(0, BLOCK_PAGES - 1), max_size=3))
        sides[1] = [b if at in changed else a for at, (a, b) in enumerate(zip(*sides, strict=True))]
    both = [
        HEAD
        + streams.ram_start({"a": BLOCK_PAGES * PAGE})
        + streams.ram_part(
            streams.zero(0, block="a"), *(streams.page(at * PAGE, fill * PAGE) for at, fill in enumerate(side))
        )
        + streams.ram_end()
        + streams.eof()
        for side in sides
    ]
    found = compared(*both)
    (block,) = found.blocks or []
    pages = [at for at in range(BLOCK_PAGES) if sides[0][at] != sides[1][at]]
    assert block.differing == len(pages)
    ranges = list(zip(block.ranges[::2], block.ranges[1::2], strict=True))
    assert [at // PAGE for start, length in ranges for at in range(start, start + length, PAGE)] == pages
    assert all(end < start for end, start in zip([a + b for a, b in ranges], [a for a, _ in ranges[1:]], strict=False))


def test_a_block_that_claims_to_be_huge_takes_no_time() -> None:
    huge = HEAD + streams.ram_start({"a": 1 << 42}) + streams.ram_part(streams.page(1 << 41, block="a"))
    other = HEAD + streams.ram_start({"a": 1 << 42}) + streams.ram_part(streams.page(1 << 41, b"x" * PAGE, block="a"))
    (block,) = compared(huge, other).blocks or []
    assert list(block.ranges) == [1 << 41, PAGE]


def test_a_folder_that_is_full_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwritev", full)
    with pytest.raises(SpoolError, match=r"No space left on device: RAM of both inputs is put there \(TMPDIR names"):
        compared(streams.minimal(), streams.minimal())


def test_devices_alone_can_be_compared() -> None:
    found = compared(streams.minimal(), streams.minimal(), ram=False)
    assert found.blocks is None
    assert "ram_blocks" not in describe_diff(found)


# -- real streams


@pytest.mark.parametrize(
    "name", [name for name in CORPUS if name.startswith(("q35-many", "pc-postcopy", "pc-running"))]
)
def test_a_real_stream_is_the_same_as_itself(name: str) -> None:
    found = compared(corpus(name), corpus(name))
    assert found.same
    assert found.complete


def test_a_running_and_a_paused_guest_differ_in_time_registers_and_pages() -> None:
    found = compared(corpus("pc-running-11.1"), corpus("pc-paused-11.1"))
    assert found.structure == []
    assert found.fields[0].path == "timer/0.cpu_ticks_offset"
    assert {"timer/0", "cpu/0", "globalstate/0"} <= {path.partition(".")[0] for path in paths(found)}
    assert "globalstate/0.runstate" in paths(found)
    unequal = {block.name: block.differing for block in found.blocks or [] if block.unequal}
    assert set(unequal) == {"pc.ram"}
    assert 0 < unequal["pc.ram"] < 200
