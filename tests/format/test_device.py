"""Device state by its description: every type both ways, every byte accounted for."""

import dataclasses
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import StreamError, TruncatedError
from qmigrate.format.device import decode_state, encode_field, encode_state
from qmigrate.format.field_types import SIGNED, TYPES, UNSIGNED
from qmigrate.format.vm_state import Field, Subsection, Value, VmState
from qmigrate.format.vmdesc import StructDescription, parse_description
from tests.streams import described, field, struct_of

BASE = 0x1000


def parse(*fields: dict[str, Any], **more: Any) -> StructDescription:
    text = json.dumps({"devices": [described("dev", *fields, **more)]})
    return parse_description(text.encode()).devices[0].body


def parse_text(fields: str) -> StructDescription:
    """For lists and trees, whose objects repeat their keys."""
    text = f'{{"devices":[{{"name":"dev","instance_id":0,"fields":[{fields}]}}]}}'
    return parse_description(text.encode()).devices[0].body


def both_ways(description: StructDescription, data: bytes, behind: bytes = b"\x7e behind") -> VmState:
    """The state of ``data``, which is all used, and comes back the same."""
    state, used = decode_state(description, data + behind, offset=BASE)
    assert used == len(data)
    assert encode_state(state) == data
    assert decode_state(description, b"before" + data, begin=6, offset=BASE) == (state, len(data))
    check_places(state)
    return state


def check_places(state: VmState) -> None:
    """Fields and subsections follow each other without a gap."""
    at = state.fields[0].offset if state.fields else None
    for one in state.fields:
        assert one.offset == at
        at = one.offset + one.length


def values(state: VmState) -> list[Value]:
    return [one.value for one in state.fields]


def fault(description: StructDescription, data: bytes) -> str:
    with pytest.raises(StreamError) as caught:
        decode_state(description, data, offset=BASE, trail=("dev",))
    return str(caught.value)


# -- plain types

INTEGERS = [
    *((name, size) for name, size in (("int8", 1), ("int16", 2), ("int32", 4), ("int64", 8))),
    *((f"u{name}", size) for name, size in (("int8", 1), ("int16", 2), ("int32", 4), ("int64", 8))),
    *(("int32 equal", 4), ("int64 equal", 8), ("uint8 equal", 1), ("uint16 equal", 2), ("uint32 equal", 4)),
    *(("uint64 equal", 8), ("int32 le", 4), ("int32_as_uint16", 2), ("uint16_from_uint8", 2), ("CPU_Double_U", 8)),
    *(("timer", 8), ("cpsr", 4), ("fpscr", 4), ("powered_off", 1), ("fpr", 8), ("vsr", 8), ("cpu/altivec/vscr", 4)),
]


def test_every_integer_type_is_tried_here() -> None:
    assert {name for name, _ in INTEGERS} == SIGNED | UNSIGNED


@given(st.sampled_from(INTEGERS), st.none() | st.integers(0, 20), st.data())
def test_integers_are_big_endian_alone_and_in_arrays(
    kind: tuple[str, int], count: int | None, data: st.DataObject
) -> None:
    name, size = kind
    raw = data.draw(st.binary(min_size=size * (1 if count is None else count), max_size=size * (count or 1)))
    more = {} if count is None else {"array_len": count}
    (value,) = values(both_ways(parse(field("x", name, size, **more)), raw))
    signed = name.startswith("int") and name != "int32_as_uint16"
    numbers = [int.from_bytes(raw[at : at + size], signed=signed) for at in range(0, len(raw), size)]
    assert value == (numbers[0] if count is None else tuple(numbers))


def test_an_integer_of_an_odd_size_stays_bytes() -> None:
    state = both_ways(parse(field("x", "uint32", 3)), b"abc")
    assert (state.fields[0].value, state.fields[0].opaque) == (b"abc", "the type 'uint32' is not known")


@pytest.mark.parametrize(("byte", "value"), [(0, False), (1, True), (2, 2), (0xFF, 0xFF)])
def test_a_bool_that_is_neither_keeps_its_byte(byte: int, value: int) -> None:
    (found,) = values(both_ways(parse(field("x", "bool", 1)), bytes([byte])))
    assert found == value
    assert isinstance(found, bool) == (byte < 2)


