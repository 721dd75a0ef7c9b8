"""What the tap writes is read back, also when it was killed, cut, or tampered with."""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qmigrate
from qmigrate.analysis.recording import RecordingStory
from qmigrate.capture.frames import (
    HEADER,
    LONGEST_PIECE,
    MOST_CONNECTIONS,
    Direction,
    End,
    FrameHeader,
    FrameKind,
    Opened,
    RecordingHeader,
    Stopped,
    build_frame,
    build_header,
    checksum,
    data_header,
)
from qmigrate.capture.recorder import Recorder
from qmigrate.capture.recording import Recording
from qmigrate.errors import NoStreamError, RefusedError, StreamError, TruncatedError
from qmigrate.format.channel import Channel, ChannelKind, How, by_order
from qmigrate.format.command import PostcopyResume, RecvBitmap, encode_command
from qmigrate.format.ram import RamFlag
from qmigrate.format.return_path import Pong, Shut, encode_message
from tests import streams

FORWARD, RETURN = Direction.FORWARD, Direction.RETURN
PONG, SHUT = encode_message(Pong(token=1)), encode_message(Shut(value=0))
RESUMED = encode_command(RecvBitmap(block="pc.ram")) + encode_command(PostcopyResume()) + b"\0"
PAGE = (0x3000 | RamFlag.ZERO).to_bytes(8) + b"\x06pc.ram\0"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A postcopy with preempt, and a recovery that sends nothing more."""
    path = tmp_path / "a.tap"
    with Recorder(path) as recorder:
        stream = streams.postcopy()
        opened(recorder, 0)
        for at in range(0, len(stream), 1000):
            recorder.data(0, FORWARD, stream[at : at + 1000])
            if not at:
                recorder.data(0, RETURN, PONG)
        opened(recorder, 1)
        recorder.data(1, FORWARD, PAGE)
        recorder.closed(1, forward_bytes=len(PAGE), return_bytes=0)
        recorder.closed(0, forward_bytes=len(stream), return_bytes=len(PONG), error="Connection reset by peer")
        opened(recorder, 2)
        recorder.data(2, FORWARD, RESUMED)
        recorder.data(2, RETURN, SHUT)
        recorder.closed(2, forward_bytes=len(RESUMED), return_bytes=len(SHUT))
    return path


def opened(recorder: Recorder, number: int) -> None:
    recorder.opened(number, peer="", listen="unix:/a", forward="unix:/b")


def bytes_of(recording: Recording, number: int, direction: Direction) -> bytes:
    return recording.stream(number, direction).read_at(0, 1 << 30)


def test_each_direction_is_one_stream_of_bytes(path: Path) -> None:
    with Recording(path).read() as recording:
        assert recording.fault is None
        assert recording.ended
        assert bytes_of(recording, 0, FORWARD) == streams.postcopy()
        assert bytes_of(recording, 0, RETURN) == PONG
        assert bytes_of(recording, 1, FORWARD) == PAGE
        assert bytes_of(recording, 1, RETURN) == b""
        first = recording.connections[0].closed
        assert first is not None
        assert first.error == "Connection reset by peer"


def test_a_stream_of_a_recording_is_walked_like_a_file(path: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(streams.postcopy())
    with Recording(path).read() as recording, qmigrate.open(tmp_path / "plain") as plain:
        stream = recording.stream(0, FORWARD)
        assert [entry[:3] for entry in stream.entries()] == [entry[:3] for entry in plain.entries()]
        assert stream.position == stream.size == len(streams.postcopy())


def test_a_recording_is_opened_as_its_main_channel(path: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(streams.postcopy())
    with qmigrate.open(path) as recorded, qmigrate.open(tmp_path / "plain") as plain:
        assert recorded.blocks.keys() == plain.blocks.keys()
        assert [section.name for section in recorded.sections] == [section.name for section in plain.sections]


def test_channels_are_told_by_their_bytes_with_their_times(path: Path) -> None:
    with Recording(path).read() as recording:
        channels = recording.channels()
        assert [(each.connection.number, each.direction, each.channel.kind) for each in channels] == [
            (0, FORWARD, ChannelKind.MAIN),
            (0, RETURN, ChannelKind.RETURN_PATH),
            (1, FORWARD, ChannelKind.PREEMPT),
            (2, FORWARD, ChannelKind.RESUMED),
            (2, RETURN, ChannelKind.RETURN_PATH),
        ]
        assert {each.channel.known_by for each in channels} == {How.BYTES}
        stream = channels[0].stream
        times = [stream.time_at(at) for at in range(0, stream.size, 1000)]
        assert None not in times
        assert times == sorted(time for time in times if time is not None)
        assert stream.time_at(stream.size) is None


def test_a_silent_connection_is_told_by_its_order_and_a_silent_way_back_is_left_out(tmp_path: Path) -> None:
    with Recorder(tmp_path / "a.tap") as recorder:
        opened(recorder, 0)
        opened(recorder, 1)
        recorder.data(0, FORWARD, streams.minimal())
    with Recording(tmp_path / "a.tap").read() as recording:
        assert [(each.channel.kind, each.channel.known_by) for each in recording.channels()] == [
            (ChannelKind.MAIN, How.BYTES),
            (ChannelKind.PREEMPT, How.ORDER),
        ]


def test_without_a_main_channel_there_is_no_stream_in_it(tmp_path: Path) -> None:
    with Recorder(tmp_path / "a.tap") as recorder:
        opened(recorder, 0)
        recorder.data(0, FORWARD, b"GET / HTTP/1.0\r\n")
    with (
        qmigrate.open(tmp_path / "a.tap") as migration,
        pytest.raises(NoStreamError, match="no recorded connection is a main channel; there are 1 unknown"),
    ):
        _ = migration.blocks


# -- cut and tampered with


def test_cut_anywhere_all_whole_frames_are_read(tmp_path: Path) -> None:
    """As it is when the tap is killed: after any byte."""
    path, cut = tmp_path / "whole.tap", tmp_path / "cut.tap"
    with Recorder(path) as recorder:
        opened(recorder, 0)
        recorder.data(0, FORWARD, streams.header())
        recorder.data(0, RETURN, PONG)
        recorder.closed(0, forward_bytes=8, return_bytes=8)
    whole = path.read_bytes()
    with Recording(path) as recording:
        ends = [frame.offset + frame.length for frame in recording.advance()]
    for length in range(HEADER.size, len(whole)):
        cut.write_bytes(whole[:length])
        with Recording(cut) as recording:
            frames = list(recording.advance())
            recording.finish()
            assert len(frames) == sum(1 for end in ends if end <= length)
            assert isinstance(recording.fault, TruncatedError)
            if length not in ends and length != HEADER.size:
                assert "of a frame that was not whole when the tap was killed" in str(recording.fault)
    for length in range(HEADER.size):
        cut.write_bytes(whole[:length])
        with pytest.raises(NoStreamError):
            Recording(cut)


def test_a_recording_that_grows_is_followed(path: Path, tmp_path: Path) -> None:
    whole, growing = path.read_bytes(), tmp_path / "growing.tap"
    growing.write_bytes(whole[: HEADER.size])
    with Recording(growing) as recording, Recording(path).read() as at_once:
        seen = 0
        for length in range(HEADER.size, len(whole) + 1, 7):
            growing.write_bytes(whole[:length])
            seen += sum(1 for _ in recording.advance())
        growing.write_bytes(whole)
        seen += sum(1 for _ in recording.advance())
        assert recording.finish().fault is None
        assert seen == sum(1 for _ in Recording(path).advance())
        assert bytes_of(recording, 0, FORWARD) == bytes_of(at_once, 0, FORWARD)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_any_byte_that_is_changed_is_found_or_is_data(path: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Frames have checksums; what DATA holds has none, and is judged as what it is: a stream."""
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    frames = list(Recording(path).advance())
    inside = any(frame.kind is FrameKind.DATA and frame.offset <= at < frame.offset + frame.length for frame in frames)
    changed = tmp_path / "changed.tap"
    changed.write_bytes(whole)
    try:
        with Recording(changed) as recording:
            RecordingStory(recording).read()
            assert (recording.fault is None) == inside
    except NoStreamError:
        assert at < HEADER.size


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(tail=st.binary(max_size=200))
def test_whatever_follows_is_an_error_with_its_place(path: Path, tmp_path: Path, tail: bytes) -> None:
    begun = path.read_bytes()[: -HEADER.size]  # without END
    changed = tmp_path / "changed.tap"
    changed.write_bytes(begun + tail)
    with Recording(changed) as recording:
        RecordingStory(recording).read()
        assert recording.fault is not None
        assert recording.fault.offset is not None
        assert recording.fault.offset >= len(begun)


