"""Files of one migration given to dissect, check, extract and diff: in any order, and each named where it fails."""

import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from threading import Thread
from typing import Final

import pytest

from qmigrate.capture.frames import Direction
from qmigrate.capture.recorder import Recorder
from qmigrate.cli.main import main
from tests import streams

Output = pytest.CaptureFixture[str]
CORPUS: Final = Path(__file__).parents[1] / "corpus"
COMMANDS: Final = ("dissect", "check", "extract", "diff")
OTHER: Final = {"multifd": "pc-multifd-11.1", "postcopy": "pc-postcopy-11.1"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Short names; none of the schemas that this machine keeps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QMIGRATE_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def multifd(folder: Path) -> list[str]:
    """main, one, two"""
    for name, packed in (("main", ".mig"), ("one", ".01-forward"), ("two", ".02-forward")):
        path = CORPUS / "channels" / f"{OTHER['multifd']}{packed}.xz"
        (folder / name).write_bytes(lzma.decompress(path.read_bytes()))
    return ["main", "one", "two"]


@pytest.fixture
def postcopy(folder: Path) -> list[str]:
    """main, back"""
    for name, packed in (("main", ".mig"), ("back", ".back")):
        (folder / name).write_bytes(lzma.decompress((CORPUS / f"{OTHER['postcopy']}{packed}.xz").read_bytes()))
    return ["main", "back"]


def command(name: str, file: str, *, channels: list[str] | None = None, back: list[str] | None = None) -> int:
    """The command with these files; ``diff`` has them as its B, and the same as its A."""
    given = [("channel", each) for each in channels or []] + [("return-path", each) for each in back or []]
    if name == "diff":
        own = [word for option, each in given for word in (f"--b-{option}", each)]
        return main(["diff", *own, "--a-channel", "one", "--a-channel", "two", "main", file])
    options = ["--raw", "ram"] if name == "extract" else []
    return main([name, *options, *(word for option, each in given for word in (f"--{option}", each)), file])


@pytest.mark.parametrize("name", COMMANDS)
def test_any_of_the_files_may_come_first(name: str, multifd: list[str], capsys: Output) -> None:
    for first, *others in permutations(multifd):
        assert command(name, first, channels=others) == 0, capsys.readouterr()
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("side", ["a", "b"])
def test_diff_takes_a_return_path_of_either_in_any_order(side: str, postcopy: list[str], capsys: Output) -> None:
    main_file, back = postcopy
    for words in (
        [f"--{side}-return-path", back, main_file, main_file],
        [main_file, main_file, f"--{side}-return-path", back],
        [main_file, f"--{side}-channel", back, main_file],  # by its bytes it is what it is
    ):
        assert main(["diff", *words]) == 0, capsys.readouterr()
    files = [back, main_file] if side == "a" else [main_file, back]
    assert main(["diff", f"--{side}-channel", main_file, *files]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["dissect", "check", "extract"])
def test_a_return_path_may_be_given_as_any_of_them(name: str, postcopy: list[str], capsys: Output) -> None:
    main_file, back = postcopy
    Path("again").write_bytes(Path(back).read_bytes())  # after a recovery there is a second one
    assert command(name, main_file, back=[back, "again"]) == 0
    assert command(name, main_file, channels=[back]) == 0
    assert command(name, back, channels=[main_file, "again"]) == 0
    assert capsys.readouterr().err == ""


CUT: Final = "back: 0x14: return path: PONG: the stream ends here, 4 of 4 bytes too soon"


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_fault_in_a_return_path_is_told_with_its_file_by_diff(side: str, postcopy: list[str], capsys: Output) -> None:
    main_file, back = postcopy
    Path(back).write_bytes(Path(back).read_bytes()[:20])
    assert main(["diff", "--json", f"--{side}-return-path", back, main_file, main_file]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"qmigrate: {CUT}\n"
    (error,) = json.loads(captured.out)[side]["errors"]
    assert (error["input"], error["offset"], error["trail"]) == ("back", 0x14, ["return path", "PONG"])


@pytest.mark.parametrize("name", ["dissect", "check", "extract"])
def test_a_fault_in_a_return_path_is_told_with_its_file(name: str, postcopy: list[str], capsys: Output) -> None:
    main_file, back = postcopy
    Path(back).write_bytes(Path(back).read_bytes()[:20])
    assert command(name, main_file, back=[back]) == 1
    assert capsys.readouterr().err == f"qmigrate: {CUT}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_no_return_path_is_read_as_what_it_is_and_told(name: str, multifd: list[str], capsys: Output) -> None:
    main_file, one, two = multifd
    assert command(name, main_file, channels=[two], back=[one]) == 0
    assert capsys.readouterr().err == (
        "qmigrate: one: is no return path, and read as multifd 0: "
        "it begins with 0x11223344, and its initial packet names channel 0\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("as_return_path", [False, True])
def test_the_file_that_fails_is_named(name: str, as_return_path: bool, multifd: list[str], capsys: Output) -> None:
    main_file, one, two = multifd
    Path("folder").mkdir()
    Path("text").write_text("hello, world\n")
    Path("cut.gz").write_bytes(gzip.compress(Path(one).read_bytes())[:15])
    Path("old.tap").write_bytes(b"\x89QTAP\r\n\x1a")
    Path("whole.tap").write_bytes(recording(streams.minimal()))
    for bad, said, code in (
        ("none", "No such file or directory", 2),
        ("folder", "a directory, expected a migration stream", 2),
        ("text", "no channel of a migration: it begins with 68 65 6c 6c 6f 2c 20 77, as no channel does", 2),
        ("cut.gz", "0x0: the input can't be read on: ", 1),
        ("old.tap", "a recording whose header has 8 bytes", 2),
        ("whole.tap", "a recording of qmigrate tap, which has all connections in it: no other file goes with it", 2),
        ("/proc/self/mem", "Input/output error", 2),
        (two, "is given twice", 2),
    ):
        back, channels = ([bad], [one, two]) if as_return_path else ([], [one, two, bad])
        assert command(name, main_file, channels=channels, back=back) == code, bad
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"qmigrate: {bad}: {said}"), captured.err
        assert captured.err.count("\n") == 1


def recording(stream: bytes) -> bytes:
    with Recorder(Path("made.tap")) as recorder:
        recorder.opened(0, peer="", listen="unix:/a", forward="unix:/b")
        recorder.data(0, Direction.FORWARD, stream)
        recorder.closed(0, forward_bytes=len(stream), return_bytes=0)
    return Path("made.tap").read_bytes()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_fault_in_main_names_it_where_another_file_came_first(name: str, multifd: list[str], capsys: Output) -> None:
    main_file, one, two = multifd
    Path("cut").write_bytes(Path(main_file).read_bytes()[:-1])
    assert command(name, one, channels=["cut", two]) == 1
    assert capsys.readouterr().err.startswith("qmigrate: cut: 0x")


@pytest.mark.parametrize("view", [[], ["--json"], ["--ndjson"], ["--structure"], ["--ram"], ["--device", "timer"]])
def test_a_fault_in_each_of_two_files_is_told_with_it(view: list[str], multifd: list[str], capsys: Output) -> None:
    main_file, *others = multifd
    for each in others:
        Path(each).write_bytes(Path(each).read_bytes()[:-1])
    given = [word for each in others for word in ("--channel", each)]
    assert main(["dissect", *view, *given, main_file]) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": 0x")[0] for line in said] == ["qmigrate: one", "qmigrate: two"]


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_page_decodes_to_is_a_fault_of_its_file(name: str, folder: Path, capsys: Output) -> None:
    for kept, packed in (("main", ".mig"), ("one", ".01-forward"), ("two", ".02-forward")):
        path = CORPUS / "channels" / f"pc-multifd-zlib-7.2{packed}.xz"
        (folder / kept).write_bytes(lzma.decompress(path.read_bytes()))
    raw = bytearray(Path("one").read_bytes())
    at = raw.index(b"\x78\x01")  # where zlib begins
    raw[at : at + 2] = b"\xff\xff"
    Path("bad").write_bytes(raw)
    code = command(name, "main", channels=["bad", "two"])
    if name in ("dissect", "check"):  # they don't look into pages
        assert code == 0
    else:
        assert code == 1
        assert capsys.readouterr().err.startswith("qmigrate: bad: 0x")


