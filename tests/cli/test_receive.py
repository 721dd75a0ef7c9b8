"""``qmigrate receive``, the command."""

import io
import json
import socket
from pathlib import Path

import pytest

from qmigrate.cli.main import main
from tests import streams
from tests.uffd.kernel import needs_userfaultfd


@pytest.fixture
def control(tmp_path: Path) -> list[str]:
    return ["--control", str(tmp_path / "control")]


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "stream.mig"
    path.write_bytes(streams.minimal())
    return path


def test_a_file_is_received_and_the_answer_says_what_came(
    stream: Path, control: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["receive", f"file:{stream}", "-q", *control]) == 0
    captured = capsys.readouterr()
    said, received, pages, phases = captured.out.splitlines()
    assert (said, pages) == ("the migration was received", "  pages     5 pages, 15 zero pages")
    assert received.startswith("  received  21.2 KiB in ")
    assert phases.startswith("  phases    precopy at 0, ended at ")
    assert captured.err == ""


def test_a_saved_file_is_the_stream_again_but_for_its_passes(
    stream: Path, control: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "saved.mig"
    assert main(["receive", f"file:{stream}", "--save", str(saved), "-q", *control]) == 0
    expected = b"".join(
        (
            streams.header(),
            streams.configuration(),
            streams.ram_start(),
            streams.ram_end(
                streams.zero(0, block="pc.ram"),
                streams.zero(streams.PAGE, 3),
                streams.page(4 * streams.PAGE),
                streams.page(5 * streams.PAGE),
                streams.zero(6 * streams.PAGE, 10),
                streams.zero(0, block="pc.rom"),
                streams.zero(streams.PAGE),
            ),
            streams.devices(),
            streams.eof(),
            streams.devices_described(),
        )
    )
    assert saved.read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    capsys.readouterr()


def test_events_are_json_lines_the_last_says_how_it_ended(
    stream: Path, control: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["receive", f"file:{stream}", "--ndjson", *control]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[0]["event"] == "listening"
    assert events[-1]["event"] == "finished"
    assert (events[-1]["exit_code"], events[-1]["postcopy"]) == (0, False)


def test_a_stream_that_ends_early_is_the_sources_still(
    stream: Path, control: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    stream.write_bytes(streams.minimal()[:-100])
    assert main(["receive", f"file:{stream}", "-q", *control]) == 3
    assert "it failed, the guest is the source's: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gopher:x"], "'gopher:x' is no place to receive from"),
        (["tcp:nowhere"], "'tcp:nowhere' is no socket"),
        (["file:/no/such/file"], "/no/such/file: No such file or directory"),
        (["file:/dev/null,offset=x"], "'x' is no offset"),
        ([], "give a URI to receive from, or --control"),
        (["-", "--recover", "unix:x"], "--recover is for a receive that runs already"),
        (["-", "--save", "x", "--touch", "random", "--touch-writes", "0.5"], "nothing may write to memory"),
    ],
)
def test_what_cannot_begin_is_refused_with_its_reason(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    control = ["--control", str(tmp_path / "control")] if words else []
    assert main(["receive", *words, *control]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--touch", "wildly"], ["--touch-writes", "2"], ["--touch-rate", "0"]])
def test_touches_that_cannot_be_are_a_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["receive", "-", *words]) == 2
    assert "qmigrate receive: error: " in capsys.readouterr().err


def test_nobody_at_the_control_socket_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["receive", "--recover", "unix:x", "--control", str(tmp_path / "nobody")]) == 2
    assert "nobody: No such file or directory" in capsys.readouterr().err


@needs_userfaultfd
def test_a_socket_that_is_inherited_is_answered(control: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(streams.postcopy())
        assert main(["receive", f"fd:{theirs.fileno()}", "-q", *control]) == 0
        answers = io.BytesIO(ours.recv(1 << 16))
        assert answers.read(8) == bytes.fromhex("0002000400000001")  # PONG 1
    capsys.readouterr()