HERE = {"monotonic_ns": 5, "time_ns": 6}
START = build_header(**HERE) + build_frame(Opened(peer="", listen="", forward=""), connection=0, **HERE)


def resealed(kind: int, length: int, *, direction: int = 0, connection: int = 0, unused: int = 0) -> bytes:
    """A frame's header that says what it likes, under a good checksum."""
    header = FrameHeader(
        kind=FrameKind(kind),
        direction=Direction(direction),
        unused=unused,
        connection=connection,
        length=length,
        monotonic_ns=5,
        time_ns=6,
    ).build()
    return header[:-4] + checksum(header).to_bytes(4)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (resealed(2, LONGEST_PIECE + 1, direction=1), "frame: DATA: length is 1048577, expected at most 1048576"),
        (resealed(2, 0, direction=1), "frame: DATA: length is 0, expected at most 1048576"),
        (resealed(1, 1 << 31), "frame: OPENED: length is 2147483648, expected at most 4096"),
        (resealed(2, 1, direction=0) + b"x", "frame: DATA: direction is NEITHER, unused 0x0"),
        (resealed(2, 1, direction=1, unused=7) + b"x", "frame: DATA: direction is FORWARD, unused 0x7"),
        (data_header(1, 1, 1, 5, 6) + b"x", "frame: DATA: of connection 1: it is not open"),
        (
            build_frame(Opened(peer="", listen="", forward=""), connection=7, **HERE),
            "frame: OPENED: of connection 7: expected 1",
        ),
        (
            build_frame(Stopped(reason="full"), connection=0, **HERE) + data_header(0, 1, 1, 5, 6) + b"x",
            "frame: DATA: of connection 0: the recording had stopped",
        ),
        (build_frame(End(), connection=0, **HERE) + b"more", "4 bytes follow END"),
        (b"\1" * 36, "frame: mark: found 0x1010101, expected one of MARK 0x4652414d"),
    ],
)
def test_a_frame_that_lies_is_an_error_with_its_place(frame: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.tap").write_bytes(START + frame)
    with Recording(tmp_path / "a.tap").read() as recording:
        assert recording.fault is not None
        assert str(recording.fault).partition(": ")[2] == message
        assert recording.fault.offset is not None
        assert len(START) <= recording.fault.offset < len(START) + len(frame)


def test_a_file_that_shrinks_is_an_error_and_no_signal(path: Path) -> None:
    with Recording(path).read() as recording:
        os.truncate(path, 100)
        with pytest.raises(StreamError, match="the recording became shorter while it was read"):
            bytes_of(recording, 0, FORWARD)


def test_the_fast_reader_of_headers_agrees_with_the_declaration() -> None:
    data = data_header(0x01020304, 2, 0x0A0B0C, 0x1112131415161718, 0x2122232425262728)
    header = FrameHeader.read(data)
    values = [getattr(header, name) for name in FrameHeader._names]
    assert tuple(values) == HEADER.unpack(data)
    assert header.build() == data
    assert RecordingHeader.size == FrameHeader.size == HEADER.size


def test_memory_follows_what_is_there_and_not_what_is_claimed(tmp_path: Path) -> None:
    """24 MiB of the shortest frames, read with not much more memory than that."""
    path = tmp_path / "long.tap"
    with path.open("wb") as file:
        file.write(START)
        file.write((data_header(0, 1, 1, 5, 6) + b"\0") * ((24 << 20) // 37))
    code = (
        "import sys; from qmigrate.capture.recording import Recording\n"
        "recording = Recording(sys.argv[1]).read(); print(len(recording.connections[0].forward.ends))"
    )
    ran = _run_limited(code, path, 130 << 20)
    assert (ran.stderr, ran.stdout) == ("", f"{(24 << 20) // 37}\n")


def test_thousands_of_connections_cost_what_came_on_them(tmp_path: Path) -> None:
    """Beside a migration 4,000 more, each with the front of a multifd channel and of a way back."""
    path = tmp_path / "many.tap"
    with Recorder(path) as recorder:
        opened(recorder, 0)
        recorder.data(0, FORWARD, streams.postcopy())
        for number in range(1, 4000):
            opened(recorder, number)
            recorder.data(number, FORWARD, b"\x11\x22\x33\x44")
            recorder.data(number, RETURN, PONG)
    code = (
        "import sys; from qmigrate.analysis.recording import RecordingStory\n"
        "from qmigrate.capture.migration import Migration; from qmigrate.capture.recording import Recording\n"
        "with Recording(sys.argv[1]) as recording: print(len(RecordingStory(recording).read().channels))\n"
        "with Migration(sys.argv[1]) as migration: print(len(migration.contents.channels))"
    )
    ran = _run_limited(code, path, 300 << 20)
    assert (ran.stderr, ran.stdout) == ("", "4000\n7999\n")


def test_a_silent_connection_is_told_without_a_look_at_all_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "silent.tap"
    with Recorder(path) as recorder:
        opened(recorder, 0)
        recorder.data(0, FORWARD, streams.postcopy())
        for number in range(1, 100):
            opened(recorder, number)
    looked: list[int] = []

    def counted(channel: Channel, *, is_forward: bool, others: Iterable[Channel]) -> Channel:
        looked.append(len(list(others)))
        return by_order(channel, is_forward=is_forward, others=others)

    monkeypatch.setattr("qmigrate.capture.recording.by_order", counted)
    monkeypatch.setattr("qmigrate.analysis.recording.by_order", counted)
    with Recording(path) as recording:
        story = RecordingStory(recording).read()
        assert [each.channel.kind for each in recording.channels()][1:] == [ChannelKind.PREEMPT] * 99
        assert max(looked) <= len(ChannelKind)
        assert len(story.channels) == 100


def _run_limited(code: str, path: Path, length: int) -> subprocess.CompletedProcess[str]:
    """In a process with so much address space."""
    return subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (length, length)),
    )


# -- the recorder


def test_a_file_that_is_there_is_not_lost(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(RefusedError, match=r"a\.tap is there already; --overwrite replaces it"):
        Recorder(path)
    assert path.read_bytes() == before
    Recorder(path, overwrite=True).close()  # nobody came
    assert path.read_bytes() == before
    with Recorder(path, overwrite=True) as recorder:
        recorder.begin()
    with Recording(path).read() as recording:
        assert (recording.fault, recording.connections) == (None, [])


def test_a_file_that_can_not_be_begun_is_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a\.tap"):
        Recorder(tmp_path / "a.tap", reserve=1 << 60)
    assert not (tmp_path / "a.tap").exists()
    (tmp_path / "a.tap").touch()
    with pytest.raises(OSError, match=r"a\.tap"):
        Recorder(tmp_path / "a.tap", reserve=1 << 60)
    assert (tmp_path / "a.tap").read_bytes() == b""


def test_two_taps_do_not_write_one_file(tmp_path: Path) -> None:
    with Recorder(tmp_path / "a.tap"):
        with Recording(tmp_path / "a.tap") as recording:
            assert recording.is_written
        for overwrite in (False, True):
            with pytest.raises(RefusedError, match=r"a\.tap is being written by another tap"):
                Recorder(tmp_path / "a.tap", overwrite=overwrite)
    with Recording(tmp_path / "a.tap") as recording:
        assert not recording.is_written


def test_only_a_regular_file_is_recorded_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(RefusedError, match="fifo is no regular file: a recording is read by offsets"):
        Recorder(tmp_path / "fifo")


def test_a_recording_that_stops_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    """A file that may grow no longer stands for a full disk; the child's limit is its own."""
    code = (
        "import resource, sys\n"
        "from qmigrate.capture.frames import Direction\n"
        "from qmigrate.capture.recorder import Recorder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "with Recorder(sys.argv[1], on_stop=lambda exc: print(exc.strerror)) as recorder:\n"
        "    recorder.opened(0, peer='', listen='', forward='')\n"
        "    for _ in range(30): recorder.data(0, Direction.FORWARD, bytes(9_000))\n"
        "    recorder.closed(0, forward_bytes=1, return_bytes=2)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.tap")], capture_output=True, text=True, check=False
    )
    assert (ran.stdout, ran.stderr) == ("File too large\n", "")
    with Recording(tmp_path / "a.tap").read() as recording:
        assert recording.fault is None
        assert recording.stopped == Stopped(reason="File too large")
        assert recording.connections[0].forward.length == 11 * 9_000
        assert recording.connections[0].closed is None


