"""``qmigrate diff``."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

import qmigrate.report
from qmigrate.capture.frames import Direction
from qmigrate.capture.recorder import Recorder
from qmigrate.cli.main import main
from tests import streams

Output = pytest.CaptureFixture[str]
SCHEMA = json.loads((Path(qmigrate.report.__file__).parent / "diff.schema.json").read_text())


def another() -> bytes:
    """The machine of ``minimal()`` a moment later."""
    timer = streams.device("timer", b"\0" * 7 + b"\x09" + streams.TIMER_STATE[8:], section_id=0, version_id=2)
    serial = bytearray(streams.SERIAL_STATE)
    serial[20] ^= 0xFF
    ram = streams.ram().replace(streams.page(5 * streams.PAGE), streams.page(5 * streams.PAGE, b"x" * streams.PAGE))
    return b"".join(
        (
            *(streams.header(), streams.configuration(), streams.ram_start(), ram, timer),
            streams.device("0000:00:04.0/serial", bytes(serial), section_id=7, instance_id=1, version_id=3),
            *(streams.eof(), streams.devices_described()),
        )
    )


@pytest.fixture
def a(tmp_path: Path) -> str:
    path = tmp_path / "a.mig"
    path.write_bytes(streams.minimal())
    return str(path)


@pytest.fixture
def b(tmp_path: Path) -> str:
    path = tmp_path / "b.mig"
    path.write_bytes(another())
    return str(path)


def test_the_same_is_0_and_one_line(a: str, capsys: Output) -> None:
    assert main(["diff", a, a]) == 0
    assert capsys.readouterr() == (
        f"""\
A  {a}  pc-q35-10.0, complete
B  {a}  pc-q35-10.0, complete

same; 12 fields compared
""",
        "",
    )


def test_what_differs_is_1_and_told_the_first_first(a: str, b: str, capsys: Output) -> None:
    assert main(["diff", a, b]) == 1
    assert capsys.readouterr() == (
        f"""\
A  {a}  pc-q35-10.0, complete
B  {b}  pc-q35-10.0, complete

differ: 2 fields, 1 page; 12 fields compared

Devices  2 fields of 2 devices, the first first
  timer/0.cpu_ticks_offset  -5  against  9
  0000:00:04.0/serial/1.id  73 65 72 69 61 6c 00 01 02 03 04 05  against  73 65 8d 69 61 6c 00 01 02 03 04 05

RAM  1 of 2 blocks
  block   pages  differ  ranges
  pc.ram     16       1       1

  pc.ram  0x5000–0x6000  1 page
