"""Device state by another stream's description: what is optional is told by the bytes."""

import json
import struct
from typing import Any

import pytest

from qmigrate.errors import StreamError
from qmigrate.format.device import OPTIONAL, decode_state, decode_whole, encode_state
from qmigrate.format.tail import Tail, read_tail
from qmigrate.format.vm_state import VmState
from qmigrate.format.vmdesc import Description, StructDescription, parse_description
from tests import streams
from tests.streams import described, device, field, struct_of
from tests.walking import InMemory, corpus

BYTE = field("x", "uint8", 1)
ONE, TWO = struct_of("cpu/one", BYTE), struct_of("cpu/two", field("y", "uint16", 2))


def description(*devices: dict[str, Any]) -> Description:
    return parse_description(json.dumps({"devices": devices}).encode())


def body(*fields: dict[str, Any], subsections: list[dict[str, Any]]) -> StructDescription:
    return description(described("cpu", *fields, subsections=subsections)).devices[0].body


def subsection(name: str, data: bytes) -> bytes:
    return b"\5" + bytes([len(name)]) + name.encode() + struct.pack(">I", 1) + data


def decoded(described: StructDescription, data: bytes, *, foreign: bool = True) -> VmState:
    state, used = decode_state(described, data, offset=0, foreign=foreign)
    assert used == len(data)
    assert encode_state(state) == data
    return state


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b"", []),
        (subsection("cpu/one", b"\1"), ["cpu/one"]),
        (subsection("cpu/two", b"\1\2"), ["cpu/two"]),
        (subsection("cpu/two", b"\1\2") + subsection("cpu/one", b"\1"), ["cpu/two", "cpu/one"]),
        (subsection("cpu/msr_smi_count", bytes(7) + b"\3"), ["cpu/msr_smi_count"]),
    ],
)
def test_the_bytes_tell_which_subsections_there_are(data: bytes, names: list[str]) -> None:
    known = body(BYTE, subsections=[ONE, TWO])
    state = decoded(known, b"\7" + data)
    assert [each.name for each in state.subsections] == names


def test_a_streams_own_description_is_taken_at_its_word() -> None:
    known = body(BYTE, subsections=[ONE])
    with pytest.raises(StreamError):
        decode_state(known, b"\7", offset=0)
    state, used = decode_state(body(BYTE, subsections=[]), b"\7" + subsection("cpu/one", b"\1"), offset=0)
    assert (state.subsections, used) == ((), 1)


def test_a_subsection_that_nobody_describes_is_said() -> None:
    with pytest.raises(StreamError, match="has the subsection 'cpu/three', which the description does not know"):
        decode_state(body(BYTE, subsections=[ONE]), b"\7" + subsection("cpu/three", b""), offset=0, foreign=True)


def test_a_subsection_of_another_vmsd_belongs_to_the_outer_level() -> None:
    inner = struct_of("inner", BYTE, subsections=[struct_of("inner/one", BYTE)])
    known = body(field("s", "struct", 1, struct=inner), subsections=[ONE])
    state = decoded(known, b"\1" + subsection("inner/one", b"\2") + subsection("cpu/one", b"\3"))
    (inner_state,) = [each.value for each in state.fields]
    assert isinstance(inner_state, VmState)
    assert ([each.name for each in inner_state.subsections], [each.name for each in state.subsections]) == (
        ["inner/one"],
        ["cpu/one"],
    )
    assert not decoded(known, b"\1").subsections


def test_a_struct_without_a_name_has_no_subsections() -> None:
    nameless = {"name": "s", "type": "struct", "struct": {}, "size": 0}
    known = body(nameless, field("text", "buffer", 4), subsections=[])
    assert decoded(known, b"\5\2ab").fields[1].value == b"\5\2ab"


def test_elements_need_not_have_what_the_first_one_had() -> None:
    element = struct_of("e", BYTE, subsections=[struct_of("e/more", BYTE)])
    known = body(field("s", "struct", 14, array_len=2, struct=element), subsections=[])
    for data in (b"\1" + subsection("e/more", b"\2") + b"\3", b"\1\3" + subsection("e/more", b"\2")):
        state, used = decode_state(known, data, offset=0, foreign=True)
        assert used == len(data)
        assert [field.name for field in state.fields] == ["s"]


@pytest.mark.parametrize("data", [b"\5", b"\5\0", b"\5\7cpu", b"\5\7cpu/one", subsection("cpu/one", b"")])
def test_a_subsection_that_is_cut_is_an_error_or_is_left(data: bytes) -> None:
    known = body(BYTE, subsections=[ONE])
    try:
        _, used = decode_state(known, b"\7" + data, offset=0, foreign=True)
    except StreamError:
        return
    assert used == 1


def test_what_is_optional_on_x86_is_as_real_streams_describe_it() -> None:
    seen = set()
    for name in ("q35-many-5.2", "q35-many-7.2", "q35-many-10.0", "q35-many-11.1"):
        known = InMemory(corpus(name)).contents.description
        assert known is not None
        for each in known.devices:
            for item in each.body.subsections:
                if item.vmsd_name in OPTIONAL:
                    assert item == OPTIONAL[item.vmsd_name]
                    seen.add(item.vmsd_name)
    assert seen == set(OPTIONAL)


# -- virtio, whose length is not in the description of a moment before


def virtio(version: str) -> tuple[Description, bytes]:
    """The description of a real machine, and its virtio-rng's state, which ends with ``virtio/disabled``."""
    contents = InMemory(corpus(f"q35-many-{version}")).contents
    assert contents.description is not None
    state = next(state for name, state in contents.devices.items() if name.endswith("/virtio-rng/0"))
    return contents.description, encode_state(state)


@pytest.mark.parametrize("version", ["5.2", "7.2", "10.0", "11.1"])
def test_a_virtio_device_may_have_more_or_less_than_the_description_knew(version: str) -> None:
    known, data = virtio(version)
    device_known = next(each for each in known.devices if each.name.endswith("/virtio-rng"))
    less = data.removesuffix(subsection("virtio/disabled", b"\1"))
    assert len(less) < len(data)
    for there in (data, less, less + subsection("virtio/broken", b"\0")):
        state = decode_whole(device_known.body, there, begin=0, end=len(there), offset=0)
        assert state.fields[0].opaque is None
        assert encode_state(state) == there
        (item,) = read(device(device_known.name, there, section_id=9) + streams.eof(), known).items
        assert item.state is not None
        assert encode_state(item.state) == there
    with pytest.raises(StreamError, match=f"does not fit its {len(data) + 1} bytes"):
        decode_whole(device_known.body, data + b"\0", begin=0, end=len(data) + 1, offset=0)
    tail = read(device(device_known.name, data + b"\0", section_id=9) + streams.eof(), known)
    assert [item.state for item in tail.items] == [None]


def read(data: bytes, known: Description | None, *, package: bool = False) -> Tail:
    return read_tail(data, base=0, footers=True, description=known, package=package, foreign=True)