@pytest.mark.parametrize("name", COMMANDS)
def test_dev_null_is_a_channel_on_which_nothing_was_sent(name: str, multifd: list[str], capsys: Output) -> None:
    main_file, one, two = multifd
    assert command(name, main_file, channels=[one, two, "/dev/null"], back=["/dev/null"]) == 0
    assert capsys.readouterr().err == ""


def feed(path: Path, data: bytes) -> Callable[[], None]:
    def write() -> None:
        with path.open("wb") as pipe:
            pipe.write(data)

    return write


@pytest.mark.parametrize("name", COMMANDS)
def test_each_of_them_may_be_a_pipe(name: str, multifd: list[str], folder: Path, capsys: Output) -> None:
    """As from ``<(zstd -dc one.zst)``; compressed or not."""
    writers = []
    for file, data in ((each, Path(each).read_bytes()) for each in multifd):
        os.mkfifo(folder / f"{file}.pipe")
        packed = gzip.compress(data, 1) if file == "two" else data
        writers.append(Thread(target=feed(folder / f"{file}.pipe", packed), daemon=True))
        writers[-1].start()
    assert command(name, "main.pipe", channels=["two.pipe", "one.pipe"]) == 0
    assert capsys.readouterr().err == ""
    for writer in writers:
        writer.join(60)
        assert not writer.is_alive()