""",
        "",
    )


def test_what_is_ignored_is_counted(a: str, b: str, capsys: Output) -> None:
    assert main(["diff", "--devices-only", "--ignore", "timer", "--ignore", "*.id", a, b]) == 0
    assert "same; 12 fields compared, 2 differences ignored, RAM not compared" in capsys.readouterr().out


def test_the_answer_is_json_too(a: str, b: str, capsys: Output) -> None:
    assert main(["diff", "--json", a, b]) == 1
    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, SCHEMA)
    assert (answer["same"], answer["complete"], answer["a"]["file"]) == (False, True, a)
    assert answer["fields"][0] == {"path": "timer/0.cpu_ticks_offset", "a": -5, "b": 9}
    assert answer["ram_blocks"][0]["ranges"] == [{"start": 0x5000, "length": 0x1000}]


def test_an_input_that_is_not_whole_is_1_though_all_there_is_is_the_same(
    a: str, tmp_path: Path, capsys: Output
) -> None:
    cut = tmp_path / "cut.mig"
    cut.write_bytes(streams.minimal()[:0x20B7])
    assert main(["diff", a, str(cut)]) == 1
    captured = capsys.readouterr()
    assert (
        f"B  {cut}  pc-q35-10.0, not complete\n\nsame; 0 fields compared, as far as both inputs reach\n" in captured.out
    )
    assert captured.err.startswith(f"qmigrate: {cut}: 0x20b7: ")


def test_what_can_not_be_read_is_2_and_named(a: str, tmp_path: Path, capsys: Output) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x7fELF and more")
    for path, said in ((str(junk), "no migration stream"), (str(tmp_path / "none"), "No such file or directory")):
        for files in ((path, a), (a, path)):
            assert main(["diff", *files]) == 2
            captured = capsys.readouterr()
            assert captured.out == ""
            assert captured.err.startswith(f"qmigrate: {path}: {said}")


def run(*arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "qmigrate", "diff", *arguments],
        input=stdin,
        capture_output=True,
        env=os.environ | environment,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("order", [("-", "FILE"), ("FILE", "-")])
def test_one_of_the_two_may_be_a_pipe(order: tuple[str, str], a: str) -> None:
    ran = run(*(a if word == "FILE" else word for word in order), stdin=streams.minimal())
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert b"  standard input  pc-q35-10.0, complete" in ran.stdout


def test_a_recording_of_the_tap_is_the_same_as_the_file(a: str, tmp_path: Path, capsys: Output) -> None:
    path, stream = tmp_path / "a.tap", streams.minimal()
    with Recorder(path) as recorder:
        recorder.opened(0, peer="", listen="unix:/a", forward="unix:/b")
        for at in range(0, len(stream), 1000):
            recorder.data(0, Direction.FORWARD, stream[at : at + 1000])
        recorder.closed(0, forward_bytes=len(stream), return_bytes=0)
    assert main(["diff", str(path), a]) == 0
    assert "same; 12 fields compared" in capsys.readouterr().out


CHANNELS = Path(__file__).parents[1] / "corpus" / "channels"


@pytest.mark.parametrize("name", ["pc-multifd-5.2", "pc-multifd-zlib-7.2", "pc-multifd-11.1"])
def test_either_may_have_travelled_over_several_connections(name: str, capsys: Output) -> None:
    main_file, *others = [
        str(path) for path in sorted(CHANNELS.glob(f"{name}.*"), key=lambda path: ".mig" not in path.name)
    ]
    assert len(others) == 2
    a = [word for other in others for word in ("--a-channel", other)]
    b = [word for other in reversed(others) for word in ("--b-channel", other)]
    assert main(["diff", *a, *b, main_file, main_file]) == 0
    assert "\nsame; " in capsys.readouterr().out
    # Without them nearly all of RAM is missing.
    assert main(["diff", "--json", *a, main_file, main_file]) == 1
    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, SCHEMA)
    assert answer["fields"] == []
    lacking = {block["name"]: block["pages"] for block in answer["ram_blocks"]}["pc.ram"]
    assert lacking["sent_by_b"] < lacking["sent_by_a"] == 2048


@pytest.mark.parametrize("name", ["pc-xbzrle-11.1", "pc-compress-7.2"])
def test_pages_that_are_encoded_are_compared_as_they_are_decoded(name: str, capsys: Output) -> None:
    path = str(CHANNELS / f"{name}.mig.xz")
    assert main(["diff", path, path]) == 0
    assert "\nsame; " in capsys.readouterr().out


def test_what_is_not_compared_by_field_is_told_and_strict_says_no(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "a.mig"
    path.write_bytes(streams.postcopy())
    assert main(["diff", str(path), str(path)]) == 0
    assert "\nsame; 0 fields compared, 2 sections as bytes\n" in capsys.readouterr().out
    assert main(["diff", "--strict", str(path), str(path)]) == 1
    assert capsys.readouterr().err == "qmigrate: --strict: 0 things not compared, 2 sections only as bytes\n"
    path.write_bytes(streams.minimal() + b"more")
    assert main(["diff", str(path), str(path)]) == 0
    captured = capsys.readouterr()
    assert "\nnothing differs, but not all was compared; 12 fields compared, 2 things not compared\n" in captured.out
    assert captured.err == "".join(
        f"qmigrate: not compared: behind the end of {side}'s stream: 4 bytes there are no part of it\n" for side in "AB"
    )
    assert main(["diff", "--json", "--strict", str(path), str(path)]) == 1
    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, SCHEMA)
    assert [each["name"] for each in answer["not_compared"]] == [
        "behind the end of A's stream",
        "behind the end of B's stream",
    ]


def test_sections_that_differ_are_told_apart_from_fields(tmp_path: Path, capsys: Output) -> None:
    paths = [tmp_path / name for name in "ab"]
    paths[0].write_bytes(streams.postcopy())
    paths[1].write_bytes(streams.postcopy().replace(b"serial\0\1", b"serial\0\7"))
    assert main(["diff", *map(str, paths)]) == 1
    assert "\ndiffer: 1 section; 0 fields compared, 2 sections as bytes\n" in capsys.readouterr().out


def test_a_pattern_that_names_nothing_is_told(a: str, b: str, capsys: Output) -> None:
    assert main(["diff", "--json", "--ignore", "timre.flag", "--ignore", "timer", a, b]) == 1
    captured = capsys.readouterr()
    assert captured.err == "qmigrate: --ignore 'timre.flag': neither A nor B has such a field\n"
    assert json.loads(captured.out)["ignored_nothing"] == ["timre.flag"]


@pytest.mark.parametrize("which", [0, 1])
def test_an_input_that_is_cut_anywhere_is_never_0(which: int, a: str, tmp_path: Path, capsys: Output) -> None:
    whole, cut = streams.minimal(), tmp_path / "cut"
    for length in (*range(0, 60, 4), *range(60, len(whole), 4001), *range(len(whole) - 60, len(whole), 3)):
        cut.write_bytes(whole[:length])
        files = [a, str(cut)] if which else [str(cut), a]
        assert main(["diff", *files]) == (2 if length < 8 else 1), length
        assert capsys.readouterr().err.startswith(f"qmigrate: {cut}: ")


def test_ctrl_c_is_130_and_leaves_nothing(a: str, tmp_path: Path) -> None:
    pipe, folder = tmp_path / "pipe", tmp_path / "temporary"
    folder.mkdir()
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "qmigrate", "diff", a, str(pipe)]
    environment = os.environ | {"TMPDIR": str(folder)}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as ran,
        pipe.open("wb") as writer,  # it is open on the other side: A is read, and B has begun
    ):
        writer.write(streams.minimal()[:0x2000])
        writer.flush()
        ran.send_signal(signal.SIGINT)
        out, err = ran.communicate(timeout=60)
    assert (ran.returncode, out, err) == (130, b"", b"")
    assert list(folder.iterdir()) == []


def test_nobody_who_reads_on_is_no_traceback(a: str, b: str) -> None:
    ran = subprocess.run(
        [f"exec {sys.executable} -m qmigrate diff --all '{a}' '{b}' | true; exit ${{PIPESTATUS[0]}}"],
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode in (1, 141)  # all of it may have been in the pipe already
    assert (ran.stdout, ran.stderr) == (b"", b"")


def test_both_can_not_be_standard_input(capsys: Output) -> None:
    assert main(["diff", "-", "-"]) == 2
    assert capsys.readouterr().err.endswith("qmigrate diff: error: standard input can be one of the two only\n")
    assert main(["diff", "a", "-", "--a-channel", "-"]) == 2
    assert capsys.readouterr().err.endswith("qmigrate diff: error: standard input can be one of the files only\n")


def test_nothing_is_left_in_the_folder_for_temporary_files(a: str, b: str, tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    assert run(a, b, TMPDIR=str(folder)).returncode == 1
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_not_there_is_no_other_one_in_silence(a: str, tmp_path: Path) -> None:
    none = tmp_path / "none"
    ran = run(a, a, TMPDIR=str(none))
    assert (ran.returncode, ran.stdout) == (2, b"")
    said = "No such file or directory: RAM of both inputs is put there (TMPDIR names another folder)"
    assert ran.stderr.decode() == f"qmigrate: {none}: {said}\n"


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="no /dev/full")
def test_a_full_folder_is_one_line(a: str, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    # Files in it are /dev/full: whatever is written there has no room, and it can't be made longer.
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: open("/dev/full", "r+b", buffering=0))  # noqa: PTH123, SIM115
    monkeypatch.setattr("os.ftruncate", lambda *_: None)
    assert main(["diff", a, a]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "No space left on device: RAM of both inputs is put there (TMPDIR names another folder)" in captured.err


def test_hostile_names_are_shown_escaped(tmp_path: Path, capsys: Output) -> None:
    name = "[bold]\x1b[31m\x07"
    known = streams.description(streams.described(name, streams.field(name, "uint8", 1)))
    paths = []
    for value in (b"\1", b"\2"):
        path = tmp_path / value.hex()
        paths.append(str(path))
        path.write_bytes(
            streams.header()
            + streams.configuration(name)
            + streams.ram_start({name: streams.PAGE})
            + streams.ram_part(streams.page(0, value * streams.PAGE, block=name))
            + streams.ram_end()
            + streams.device(name, value, section_id=3)
            + streams.eof()
            + known
        )
    assert main(["diff", *paths]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert r"  [bold]\x1b[31m\x07/0.[bold]\x1b[31m\x07  1  against  2" in out


def test_of_bytes_that_one_side_lacks_the_first_are_shown(tmp_path: Path, capsys: Output) -> None:
    paths = []
    for fields in ([], [streams.field("data", "buffer", 5000)]):
        path = tmp_path / str(len(fields))
        paths.append(str(path))
        known = streams.description(streams.described("a", streams.field("x", "uint8", 1), *fields))
        data = b"\1" + bytes(5000 * len(fields))
        path.write_bytes(
            streams.header() + streams.configuration() + streams.ram_start() + streams.ram()
            + streams.device("a", data, section_id=3) + streams.eof() + known
        )  # fmt: skip
    assert main(["diff", *paths]) == 1
    assert f"  a/0.data  absent  against  {bytes(16).hex(' ')}  of 5,000 bytes\n" in capsys.readouterr().out


def test_of_much_the_first_is_shown_unless_all_is_asked_for(tmp_path: Path, capsys: Output) -> None:
    known = streams.description(streams.described("a", streams.field("x", "uint8", 1, array_len=50)))
    paths = []
    for value in (b"\1", b"\2"):
        path = tmp_path / value.hex()
        paths.append(str(path))
        pages = [streams.page(2 * at * streams.PAGE, value * streams.PAGE) for at in range(30)]
        path.write_bytes(
            streams.header() + streams.configuration() + streams.ram_start({"a": 64 * streams.PAGE})
            + streams.ram_part(streams.zero(streams.PAGE, block="a"), *pages) + streams.ram_end()
            + streams.device("a", value * 50, section_id=3) + streams.eof() + known
        )  # fmt: skip
    assert main(["diff", *paths]) == 1
    some = capsys.readouterr().out
    assert "a/0.x[19]" in some
    assert "a/0.x[20]" not in some
    assert ("… and 30 more: --all" in some, "… and 10 more: --all" in some) == (True, True)
    assert main(["diff", "--all", *paths]) == 1
    everything = capsys.readouterr().out
    assert "a/0.x[49]" in everything
    assert "0x3a000–0x3b000  1 page" in everything
    assert "more" not in everything
