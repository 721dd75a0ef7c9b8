"""``qmigrate send``: what of it is the command's own."""

import fcntl
import json
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from qmigrate.cli.main import main
from tests import streams

Output = pytest.CaptureFixture[str]
TIMEOUT_S = 60.0


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "a.mig"
    path.write_bytes(streams.minimal())
    return path


def sent(stream: Path, capsys: Output, *options: str) -> list[bool]:
    """To nobody, so that all it does is to read the file: was there an index of it?"""
    assert main(["send", "--ndjson", *options, str(stream), f"unix:{stream}.nobody"]) == 2
    said = capsys.readouterr()
    assert "it can't be reached" in said.err
    events = [json.loads(line) for line in said.out.splitlines()]
    return [each["kept"] for each in events if each["event"] == "indexed"]


def test_it_keeps_an_index_and_uses_it_the_next_time(stream: Path, tmp_path: Path, capsys: Output) -> None:
    folder = tmp_path / "indexes"
    assert [sent(stream, capsys, "--index-folder", str(folder)) for _ in range(2)] == [[False], [True]]
    assert len(list(folder.iterdir())) == 1


def test_it_keeps_none_where_it_shall_not(
    stream: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QMIGRATE_CACHE", str(tmp_path / "cache"))
    assert [sent(stream, capsys, "--no-kept-index") for _ in range(2)] == [[False], [False]]
    assert not (tmp_path / "cache").exists()
    assert [sent(stream, capsys) for _ in range(2)] == [[False], [True]]


def test_what_can_not_be_opened_is_told_at_once(tmp_path: Path, capsys: Output) -> None:
    assert main(["send", str(tmp_path / "nothing.mig"), "unix:/nowhere"]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_does_not_wait_for_a_pipe(number: signal.Signals, stream: Path) -> None:
    command = [sys.executable, "-m", "qmigrate", "send", "-", f"unix:{stream}.nobody"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(stream.read_bytes()[:5000])
        process.stdin.flush()
        wait_for_it_to_be_read(process.stdin.fileno())
        process.send_signal(number)
        status = process.wait(TIMEOUT_S)
        assert process.stderr is not None
        assert (status, process.stderr.read()) == (130, b"qmigrate: interrupted before anything began\n")


def wait_for_it_to_be_read(pipe: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_report_of_a_restore_never_takes_the_place_of_the_saved_guest(tmp_path: Path, capsys: Output) -> None:
    saved = tmp_path / "a.mig"
    saved.write_bytes(streams.minimal())
    assert main(["restore", "--report", str(saved), "--qmp", str(tmp_path / "none"), str(saved)]) == 2
    assert capsys.readouterr().err == f"qmigrate: {saved}: an input, which would be overwritten\n"
    assert saved.read_bytes() == streams.minimal()
