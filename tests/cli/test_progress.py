"""Progress: on a terminal, for whoever asks by a signal, and with -v."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Self

import pytest

from qmigrate.cli import progress
from qmigrate.cli.main import main
from tests import streams
from tests.report.papers import Terminal


def standard_error(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in its place; no fixture, as pytest puts its own there when the test begins."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_what_is_shown_is_erased_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_FIRST_S", 0)
    monkeypatch.setattr(progress, "_EVERY_S", 600)
    terminal = standard_error(monkeypatch)
    path = tmp_path / "a.mig"
    path.write_bytes(streams.minimal())
    with progress.WatchedMigration(path) as migration:
        assert migration.complete
    assert terminal.getvalue() == "\r\x1b[K21.2 KiB of 21.2 KiB read, 100 %\r\x1b[K"


def test_it_is_erased_where_reading_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_FIRST_S", 0)
    terminal = standard_error(monkeypatch)
    path = tmp_path / "a.mig"
    path.write_bytes(streams.minimal())
    with progress.WatchedMigration(path) as migration:
        entries = migration.entries()
        next(entries)
        next(entries)
        del entries
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_what_is_done_soon_shows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock = standard_error(monkeypatch), SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    path = tmp_path / "a.mig"
    path.write_bytes(streams.minimal())
    with progress.WatchedMigration(path) as migration:
        count = len(list(migration.entries()))
        for number, _ in enumerate(migration.entries(), start=1):
            clock.now = 1000 + 0.49 * number / count
        assert terminal.getvalue() == ""
        for _ in migration.entries():
            clock.now += 0.5
    assert terminal.getvalue().startswith("\r\x1b[K")


# -- SIGUSR1


class Piped:
    """A command that reads a pipe, which the test writes."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        pipe = folder / "pipe"
        os.mkfifo(pipe)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qmigrate", *arguments, "pipe"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        self.writer: IO[bytes] = pipe.open("wb", buffering=0)  # returns once it is opened for reading

    def asked(self) -> str:
        assert self.process.stderr is not None
        self.process.send_signal(signal.SIGUSR1)
        return self.process.stderr.readline()

    def asked_until(self, line: str) -> None:
        """The bytes are on their way: it takes a moment until they are read."""
        said, ends = [self.asked()], time.monotonic() + 60
        while said[-1] != line and time.monotonic() < ends:
            time.sleep(0.02)
            said.append(self.asked())
        assert said[-1] == line, said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()
        self.process.kill()
        self.process.communicate()

    def end(self) -> int:
        self.writer.close()
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.fixture(params=[["dissect"], ["dissect", "--ndjson"], ["check"], ["extract", "--raw", "out"]], ids=" ".join)
def piped(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Piped]:
    with Piped(tmp_path, *request.param) as piped:
        yield piped


def test_a_signal_asks_how_much_is_read_and_what_is_being_read(piped: Piped) -> None:
    start = streams.header() + streams.configuration() + streams.ram_start()
    section = b"\2\0\0\0\2"  # PART of section 2
    pages = streams.page(0, block="pc.ram") + streams.page(streams.PAGE)
    piped.asked_until("qmigrate: pipe: 0 bytes read, at 0x0\n")
    piped.writer.write(start + section + pages + pages[:100])
    end = len(start + section + pages)
    piped.asked_until(f"qmigrate: pipe: {end / 1024:.1f} KiB read, at {end:#x} in ram/0: pc.ram\n")
    assert piped.end() == 1


def test_between_sections_the_place_is_an_offset(piped: Piped) -> None:
    start = streams.header() + streams.configuration() + streams.ram_start()
    piped.writer.write(start)
    piped.asked_until(f"qmigrate: pipe: {len(start)} bytes read, at {len(start):#x}\n")
    piped.writer.write(streams.minimal()[len(start) :])
    assert piped.end() == 0


def test_hostile_names_do_nothing_in_the_answer(tmp_path: Path) -> None:
    name = "\x1b[31m[bold]\udcff"
    with Piped(tmp_path, "dissect") as piped:
        start = streams.header() + streams.configuration() + streams.ram_start({name: streams.PAGE})
        stream = start + b"\2\0\0\0\2" + streams.page(0, block=name)
        piped.writer.write(stream)
        place = f"{len(stream) / 1024:.1f} KiB read, at {len(stream):#x} in ram/0: "
        piped.asked_until(f"qmigrate: pipe: {place}" + r"\x1b[31m[bold]\xff" + "\n")
        assert piped.end() == 1


def test_of_a_file_the_share_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.mig"
    stream = streams.minimal()[:100]
    path.write_bytes(stream)
    with progress.WatchedMigration(path, shows=False) as migration:
        assert migration.where() == f"{path}: 0 bytes of 100 bytes read, 0 %, at 0x0"
        assert not migration.complete
        assert migration.where() == f"{path}: 100 bytes of 100 bytes read, 100 %, at 0x61 in ram/0"


def test_the_signal_means_what_it_did_before_once_a_command_is_over(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    assert main(["dissect", str(tmp_path / "nothing")]) == 2
    assert signal.getsignal(signal.SIGUSR1) == before


# -- -v


def verbose(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """What -v adds on standard error, times and sizes left out."""
    assert main([*arguments, "-v"]) == 0
    return re.sub(r"[\d,]*\.\d+( [KMG]iB)?|[\d,]+ [KMGb]\w+(?=/s)", "N", capsys.readouterr().err).splitlines()


def test_verbose_tells_how_it_was_read_and_what_that_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.mig"
    path.write_bytes(streams.minimal())
    for command in (["dissect"], ["dissect", "--structure"], ["check"], ["extract", "--raw", str(tmp_path / "out")]):
        told = verbose(capsys, *command, str(path))
        assert told == [
            f"qmigrate: {path}: a file of 21,752 bytes, not compressed",
            f"qmigrate: {path}: target pages of 4 KiB: not announced",
            f"qmigrate: {path}: sections with footers, a description of 827 bytes",
            f"qmigrate: {path}: 21,752 bytes of stream read in N s, N/s",
            "qmigrate: N s, N s of CPU time, N of memory at most, in this process",
        ]


def test_verbose_tells_where_the_page_size_is_known_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.mig"
    path.write_bytes(streams.minimal())
    assert verbose(capsys, "dissect", "--page-size", "4K", str(path))[1].endswith("target pages of 4 KiB: --page-size")
    path.write_bytes(streams.postcopy())
    told = verbose(capsys, "dissect", str(path))
    assert told[1].endswith("target pages of 4 KiB: POSTCOPY_ADVISE says so")
    assert told[2].endswith("sections with footers, no description")
