"""Several FILEs: in turn, and with --json side by side."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from qmigrate.cli import files as cli_files
from qmigrate.cli.main import main
from tests import streams

QMIGRATE = [sys.executable, "-m", "qmigrate"]
Output = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two good streams, one that ends too soon, one that is none."""
    (tmp_path / "a.mig").write_bytes(streams.minimal())
    (tmp_path / "b.mig").write_bytes(streams.postcopy())
    (tmp_path / "cut.mig").write_bytes(streams.minimal()[:0x20B7])
    (tmp_path / "none.mig").write_bytes(b"#!/bin/sh\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FOUR = ("none.mig", "b.mig", "cut.mig", "a.mig")
NO_STREAM = "no migration stream: it begins with 23212f62, expected 5145564d (QEVM)"
CUT = "0x20b7: ram: pc.ram: "


@pytest.mark.parametrize("jobs", [(), ("--jobs", "1"), ("--jobs", "3"), ("--jobs", "64")])
@pytest.mark.parametrize("command", ["dissect", "check"])
@pytest.mark.usefixtures("folder")
def test_each_file_gives_a_line_in_the_order_given_and_the_worst_is_the_exit_code(
    command: str, jobs: tuple[str, ...], capsys: Output
) -> None:
    assert main([command, "--json", *jobs, *FOUR]) == 2
    captured = capsys.readouterr()
    answers = [json.loads(line) for line in captured.out.splitlines()]
    assert [answer["file"] for answer in answers] == list(FOUR)
    assert answers[0] == {"file": "none.mig", "error": NO_STREAM}
    assert [answer.get("complete") for answer in answers] == [None, True, False, True]
    none, cut = captured.err.splitlines()
    assert none == f"qmigrate: none.mig: {NO_STREAM}"
    assert cut.startswith(f"qmigrate: cut.mig: {CUT}")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["dissect", "a.mig", "b.mig"], 0),
        (["dissect", "a.mig", "cut.mig", "b.mig"], 1),
        (["dissect", "nothing", "cut.mig", "a.mig"], 2),
        (["check", "a.mig", "b.mig"], 0),
        (["check", "--strict", "a.mig", "b.mig"], 1),
        (["dissect", "--device", "serial", "a.mig", "b.mig"], 0),
        (["dissect", "--device", "nobody", "a.mig", "b.mig"], 1),
        (["dissect", "--field", "timer.flag", "a.mig", "b.mig"], 1),
        (["dissect", "--ram", "a.mig", "cut.mig"], 1),
    ],
)
@pytest.mark.usefixtures("folder")
def test_the_exit_code_is_the_same_for_people_and_for_programs(
    arguments: list[str], status: int, capsys: Output
) -> None:
    assert main(arguments) == status
    told = capsys.readouterr().err
    assert main([*arguments, "--json"]) == status
    if "--strict" not in arguments and "--device" not in arguments and "--field" not in arguments:
        assert capsys.readouterr().err == told


@pytest.mark.usefixtures("folder")
def test_a_line_holds_the_view_that_is_asked_for(capsys: Output) -> None:
    def lines(*arguments: str) -> list[dict[str, Any]]:
        assert main(["dissect", *arguments, "--json", "--jobs", "2", "a.mig", "b.mig"]) in (0, 1)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    field = lines("--field", "timer.flag")
    assert field[0] == {"file": "a.mig", "value": True, "complete": True, "errors": []}
    assert field[1]["missing"] == (
        "no field 'timer.flag' in this stream; timer/0 was not decoded: no description in this stream"
    )
    device = lines("--device", "timer")
    assert device[0]["devices"] == {"timer/0": {"cpu_ticks_offset": -5, "unused": "00" * 8, "flag": True}}
    assert device[1]["devices"] == {"timer/0": None}
    assert [len(line["passes"]) for line in lines("--ram")] == [2, 1]


