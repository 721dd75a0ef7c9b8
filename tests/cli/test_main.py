"""What ``qmigrate`` means to a shell: exit codes, one line for each error, never a traceback."""

import errno
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from qmigrate import __version__
from qmigrate.cli.main import COMMANDS, DESCRIPTION, main
from qmigrate.format.stream import SectionType
from tests import streams

QMIGRATE = [sys.executable, "-m", "qmigrate"]
Output = pytest.CaptureFixture[str]


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "a.mig"
    path.write_bytes(streams.minimal())
    return path


def run(
    *arguments: str | Path,
    stdin: Any = None,
    stdout: Any = subprocess.PIPE,
    stderr: Any = subprocess.PIPE,
    env: dict[str, str] | None = None,
) -> "subprocess.CompletedProcess[str]":
    command = [*QMIGRATE, *map(str, arguments)]
    return subprocess.run(
        command, stdin=stdin, stdout=stdout, stderr=stderr, env=env, text=True, timeout=60, check=False
    )


def test_the_version_is_told(capsys: Output) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qmigrate {__version__}\n"


def test_it_runs_as_a_module() -> None:
    ended = run("--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"qmigrate {__version__}\n", "")


def test_the_version_needs_no_library() -> None:
    code = (
        "import sys; from qmigrate.cli.main import main; main(['--version']); "
        "late = ('construct', 'rich', 'rich_argparse', 'qemu', 'asyncio', 'shtab', 'multiprocessing'); "
        "print([name for name in late if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.splitlines()[1] == "[]"


@pytest.mark.parametrize("command", [[], ["dissect"], ["check"], ["extract"]])
def test_help_is_given(command: list[str], capsys: Output) -> None:
    assert main([*command, "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"Usage: {' '.join(['qmigrate', *command])} ")
    assert "\x1b" not in captured.out
    assert captured.err == ""


def test_the_help_says_what_every_command_is_for() -> None:
    said = re.findall(r"[\w-]+", DESCRIPTION)
    assert [name for name in COMMANDS if name not in said] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "qmigrate: error: the following arguments are required: COMMAND\n"),
        (["disect", "x"], "qmigrate: error: argument COMMAND: invalid choice: 'disect' (choose from "),
        (["dissect"], "qmigrate dissect: error: the following arguments are required: FILE\n"),
        (["extract", "x"], "qmigrate extract: error: the following arguments are required: --raw\n"),
        (["extract", "--raw", "", "x"], "argument --raw: an empty name: expected a directory\n"),
        (["dissect", "--struct", "x"], "error: unrecognized arguments: --struct\n"),
        (["dissect", "--ram", "--structure", "x"], "argument --structure: not allowed with argument --ram\n"),
        (["dissect", "--json", "--structure", "x"], "--structure goes with --ndjson: there is a record a line\n"),
        (["dissect", "--ram", "--ndjson", "x"], "--device, --field and --ram go with --json\n"),
        (
            ["dissect", "--max-package", "5Q", "x"],
            "'5Q' is no size: expected bytes, or a number with K, M, G or T\n",
        ),
        (["dissect", "--page-size", "3000", "x"], "'3000' is no page size: expected a power of two from 256 to 64K\n"),
    ],
)
def test_a_wrong_usage_ends_with_2(arguments: list[str], said: str, capsys: Output) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path, capsys: Output) -> None:
    assert main(["dissect", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr() == ("", f"qmigrate: {tmp_path}/nothing: No such file or directory\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_one_line(stream: Path, capsys: Output) -> None:
    stream.chmod(0)
    assert main(["dissect", str(stream)]) == 2
    assert capsys.readouterr() == ("", f"qmigrate: {stream}: Permission denied\n")


@pytest.mark.parametrize(
    "command",
    [
        ["dissect", "FILE"],
        ["dissect", "--live", "FILE"],
        ["check", "FILE"],
        ["check", "--channel", "FILE", "STREAM"],
        ["check", "--return-path", "FILE", "STREAM"],
        ["extract", "--raw", "FOLDER", "FILE"],
        ["diff", "FILE", "STREAM"],
        ["diff", "STREAM", "FILE"],
        ["schema", "make", "FILE"],
        ["send", "--no-kept-index", "FILE", "unix:/nowhere"],
    ],
    ids=" ".join,
)
def test_a_file_that_can_not_be_read_is_named(command: list[str], stream: Path, tmp_path: Path, capsys: Output) -> None:
    unreadable = "/proc/self/mem"  # opens well, and nothing is at its start
    given = {"FILE": unreadable, "STREAM": str(stream), "FOLDER": str(tmp_path / "out")}
    assert main([given.get(word, word) for word in command]) == 2
    assert capsys.readouterr() == ("", f"qmigrate: {unreadable}: Input/output error\n")


def test_a_channel_that_can_not_be_read_is_named_where_it_is_sent(stream: Path, capsys: Output) -> None:
    assert main(["send", "--no-kept-index", "--channel", "/proc/self/mem", str(stream), "unix:/nowhere"]) == 2
    assert capsys.readouterr() == ("", f"qmigrate: {stream}: /proc/self/mem: Input/output error\n")


@pytest.mark.parametrize(
    "command",
    [
        ["check", ""],
        ["check", "--channel", "", "STREAM"],
        ["dissect", "--live", ""],
        ["extract", "--raw", "FOLDER", ""],
        ["diff", "", "STREAM"],
        ["schema", "make", ""],
        ["send", "", "unix:/nowhere"],
    ],
    ids=" ".join,
)
def test_a_file_whose_name_is_empty_is_told_of(
    command: list[str], stream: Path, tmp_path: Path, capsys: Output
) -> None:
    given = {"STREAM": str(stream), "FOLDER": str(tmp_path / "out")}
    assert main([given.get(word, word) for word in command]) == 2
    assert capsys.readouterr() == ("", "qmigrate: '' (an empty name): No such file or directory\n")


def test_a_channel_that_is_no_file_is_named(stream: Path, tmp_path: Path, capsys: Output) -> None:
    assert main(["check", "--channel", str(tmp_path), str(stream)]) == 2
    assert capsys.readouterr() == ("", f"qmigrate: {tmp_path}: a directory, expected a migration stream\n")


@pytest.mark.parametrize("command", ["extract", "diff", "send"])
def test_that_no_further_file_can_be_opened_is_not_said_of_standard_output(command: str, stream: Path) -> None:
    arguments = {
        "extract": ["extract", "--raw", str(stream.with_name("out")), str(stream)],
        "diff": ["diff", str(stream), str(stream)],
        "send": ["send", "--no-kept-index", str(stream), "unix:/nowhere"],
    }
    code = (  # all is imported before the limit holds
        "import resource, sys; from qmigrate.cli.main import main; main(sys.argv[1:]); sys.stderr.write('LIMITED\\n'); "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5)); sys.exit(main(sys.argv[1:]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments[command]], capture_output=True, text=True, timeout=60, check=False
    )
    said = ended.stderr.rpartition("LIMITED\n")[2].splitlines()
    assert ended.returncode == 2
    assert said[-1].startswith("qmigrate: ")
    assert "Too many open files" in said[-1]
    assert "standard output" not in said[-1]


def test_a_directory_is_one_line(tmp_path: Path, capsys: Output) -> None:
    assert main(["dissect", str(tmp_path)]) == 2
    assert capsys.readouterr() == ("", f"qmigrate: {tmp_path}: a directory, expected a migration stream\n")


@pytest.mark.parametrize("view", [[], ["--structure"], ["--ram"], ["--json"], ["--ndjson"], ["--device", "x"]])
@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (b"", "no migration stream: 0 bytes are there, its header has 8"),
        (b"QEVM", "no migration stream: 4 bytes are there, its header has 8"),
        (b"#!/bin/sh\n", "no migration stream: it begins with 23212f62, expected 5145564d (QEVM)"),
        (streams.header(version=2), "a migration stream of version 2, expected 3"),
    ],
)
def test_what_holds_no_stream_is_one_line(
    view: list[str], contents: bytes, said: str, tmp_path: Path, capsys: Output
) -> None:
    path = tmp_path / "a.mig"
    path.write_bytes(contents)
    assert main(["dissect", *view, str(path)]) == 2
    assert capsys.readouterr() == ("", f"qmigrate: {path}: {said}\n")


