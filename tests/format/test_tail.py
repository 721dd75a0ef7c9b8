"""Where sections of unknown length end: by the description, by footers, and by what may follow."""

import json
import struct
import time

import pytest

from qmigrate.errors import StreamError, TruncatedError, UnsupportedError
from qmigrate.format.command import CommandNumber, Ping, PostcopyListen, PostcopyRamDiscard, PostcopyRun
from qmigrate.format.stream import SectionType
from qmigrate.format.tail import Tail, read_tail
from qmigrate.format.vmdesc import Description, parse_description
from tests import streams
from tests.streams import command, described, device, field

BASE = 0x1000
BYTE = field("x", "uint8", 1)


def description(*devices: dict[str, object]) -> Description:
    return parse_description(json.dumps({"devices": devices}).encode())


def read(data: bytes, *, footers: bool | None = True, known: Description | None = None, package: bool = False) -> Tail:
    return read_tail(data, base=BASE, footers=footers, description=known, package=package)


def spans(tail: Tail) -> list[tuple[str, int, int]]:
    """Each section's name and the bounds of its data."""
    return [(item.header.idstr, item.body, item.body_end) for item in tail.items if item.header is not None]


def check_partition(tail: Tail) -> None:
    at = 0
    for item in tail.items:
        assert item.begin == at
        assert item.begin < item.end
        at = item.end
    assert tail.end == at


# -- by the description


def test_with_a_description_each_section_is_decoded_and_its_footer_proves_it() -> None:
    data = device("a", b"\1", section_id=3) + device("b", b"\1\2", section_id=4) + streams.eof()
    tail = read(data, known=description(described("a", BYTE), described("b", field("x", "uint16", 2))))
    check_partition(tail)
    assert tail.error is None
    assert [item.state is not None for item in tail.items] == [True, True]
    assert tail.end == len(data) - 1


def test_a_section_that_the_description_does_not_fit_is_found_by_its_footer_with_the_reason() -> None:
    data = device("a", b"\1\2", section_id=3) + device("b", b"\5", section_id=4) + streams.eof()
    tail = read(data, known=description(described("a", BYTE), described("b", BYTE)))
    bad, good = tail.items
    assert (bad.state, good.state is not None) == (None, True)
    assert bad.reason == "the description does not fit: 0x1010: a: found 027e000000, expected the footer 7e00000003"
    assert tail.error is None


def test_a_section_that_the_description_does_not_have_is_found_by_its_footer() -> None:
    tail = read(device("a", b"\1\2", section_id=3) + streams.eof(), known=description())
    assert [item.reason for item in tail.items] == ["not in the description"]


def test_a_version_that_nothing_else_would_take_is_believed_where_the_description_names_the_device() -> None:
    data = device("a", b"\1", section_id=3, version_id=0x7FFFFFFF) + streams.eof()
    assert read(data, known=description(described("a", BYTE))).items[0].state is not None
    error = read(data).error
    assert str(error) == "0x1000: found 0x4, expected a section's header or the end"


def test_sections_without_footers_are_decoded_all_the_same() -> None:
    data = device("a", b"\1", section_id=3, footers=False) + device("b", b"\2", section_id=4, footers=False) + b"\0"
    known = description(described("a", BYTE), described("b", BYTE))
    for footers in (False, None):
        tail = read(data, footers=footers, known=known)
        check_partition(tail)
        assert [item.state is not None for item in tail.items] == [True, True]


# -- by footers


@pytest.mark.parametrize("footers", [True, None])
def test_without_a_description_footers_tell_the_sections_apart(footers: bool | None) -> None:
    data = device("a", b"\1\2", section_id=3) + device("b", b"\x7e\0\0\0\4\1", section_id=4) + device("c", section_id=5)
    tail = read(data + streams.eof(), footers=footers)
    check_partition(tail)
    assert tail.error is None
    assert [(name, end - begin) for name, begin, end in spans(tail)] == [("a", 2), ("b", 6), ("c", 0)]
    assert {item.reason for item in tail.items} == {"no description in this stream"}


