"""``qmigrate dissect`` of what ``qmigrate tap`` recorded."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import qmigrate
from qmigrate.analysis.story import Flow
from qmigrate.capture import recorder as recorder_module
from qmigrate.capture.frames import HEADER, Direction, End, Stopped, build_frame
from qmigrate.capture.recorder import Recorder
from qmigrate.capture.recording import Recording
from qmigrate.cli.main import main
from qmigrate.format.command import PostcopyResume, RecvBitmap, encode_command
from qmigrate.format.ram import RamFlag
from qmigrate.format.return_path import Pong, RequestPagesId, ResumeAck, ResumeAckValue, Shut, encode_message
from tests import streams

Output = pytest.CaptureFixture[str]
FORWARD, RETURN = Direction.FORWARD, Direction.RETURN
SCHEMA = json.loads((Path(qmigrate.__file__).parent / "report" / "dissect.schema.json").read_text())


def zero_page(start: int) -> bytes:
    return (start | RamFlag.ZERO).to_bytes(8) + b"\x06pc.ram\0"


def request(start: int) -> bytes:
    return encode_message(RequestPagesId(start=start, length=4096, block="pc.ram"))


def opened(recorder: Recorder, number: int) -> None:
    recorder.opened(number, peer="tcp:10.0.0.1:50000", listen="tcp:0.0.0.0:4444", forward="unix:/b")


@pytest.fixture
def recording(tmp_path: Path) -> str:
    """A postcopy, a request that preempt answers, one that nobody does, a cut and its recovery."""
    path = tmp_path / "a.tap"
    stream = streams.postcopy()
    with Recorder(path) as recorder:
        opened(recorder, 0)
        recorder.data(0, FORWARD, stream[:-1])  # without EOF
        opened(recorder, 1)
        recorder.data(0, RETURN, encode_message(Pong(token=1)) + request(0x3000) + request(0x4000))
        recorder.data(1, FORWARD, zero_page(0x3000))
        for number in (1, 0):
            recorder.closed(number, forward_bytes=1, return_bytes=0, error="Connection reset by peer")
        opened(recorder, 2)
        recorder.data(2, FORWARD, encode_command(RecvBitmap(block="pc.ram")) + encode_command(PostcopyResume()))
        recorder.data(2, RETURN, encode_message(ResumeAck(value=ResumeAckValue.RESUME_ACK_VALUE)))
        recorder.data(2, FORWARD, b"\0")
        recorder.data(2, RETURN, encode_message(Shut(value=0)))
        recorder.closed(2, forward_bytes=1, return_bytes=2)
    return str(path)


def test_the_story_is_told_in_the_order_of_time(recording: str, capsys: Output) -> None:
    assert main(["dissect", recording]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert lines[0].startswith(f"{recording}  a recording, complete, 3 connections, ")
    assert "  2 →  main, resumed, by bytes: it begins with RECV_BITMAP of pc.ram, without a header" in lines
    phases = [line.split()[0] for line in lines[lines.index("Phases") + 2 :][:7]]
    assert phases == ["precopy", "switchover", "postcopy", "paused", "recovery", "postcopy", "ending"]
    told = [line.split(" s ", 1)[1].strip() for line in lines if re.match(r" +\d+\.\d+ s ", line)]
    assert told[0] == "0   opened  peer tcp:10.0.0.1:50000"
    for before, after in (
        ("0 → PACKAGED", "0 ← REQ_PAGES"),
        ("0 ← REQ_PAGES", "1 → PAGES"),
        ("1   closed", "2   opened"),
    ):
        places = [next(at for at, line in enumerate(told) if line.startswith(each)) for each in (before, after)]
        assert places == sorted(places), (before, after)
    assert "Page requests  2, 1 answered, 1 not answered" in lines
    assert f"{recording}: its channels, joined  complete, " in said.out


def test_for_programs_it_is_by_the_schema(recording: str, tmp_path: Path, capsys: Output) -> None:
    assert main(["dissect", "--json", recording]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(SCHEMA).validate(answer)
    assert [channel["directions"]["forward"]["kind"] for channel in answer["channels"]] == [
        "main",
        "preempt",
        "main, resumed",
    ]
    first, second = answer["page_requests"]["requests"]
    assert (first["start"], first["answered_on"], second["answered_ns"]) == (0x3000, 1, None)
    times = [moment["time_ns"] for moment in answer["timeline"]]
    assert times == sorted(times)
    (tmp_path / "b.mig").write_bytes(streams.minimal())
    assert main(["dissect", "--json", recording, str(tmp_path / "b.mig")]) == 0
    both = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["channels" in each for each in both] == [True, False]


def test_each_moment_is_a_line_with_each_request_and_each_answer(recording: str, capsys: Output) -> None:
    assert main(["dissect", "--ndjson", recording]) == 0
    moments = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    asked = [moment for moment in moments if moment["name"] == "REQ_PAGES_ID"]
    (answered,) = [moment for moment in moments if moment["name"] == "answer"]
    assert [moment["start"] for moment in asked] == [0x3000, 0x4000]
    assert (answered["start"], answered["connection"]) == (0x3000, 1)
    assert answered["delay_ns"] == answered["time_ns"] - asked[0]["time_ns"]


def test_the_recording_of_a_killed_tap_is_told_as_far_as_it_goes(recording: str, capsys: Output) -> None:
    whole = Path(recording).read_bytes()
    Path(recording).write_bytes(whole[:-50])
    assert main(["dissect", recording]) == 1
    said = capsys.readouterr()
    assert "a recording without an end, 3 connections" in said.out
    assert "of a frame that was not whole when the tap was killed; they were not passed on" in said.err


def test_a_recording_that_stopped_says_so(tmp_path: Path, capsys: Output) -> None:
    when = {"monotonic_ns": 1, "time_ns": 2}
    stopped = build_frame(Stopped(reason="No space left on device"), connection=0, **when)
    with Recorder(tmp_path / "a.tap") as recorder:
        opened(recorder, 0)
        recorder.data(0, FORWARD, streams.minimal())
    end = len(build_frame(End(), connection=0, **when))
    (tmp_path / "a.tap").write_bytes((tmp_path / "a.tap").read_bytes()[:-end] + stopped)
    for more in (), ("--json",), ("--json", "--jobs", "1"), ("--ndjson",), ("--live",):
        assert main(["dissect", *more, str(tmp_path / "a.tap")]) == 1
        said = capsys.readouterr()
        assert "the recording stopped before the migration ended: No space left on device" in said.err
        is_text = more in ((), ("--live",))
        assert ("a recording that stopped: No space left on device, 1 connection" in said.out) == is_text
        assert re.search(r"-\d+ [a-zµ]", said.out) is None  # though the last frame's time is before the others'


VIEWS = (
    ["dissect"],
    ["dissect", "--json"],
    ["dissect", "--json", "--jobs", "1"],
    ["dissect", "--ndjson"],
    ["dissect", "--live"],
    ["dissect", "--live", "--ndjson"],
    ["dissect", "--report", "page.html"],
    ["dissect", "--structure"],
    ["dissect", "--ram"],
    ["dissect", "--device", "cpu"],
    ["check"],
    ["check", "--json"],
    ["extract", "--raw", "raw"],
    ["diff", "whole.tap"],
)
TLS, HTTP = b"\x16\x03\x01" + bytes(100), b"GET / HTTP/1.0\r\n\r\n"
NO_MAIN = "no migration stream: no recorded connection is a main channel; there are "


@pytest.mark.parametrize(
    ("connections", "wrong"),
    [
        ([], "no migration stream: the recording has no connections"),
        ([(b"", b"")], f"{NO_MAIN}1 unknown"),
        ([(b"", encode_message(Pong(token=1)))], f"{NO_MAIN}1 unknown"),
        ([(TLS, TLS), (TLS, TLS), (HTTP, b"")], f"{NO_MAIN}2 TLS, 1 unknown"),
        ([(bytes.fromhex("1122334400000001"), b"")], f"{NO_MAIN}1 multifd"),
        ([(b"QE", b"")], f"{NO_MAIN}1 unknown"),
        ([(b"QEVM\0\0", encode_message(Pong(token=1)))], "no migration stream: 6 bytes are there, its header has 8"),
    ],
)
@pytest.mark.parametrize("is_killed", [False, True])
def test_a_recording_without_a_stream_is_2_for_all_who_read_it(
    connections: list[tuple[bytes, bytes]],
    wrong: str,
    is_killed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
) -> None:
    """Nothing could be done; the story of the connections is told nevertheless."""
    monkeypatch.chdir(tmp_path)
    written("whole.tap", [(streams.minimal(), b"")])
    written("a.tap", connections)
    if is_killed:
        Path("a.tap").write_bytes(Path("a.tap").read_bytes()[: -HEADER.size])
    for view in VIEWS:
        assert main([*view, "a.tap"]) == 2, view
        said = capsys.readouterr()
        assert re.search(rf"^qmigrate: a\.tap: (connection 0, forward: )?{re.escape(wrong)}$", said.err, re.M), view
        assert said.err.count(wrong) == 1
        assert view != ["dissect", "--json"] or json.loads(said.out)["channels"] is not None
    assert "TLS" not in wrong or "what is inside can" in Path("page.html").read_text()


def test_a_main_that_is_cut_behind_its_header_is_1_for_all_who_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.chdir(tmp_path)
    written("whole.tap", [(streams.minimal(), b"")])
    written("a.tap", [(streams.minimal()[:8], b"")])
    for view in VIEWS:
        assert main([*view, "a.tap"]) == 1, view
        assert "0x8: the stream ends here, 1 byte too soon\n" in capsys.readouterr().err, view


def test_a_preempt_channel_whose_end_was_not_recorded_may_have_more(tmp_path: Path, capsys: Output) -> None:
    """No record is its last: what a killed tap, or a full disk, has left out leaves no trace."""
    path = tmp_path / "a.tap"
    for is_closed in (True, False):
        with Recorder(path, overwrite=True) as recorder:
            opened(recorder, 0)
            recorder.data(0, FORWARD, streams.postcopy())
            opened(recorder, 1)
            recorder.data(1, FORWARD, zero_page(0x3000))
            for number in range(1 + is_closed):
                recorder.closed(number, forward_bytes=1, return_bytes=0)
        assert main(["check", str(path)]) == (0 if is_closed else 1)
        said = capsys.readouterr().err
        assert ("preempt: the recording ends before this connection did: pages that" in said) == (not is_closed)


def written(path: str, connections: list[tuple[bytes, bytes]]) -> None:
    """A recording of what went forward and back on each."""
    with Recorder(path) as recorder:
        recorder.begin()
        for number, (forward, back) in enumerate(connections):
            opened(recorder, number)
            for direction, data in ((FORWARD, forward), (RETURN, back)):
                if data:
                    recorder.data(number, direction, data)
            recorder.closed(number, forward_bytes=len(forward), return_bytes=len(back))


def test_names_in_a_recording_are_data(tmp_path: Path, capsys: Output) -> None:
    with Recorder(tmp_path / "a.tap") as recorder:
        recorder.opened(0, peer="\x1b[31mred[bold]", listen="", forward="")
        recorder.data(0, FORWARD, encode_command(RecvBitmap(block="\x1b[2J")))
        recorder.closed(0, forward_bytes=1, return_bytes=0, error="\x07")
    assert main(["dissect", str(tmp_path / "a.tap")]) == 2
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "\\x1b[31mred[bold]" in said.out


@pytest.mark.parametrize("view", ["--json", "--structure", "--ram"])
def test_live_goes_with_ndjson_alone(view: str, recording: str, capsys: Output) -> None:
    assert main(["dissect", "--live", view, recording]) == 2
    assert "--live goes with --ndjson, or alone" in capsys.readouterr().err


def test_what_has_ended_is_followed_to_its_end(recording: str, capsys: Output) -> None:
    assert main(["dissect", "--live", "--ndjson", recording]) == 0
    live = capsys.readouterr().out
    assert main(["dissect", "--ndjson", recording]) == 0
    assert capsys.readouterr().out == live


def test_live_wants_a_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.chdir(tmp_path)
    Path("b.mig").write_bytes(streams.minimal())
    Path("empty").touch()
    Path("folder").mkdir()
    os.mkfifo("pipe")  # that nobody writes: it must not be waited for
    for name, wrong in {
        "b.mig": "no recording of qmigrate tap: it does not begin with its magic",
        "empty": "no recording of qmigrate tap: it does not begin with its magic",
        "folder": "no recording of qmigrate tap: it is no regular file, which is read by offsets",
        "pipe": "no recording of qmigrate tap: it is no regular file, which is read by offsets",
        "none": "No such file or directory",
    }.items():
        assert main(["dissect", "--live", name]) == 2
        assert capsys.readouterr().err == f"qmigrate: {name}: {wrong}\n"


def test_a_recording_that_is_replaced_while_it_is_followed_is_a_fault(tmp_path: Path) -> None:
    with Recorder(tmp_path / "a.tap") as recorder, Recording(tmp_path / "a.tap") as followed:
        opened(recorder, 0)
        assert len(list(followed.advance())) == 1
        os.truncate(tmp_path / "a.tap", HEADER.size)
        assert list(followed.advance()) == []
        assert str(followed.fault).endswith("the recording became shorter while it was read: it has 36 bytes")


def test_what_was_told_before_the_file_was_cut_is_told(
    recording: str, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """Between its frames being read and what is in them."""
    read_into = Recording.read_into

    def cut(self: Recording, buffer: bytearray, offset: int) -> int:
        if offset > 1000:
            os.truncate(self.path, 1000)
        return read_into(self, buffer, offset)

    monkeypatch.setattr(Recording, "read_into", cut)
    assert main(["dissect", "--live", recording]) == 1
    said = capsys.readouterr()
    assert "HEADER" in said.out
    assert "the recording became shorter while it was read" in said.err


def test_a_page_shows_the_channels_on_one_axis(recording: str, tmp_path: Path, capsys: Output) -> None:
    page = tmp_path / "page.html"
    assert main(["dissect", "--report", str(page), recording]) == 0
    assert capsys.readouterr().err == ""
    said = page.read_text()
    assert "default-src 'none'" in said
    for each in ("<b>phases</b>", "<b>connection 2</b>", ">main, resumed</span>", "Waiting for pages", "RECV_BITMAP"):
        assert each in said
    assert not (set("\x00\x07\x1b") & set(said))


def test_a_page_never_takes_the_place_of_its_recording(recording: str, capsys: Output) -> None:
    before = Path(recording).read_bytes()
    assert main(["dissect", "--report", recording, recording]) == 2
    assert capsys.readouterr() == ("", f"qmigrate: {recording}: an input, which would be overwritten\n")
    assert Path(recording).read_bytes() == before


def test_a_page_never_takes_the_place_of_standard_input(recording: str) -> None:
    before = Path(recording).read_bytes()
    command = [sys.executable, "-m", "qmigrate", "dissect", "-", "--report", recording]
    with Path(recording).open("rb") as file:
        ended = subprocess.run(command, stdin=file, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (2, f"qmigrate: {recording}: an input, which would be overwritten\n")
    assert Path(recording).read_bytes() == before


def test_the_longest_waits_are_told_in_text_and_on_the_page(recording: str, tmp_path: Path, capsys: Output) -> None:
    page = tmp_path / "page.html"
    assert main(["dissect", recording]) == 0
    text = capsys.readouterr().out
    assert main(["dissect", "--report", str(page), recording]) == 0
    for said in (text, page.read_text()):
        waits = said[said.index("Longest waits") :]
        waits = waits[: waits.index("</table>" if said is not text else "joined")]
        assert "0x3000" in waits
        assert "0x4000" not in waits  # which nobody answered


def test_a_tap_that_stood_ready_for_an_hour_has_no_hour_in_its_chart(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    hour_ns = 3600 * 10**9
    with Recorder(tmp_path / "a.tap") as recorder:
        began = recorder_module._now()
        later = {name: at + hour_ns for name, at in began.items()}
        monkeypatch.setattr(recorder_module, "_now", lambda: later)
        opened(recorder, 0)
        recorder.data(0, FORWARD, streams.minimal())
        later = {name: at + 10**9 for name, at in later.items()}
        recorder.closed(0, forward_bytes=1, return_bytes=0)
    assert main(["dissect", "--report", str(page), str(tmp_path / "a.tap")]) == 0
    capsys.readouterr()
    said = page.read_text()
    lane = said[said.index("<b>connection 0</b>") :]
    found = re.search(r'style="left:(.*?);width:(.*?)"', lane)
    assert found is not None
    assert found.groups() == ("0%", "100%")
    assert re.search(r"3600\.\d{6} s", said)


def test_names_on_the_page_are_data(tmp_path: Path, capsys: Output) -> None:
    page = tmp_path / "page.html"
    with Recorder(tmp_path / "a.tap") as recorder:
        recorder.opened(0, peer="<script>\x1b", listen="", forward="")
        recorder.data(0, FORWARD, encode_command(RecvBitmap(block="<b>\udcff")))
        recorder.closed(0, forward_bytes=1, return_bytes=0, error="</td>")
    assert main(["dissect", "--report", str(page), str(tmp_path / "a.tap")]) == 2
    capsys.readouterr()
    said = page.read_text()
    assert "&lt;script&gt;\\x1b" in said
    assert "<script>\\x1b" not in said
    assert "&lt;/td&gt;" in said


def test_a_page_is_about_a_recording(recording: str, tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "b.mig").write_bytes(streams.minimal())
    page = str(tmp_path / "page.html")
    assert main(["dissect", "--report", page, str(tmp_path / "b.mig")]) == 2
    assert "no recording of qmigrate tap, which --report is about" in capsys.readouterr().err
    assert main(["dissect", "--report", page, "--ndjson", recording]) == 2
    assert "--report is about one recording, and goes with no other view" in capsys.readouterr().err
    assert not Path(page).exists()


def test_however_much_passes_the_samples_of_it_stay_few() -> None:
    flow = Flow()
    for number in range(100_000):
        flow.add(number * 1_000_000, 10, is_forward=number % 3 > 0)
    assert len(flow.samples) <= 2002
    times = [sample[0] for sample in flow.samples]
    assert times == sorted(times)
    assert flow.samples[-1] == (99_999_000_000, 666_660, 333_340)