@pytest.mark.parametrize("view", [[], ["--structure"], ["--ram"], ["--json"], ["--ndjson"]])
def test_a_damaged_stream_ends_with_1_and_what_was_good_is_given(
    view: list[str], tmp_path: Path, capsys: Output
) -> None:
    path = tmp_path / "a.mig"
    path.write_bytes(streams.header() + streams.configuration() + streams.ram_start() + b"\x02\0\0\0\7")
    assert main(["dissect", *view, str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"qmigrate: {path}: 0x5d: PART names section 7, and no START did\n"
    assert "pc.ram" in captured.out


def test_hostile_names_in_errors_do_nothing(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "a\x1b[31m.mig"
    name = "\x1b[2J[bold]\udcff"
    path.write_bytes(streams.header() + streams.section(SectionType.START, name, section_id=1))
    assert main(["dissect", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        rf"qmigrate: {tmp_path}/a\x1b[31m.mig: 0x21: \x1b[2J[bold]\xff: "
        "the inside of this live section is not known\n"
    )
    assert "\x1b" not in captured.out


def test_standard_input_is_read(stream: Path) -> None:
    with stream.open("rb") as file:
        ended = run("dissect", "-", stdin=file)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("standard input  complete, 21,752 bytes\n")


@pytest.mark.parametrize("view", [[], ["--structure"], ["--ram"], ["--json"], ["--ndjson"]])
def test_a_pipe_gives_what_a_file_does(view: list[str], stream: Path) -> None:
    pipe = stream.with_name("pipe")
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(stream.read_bytes()))
    writer.start()
    from_pipe = run("dissect", *view, pipe)
    writer.join()
    from_file = run("dissect", *view, stream)
    assert (from_pipe.returncode, from_pipe.stderr) == (0, "")
    assert from_pipe.stdout.replace(str(pipe), str(stream)) == from_file.stdout


@pytest.mark.parametrize("view", ["--structure", "--ndjson"])
def test_a_reader_that_has_enough_ends_it_quietly(view: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mig"
    many = streams.ram_part(*(streams.page(at % 16 * streams.PAGE, b"\1" * 4096, block="pc.ram") for at in range(5000)))
    path.write_bytes(streams.header() + streams.ram_start() + many)
    with subprocess.Popen(
        [*QMIGRATE, "dissect", view, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert b"HEADER" in process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        assert (process.wait(60), said) == (141, b"")


def test_a_reader_that_is_gone_at_once_ends_it_quietly(stream: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = run("dissect", stream, stdout=writing)
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["dissect"], ["dissect", "--structure"], ["dissect", "--json"], ["check"]])
def test_a_full_disk_is_one_line(arguments: list[str], stream: Path) -> None:
    with Path("/dev/full").open("w") as full:
        ended = run(*arguments, stream, stdout=full)
    assert ended.returncode == 2
    assert ended.stderr == f"qmigrate: standard output: {os.strerror(errno.ENOSPC)}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("argument", ["--version", "--help", "--print-completion=bash"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_takes_the_version_and_help_too(argument: str, unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        ended = run(argument, stdout=full, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert (ended.returncode, ended.stderr) == (2, f"qmigrate: standard output: {os.strerror(errno.ENOSPC)}\n")


def test_a_closed_standard_output_is_one_line(stream: Path) -> None:
    ended = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *QMIGRATE, "dissect", str(stream)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (2, "qmigrate: standard output is closed\n")


def test_ctrl_c_ends_it_quietly(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with (
        subprocess.Popen([*QMIGRATE, "dissect", str(pipe)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
        pipe.open("wb") as writer,
    ):  # opens once it is opened for reading
        writer.write(streams.header())
        writer.flush()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")


@pytest.mark.parametrize("locale", ["C", "POSIX", "nowhere_AT.nothing"])
def test_a_locale_that_cannot_hold_a_character_does_no_harm(locale: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mig"
    path.write_bytes(
        streams.header() + streams.configuration("日本\udcff") + streams.ram_start() + streams.ram_end() + streams.eof()
    )
    environment = {
        **os.environ,
        "LC_ALL": locale,
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    for view in ([], ["--structure"], ["--json"]):
        ended = run("dissect", *view, path, env=environment)
        assert ended.returncode == 0
        assert "Traceback" not in ended.stderr
        assert ended.stdout.isascii()
        assert "u65e5" in ended.stdout


def test_no_progress_is_shown_where_it_is_not_asked_for(stream: Path) -> None:
    for more in ([], ["-q"]):
        ours, theirs = pty.openpty()
        try:
            ended = run("dissect", *more, stream, stderr=theirs)
            os.set_blocking(ours, False)
            with pytest.raises(BlockingIOError):
                os.read(ours, 1)
        finally:
            os.close(ours)
            os.close(theirs)
        assert ended.returncode == 0