def test_the_false_footer_of_timer_is_passed_over() -> None:
    # Its section id is 0 on x86: a low byte 0x7e and the 8 zero bytes behind it complete the pattern.
    state = struct.pack(">q8sq", 0x7E, bytes(8), 5)
    data = device("timer", state, section_id=0, version_id=2) + device("b", b"x", section_id=4) + streams.eof()
    assert state.find(b"\x7e\0\0\0\0\0") >= 0
    assert [(name, end - begin) for name, begin, end in spans(read(data))] == [("timer", 24), ("b", 1)]


def opening(name: str, section_id: int) -> bytes:
    return streams.section(SectionType.FULL, name, section_id=section_id)


def test_two_readings_leave_one_span_undecoded() -> None:
    # a ends at its first footer and c follows, or a goes on to its second one, which stands at the end of c's data.
    a = opening("a", 3) + b"1" + streams.footer(3)
    c = opening("c", 9) + b"2" + streams.footer(9)
    again = opening("a", 3) + b"3" + streams.footer(3)
    data = device("b", b"b", section_id=1) + a + c + again + device("d", b"d", section_id=4) + streams.eof()
    tail = read(data)
    check_partition(tail)
    assert tail.error is None
    first, span, last = tail.items
    assert first.header is not None
    assert last.header is not None
    assert (first.header.idstr, last.header.idstr) == ("b", "d")
    assert span.header is None
    ends = [BASE + len(device("b", b"b", section_id=1)) + length for length in (len(a), len(a + c), len(a + c + again))]
    assert span.reason == (
        f"there are two readings: a to {ends[0]:#x} + c to {ends[1]:#x} + a to {ends[2]:#x}; or a to {ends[2]:#x}"
    )


def test_two_ends_leave_all_behind_the_last_sure_place_undecoded() -> None:
    text = b"{" * 40 + streams.footer(1) + streams.eof()
    data = device("b", b"xx", section_id=1) + streams.eof() + b"\6" + struct.pack(">I", len(text)) + text
    tail = read(data)
    assert tail.error is None
    assert [item.header for item in tail.items] == [None]
    assert tail.end == len(data) - 1


# -- without footers


def test_without_footers_and_description_the_next_plausible_header_takes_their_place() -> None:
    data = device("a", b"\1\2", section_id=3, footers=False) + device("b", bytes(9), section_id=4, footers=False)
    tail = read(data + streams.eof(), footers=False)
    check_partition(tail)
    assert [(name, end - begin) for name, begin, end in spans(tail)] == [("a", 2), ("b", 9)]
    assert tail.items[0].reason == (
        "no description in this stream; there are no footers, so it is taken to end where the next header stands"
    )


def test_without_footers_the_nearest_opening_that_leads_to_the_end_counts() -> None:
    # What looks like a header in the data of a leads nowhere: its name is longer than what is left.
    decoy = b"\4" + struct.pack(">IB", 9, 200) + b"name" + bytes(9)
    data = device("a", decoy, section_id=3, footers=False) + device("b", b"x", section_id=4, footers=False)
    assert [(name, end - begin) for name, begin, end in spans(read(data + streams.eof(), footers=False))] == [
        *(("a", len(decoy)), ("b", 1))
    ]


def test_without_footers_many_sections_of_zeros_are_no_trouble() -> None:
    data = b"".join(device(f"d{index}", bytes(10_000), section_id=index, footers=False) for index in range(300))
    start = time.process_time()
    tail = read(data + streams.eof(), footers=False)
    assert [end - begin for _, begin, end in spans(tail)] == [10_000] * 300
    assert time.process_time() - start < 5


# -- packages


def test_a_package_ends_with_its_last_byte() -> None:
    data = b"".join(
        (
            command(PostcopyListen()),
            device("timer", struct.pack(">q8sq", 0x7E, bytes(8), 0), section_id=0, version_id=2),
            device("b", b"\0", section_id=4),
            command(Ping(token=3)),
            command(PostcopyRun()),
        )
    )
    tail = read(data, package=True)
    check_partition(tail)
    assert tail.error is None
    assert [item.command or (item.header and item.header.idstr) for item in tail.items] == [
        CommandNumber.POSTCOPY_LISTEN,
        "timer",
        "b",
        CommandNumber.PING,
        CommandNumber.POSTCOPY_RUN,
    ]


def test_a_package_that_is_empty_holds_nothing() -> None:
    assert read(b"", package=True) == Tail([], 0)