def test_what_is_reserved_and_not_used_is_given_back(tmp_path: Path) -> None:
    with Recorder(tmp_path / "a.tap", reserve=8 << 20) as recorder:
        assert (tmp_path / "a.tap").stat().st_blocks * 512 >= 8 << 20
        assert (tmp_path / "a.tap").stat().st_size == HEADER.size
        opened(recorder, 0)
    with Recording(tmp_path / "a.tap").read() as recording:
        assert (recording.fault, len(recording.connections)) == (None, 1)
    assert (tmp_path / "a.tap").stat().st_blocks * 512 < 1 << 20


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    """A folder on a tmpfs."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no tmpfs at /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="qmigrate-test-") as folder:
        yield Path(folder)


def pushed(recorder: Recorder, data: bytes) -> None:
    """Through a pipe, as the tap does it."""
    out, into = os.pipe()
    try:
        for at in range(0, len(data), 50_000):
            part = data[at : at + 50_000]
            assert os.write(into, part) == len(part)
            if not (recorder.has_room and recorder.data_by(0, FORWARD, lambda room: os.readv(out, [room]))):
                recorder.data_from(0, FORWARD, out, len(part))
    finally:
        os.close(out)
        os.close(into)


@pytest.mark.parametrize("reserve", [0, 1 << 16, LONGEST_PIECE + 150_000, None])
def test_what_is_mapped_and_what_is_not_hold_the_same(reserve: int | None, tmpfs: Path) -> None:
    """Nothing of it, part of it and all of it fits into what was set aside, with room for a longest piece."""
    data = os.urandom(300_000)
    with Recorder(tmpfs / "a.tap", reserve=reserve) as recorder, Recording(tmpfs / "a.tap") as followed:
        assert (followed.size > HEADER.size) == (reserve != 0)
        opened(recorder, 0)
        for part in (data[:120_000], data[120_000:]):
            pushed(recorder, part)
            recorder.data(0, RETURN, PONG)
            assert len(list(followed.advance())) > 3
            assert followed.fault is None
        assert bytes_of(followed, 0, FORWARD) == data
        with Recording(tmpfs / "a.tap").read() as unfinished:
            assert str(unfinished.fault).endswith("the recording has no end: the tap was killed, or still runs")
            assert bytes_of(unfinished, 0, FORWARD) == data
            assert bytes_of(unfinished, 0, RETURN) == PONG * 2
        length = recorder.size
    with Recording(tmpfs / "a.tap").read() as recording:
        assert recording.fault is None
        assert bytes_of(recording, 0, FORWARD) == data
        assert recording.size == length + HEADER.size


def test_a_mapped_file_that_somebody_cuts_stops_the_recording_and_nothing_else(tmpfs: Path) -> None:
    heard: list[OSError] = []
    with Recorder(tmpfs / "a.tap", reserve=2 << 20, on_stop=heard.append) as recorder:
        opened(recorder, 0)
        os.truncate(tmpfs / "a.tap", 0)
        pushed(recorder, bytes(50_000))
        assert [exc.strerror for exc in heard] == ["Bad address"]


def test_what_was_passed_on_and_is_not_here_is_told(path: Path) -> None:
    """A whole frame is missing; what stands behind it is read all the same."""
    with Recording(path) as recording:
        frames = list(recording.advance())
        assert recording.finish().faults == []
    lost = next(frame for frame in frames if frame.kind is FrameKind.DATA and frame.connection == 0)
    data = path.read_bytes()
    path.write_bytes(data[: lost.offset - HEADER.size] + data[lost.offset + lost.length :])
    with Recording(path) as recording:
        recording.read()
    assert (recording.ended, recording.fault, len(recording.connections)) == (True, None, 3)
    (fault,) = recording.faults
    size = len(streams.postcopy())
    assert fault.message == f"of connection 0: {size} bytes were passed on forward, {size - lost.length} are here"
    assert fault.trail == ("frame", "CLOSED")


def test_no_more_connections_are_recorded_than_are_read(tmp_path: Path) -> None:
    stops: list[str | None] = []
    with Recorder(tmp_path / "full.tap", on_stop=lambda exc: stops.append(exc.strerror)) as recorder:
        opened(recorder, MOST_CONNECTIONS)
    with Recording(tmp_path / "full.tap").read() as recording:
        assert [str(fault) for fault in recording.faults] == [
            "the recording stopped before the migration ended: a recording has at most 65536 connections"
        ]
    assert stops == ["a recording has at most 65536 connections"]


def test_a_file_that_never_had_a_name_was_not_deleted() -> None:
    descriptor = os.memfd_create("recording")
    try:
        with Recorder(f"/proc/self/fd/{descriptor}") as recorder:
            recorder.begin()
        assert not recorder.is_gone
    finally:
        os.close(descriptor)
