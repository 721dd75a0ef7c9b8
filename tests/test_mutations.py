"""Whatever the bytes: an answer or a fault of ours, in bounded time and memory.

Seeded changes of every real stream, and cuts at every boundary of its sections and, one device after the other, of
its fields.  ``scripts/soak`` does thousands.
"""

import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import pytest

from qmigrate.analysis.check import Checked, check
from qmigrate.analysis.summary import summarize
from qmigrate.errors import NoStreamError, StreamError
from qmigrate.format.device import decode_state
from qmigrate.format.ram import Pages
from qmigrate.format.stream import FOOTER_BYTES, SectionType
from qmigrate.format.vmdesc import parse_description
from tests.test_odd import RECIPES
from tests.walking import CORPUS, InMemory, corpus, entries

MUTATIONS = 100
SUMMARIES = 4  # of them are summarized too
ROOM = 256 << 20  # bytes of address space beyond what the process has already
STREAMS = [*CORPUS, *(f"odd/{name}" for name in RECIPES)]
HEADER_BYTES = 1 + 4 + 1 + 4 + 4  # of a FULL section, without its name
CUT_DEVICES: set[tuple[str, int]] = set()  # of one kind and length one is enough
NUMBERS = [0, 1, 4, 5, 6, 7, 8, 0x30, 0x7E, 0x7F, 0xFF]
WORDS = [b"\xff" * 8, bytes(8), (1 << 60).to_bytes(8), b"\x7f" + b"\xff" * 7, b"\xff" * 4, bytes(4)]


@contextmanager
def little_memory() -> Iterator[None]:
    """Memory that followed a claim in the stream would be more than this."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(autouse=True)
def each_description_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few changes hit it, and parsing it anew each time would take as long as all else."""
    monkeypatch.setattr("qmigrate.format.closing.parse_description", lru_cache(maxsize=8)(parse_description))


@lru_cache(maxsize=1)
def slim(name: str) -> tuple[bytes, list[int]]:
    """The stream with few of its pages, one of its great devices and some of the others; and where its records begin.

    Nothing new can go wrong in the rest, each of which is in other streams too, and the time is better spent on
    more changes.
    """
    full = [section for section in InMemory(corpus(name)).contents.sections if section.kind == SectionType.FULL]
    great = [section for section in full if section.length > 16_000]
    some = random.Random(name).sample(full, len(full) // 2)
    kept = [section for section in full if section in great[:1] or (section in some and section not in great)]
    needless = [
        range(section.offset, section.offset + section.length)
        for section in full
        if section not in kept and section.package is None
    ]
    parts = [
        bytes(entry.view)
        for entry in entries(corpus(name))
        if not any(entry.offset in places for places in needless)
        and (not isinstance(entry.record, Pages) or entry.record.named or entry.length < 4096)
    ]
    stream = b"".join(parts)
    return stream, [entry.offset for entry in entries(stream)]


def mutated(stream: bytes, boundaries: list[int], chance: random.Random) -> bytes:
    """The stream with some bytes changed, left out, put in, moved, or cut."""
    data = bytearray(stream)
    for _ in range(chance.choice((1, 1, 2, 5))):
        near = chance.choice(boundaries) + chance.randrange(-1, 30)
        at = max(0, min(near, len(data) - 1)) if chance.random() < 0.7 else chance.randrange(len(data))
        match chance.randrange(8):
            case 0 | 1:
                data[at] = chance.choice(NUMBERS)
            case 2:
                data[at] = chance.randrange(256)
            case 3:
                word = chance.choice(WORDS)
                data[at : at + len(word)] = word
            case 4:
                del data[at : at + chance.choice((1, 4, 9, 100))]
            case 5:
                data[at:at] = chance.randbytes(chance.choice((1, 4, 9)))
            case 6:
                begin = chance.choice(boundaries)
                data[at:at] = stream[begin : begin + chance.choice((5, 20, 300))]
            case 7:
                del data[at:]
        if not data:
            break
    return bytes(data)


def answer(data: bytes) -> Checked | None:
    """What ``check`` says; None where there is no stream.  Nothing else may come out of it."""
    with suppress(NoStreamError):
        return check(InMemory(data))
    return None


@pytest.mark.parametrize("name", STREAMS)
def test_a_damaged_stream_gets_an_answer(name: str) -> None:
    stream, boundaries = slim(name)
    chance = random.Random(name)
    with little_memory():
        for number in range(MUTATIONS):
            data = mutated(stream, boundaries, chance)
            checked = answer(data)
            if checked is None:
                continue
            contents = checked.gathering.contents
            assert checked.differences == [], number
            assert contents.complete == (not contents.errors)
            assert contents.length == checked.length <= len(data)
            assert contents.length == len(data) or contents.errors
            if number % (MUTATIONS // SUMMARIES) == 0:
                assert summarize(contents)["complete"] == contents.complete


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_is_cut_at_a_boundary_is_said_to_be_cut(name: str) -> None:
    stream, _ = slim(name)
    contents = InMemory(stream).contents
    places = [place for one in contents.sections for place in (one.offset, one.offset + one.length)]
    places += [place.offset for place in contents.commands]
    # EOF may well be the end of a stream.
    last = max(one.offset + one.length for one in contents.sections) + 1
    cuts = {place + step for place in places for step in (-1, 0, 1)} - {last}
    with little_memory():
        for cut in sorted(cut for cut in cuts if cut >= 8):  # less is no stream
            checked = answer(stream[:cut])
            assert checked is not None
            if contents.footers is None and checked.gathering.contents.complete:
                assert stream[cut - 1] == SectionType.EOF  # where nothing tells a section's end, it may be the stream's
                continue
            (error,) = checked.gathering.contents.errors
            assert isinstance(error, StreamError)
            assert not checked.gathering.contents.complete
            assert checked.length <= cut


@pytest.mark.parametrize("name", STREAMS)
def test_a_device_that_is_cut_at_a_field_is_said_to_be_cut(name: str) -> None:
    contents = InMemory(corpus(name)).contents
    for section in contents.sections:
        if contents.description is None or section.state is None or section.package is not None:
            continue
        body = contents.description.device(section.name, section.instance_id)
        key = section.name.rpartition("/")[2], section.length
        if body is None or key in CUT_DEVICES:
            continue
        CUT_DEVICES.add(key)
        begin = section.offset + HEADER_BYTES + len(section.name)
        data = corpus(name)[begin : section.offset + section.length - FOOTER_BYTES * bool(contents.footers)]
        assert decode_state(body.body, data, offset=begin) == (section.state, len(data))
        ends = sorted({0, *(leaf.offset + leaf.length - begin for leaf in section.state.leaves())})
        # All of nearly every device; of one with thousands of fields some.
        ends = random.Random(name).sample(ends, min(len(ends), max(2, 9000 // len(ends))))
        for cut in sorted({end + step for end in ends for step in (-1, 0, 1)} & set(range(len(data)))):
            try:
                _, used = decode_state(body.body, data[:cut], offset=begin)
            except StreamError as exc:
                assert_within(exc, begin, cut)
            else:
                assert used <= cut


def assert_within(exc: StreamError, begin: int, cut: int) -> None:
    """The fault is in the bytes that are there."""
    assert exc.offset is not None
    assert begin <= exc.offset <= begin + cut