def test_bools_in_an_array_are_told_one_by_one() -> None:
    assert values(both_ways(parse(field("x", "bool", 1, array_len=4)), bytes([0, 1, 7, 1]))) == [(False, True, 7, True)]


def test_a_bool_of_four_bytes_stays_bytes() -> None:
    state = both_ways(parse(field("x", "bool", 4)), b"\0\0\0\1")
    assert (state.fields[0].value, state.fields[0].opaque) == (b"\0\0\0\1", "a bool has 4 bytes, expected 1")


def test_a_bitmap_is_words() -> None:
    assert values(both_ways(parse(field("x", "bitmap", 16)), struct.pack(">QQ", 5, 1 << 63))) == [(5, 1 << 63)]
    state = both_ways(parse(field("x", "bitmap", 9)), bytes(9))
    assert state.fields[0].opaque == "a bitmap has 9 bytes, expected whole u64 words"


@pytest.mark.parametrize("kind", ["buffer", "unused_buffer"])
def test_buffers_are_bytes_and_said_to_be_opaque(kind: str) -> None:
    state = both_ways(parse(field("a", kind, 3), field("b", kind, 2, array_len=2), field("c", kind, 0)), b"abcdefg")
    assert values(state) == [b"abc", (b"de", b"fg"), b""]
    assert {one.opaque for one in state.fields} == {"a buffer has no inner structure"}


def test_packet_ids_and_pairs_are_numbers() -> None:
    ids = struct.pack(">I2Q", 2, 7, 1 << 40)
    description = parse(field("q", "usb-redir-packet-id-q", 20), field("avr", "avr", 16, array_len=2))
    pairs = struct.pack(">4Q", 1, 2, 3, 4)
    assert values(both_ways(description, ids + pairs)) == [(7, 1 << 40), ((1, 2), (3, 4))]
    lie = both_ways(parse(field("q", "usb-redir-packet-id-q", 4)), struct.pack(">I", 9))
    assert lie.fields[0].opaque == "a queue of packet ids has 4 bytes, its count says otherwise"


@pytest.mark.parametrize("kind", [*TYPES, "unknown", "shpc", "never heard of"])
@given(st.binary(max_size=70))
def test_whatever_the_bytes_a_field_of_any_type_comes_back_the_same(kind: str, data: bytes) -> None:
    state = both_ways(parse(field("x", kind, len(data)), field("end", "uint8", 1)), data + b"\x55")
    assert state.fields[1].value == 0x55
    assert (state.fields[0].opaque is None) == (not isinstance(state.fields[0].value, bytes))


def test_a_type_that_nobody_knows_stays_bytes_with_the_reason() -> None:
    state = both_ways(parse(field("x", "flux", 3, array_len=2)), b"abcdef")
    assert (state.fields[0].value, state.fields[0].opaque) == (b"abcdef", "the type 'flux' is not known")


# -- structs, arrays, subsections

PAIR = struct_of("pair", field("a", "uint8", 1), field("b", "uint16", 2))


def test_structs_nest_alone_and_in_arrays() -> None:
    inner = struct_of(
        "outer", field("pair", "struct", 3, struct=PAIR), field("pairs", "struct", 3, array_len=2, struct=PAIR)
    )
    state = both_ways(parse(field("o", "struct", 9, struct=inner), field("end", "uint8", 1)), bytes(range(10)))
    outer = state.fields[0].value
    assert isinstance(outer, VmState)
    pair, pairs = (one.value for one in outer.fields)
    assert isinstance(pair, VmState)
    assert isinstance(pairs, tuple)
    assert values(pair) == [0, 0x0102]
    assert [values(one) for one in pairs if isinstance(one, VmState)] == [[3, 0x0405], [6, 0x0708]]
    assert [leaf.offset - BASE for leaf in state.leaves()] == [0, 1, 3, 4, 6, 7, 9]
    assert [leaf.value for leaf in state.leaves()] == [0, 0x0102, 3, 0x0405, 6, 0x0708, 9]


