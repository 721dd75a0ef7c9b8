"""``qmigrate receive`` interrupted, unheard, and refused: the command itself, as a shell starts it."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jsonschema
import pytest

import qmigrate
from tests import streams
from tests.operations.test_receive import END, EVERYTHING, PACKAGE, advised
from tests.uffd.kernel import needs_userfaultfd

pytestmark = needs_userfaultfd

TIMEOUT_S: Final = 60.0
SCHEMA: Final = json.loads((Path(qmigrate.__file__).parent / "report" / "receive.schema.json").read_text())


@dataclass
class Command:
    """One that runs; its events come line by line from ``process.stdout``."""

    process: "subprocess.Popen[str]"
    folder: Path

    def connect(self) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(TIMEOUT_S)
        peer.connect(str(self.folder / "in"))
        return peer

    def event(self, name: str, status: str = "") -> None:
        """Until it has told of this."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            if said["event"] == name and said.get("status", "") == status:
                return
        raise AssertionError(f"it ended without {name} {status}")

    def line(self, expected: str) -> str:
        """The next on standard error that holds this."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if expected in line:
                return line
        raise AssertionError(f"it ended without saying {expected!r}")

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """As a terminal does: all processes of the group."""
        os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=TIMEOUT_S)[1]
        return self.process.returncode, said


@contextmanager
def receiving(folder: Path, *words: str) -> Iterator[Command]:
    command = [sys.executable, "-m", "qmigrate", "receive", f"unix:{folder / 'in'}", "--ndjson", *words]
    process = subprocess.Popen(
        [*command, "--control", str(folder / "control")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    started = Command(process, folder)
    try:
        started.event("listening")
        yield started
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_before_a_source_came_nothing_began(number: int, tmp_path: Path) -> None:
    with receiving(tmp_path) as command:
        command.interrupt(number)
        assert command.end() == (130, "qmigrate: interrupted before anything began\n")
    assert left(tmp_path) == set()


def test_interrupted_in_precopy_the_guest_is_the_sources(tmp_path: Path) -> None:
    data = tmp_path / "x.json"
    words = ["--json", str(data), "--save", str(tmp_path / "x.mig")]
    with receiving(tmp_path, *words) as command, command.connect() as source:
        source.sendall(advised())
        command.event("status-changed", "advised")
        command.interrupt()
        assert command.end() == (3, "qmigrate: interrupted: the guest is the source's\n")
    found = json.loads(data.read_text())
    jsonschema.validate(found, SCHEMA)
    assert (found["exit_code"], found["guest"]) == (3, "source")
    assert [each["phase"] for each in found["phases"]] == ["precopy", "advised"]
    assert left(tmp_path) == {"x.json"}


def test_interrupted_in_postcopy_it_says_what_that_would_cost_and_goes_on(tmp_path: Path) -> None:
    with receiving(tmp_path, "--save", str(tmp_path / "x.mig")) as command, command.connect() as source:
        source.sendall(advised() + PACKAGE)
        command.event("status-changed", "running")
        command.interrupt(signal.SIGHUP)  # a terminal that goes away costs no guest
        command.interrupt()
        command.line("what is here is the only copy of the guest; interrupted again, it is lost")
        source.sendall(EVERYTHING + END)
        assert command.end() == (0, "")
    assert left(tmp_path) == {"x.mig"}


@pytest.mark.parametrize("is_paused", [False, True], ids=["running", "paused"])
def test_interrupted_twice_in_postcopy_the_guest_is_lost(is_paused: bool, tmp_path: Path) -> None:
    with receiving(tmp_path) as command, command.connect() as source:
        source.sendall(advised() + PACKAGE)
        command.event("status-changed", "running")
        if is_paused:
            source.close()
            command.event("paused")
        command.interrupt()
        command.line("interrupted again, it is lost")
        command.interrupt()
        assert command.end() == (6, "qmigrate: interrupted in postcopy: the guest is lost\n")
    assert left(tmp_path) == set()


def test_who_reads_no_more_ends_no_migration(tmp_path: Path) -> None:
    saved = tmp_path / "x.mig"
    with receiving(tmp_path, "--save", str(saved)) as command:
        assert command.process.stdout is not None
        command.process.stdout.close()  # | head -1
        with command.connect() as source:
            source.sendall(advised() + PACKAGE + EVERYTHING + END)
            source.recv(1 << 16)
            assert command.process.wait(TIMEOUT_S) == 141
        assert command.process.stderr is not None
        assert command.process.stderr.read() == ""
        command.process.stdout = None
    assert left(tmp_path) == {"x.mig"}


def test_a_package_longer_than_allowed_is_refused_by_the_options_name(tmp_path: Path) -> None:
    with receiving(tmp_path, "--max-package", "100") as command, command.connect() as source:
        source.sendall(advised() + PACKAGE)
        code, said = command.end()
    assert code == 3
    assert "PACKAGED: a package of" in said
    assert "the limit is 100 (--max-package)" in said


def test_a_control_socket_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qmigrate", "receive", "unix:x", "--control", str(tmp_path / "no" / "control")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == f"qmigrate: {tmp_path / 'no' / 'control'}: No such file or directory\n"
    assert left(tmp_path) == set()


def test_json_on_standard_output_is_all_that_is_there(tmp_path: Path) -> None:
    stream = tmp_path / "stream.mig"
    stream.write_bytes(streams.postcopy())
    command = [sys.executable, "-m", "qmigrate", "receive", f"file:{stream}", "--json", "--report", "page.html"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True, cwd=tmp_path)
    found = json.loads(ended.stdout)
    jsonschema.validate(found, SCHEMA)
    assert found["numbers"]["normal"] == 2
    assert "the migration was received" in ended.stderr
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tcp:192.0.2.1:4444"], "tcp:192.0.2.1:4444: Cannot assign requested address"),
        (["unix:/no/such/folder/in"], "unix:/no/such/folder/in: No such file or directory"),
        (["unix:" + "x" * 200], f"unix:{'x' * 200}: AF_UNIX path too long"),
        (["fd:99"], "fd:99: Bad file descriptor"),
        (["-", "--record", "/no/such/folder/x.tap"], "/no/such/folder/x.tap: No such file or directory"),
        (["-", "--record", "old.tap"], "old.tap is there already; --overwrite replaces it"),
        (["-", "--report", "/no/such/folder/page.html"], "/no/such/folder/page.html: No such file or directory"),
        (["-", "--json", "--ndjson"], "--json and --ndjson both want standard output"),
        (["-", "--touch-trace", "old.tap"], "old.tap: line 1 is no touch: expected BLOCK START, and w for a write"),
        (["-", "--touch-trace", "empty"], "empty has no touches"),
        (["-", "--save", "x", "--touch-trace", "writes"], "with --save nothing may write to memory"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_begin_is_refused_and_leaves_nothing(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "old.tap").write_text("old\n")
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "writes").write_text("pc.ram 0x1000 w\n")
    command = [sys.executable, "-m", "qmigrate", "receive", *words, "--control", str(tmp_path / "control")]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    assert message in ended.stderr
    assert left(tmp_path) == {"old.tap", "empty", "writes"}


def test_a_record_that_could_not_begin_is_not_left(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qmigrate", "receive", "gopher:x", "--record", "x.tap"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=tmp_path)
    assert (ended.returncode, left(tmp_path)) == (2, set())
