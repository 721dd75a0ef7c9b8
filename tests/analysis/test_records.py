"""Records as plain values, however the bytes arrived."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qmigrate.analysis.records import coalesce, describe_record
from qmigrate.errors import StreamError
from qmigrate.report.structure import write_structure
from tests import streams
from tests.report import papers
from tests.report.test_text import LONG, dripped


def described(stream: bytes, cuts: list[int]) -> list[dict[str, Any]]:
    bounds = [0, *sorted(cuts), len(stream)]
    pieces = [stream[begin:end] for begin, end in pairwise(bounds) if begin < end]
    return [describe_record(entry) for entry in coalesce(dripped(pieces))]


@given(st.lists(st.integers(0, len(LONG)), max_size=20))
@example(list(range(0, len(LONG), 64)))
def test_records_do_not_depend_on_how_the_bytes_arrive(cuts: list[int]) -> None:
    assert described(LONG, cuts) == described(LONG, [])


def test_what_follows_the_end_is_one_record_however_long() -> None:
    stream = streams.minimal() + b"x" * (3 << 20)
    last = described(stream, list(range(0, len(stream), 1000)))[-1]
    assert last == {"offset": len(streams.minimal()), "length": 3 << 20, "record": "TRAILING"}


def test_what_came_before_a_fault_is_given_before_it() -> None:
    pages = [streams.page(0, block="pc.ram"), streams.page(streams.PAGE), streams.page(2 * streams.PAGE)]
    good = streams.header() + streams.ram_start() + streams.ram_part(*pages)[:-13]  # without EOS and footer
    found: list[dict[str, Any]] = []
    with pytest.raises(StreamError, match="unknown flags 0x400"):
        found.extend(map(describe_record, coalesce(dripped([good + b"\0\0\0\0\0\0\4\0"]))))
    assert found[-1] == {
        "offset": found[-2]["offset"] + 5,
        "length": 3 * 4104 + 7,
        "record": "PAGE",
        "block": "pc.ram",
        "start": 0,
        "page_count": 3,
        "named": True,
    }


@pytest.mark.parametrize("stream", [streams.minimal(), streams.postcopy(), LONG])
def test_records_have_the_names_that_the_structure_shows(stream: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    paper, out = papers.file(monkeypatch)
    write_structure(dripped([stream]), paper)
    words = {words[2] for line in out.getvalue().splitlines() if (words := line.split())[2].isupper()}
    names = {record["record"] for record in described(stream, [])}
    folded = {"STATE", "UNDECODED"}  # the structure shows these in the line of their section
    assert words == names - folded