@pytest.mark.parametrize("kind", ["tmp", "vstruct"])
def test_an_inline_struct_is_decoded(kind: str) -> None:
    (value,) = values(both_ways(parse({"name": "t", "type": kind, **PAIR, "size": 3}), b"\1\2\3"))
    assert isinstance(value, VmState)
    assert values(value) == [1, 0x0203]


def subsection(name: str, version: int, data: bytes) -> bytes:
    return bytes([5, len(name)]) + name.encode() + version.to_bytes(4) + data


def test_subsections_nest_and_keep_the_version_on_the_wire() -> None:
    deeper = struct_of("dev/one/deep", field("z", "uint8", 1))
    one = struct_of("dev/one", field("y", "uint8", 1), subsections=[deeper])
    two = struct_of("dev/two")
    data = (
        b"\1"
        + subsection("dev/one", 0x102, b"\2" + subsection("dev/one/deep", 1, b"\3"))
        + subsection("dev/two", 1, b"")
    )
    state = both_ways(parse(field("x", "uint8", 1), subsections=[one, two]), data)
    first, second = state.subsections
    assert (first.name, first.version, first.offset) == ("dev/one", 0x102, BASE + 1)
    assert [leaf.value for leaf in state.leaves()] == [1, 2, 3]
    assert second.state.fields == ()


def test_a_struct_in_an_array_has_subsections_of_its_own() -> None:
    element = struct_of("e", field("x", "uint8", 1), subsections=[struct_of("e/s", field("y", "uint8", 1))])
    entries = [field("e", "struct", 11, index=index, struct=element) for index in range(2)]
    data = b"".join(bytes([index]) + subsection("e/s", 1, bytes([index + 7])) for index in range(2))
    assert [leaf.value for leaf in both_ways(parse(*entries), data).leaves()] == [0, 7, 1, 8]


def test_an_array_of_empty_structs_takes_no_bytes() -> None:
    description = parse(field("e", "struct", 0, array_len=3, struct=struct_of("e")), field("x", "uint8", 1))
    state = both_ways(description, b"\1")
    assert isinstance(state.fields[0].value, tuple)
    assert len(state.fields[0].value) == 3


# -- lists and trees

ONE = '"vmsd_name":"one","version":1,"fields":[{"name":"x","type":"uint8","size":1}]'
TWO = '"vmsd_name":"two","version":1,"fields":[{"name":"y","type":"uint16","size":2}]'


@pytest.mark.parametrize("kind", ["qtailq", "qlist"])
def test_a_list_is_its_elements(kind: str) -> None:
    description = parse_text(
        f'{{"name":"q","type":"{kind}",{ONE},{TWO},"size":6}},{{"name":"e","type":"uint8","size":1}}'
    )
    state = both_ways(description, bytes.fromhex("01 0a 01 0b0c 00 55"))
    assert [leaf.value for leaf in state.leaves()] == [0x0A, 0x0B0C, 0x55]
    empty = both_ways(parse_text(f'{{"name":"q","type":"{kind}","size":1}}'), b"\0")
    assert values(empty) == [()]


def test_a_tree_has_direct_keys_or_structs() -> None:
    direct = parse_text(f'{{"name":"t","type":"gtree",{ONE},{ONE},"size":26}}')
    (nodes,) = values(both_ways(direct, bytes.fromhex("00000002 01 0000000000000007 0a 01 0000000000000009 0b 00")))
    assert isinstance(nodes, tuple)
    assert [node[0] for node in nodes if isinstance(node, tuple)] == [7, 9]
    structs = parse_text(f'{{"name":"t","type":"gtree",{TWO},{ONE},"size":9}}')
    ((node,),) = values(both_ways(structs, bytes.fromhex("00000001 01 0102 0a 00")))  # type: ignore[misc]
    assert [values(part) for part in node] == [[0x0102], [0x0A]]  # type: ignore[arg-type, union-attr]
    empty = parse_text('{"name":"t","type":"gtree","size":5}')
    assert values(both_ways(empty, bytes(5))) == [()]