def test_a_package_in_a_package_is_one_piece() -> None:
    inner = command(Ping(token=3)) + command(PostcopyRun())
    data = streams.package(inner) + command(PostcopyRun())
    tail = read(data, package=True)
    check_partition(tail)
    assert [item.command for item in tail.items] == [CommandNumber.PACKAGED, CommandNumber.POSTCOPY_RUN]


def test_a_command_of_any_length_is_passed_by_its_length() -> None:
    discard = command(PostcopyRamDiscard(block="a", ranges=()))[:3] + b"\0\x20" + bytes(0x20)
    tail = read(discard + command(PostcopyRun()), package=True)
    assert [item.command for item in tail.items] == [CommandNumber.POSTCOPY_RAM_DISCARD, CommandNumber.POSTCOPY_RUN]


def test_commands_stand_in_packages_only() -> None:
    error = read(command(Ping(token=3)) + streams.eof()).error
    assert str(error) == "0x1000: found 0x8, expected a section's header or the end"


# -- none


def failure(data: bytes, **options: bool | None) -> tuple[Tail, StreamError]:
    tail = read(data, **options)  # type: ignore[arg-type]
    check_partition(tail)
    assert tail.error is not None
    return tail, tail.error


def test_a_tail_that_is_cut_gives_the_sections_before_the_cut() -> None:
    a, b = device("a", b"1", section_id=3), device("b", b"22", section_id=4)
    whole = a + b + streams.eof()
    for cut in range(1, len(whole)):
        tail, error = failure(whole[:cut])
        assert isinstance(error, TruncatedError)
        expected = ["a", "b"][: (cut >= len(a)) + (cut >= len(a + b))]
        assert [name for name, _, _ in spans(tail)] == expected
    tail, error = failure(whole[: len(a) + 17])
    assert [name for name, _, _ in spans(tail)] == ["a"]
    assert str(error) == "0x1015: b: no footer 7e00000004 closes this section before the stream ends"
    tail, error = failure(whole[: len(a) + 8])
    assert str(error) == "0x101d: instance_id: the stream ends here"


def test_a_tail_that_ends_without_eof_is_too_short() -> None:
    _, error = failure(b"")
    assert isinstance(error, TruncatedError)
    assert str(error) == "0x1000: the stream ends here, expected a section or EOF"


def test_a_tail_that_is_cut_in_its_description_says_so_and_gives_all_sections() -> None:
    data = device("a", b"1", section_id=3) + streams.eof() + streams.description(described("a", BYTE))
    for cut in (23, 26, 27, 28, len(data) - 1):
        tail, error = failure(data[:cut])
        assert [name for name, _, _ in spans(tail)] == ["a"]
        assert isinstance(error, TruncatedError)
        assert str(error) == f"{BASE + cut:#x}: description: the stream ends here, in the description"


def test_what_is_no_section_is_an_error_at_the_furthest_place() -> None:
    a = device("a", b"1", section_id=3)
    tail, error = failure(a + b"\x55 garbage")
    assert str(error).startswith("0x1000: a: no footer 7e00000003 closes this section")
    assert tail.items == []
    _, error = failure(b"\x55 garbage")
    assert str(error) == "0x1000: found 0x55, expected a section's header or the end"


def test_a_hostile_tail_is_given_up_and_said_to_be() -> None:
    data = b"".join(device(f"d{index}", b"x", section_id=index % 2) for index in range(3000)) + streams.eof()
    start = time.process_time()
    _, error = failure(data)
    assert isinstance(error, UnsupportedError)
    assert str(error).endswith("given up after 200000 places where a section of unknown length might end")
    assert time.process_time() - start < 20  # it takes one


# -- without footers: what can't be true together


def test_without_footers_headers_that_overlap_are_two_readings() -> None:
    # The version of one is the kind of the other: both have a plausible name, and each leads to the end.
    first = device("a", b"\1\2", section_id=3, footers=False)
    late = b"\4" + struct.pack(">IB", 5, 1) + b"b" + struct.pack(">I", 0)[:4] + b"\0\0\0\4"
    other = struct.pack(">IB", 6, 1) + b"c" + struct.pack(">II", 0, 1)
    data = first + late + other + b"zz" + device("d", b"d", section_id=8, footers=False) + streams.eof()
    tail = read(data, footers=False)
    check_partition(tail)
    assert tail.error is None
    span, last = tail.items
    assert span.header is None
    assert last.header is not None
    b, c, d = (BASE + place for place in (len(first), len(first + late) - 1, len(data) - 1 - 16))
    assert span.reason == (f"there are two readings: a to {b:#x} + b to {d:#x}; or a to {c:#x} + c to {d:#x}")