@pytest.mark.parametrize("which", ["main", "one"])
def test_one_of_them_may_be_standard_input(which: str, multifd: list[str]) -> None:
    first, *others = [which, *(each for each in multifd if each != which)]
    command = [sys.executable, "-m", "qmigrate", "check", *(w for each in others for w in ("--channel", each)), "-"]
    given = Path(first).read_bytes()
    ran = subprocess.run(command, input=given, capture_output=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert ran.stdout.startswith(b"standard input  valid, identical when rebuilt\n")
    twice = subprocess.run([*command, "--channel", "-"], input=given, capture_output=True, timeout=60, check=False)
    assert (twice.returncode, twice.stderr) == (2, b"qmigrate: standard input: is given twice\n")


@pytest.mark.parametrize("words", [["check", "-"], ["diff", "main", "-"], ["diff", "-", "main"]])
def test_standard_input_that_is_closed_is_named(words: list[str], multifd: list[str]) -> None:
    assert Path(multifd[0]).exists()
    shell = ["/bin/sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "qmigrate", *words]
    ran = subprocess.run(shell, capture_output=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (2, b"")
    assert ran.stderr == b"qmigrate: standard input: Bad file descriptor\n"


@pytest.mark.parametrize("option", ["--channel", "--return-path"])
def test_files_of_one_migration_go_with_one_file_and_without_jobs(option: str, capsys: Output) -> None:
    """They were left out in silence where answers come a line each."""
    for words, said in (
        (["check", "--json", "main", "two"], "--channel and --return-path belong to one migration: give one FILE"),
        (["dissect", "--json", "main", "two"], "--channel and --return-path belong to one migration: give one FILE"),
        (["extract", "--raw", "ram", "main", "two"], "--channel and --return-path belong to one migration: give one"),
        (["dissect", "--live", "main"], "--live follows a recording, which has all connections in it"),
        (["check", "--json", "--jobs", "2", "main"], "--jobs reads files one by one: it goes without --channel and"),
        (["dissect", "--json", "--jobs", "2", "main"], "--jobs reads files one by one: it goes without --channel"),
    ):
        assert main([*words, option, "one"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert said in " ".join(captured.err.split())


@pytest.mark.parametrize("option", ["channel", "return-path"])
def test_diff_asks_whose_a_file_is(option: str, capsys: Output) -> None:
    assert main(["diff", f"--{option}", "one", "main", "main"]) == 2
    said = f"qmigrate diff: error: --{option}: of which of the two? --a-{option} or --b-{option}\n"
    assert capsys.readouterr().err.endswith(said)


DISSECTIONS = (["dissect"], ["dissect", "--json"], ["dissect", "--ndjson"], ["dissect", "--live"])


def test_a_recording_with_a_connection_of_which_nobody_knows_what_it_is_is_not_whole(capsys: Output) -> None:
    """Pages may have been sent on it."""
    with Recorder(Path("a.tap")) as recorder:
        stream, other = streams.minimal(), b"hello, world"
        for number, data in enumerate((stream, other)):
            recorder.opened(number, peer="", listen="unix:/a", forward="unix:/b")
            recorder.data(number, Direction.FORWARD, data)
            recorder.closed(number, forward_bytes=len(data), return_bytes=0)
    for words in (["check"], ["extract", "--raw", "ram"], ["diff", "a.tap"], *DISSECTIONS):
        assert main([*words, "a.tap"]) == 1
        assert (
            "qmigrate: a.tap: connection 1, forward: 0x0: unknown: what was sent can't be told: it begins with 68 65 6c"
            in capsys.readouterr().err
        )


@pytest.mark.parametrize(
    "words",
    [
        ["check"],
        ["check", "--json", "--jobs", "1"],
        ["extract", "--raw", "ram"],
        ["diff", "a.tap"],
        *(["dissect", *view] for view in ([], ["--json"], ["--structure"], ["--ram"], ["--ndjson"])),
        ["dissect", "--device", "timer"],
        ["dissect", "--field", "timer.flag"],
    ],
    ids=" ".join,
)
def test_a_recording_that_is_damaged_is_told_by_each_command(words: list[str], capsys: Output) -> None:
    """Its streams may be whole all the same: what else there was, nobody knows."""
    data = bytearray(recording(streams.minimal()))
    data[-50] ^= 1  # CLOSED stands there
    Path("a.tap").write_bytes(data)
    assert main([*words, "a.tap"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert {line.partition(": the checksum is 0x")[0].partition(": 0x")[0] for line in said} == {"qmigrate: a.tap"}
    assert len(said) == (2 if words[0] == "diff" else 1)  # of both
