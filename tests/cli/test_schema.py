"""``qmigrate schema``, and what dissect, check and diff do with what it made."""

import asyncio
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from qmigrate.cli.completion import completion
from qmigrate.cli.main import build_parser, main
from qmigrate.cli.man import man_page
from qmigrate.qmp import migration
from tests import streams

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QMIGRATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "schemas"


@pytest.fixture
def precopy(tmp_path: Path) -> str:
    path = tmp_path / "precopy.mig"
    path.write_bytes(streams.minimal())
    return str(path)


@pytest.fixture
def postcopy(tmp_path: Path) -> str:
    path = tmp_path / "postcopy.mig"
    path.write_bytes(streams.postcopy())
    return str(path)


def make(capsys: Output, *files: str) -> dict[str, object]:
    assert main(["schema", "make", "--json", *files]) == 0
    made: dict[str, object] = json.loads(capsys.readouterr().out)
    return made


def test_a_schema_that_can_not_be_written_is_named(precopy: str, folder: Path, capsys: Output) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        status = main(["schema", "make", precopy])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    assert re.fullmatch(rf"qmigrate: {folder}/[0-9a-f]+\.schema: File too large\n", capsys.readouterr().err)
    assert not list(folder.iterdir())


def test_what_is_made_is_listed_and_shown(precopy: str, folder: Path, capsys: Output) -> None:
    made = make(capsys, precopy)
    assert made["path"] == str(folder / f"{made['id']}.schema")
    assert main(["schema", "list"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["id", "machine", "QEMU", "made", "at", "sections", "made", "from"]
    assert row.split()[:3] == [made["id"], "pc-q35-10.0", "-"]
    assert row.split()[-2:] == ["2", precopy]
    assert main(["schema", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{key: value for key, value in made.items() if key != "path"}]
    assert main(["schema", "show", str(made["id"])[:5]]) == 0
    shown = capsys.readouterr().out
    assert f"Made from  {precopy}\n" in shown
    assert shown.endswith("  timer/0                      2\n  0000:00:04.0/serial/1        3\n")
    assert main(["schema", "show", "--json", str(made["id"])]) == 0
    assert json.loads(capsys.readouterr().out)["devices"][0] == {"name": "timer", "instance_id": 0, "version_id": 2}


def test_streams_without_a_description_are_decoded_by_themselves(precopy: str, postcopy: str, capsys: Output) -> None:
    assert main(["check", "--strict", postcopy]) == 1
    capsys.readouterr()
    made = make(capsys, precopy)
    assert main(["dissect", "--field", "timer.cpu_ticks_offset", postcopy]) == 0
    assert capsys.readouterr().out == "-5\n"
    assert main(["check", "--strict", "-v", postcopy]) == 0
    used = f"sections with footers, no description: schema {made['id']}, made from {precopy}\n"
    assert used in capsys.readouterr().err
    assert main(["dissect", postcopy]) == 0
    assert f"they are decoded by schema {made['id']}, made from {precopy}." in capsys.readouterr().out
    assert main(["check", "--strict", "--no-schemas", postcopy]) == 1
    capsys.readouterr()
    assert main(["dissect", "--json", "--jobs", "2", postcopy, postcopy]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(answer["devices"]) for answer in answers] == [2, 2]
    assert main(["diff", postcopy, postcopy]) == 0
    assert "same; 12 fields compared" in capsys.readouterr().out


def test_a_description_that_is_named_wins(precopy: str, postcopy: str, tmp_path: Path, capsys: Output) -> None:
    make(capsys, precopy)
    other = tmp_path / "other.mig"
    known = streams.description(streams.described("timer", streams.field("all", "buffer", 17)))
    head = streams.header() + streams.configuration() + streams.ram_start() + streams.ram() + streams.devices()
    other.write_bytes(head + streams.eof() + known)
    assert main(["dissect", "--field", "timer.all", "--description", str(other), postcopy]) == 0
    assert capsys.readouterr().out == f"{streams.TIMER_STATE.hex()}\n"


def test_a_pipe_is_decoded_too(precopy: str, tmp_path: Path, capsys: Output) -> None:
    make(capsys, precopy)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    thread = threading.Thread(target=lambda: pipe.write_bytes(streams.postcopy()))
    thread.start()
    assert main(["dissect", "--field", "timer.cpu_ticks_offset", str(pipe)]) == 0
    thread.join(timeout=60)
    assert capsys.readouterr().out == "-5\n"


def test_a_damaged_schema_is_told_once_and_not_used(precopy: str, postcopy: str, folder: Path, capsys: Output) -> None:
    made = make(capsys, precopy)
    path = folder / f"{made['id']}.schema"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["check", "--strict", postcopy]) == 1
    captured = capsys.readouterr()
    assert captured.err.count(f"qmigrate: {path}: not used: its description is not what was written there\n") == 1
    assert main(["schema", "list"]) == 0
    assert capsys.readouterr().err.endswith(f"qmigrate: there are no schemas in {folder}\n")


def test_what_no_schema_can_be_made_of_is_told(postcopy: str, precopy: str, tmp_path: Path, capsys: Output) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x7fELF and more")
    assert main(["schema", "make", postcopy, precopy]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"qmigrate: {postcopy}: this stream has no description of its devices\n"
    assert captured.out.splitlines()[-1].endswith(precopy)
    assert main(["schema", "make", str(junk)]) == 2
    assert main(["schema", "make", str(tmp_path / "none")]) == 2
    capsys.readouterr()
    assert main(["schema", "show", "0123"]) == 2
    assert "begin with 0123" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["make"], "make takes STREAMs, or -- and a command line"),
        (["make", "--"], "make takes STREAMs, or -- and a command line"),
        (["make", "x.mig", "--", "qemu"], "make takes STREAMs, or -- and a command line"),
        (["make", "qemu", "-m", "8"], "unrecognized arguments: -m 8 (a QEMU's command line stands behind --)"),
        (["list", "-m", "8"], "unrecognized arguments: -m 8\n"),
        (["list", "--", "qemu"], "only make takes a command line"),
        (["make", "--timeout", "0", "x.mig"], "argument --timeout: '0' is no number of seconds"),
        ([], "the following arguments are required: ACTION"),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: Output) -> None:
    assert main(["schema", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("word", ["-incoming", "--daemonize", "-preconfig"])
def test_a_command_line_without_a_guest_to_migrate_is_refused(word: str, capsys: Output) -> None:
    assert main(["schema", "make", "--", "qemu-system-x86_64", word]) == 2
    assert capsys.readouterr().err == (
        f"qmigrate: {word} can't be in the command line: the machine is started to be migrated from\n"
    )


def test_a_qemu_that_is_not_there_is_one_line(capsys: Output) -> None:
    assert main(["schema", "make", "--", "no-such-qemu", "-m", "8"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("qmigrate: no-such-qemu: it did not start: ")


def test_a_command_line_without_a_program_is_refused(capsys: Output) -> None:
    assert main(["schema", "make", "--", "", "-m", "8"]) == 2
    assert capsys.readouterr().err == "qmigrate: the command line names no program\n"


def test_a_program_where_a_stream_should_be_is_told_where_it_belongs(tmp_path: Path, capsys: Output) -> None:
    program = tmp_path / "qemu"
    program.write_bytes(b"#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    assert main(["schema", "make", str(program)]) == 2
    assert capsys.readouterr().err == (
        f"qmigrate: {program}: no migration stream but a program: a QEMU's command line stands behind --\n"
    )


def test_a_folder_for_the_socket_whose_path_is_too_long_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    assert main(["schema", "make", "--", "qemu-system-x86_64"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"qmigrate: {deep}/")
    assert err.endswith("/socket is too long for the path of a socket: set TMPDIR to a shorter one\n")
    assert list(deep.iterdir()) == []


SPEAKER = """\
import json, re, socket, sys
qmp = socket.socket(fileno=int(re.search(r"fd=(\\d+)", " ".join(sys.argv))[1]))
say = lambda message: qmp.sendall(json.dumps(message).encode() + b"\\n")
say({"QMP": {"version": {"qemu": {"major": 9, "minor": 0, "micro": 0}, "package": ""}, "capabilities": []}})
decoder, said = json.JSONDecoder(), ""
while piece := qmp.recv(1 << 16):
    said += piece.decode()
    while said.strip():
        message, end = decoder.raw_decode(said.lstrip())
        said = said.lstrip()[end:]
        returned = {"query-migrate": {"status": "completed"}, "query-migrate-capabilities": []}
        if message["execute"] == "migrate":
            CONNECT
        say({"return": returned.get(message["execute"], {}), "id": message.get("id")})
        if message["execute"] == "quit":
            sys.exit()
"""


TIMEOUT_S = 20  # less than a command has, which would be what ends it


@contextmanager
def no_time_left(step: str, done: bool) -> Iterator[None]:
    """For event loops the time-out has passed once this step of a migration is done, or a moment after it began.

    How long it took to come there makes no difference then.
    """
    passed_s, real = 0, getattr(migration, step)

    def pass_by() -> None:
        nonlocal passed_s
        passed_s = TIMEOUT_S

    async def passes(*arguments: Any, **options: Any) -> Any:
        if not done:
            asyncio.get_running_loop().call_later(0.2, pass_by)
        found = await real(*arguments, **options)
        pass_by()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.BaseEventLoop, "time", lambda _: time.monotonic() + passed_s)
        patch.setattr(migration, step, passes)
        yield


DONE, TOLD = ("wait_until", True), ("start", False)
ENDLESS = f"speaker: its stream has not ended after {TIMEOUT_S} s"
CONNECTED = "stream = socket.socket(socket.AF_UNIX); stream.connect(message['arguments']['uri'][5:])"
SENT = f"{CONNECTED}; stream.send(b'nonsense')"


@pytest.mark.parametrize(
    ("connect", "clock", "told"),
    [
        ("pass", DONE, ENDLESS),
        (SENT, DONE, ENDLESS),
        (f"{SENT}; stream.close()", None, "no migration stream: it begins with 6e6f6e73, expected 5145564d (QEVM)"),
        # Nothing is sent on the second one: it is closed at once, which may be before the program would send.
        (f"{SENT}; stream.close(); {CONNECTED}; stream.close()", None, "no migration stream: it begins with 6e6f6e73"),
        ("import time; time.sleep(600)", TOLD, ENDLESS),
    ],
    ids=["none", "no end", "no stream", "two", "no answer"],
)
def test_a_program_that_speaks_qmp_and_sends_no_stream_is_one_line(
    connect: str, clock: tuple[str, bool] | None, told: str, tmp_path: Path, capfd: Output
) -> None:
    program = tmp_path / "speaker"
    body = SPEAKER.replace("CONNECT\n", f"{connect}\n")
    program.write_text(f"#!{sys.executable}\n{body}")
    program.chmod(0o755)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", temporary)  # tmp_path may be too long for a socket in it
        with no_time_left(*clock) if clock else nullcontext():
            assert main(["schema", "make", "--timeout", str(TIMEOUT_S if clock else 60), "--", str(program)]) == 2
        assert list(Path(temporary).iterdir()) == []
    assert time.monotonic() - start < 60  # not the 600 s that one of them sleeps
    err = capfd.readouterr().err
    assert err.startswith("qmigrate: ")
    assert told in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whatever_ends_it_neither_a_qemu_nor_a_folder_is_left(tmp_path: Path, number: signal.Signals) -> None:
    """The program never says a word of QMP."""
    program, started = tmp_path / "qemu", tmp_path / "started"
    program.write_text(f"#!/bin/sh\necho $$ > {started}.part; mv {started}.part {started}; exec sleep 1000\n")
    program.chmod(0o755)
    command = [sys.executable, "-m", "qmigrate", "schema", "make", "--", str(program)]
    with tempfile.TemporaryDirectory() as temporary:  # tmp_path may be too long for a socket in it
        with subprocess.Popen(command, env={**os.environ, "TMPDIR": temporary}, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 60
            while not started.exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(number)
            assert (process.wait(timeout=60), process.stderr and process.stderr.read()) == (130, b"")
        assert list(Path(temporary).iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_its_actions_are_completed_and_in_the_manual() -> None:
    assert "make" in completion(build_parser(), "bash")
    assert "qmigrate schema make" in man_page(build_parser(), "1").replace("\\-", "-")