def test_without_footers_headers_of_one_id_are_two_readings() -> None:
    # A section's id is there once in a stream: one of the two stands in the data of another section.
    sections = [device(name, name.encode() * 4, section_id=number, footers=False) for name, number in
                (("a", 1), ("b", 7), ("c", 3), ("d", 7), ("e", 5))]  # fmt: skip
    data = b"".join(sections) + streams.eof()
    tail = read(data, footers=False)
    check_partition(tail)
    assert tail.error is None
    assert [item.header.idstr if item.header else item.reason for item in tail.items] == [
        f"there are two readings: a to {BASE + 19:#x} + b to {BASE + 38:#x}; or a to {BASE + 38:#x}",
        f"there are two readings: c to {BASE + 57:#x} + d to {BASE + 76:#x}; or c to {BASE + 76:#x}",
        "e",
    ]


def test_without_footers_a_great_tail_takes_little_time() -> None:
    # Small integers, as device state is full of them: bytes that open something are everywhere.
    noise = b"".join(struct.pack(">HIB", index & 7, index % 5, index & 0x7F) for index in range(4000))
    data = b"".join(device(f"dev{index}", noise, section_id=index, footers=False) for index in range(22))
    assert len(data) > 600_000
    start = time.process_time()
    tail = read(data + streams.eof(), footers=False)
    assert time.process_time() - start < 2
    assert [(name, end - begin) for name, begin, end in spans(tail)] == [(f"dev{i}", len(noise)) for i in range(22)]


def test_without_footers_headers_everywhere_are_given_up() -> None:
    first, last = opening("b", 0), opening("b", 199_999)  # to build each takes longer than to read them all
    headers = b"".join(first[:1] + index.to_bytes(4) + first[5:] for index in range(200_000))
    assert headers.startswith(first + opening("b", 1))
    assert headers.endswith(last)
    start = time.process_time()
    _, error = failure(opening("a", 1) + headers + streams.eof(), footers=False)
    assert isinstance(error, UnsupportedError)
    assert time.process_time() - start < 20  # it takes one; not to give up would take hours


# -- a whole false section in a buffer, as a guest may plant it


def planted(*, package: bool) -> tuple[bytes, bytes]:
    """A tail whose device ``a`` has in its buffer a footer of its own, a whole section, and a header of ``a`` again."""
    inside = b"1" * 8 + streams.footer(3) + device("false", b"f" * 20, section_id=9) + opening("a", 3) + b"2" * 8
    data = device("b", b"b", section_id=1) + device("a", inside, section_id=3) + device("d", b"d", section_id=4)
    return data + (command(PostcopyRun()) if package else streams.eof()), inside


@pytest.mark.parametrize("package", [True, False])
def test_a_false_section_in_a_buffer_is_named_and_not_believed(package: bool) -> None:
    data, inside = planted(package=package)
    tail = read(data, package=package)
    check_partition(tail)
    assert tail.error is None
    first, span, last = [item for item in tail.items if item.command is None]
    assert [item.header.idstr if item.header else None for item in (first, span, last)] == ["b", None, "d"]
    assert (span.begin, span.end) == (first.end, last.begin)
    assert span.end - span.begin == len(device("a", inside, section_id=3))
    assert span.reason is not None
    assert span.reason.startswith("there are two readings: a to ")
    assert "false to " in span.reason


@pytest.mark.parametrize("package", [True, False])
def test_with_a_description_a_false_section_in_a_buffer_is_bytes(package: bool) -> None:
    data, inside = planted(package=package)
    known = description(described("b", BYTE), described("a", field("x", "buffer", len(inside))), described("d", BYTE))
    tail = read(data, package=package, known=known)
    assert [name for name, _, _ in spans(tail)] == ["b", "a", "d"]
    assert all(item.state is not None for item in tail.items if item.header is not None)