@pytest.mark.parametrize(
    ("fields", "data", "message"),
    [
        ('"qtailq"', "02 0a 00", "0x1000: dev: q: found the mark 0x2 before an element, expected 0x1 or 0x0"),
        ('"qtailq"', "01 0a 01 0b 00", "0x1003: dev: q: has more than the 1 elements that are described"),
        ('"qtailq"', "01 0a", "0x1002: dev: q: 1 bytes are described, 0 are there"),
        ('"gtree"', "00000003", "0x1004: dev: q: has 3 nodes, 1 keys and values are described"),
        ('"gtree"', "00000001 00", "0x1004: dev: q[0]: found the mark 0x0 before a node, expected 0x1"),
        (
            '"gtree"',
            "00000001 01 0000000000000000 0a 01",
            "0x100e: dev: q: found the mark 0x1 behind the last node, expected 0x0",
        ),
    ],
)
def test_a_list_or_tree_that_does_not_add_up_is_refused(fields: str, data: str, message: str) -> None:
    assert fault(parse_text(f'{{"name":"q","type":{fields},{ONE},"size":3}}'), bytes.fromhex(data)) == message


# -- NULLs


@pytest.mark.parametrize("kind", ["nullptr", "ptr-marker"])
def test_null_markers_are_none_and_valid_ones_true(kind: str) -> None:
    description = parse(field("p", kind, 1, array_len=3), field("q", kind, 1))
    assert values(both_ways(description, b"0100")) == [(None, True, None), None]
    assert fault(description, b"01x0") == "0x1002: dev: p: found 0x78, expected a marker 0x30 or 0x31"
    assert fault(parse(field("p", kind, 1, array_len=1 << 40)), b"0") == (
        "0x1000: dev: p: 1099511627776 markers are described, 1 bytes are there"
    )


def test_a_null_of_the_old_dialect_is_a_byte_under_the_type_of_the_elements() -> None:
    null = field("p", "struct", 1, index=0, struct={})
    there = field("p", "struct", 3, index=1, struct=PAIR)
    number, no_number = field("n", "uint32", 4, index=0), field("n", "uint32", 1, index=1)
    state = both_ways(parse(null, there, number, no_number), bytes.fromhex("30 010203 00000007 30"))
    assert [one.value for one in state.fields if not isinstance(one.value, VmState)] == [None, 7, None]


def test_an_array_of_old_nulls_is_none_again_and_again() -> None:
    description = parse(field("p", "struct", 1, array_len=3, struct={}), field("n", "uint64", 1, array_len=2))
    assert values(both_ways(description, b"00000")) == [(None, None, None), (None, None)]


def test_a_run_length_that_10_0_miscounts_is_put_right() -> None:
    description = parse(
        field("p", "uint16", 2, array_len=4), field("p", "nullptr", 1, array_len=2), field("e", "uint8", 1)
    )
    assert values(both_ways(description, bytes.fromhex("0001 0002 3030 55"))) == [(1, 2), (None, None), 0x55]


# -- descriptions that do not fit


@pytest.mark.parametrize(
    ("fields", "data", "message"),
    [
        ([field("x", "uint32", 4)], b"abc", "0x1000: dev: x: 4 bytes are described, 3 are there"),
        (
            [field("x", "uint8", 1, array_len=1 << 62)],
            b"a",
            f"0x1000: dev: x: {1 << 62} bytes are described, 1 are there",
        ),
        (
            [field("s", "struct", 2, struct=PAIR)],
            b"abc",
            "0x1000: dev: s: takes 3 bytes, 2 are described",
        ),
        (
            [field("s", "struct", 3, array_len=2, struct=PAIR)],
            b"abcd",
            "0x1004: dev: s[1]: b: 2 bytes are described, 0 are there",
        ),
        (
            [field("s", "struct", 0, array_len=1 << 40, struct=struct_of("e"))],
            b"",
            "0x1000: dev: s: 1099511627776 elements are described, 0 bytes are there",
        ),
    ],
)
def test_a_description_that_does_not_fit_is_refused(fields: list[dict[str, Any]], data: bytes, message: str) -> None:
    fitted = fault(parse(*fields), data)
    # Where a struct takes another length than described, the place is behind it.
    assert fitted.split(": ", 1)[1] == message.split(": ", 1)[1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\1", "0x1001: dev: dev/one: kind: the stream ends here"),
        (b"\1\7", "0x1001: dev: dev/one: kind: found 0x7, expected SUBSECTION 0x5"),
        (
            b"\1" + subsection("dev/two", 1, b""),
            "0x1001: dev: dev/one: found subsection 'dev/two', expected 'dev/one'",
        ),
    ],
)
def test_a_subsection_that_is_described_and_missing_is_refused(data: bytes, message: str) -> None:
    assert fault(parse(field("x", "uint8", 1), subsections=[struct_of("dev/one")]), data) == message


