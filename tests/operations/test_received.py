"""What was received, as files: whole or not at all, also where whoever wanted them goes."""

import os
import threading
from pathlib import Path

import pytest

from qmigrate.operations.received import Parts, write_raw, write_stream

PAGE = 4096
BLOCK = ("pc.ram", 16 * PAGE, PAGE)


@pytest.fixture
def memory() -> int:
    descriptor = os.memfd_create("pc.ram")
    os.ftruncate(descriptor, BLOCK[1])
    os.pwrite(descriptor, b"\x11" * PAGE, 3 * PAGE)
    return descriptor


def empty() -> int:
    return os.memfd_create("empty")


def parts(memory: int) -> Parts:
    kept = {name: empty() for name in ("opening", "live", "devices", "closing")}
    return Parts(blocks=[BLOCK], memory=[memory], target_page=PAGE, kept=kept, section_id=2, footers=True)


def test_a_stream_that_nobody_waits_for_any_more_is_not_left(memory: int, tmp_path: Path) -> None:
    stops = threading.Event()
    stops.set()
    with pytest.raises(InterruptedError):
        write_stream(tmp_path / "x.mig", parts(memory), stops)
    assert list(tmp_path.iterdir()) == []


def test_ram_that_nobody_waits_for_any_more_is_not_left(memory: int, tmp_path: Path) -> None:
    stops = threading.Event()
    stops.set()
    with pytest.raises(InterruptedError):
        write_raw(tmp_path, [BLOCK], [memory], stops)
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_stays_where_the_new_one_can_not_be_written(memory: int, tmp_path: Path) -> None:
    (tmp_path / "x.mig").write_text("older")
    stops = threading.Event()
    stops.set()
    with pytest.raises(InterruptedError):
        write_stream(tmp_path / "x.mig", parts(memory), stops)
    assert (tmp_path / "x.mig").read_text() == "older"


def test_what_was_never_written_to_is_a_hole(memory: int, tmp_path: Path) -> None:
    write_raw(tmp_path, [BLOCK], [memory])
    file = tmp_path / "pc.ram.raw"
    assert file.read_bytes() == bytes(3 * PAGE) + b"\x11" * PAGE + bytes(12 * PAGE)
    assert file.stat().st_blocks * 512 < BLOCK[1]
