"""Whatever is nested in whatever: packages in packages, structs in structs, subsections in subsections.

What was put together is what is read, at the depth where it was put, however the bytes come; it is written the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st

from qmigrate.format.command import Packaged, Ping
from qmigrate.format.entry import DeviceState, Entry, Undecoded
from qmigrate.format.stream import SectionHeader
from qmigrate.format.vm_state import Subsection, VmState
from tests import streams
from tests.streams import command, described, device, field, struct_of
from tests.walking import entries, kept, rebuilt

# With RAM of few bytes, as nothing is nested in that, and they come one by one.
ZEROS = streams.zero(0, 16, block="pc.ram") + streams.zero(0, 2, block="pc.rom")
HEAD = streams.header() + streams.configuration() + streams.ram_start() + streams.ram_end(ZEROS)
steps = st.sampled_from([None, 1, 3, 64])

# -- packages

Inside: TypeAlias = "int | bytes | list[Inside]"
"""A PING with its token, a device with its data, or a package with what is in it."""

# No byte of it can begin or end a section.
opaque_data = st.text("0123456789", min_size=1, max_size=20).map(str.encode)
inside = st.recursive(
    st.integers(0, 0xFFFFFFFF) | opaque_data, lambda each: st.lists(each, min_size=1, max_size=4), max_leaves=12
)
packages: st.SearchStrategy[Inside] = st.lists(inside, min_size=1, max_size=3)


def put_together(what: Inside, numbers: Iterator[int]) -> bytes:
    """Each section has a number of its own, as QEMU gives them."""
    if isinstance(what, int):
        return command(Ping(token=what))
    if isinstance(what, bytes):
        return device("device", what, section_id=next(numbers))
    return streams.package(*(put_together(each, numbers) for each in what))


def flat(what: Inside, depth: int) -> Iterator[tuple[int, int | bytes | None]]:
    """Each with its depth, in the order of the stream; None is a package."""
    if not isinstance(what, list):
        yield depth, what
        return
    yield depth, None
    for each in what:
        yield from flat(each, depth + 1)


def read(found: list[Entry]) -> Iterator[tuple[int, int | bytes | None]]:
    for entry in found:
        match entry.record:
            case Ping(token=token):
                yield entry.depth, token
            case Undecoded(data=data):
                yield entry.depth, data
            case Packaged():
                yield entry.depth, None


@settings(max_examples=40)
@given(packages, steps)
def test_packages_nest_in_any_way(parts: Inside, step: int | None) -> None:
    stream = HEAD + put_together(parts, count(100)) + streams.eof()
    found = list(kept(entries(stream, step)))
    assert list(read(found)) == list(flat(parts, 0))
    assert rebuilt(iter(found)) == stream


# -- the state of a device


@dataclass
class State:
    """Numbers, and states in it, and states behind it as subsections."""

    fields: "list[int | State]"
    subsections: "list[State]"


states: st.SearchStrategy[State] = st.deferred(
    lambda: st.builds(
        State,
        st.lists(st.integers(0, 255) | states, max_size=3),
        st.lists(states, max_size=2),
    )
)


def with_bytes(state: State, name: str) -> tuple[dict[str, Any], bytes]:
    """Its description, and its bytes."""
    data, fields = b"", []
    for number, value in enumerate(state.fields):
        if isinstance(value, int):
            fields.append(field(f"f{number}", "uint8", 1))
            data += bytes([value])
        else:
            struct, its = with_bytes(value, f"{name}.{number}")
            fields.append(field(f"f{number}", "struct", len(its), struct=struct))
            data += its
    subsections = []
    for number, each in enumerate(state.subsections):
        struct, its = with_bytes(each, f"{name}/{number}")
        subsections.append(struct)
        label = f"{name}/{number}".encode()
        data += bytes([5, len(label)]) + label + (1).to_bytes(4) + its
    return struct_of(name, *fields, subsections=subsections), data


def decoded(state: VmState) -> State:
    fields: list[int | State] = []
    for each in state.fields:
        assert isinstance(each.value, int | VmState)
        fields.append(each.value if isinstance(each.value, int) else decoded(each.value))
    return State(fields, [_state(each) for each in state.subsections])


def _state(subsection: Subsection) -> State:
    return decoded(subsection.state)


@settings(max_examples=40)
@given(states, steps)
def test_structs_and_subsections_nest_in_any_way(state: State, step: int | None) -> None:
    struct, data = with_bytes(state, "d")
    whole = described("d") | struct
    stream = HEAD + device("d", data, section_id=5) + streams.eof() + streams.description(whole)
    found = list(kept(entries(stream, step)))
    (read_state,) = [entry.record.state for entry in found if isinstance(entry.record, DeviceState)]
    assert decoded(read_state) == state
    assert [entry.record.idstr for entry in found if isinstance(entry.record, SectionHeader)] == ["ram", "d"]
    assert rebuilt(iter(found)) == stream