def test_arrays_of_arrays_of_nothing_do_not_go_on_for_ever() -> None:
    entry = field("e", "buffer", 0)
    for _ in range(4):
        entry = field("e", "struct", 0, array_len=60_000, struct=struct_of("e", entry))
    assert "elements that take no bytes are described" in fault(parse(entry), b"x" * 100)


def test_a_claim_takes_no_memory() -> None:
    with pytest.raises(TruncatedError):
        decode_state(parse(field("x", "buffer", 1 << 60)), bytes(10), offset=0)


# -- values without room


@pytest.mark.parametrize(
    ("description", "data", "value"),
    [
        (field("x", "uint8", 1), b"a", 256),
        (field("x", "int16", 2), b"ab", 0x8000),
        (field("x", "uint8", 1), b"a", "a"),
        (field("x", "uint8", 1, array_len=2), b"ab", (1, 2, 3)),
        (field("x", "uint8", 1), b"a", None),
        (field("x", "bool", 1), b"\1", 256),
        (field("x", "bool", 1), b"\1", "yes"),
        (field("x", "buffer", 2), b"ab", b"abc"),
        (field("x", "buffer", 2), b"ab", 2),
        (field("x", "bitmap", 8), bytes(8), (1, 2)),
        (field("x", "bitmap", 8), bytes(8), (1 << 64,)),
        (field("x", "nullptr", 1), b"0", 7),
        (field("s", "struct", 3, struct=PAIR), b"abc", 7),
        (field("s", "struct", 3, array_len=2, struct=PAIR), b"abcdef", ()),
        (field("x", "flux", 2), b"ab", 7),
        (field("x", "flux", 2), b"ab", b"a"),
    ],
)
def test_a_value_without_room_is_refused_when_written(description: dict[str, Any], data: bytes, value: Any) -> None:
    state = both_ways(parse(description), data)
    with pytest.raises(StreamError) as caught:
        encode_field(dataclasses.replace(state.fields[0], value=value))
    kind, name = description["type"], description["name"]
    assert str(caught.value).startswith(f"0x1000: {name}: {value!r} does not go into the type {kind!r}: ")


def test_one_changed_value_changes_its_bytes_alone() -> None:
    description = parse(field("a", "uint16", 2), field("s", "struct", 3, struct=PAIR), field("z", "buffer", 2))
    state = both_ways(description, b"\0\1\2\0\3zz")
    pair = state.fields[1].value
    assert isinstance(pair, VmState)
    changed = dataclasses.replace(pair, fields=(pair.fields[0], dataclasses.replace(pair.fields[1], value=0x99)))
    fields: tuple[Field, ...] = (state.fields[0], dataclasses.replace(state.fields[1], value=changed), state.fields[2])
    assert encode_state(dataclasses.replace(state, fields=fields)) == b"\0\1\2\0\x99zz"


def test_the_version_of_a_subsection_can_be_changed() -> None:
    state = both_ways(parse(subsections=[struct_of("dev/one")]), subsection("dev/one", 1, b""))
    newer = Subsection("dev/one", 2, 0, state.subsections[0].state)
    assert encode_state(dataclasses.replace(state, subsections=(newer,))) == subsection("dev/one", 2, b"")