@pytest.mark.usefixtures("folder")
def test_with_jobs_one_file_gives_one_line_too(capsys: Output) -> None:
    assert main(["dissect", "--json", "--jobs", "4", "a.mig"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == "a.mig"


@pytest.mark.usefixtures("folder")
def test_the_records_of_several_files_say_which(capsys: Output) -> None:
    assert main(["dissect", "--ndjson", "a.mig", "b.mig"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert list(dict.fromkeys(record["file"] for record in records)) == ["a.mig", "b.mig"]
    assert records[0] == {"file": "a.mig", "offset": 0, "length": 8, "record": "HEADER", "version": 3}


@pytest.mark.usefixtures("folder")
def test_each_story_stands_under_its_name(capsys: Output) -> None:
    assert main(["dissect", "a.mig", "none.mig", "b.mig"]) == 2
    told = capsys.readouterr().out
    assert told.startswith("a.mig  complete, 21,752 bytes\n")
    assert "\n\nb.mig  complete, " in told


@pytest.mark.parametrize("view", [["--structure"], ["--ram"], ["--device", "timer"]])
@pytest.mark.usefixtures("folder")
def test_each_view_stands_under_the_name_of_its_file(view: list[str], capsys: Output) -> None:
    assert main(["dissect", *view, "a.mig"]) == 0
    one = capsys.readouterr().out
    assert main(["dissect", *view, "b.mig"]) == 0
    other = capsys.readouterr().out
    assert main(["dissect", *view, "a.mig", "b.mig"]) == 0
    assert capsys.readouterr().out == f"a.mig\n{one}\nb.mig\n{other}"


def test_each_file_is_extracted_into_a_folder_of_its_own(folder: Path, capsys: Output) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "A.mig").write_bytes(streams.postcopy())
    assert main(["extract", "--raw", "out", "--json", "a.mig", "sub/A.mig", "none.mig"]) == 2
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer.get("directory") for answer in answers] == ["out/a.mig", "out/A.mig~2", None]
    assert answers[2] == {"file": "none.mig", "error": NO_STREAM}
    assert {path.name for path in (folder / "out" / "A.mig~2").iterdir()} == {"blocks.json", "pc.ram.raw", "pc.rom.raw"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "2", "a.mig"], "--jobs goes with --json: answers come a line each\n"),
        (["--json", "--jobs", "2", "-", "a.mig"], "--jobs reads files: standard input can't be one of them\n"),
        (["--json", "--jobs", "0", "a.mig"], "argument --jobs: '0' is no number of processes: expected 1 to 1024\n"),
        (["--json", "--jobs", "many", "a.mig"], "'many' is no number of processes: expected 1 to 1024\n"),
    ],
)
def test_a_wrong_number_of_jobs_is_refused(arguments: list[str], said: str, capsys: Output) -> None:
    assert main(["dissect", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(said)


# -- processes


def line_of(file: str) -> tuple[str, list[tuple[str, ...]], int]:
    """In a process of its own; one file kills it."""
    if file == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
    return file, [], 0


@pytest.mark.parametrize("most", range(1, 8))
@pytest.mark.usefixtures("folder")
def test_a_limit_of_processes_and_threads_is_one_line(
    most: int, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    start, started = threading.Thread.start, list[threading.Thread]()

    def limited(thread: threading.Thread) -> None:  # those of tests before may still be about to end
        if sum(each.is_alive() for each in started) >= most:
            raise RuntimeError("can't start new thread")
        start(thread)
        started.append(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    status = main(["check", "--json", "--jobs", "2", "a.mig", "b.mig"])
    out, err = capsys.readouterr()
    if most < 6:
        assert (status, out, err) == (2, "", "qmigrate: no further process can be started\n")
    else:
        assert (status, out.count("\n"), err) == (0, 2, "")


def test_a_process_that_is_killed_costs_its_own_file_alone() -> None:
    files = ["a", "b", "killer", "c", "d", "e", "f", "g"]
    with closing(cli_files._from_processes(files, line_of, 2)) as lines:
        found = [line for line, _, _ in lines]
    killed = '{"file":"killer","error":"the process that read it was killed"}'
    assert found == [killed if file == "killer" else file for file in files]


class Waiting:
    """``dissect --json --jobs 2`` of two pipes, in a session of its own: both are open, and nothing is in them."""

    def __init__(self, folder: Path) -> None:
        self.pipes = [folder / "one", folder / "two"]
        for pipe in self.pipes:
            os.mkfifo(pipe)
        self.process = subprocess.Popen(
            [*QMIGRATE, "dissect", "--json", "--jobs", "2", *map(str, self.pipes)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        self.writers = [pipe.open("wb", buffering=0) for pipe in self.pipes]  # returns once it is opened for reading

    def signal(self, number: signal.Signals) -> None:
        """As a terminal sends it: to all processes of the group."""
        os.killpg(self.process.pid, number)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
        self.process.communicate(timeout=60)


def test_ctrl_c_ends_all_processes_quietly(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path)
    waiting.signal(signal.SIGINT)
    out, err = waiting.process.communicate(timeout=60)
    assert (waiting.process.returncode, out, err) == (130, "", "")
    for writer in waiting.writers:
        with pytest.raises(BrokenPipeError):  # nobody has it open any more
            writer.write(b"x")
    waiting.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_where_who_started_them_is_killed_no_process_is_left(number: signal.Signals, tmp_path: Path) -> None:
    waiting = Waiting(tmp_path)
    os.kill(waiting.process.pid, number)  # that process alone
    out, err = waiting.process.communicate(timeout=60)  # until nobody has these open any more
    if number == signal.SIGKILL:
        assert (waiting.process.returncode, out) == (-number, "")
    else:
        assert (waiting.process.returncode, out, err) == (128 + number, "", "")
    for writer in waiting.writers:
        with pytest.raises(BrokenPipeError):
            writer.write(b"x")
    waiting.close()


def test_files_of_the_current_folder_called_like_modules_of_python_are_not_run(folder: Path) -> None:
    for name in ("selectors", "socket", "threading"):
        (folder / f"{name}.py").write_text("raise SystemExit('a file of the user was run')\n")
    code = "import sys; from qmigrate.cli.main import entry_point; entry_point()"
    options = ["check", "--json", "--jobs", "2", "a.mig", "a.mig"]
    command = [sys.executable, "-P", "-c", code, *options]
    env = os.environ | {"PYTHONPATH": str(Path(cli_files.__file__).parents[2])}
    ended = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert (ended.returncode, ended.stderr, len(ended.stdout.splitlines())) == (0, "", 2)


def test_a_signal_asks_how_many_files_are_read(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path)
    assert waiting.process.stderr is not None
    waiting.signal(signal.SIGUSR1)
    assert waiting.process.stderr.readline() == "qmigrate: 0 of 2 files read\n"
    waiting.writers[0].write(streams.minimal())
    waiting.writers[0].close()
    assert waiting.process.stdout is not None
    assert json.loads(waiting.process.stdout.readline())["complete"] is True
    waiting.signal(signal.SIGUSR1)
    assert waiting.process.stderr.readline() == "qmigrate: 1 of 2 files read\n"
    waiting.writers[1].write(streams.postcopy())
    waiting.close()
    assert waiting.process.returncode == 0


def test_a_reader_that_has_enough_ends_all_processes_quietly(folder: Path) -> None:
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    # More than all pipes on the way hold: else all might be written before it is known that nobody reads.
    command = [*QMIGRATE, "dissect", "--json", "--jobs", "2", "a.mig", "b.mig", *["a.mig"] * 80, str(pipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["file"] == "a.mig"
        process.stdout.close()
        said = process.stderr.read()
        assert (process.wait(60), said) == (141, b"")


def test_what_is_done_side_by_side_is_what_is_done_in_turn(folder: Path) -> None:
    many = [f"{number}.mig" for number in range(30)]
    for number, name in enumerate(many):
        os.link(folder / FOUR[number % 4], folder / name)
    run = functools.partial(subprocess.run, capture_output=True, timeout=100, check=False)
    in_turn = run([*QMIGRATE, "check", "--json", *many])
    side_by_side = run([*QMIGRATE, "check", "--json", "--jobs", "4", *many])
    assert (side_by_side.stdout, side_by_side.stderr) == (in_turn.stdout, in_turn.stderr)
    assert side_by_side.returncode == 2
