"""RAM out of a stream, against what its records say one after the other."""

import os
import random
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmigrate.analysis.extract import extract
from qmigrate.analysis.ram_files import RamWriter
from qmigrate.capture.migration import Migration
from tests import streams

PAGE = 4096
LENGTH = 64  # pages
Sent = tuple[bool, int, int]  # is it ZERO, page, byte


def written(tmp_path: Path, sent: list[Sent]) -> Path:
    """The file into which ``sent`` is extracted."""
    parts = [streams.zero(0, block="pc.ram")]
    parts += [
        streams.zero(page * PAGE) if is_zero else streams.page(page * PAGE, bytes([byte]) * PAGE)
        for is_zero, page, byte in sent
    ]
    stream = tmp_path / "a.mig"
    stream.write_bytes(
        b"".join(
            [
                streams.header(),
                streams.configuration(),
                streams.ram_start({"pc.ram": LENGTH * PAGE}),
                streams.ram_part(*parts),
                streams.ram_end(),
                streams.eof(),
            ]
        )
    )
    with Migration(stream) as migration:
        extracted = extract(migration, tmp_path / "out")
    # Where no page has contents and some did not come, RAM is missing: it travelled over other connections.
    is_whole = not all(is_zero for is_zero, _, _ in sent) or len({page for _, page, _ in sent}) == LENGTH
    assert extracted.gathering.contents.complete == is_whole
    assert extracted.bytes_written["pc.ram"] == PAGE * sum(not is_zero for is_zero, _, _ in sent)
    return tmp_path / "out" / "pc.ram.raw"


def expected(sent: list[Sent]) -> bytes:
    memory = bytearray(LENGTH * PAGE)
    for is_zero, page, byte in sent:
        memory[page * PAGE : (page + 1) * PAGE] = bytes([0 if is_zero else byte]) * PAGE
    return bytes(memory)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, LENGTH - 1), st.integers(1, 255)), max_size=80))
def test_the_last_copy_of_each_page_wins_whatever_the_order(
    tmp_path_factory: pytest.TempPathFactory, sent: list[Sent]
) -> None:
    assert written(tmp_path_factory.mktemp("ram"), sent).read_bytes() == expected(sent)


@pytest.mark.parametrize("step", [1, 3])
def test_of_alternating_pages_the_zero_ones_are_holes(tmp_path: Path, step: int) -> None:
    sent = [(index % (step + 1) == 0, index, 7) for index in range(LENGTH)]
    file = written(tmp_path, sent)
    assert file.read_bytes() == expected(sent)
    assert file.stat().st_blocks * 512 <= PAGE * sum(not is_zero for is_zero, _, _ in sent)


def test_pages_in_any_order_come_to_their_places(tmp_path: Path) -> None:
    chance = random.Random(1)
    sent = [(chance.random() < 0.5, page, page + 1) for page in chance.sample(range(LENGTH), LENGTH)]
    assert written(tmp_path, sent).read_bytes() == expected(sent)


def test_a_signal_right_when_a_file_was_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python hears of it before whatever would come next."""
    make = os.open

    def interrupted(path: Path, flags: int, mode: int) -> int:
        os.close(make(path, flags, mode))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", interrupted)
    with ExitStack() as stack:
        writer = RamWriter(tmp_path, stack)
        writer.names = {"pc.ram": "pc.ram.raw"}
        with pytest.raises(KeyboardInterrupt):
            writer._new_file("pc.ram")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_another_one_makes_just_now_is_left_to_him(tmp_path: Path) -> None:
    """In another container, which has the same number."""
    his = tmp_path / f".pc.ram.raw.{os.getpid()}.part"
    his.write_bytes(b"his")
    with ExitStack() as stack:
        writer = RamWriter(tmp_path, stack)
        writer.names = {"pc.ram": "pc.ram.raw"}
        with pytest.raises(FileExistsError):
            writer._new_file("pc.ram")
    assert his.read_bytes() == b"his"
