"""The tap passes everything on, whatever becomes of its recording, and ends what has to end."""

import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from qmigrate.capture.frames import Direction
from qmigrate.capture.recording import Recording
from qmigrate.format.return_path import Pong, RequestPages, Shut, encode_message

TIMEOUT_S: Final = 60.0
MIB: Final = 1 << 20
HEAD: Final = b"QEVM\0\0\0\3"
PONG, SHUT = encode_message(Pong(token=1)), encode_message(Shut(value=0))
REQUEST = encode_message(RequestPages(start=0x3000, length=4096))


@dataclass
class Tapped:
    """A running tap, and a destination that waits for its connections."""

    process: subprocess.Popen[str]
    listen: str
    listener: socket.socket
    recording: Path

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """A source, and the destination's side of its connection."""
        source = connected(self.listen)
        destination, _ = self.listener.accept()
        destination.settimeout(TIMEOUT_S)
        return source, destination

    def end(self) -> tuple[int, str]:
        """Its exit code, and what it said since: ``communicate()`` would lose what was read ahead of the last line."""
        assert self.process.stderr is not None
        late = threading.Timer(TIMEOUT_S, self.process.kill)
        late.start()
        try:
            said = self.process.stderr.read()
            return self.process.wait(TIMEOUT_S), said
        finally:
            late.cancel()

    def read(self) -> Recording:
        return Recording(self.recording).read()


def connected(uri: str) -> socket.socket:
    scheme, _, rest = uri.partition(":")
    if scheme == "unix":
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(TIMEOUT_S)
        try:
            peer.connect(rest)
        except OSError:
            peer.close()
            raise
        return peer
    host, _, port = rest.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT_S)


def limited(length: int) -> Callable[[], None]:
    """No file of the child may grow beyond this."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (length, length))


@contextmanager
def tapped(
    folder: Path,
    *more: str,
    kind: str = "unix",
    recording: Path | None = None,
    before: Callable[[], object] | None = None,
) -> Iterator[Tapped]:
    recording = recording or folder / "a.tap"
    with ExitStack() as stack:
        if kind == "unix":
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(folder / "destination"))
            listener.listen()
            listen, forward = f"unix:{folder / 'tap'}", f"unix:{folder / 'destination'}"
        else:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            listen, forward = "tcp:127.0.0.1:0", f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        listener.settimeout(TIMEOUT_S)
        command = [sys.executable, "-m", "qmigrate", "tap", listen, forward, "-o", str(recording), *more]
        process = stack.enter_context(
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=before)  # noqa: PLW1509 - no thread of ours is running then
        )
        stack.callback(process.kill)
        assert process.stderr is not None
        began = process.stderr.readline()
        assert began.startswith("qmigrate: listening at "), began
        yield Tapped(process, began.removeprefix("qmigrate: listening at ").partition(",")[0], listener, recording)


def received(peer: socket.socket, length: int) -> bytes:
    """So many bytes."""
    parts = bytearray()
    while len(parts) < length and (part := peer.recv(length - len(parts))):
        parts += part
    return bytes(parts)


def bytes_of(recording: Recording, number: int, direction: Direction) -> bytes:
    return recording.stream(number, direction).read_at(0, 1 << 30)


def few_threads() -> None:
    """Room for the stacks of tens, not of hundreds."""
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))


def test_connections_for_which_there_are_no_threads_close_and_the_next_is_served(tmp_path: Path) -> None:
    with tapped(tmp_path, before=few_threads) as tap:
        silent: list[tuple[socket.socket, socket.socket]] = []
        closed: list[socket.socket] = []
        while not closed:
            silent.append(tap.connect())
            closed = select.select([source for source, _ in silent], [], [], 0.1)[0]
            assert len(silent) < 500
        for pair in silent:
            for peer in pair:
                peer.close()
        served, deadline = b"", time.monotonic() + TIMEOUT_S
        while served != HEAD:  # until the threads of those have ended
            assert time.monotonic() < deadline, "no connection is served any more"
            source, destination = tap.connect()
            with source, destination, suppress(OSError):
                source.sendall(HEAD)
                served = received(destination, len(HEAD))
        tap.process.send_signal(signal.SIGINT)
        code, said = tap.end()
        assert code == 0, said
        assert "can't start new thread" in said


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_both_directions_arrive_and_are_recorded(kind: str, tmp_path: Path) -> None:
    stream = HEAD + os.urandom(3 * MIB)
    with tapped(tmp_path, kind=kind) as tap:
        source, destination = tap.connect()
        with source, destination:
            sender = threading.Thread(target=source.sendall, args=(stream,))
            sender.start()
            assert received(destination, len(stream)) == stream
            sender.join()
            destination.sendall(SHUT)
            assert received(source, len(SHUT)) == SHUT
        tap.process.send_signal(signal.SIGINT)
        assert tap.end()[0] == 0
        with tap.read() as recording:
            assert recording.fault is None
            assert bytes_of(recording, 0, Direction.FORWARD) == stream
            assert bytes_of(recording, 0, Direction.RETURN) == SHUT
            opened, closed = recording.connections[0].opened, recording.connections[0].closed
            assert (opened.listen, opened.peer.partition(":")[0]) == (tap.listen, "tcp" if kind == "tcp" else "")
            assert closed is not None
            assert (closed.forward_bytes, closed.return_bytes, closed.error) == (len(stream), len(SHUT), "")


@pytest.mark.parametrize(("mapped", "reserve"), [(False, 0), (True, 8), (True, 100)])
def test_killed_while_it_relays_all_that_was_passed_on_is_readable(mapped: bool, reserve: int, tmp_path: Path) -> None:
    """On a tmpfs, where it writes by a mapping first, and then beyond what is mapped; and elsewhere."""
    if mapped and not os.access("/dev/shm", os.W_OK):
        pytest.skip("no tmpfs at /dev/shm")
    block = os.urandom(MIB)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")) if mapped else tmp_path
        more = ("--reserve", f"{reserve}M") if mapped else ()
        tap = stack.enter_context(tapped(tmp_path, *more, recording=Path(folder, "a.tap")))
        source, destination = tap.connect()

        def send() -> None:
            with suppress(OSError):
                while True:
                    source.sendall(block)

        with source, destination:
            sender = threading.Thread(target=send)
            sender.start()
            got = received(destination, 20 * MIB + 12345)
            tap.process.kill()
            with suppress(ConnectionError):
                while part := destination.recv(MIB):
                    got += part
            tap.process.wait(TIMEOUT_S)
            sender.join()
        with tap.read() as recording:
            assert recording.fault is not None
            recorded = bytes_of(recording, 0, Direction.FORWARD)
            assert len(recorded) >= len(got)
            assert recorded.startswith(got)
            assert recorded == (block * (len(recorded) // MIB + 1))[: len(recorded)]


def assert_goes_on_without_its_recording(tap: Tapped, reason: str) -> None:
    stream = os.urandom(6 * MIB)
    source, destination = tap.connect()
    with source, destination:
        source.sendall(stream[:1000])  # the frame that does not fit is taken back whole, and may be as long as the file
        assert received(destination, 1000) == stream[:1000]
        sender = threading.Thread(target=source.sendall, args=(stream[1000:],))
        sender.start()
        assert received(destination, len(stream) - 1000) == stream[1000:]
        sender.join()
        destination.sendall(PONG)
        assert received(source, len(PONG)) == PONG
    tap.process.send_signal(signal.SIGTERM)
    code, said = tap.end()
    assert code == 1
    assert said.count(f"qmigrate: the recording stopped, the migration goes on: {reason}\n") == 1
    with tap.read() as recording:
        assert recording.stopped is not None
        assert recording.stopped.reason == reason
        assert recording.fault is None
        recorded = bytes_of(recording, 0, Direction.FORWARD)
        assert 0 < len(recorded) < MIB
        assert stream.startswith(recorded)


def test_a_file_that_may_not_grow_stops_the_recording_and_not_the_migration(tmp_path: Path) -> None:
    with tapped(tmp_path, before=limited(MIB)) as tap:
        assert_goes_on_without_its_recording(tap, "File too large")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_full_disk_stops_the_recording_and_not_the_migration(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.strip()}")
    try:
        with tapped(tmp_path, recording=small / "a.tap") as tap:
            assert_goes_on_without_its_recording(tap, "No space left on device")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_recording_that_was_deleted_meanwhile_is_told(tmp_path: Path) -> None:
    with tapped(tmp_path) as tap:
        source, destination = tap.connect()
        with source, destination:
            source.sendall(HEAD)
            assert received(destination, len(HEAD)) == HEAD
            tap.recording.unlink()
        tap.process.send_signal(signal.SIGINT)
        code, said = tap.end()
    assert code == 1
    assert said.splitlines()[-1] == (
        f"qmigrate: {tap.recording}: it was deleted while it was written: what was recorded is lost"
    )


def test_a_source_that_has_said_all_still_hears_the_answer(tmp_path: Path) -> None:
    with tapped(tmp_path) as tap:
        source, destination = tap.connect()
        with source, destination:
            source.sendall(HEAD)
            source.shutdown(socket.SHUT_WR)
            assert received(destination, 100) == HEAD  # and then the end
            destination.sendall(SHUT)
            destination.close()
            assert received(source, 100) == SHUT


def test_a_destination_that_dies_ends_a_source_that_says_nothing(tmp_path: Path) -> None:
    """Hazard 9: a QEMU whose peer has died does not notice while a relay keeps its side open."""
    with tapped(tmp_path) as tap:
        source, destination = tap.connect()
        with source, destination:
            source.sendall(HEAD)
            assert received(destination, len(HEAD)) == HEAD
            destination.close()
            assert source.recv(1) == b""
            with pytest.raises(OSError, match="Broken pipe"):
                source.sendall(HEAD)


def test_a_destination_that_does_not_read_holds_the_source_back(tmp_path: Path) -> None:
    """What is on its way is in the kernel's buffers and one piece of ours, however much the source would send."""
    with tapped(tmp_path) as tap:
        source, destination = tap.connect()
        with source, destination:
            source.setblocking(False)
            sent = 0
            while select.select([], [source], [], 1.0)[1]:  # a second in which nothing moves: it is held back
                sent += source.send(bytes(MIB))
                assert sent < 16 * MIB
            assert tap.recording.stat().st_size < 16 * MIB
            peak = Path(f"/proc/{tap.process.pid}/status").read_text().partition("VmHWM:")[2].split()[0]
            assert int(peak) < 64 << 10  # KiB


def test_once_ends_with_the_migration(tmp_path: Path) -> None:
    with tapped(tmp_path, "--once") as tap:
        source, destination = tap.connect()
        with source, destination:
            source.sendall(HEAD)
            assert received(destination, len(HEAD)) == HEAD
            destination.sendall(PONG + SHUT)
            assert received(source, len(PONG + SHUT)) == PONG + SHUT
        code, said = tap.end()
        assert code == 0
        assert "connection 0 closed, 8 bytes forward, 16 bytes back\n" in said
        with tap.read() as recording:
            assert recording.ended


def test_once_waits_for_the_recovery_of_a_postcopy_that_broke(tmp_path: Path) -> None:
    with tapped(tmp_path, "--once") as tap:
        for answer in (PONG + REQUEST, SHUT):
            source, destination = tap.connect()
            with source, destination:
                source.sendall(HEAD)
                assert received(destination, len(HEAD)) == HEAD
                destination.sendall(answer)
                assert received(source, len(answer)) == answer
            if answer != SHUT:
                wait_for_line(tap, "connection 0 closed, 8 bytes forward, 24 bytes back; its return path has no end: ")
                with pytest.raises(subprocess.TimeoutExpired):
                    tap.process.wait(0.5)  # long enough for it to end, where it thinks that all is over
        code, _ = tap.end()
        assert code == 0


def test_once_ends_when_a_precopy_has_failed_which_can_t_be_recovered(tmp_path: Path) -> None:
    with tapped(tmp_path, "--once") as tap:
        source, destination = tap.connect()
        with source, destination:
            source.sendall(HEAD)
            assert received(destination, len(HEAD)) == HEAD
            destination.sendall(PONG)
            assert received(source, len(PONG)) == PONG
        code, said = tap.end()
        assert code == 0
        assert "connection 0 closed, 8 bytes forward, 8 bytes back; its return path has no end\n" in said


LEFT_OPEN: Final = "cut: the migration was over, and the destination kept it open"


def test_what_the_destination_does_not_close_when_all_is_over_is_cut(tmp_path: Path) -> None:
    """QEMU 5.2 keeps its multifd channels open after a postcopy, until it quits."""
    with tapped(tmp_path, "--once") as tap:
        pairs = [tap.connect() for _ in range(2)]
        (main, to_main), (multifd, to_multifd) = pairs
        with main, to_main, multifd, to_multifd:
            for source, destination in pairs:
                source.sendall(HEAD)
                assert received(destination, len(HEAD)) == HEAD
            to_main.sendall(SHUT)
            assert received(main, len(SHUT)) == SHUT
            main.close()
            to_main.close()
            wait_for_line(tap, "connection 0 closed, ")
            with pytest.raises(subprocess.TimeoutExpired):
                tap.process.wait(3)  # longer than it waits for a destination to close: the source may have more to say
            multifd.sendall(HEAD)
            multifd.close()
            assert received(to_multifd, 100) == HEAD  # and then the end
            code, said = tap.end()
        assert code == 0
        assert f"connection 1 closed, 16 bytes forward, 0 bytes back, {LEFT_OPEN}\n" in said
        with tap.read() as recording:
            assert (recording.fault, recording.ended) == (None, True)
            assert [each.closed and each.closed.error for each in recording.connections] == ["", LEFT_OPEN]


def test_a_load_that_takes_its_time_is_not_cut(tmp_path: Path) -> None:
    """Without a return path nothing tells when a destination has read all but its own end."""
    with tapped(tmp_path, "--once") as tap:
        pairs = [tap.connect() for _ in range(2)]
        (main, to_main), (multifd, to_multifd) = pairs
        with main, to_main, multifd, to_multifd:
            for source, destination in pairs:
                source.sendall(HEAD)
                source.close()
                assert received(destination, 100) == HEAD
            to_multifd.close()
            with pytest.raises(subprocess.TimeoutExpired):
                tap.process.wait(3)
            to_main.close()
            assert tap.end()[0] == 0


def test_the_first_interrupt_does_not_wait_for_what_the_destination_never_closes(tmp_path: Path) -> None:
    with tapped(tmp_path) as tap:
        pairs = [tap.connect() for _ in range(2)]
        (main, to_main), (multifd, to_multifd) = pairs
        with main, to_main, multifd, to_multifd:
            to_main.sendall(SHUT)
            assert received(main, len(SHUT)) == SHUT
            main.close()
            to_main.close()
            multifd.close()
            assert to_multifd.recv(1) == b""
            wait_for_line(tap, "connection 0 closed, ")
            tap.process.send_signal(signal.SIGINT)
            code, said = tap.end()
        assert code == 0
        assert LEFT_OPEN in said


def test_the_first_interrupt_waits_for_open_connections_and_the_second_cuts_them(tmp_path: Path) -> None:
    with tapped(tmp_path) as tap:
        source, destination = tap.connect()
        with source, destination:
            source.sendall(HEAD)
            assert received(destination, len(HEAD)) == HEAD
            tap.process.send_signal(signal.SIGINT)
            wait_for_line(tap, "ending when 1 open connection has closed; Ctrl-C again cuts them")
            source.sendall(HEAD)
            assert received(destination, len(HEAD)) == HEAD
            with pytest.raises(OSError, match="No such file"):
                connected(tap.listen)
            tap.process.send_signal(signal.SIGINT)
            assert (source.recv(1), destination.recv(1)) == (b"", b"")
        code, said = tap.end()
        assert code == 130
        *_, closed, summary = said.splitlines()
        assert closed == "qmigrate: connection 0 closed, 16 bytes forward, 0 bytes back, cut, for the tap ended"
        assert summary.startswith("qmigrate: 1 connection, 16 bytes passed on, ")
        with tap.read() as recording:
            assert (recording.fault, recording.ended) == (None, True)
            assert recording.connections[0].closed is not None
            assert recording.connections[0].closed.error == "cut, for the tap ended"


def test_a_terminal_that_closes_cuts_nothing(tmp_path: Path) -> None:
    with tapped(tmp_path) as tap:
        source, destination = tap.connect()
        with source, destination:
            tap.process.send_signal(signal.SIGHUP)
            wait_for_line(tap, "ending when 1 open connection has closed")
            tap.process.send_signal(signal.SIGHUP)
            source.sendall(HEAD)
            assert received(destination, len(HEAD)) == HEAD
        assert tap.end()[0] == 0


def test_nohup_is_heeded(tmp_path: Path) -> None:
    with tapped(tmp_path, before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as tap:
        tap.process.send_signal(signal.SIGHUP)
        source, destination = tap.connect()
        with source, destination:
            source.sendall(HEAD)
            assert received(destination, len(HEAD)) == HEAD
        tap.process.send_signal(signal.SIGINT)
        assert tap.end()[0] == 0


def wait_for_line(tap: Tapped, what: str) -> None:
    assert tap.process.stderr is not None
    for line in tap.process.stderr:
        if what in line:
            return
    pytest.fail(f"it never said {what!r}")


def test_a_destination_that_does_not_listen_closes_the_source(tmp_path: Path) -> None:
    with tapped(tmp_path) as tap:
        tap.listener.close()
        with connected(tap.listen) as source:
            assert source.recv(1) == b""
        tap.process.send_signal(signal.SIGINT)
        code, said = tap.end()
        assert code == 0
        assert "connection 0 refused: unix:" in said
        with tap.read() as recording:
            closed = recording.connections[0].closed
            assert closed is not None
            assert closed.error.endswith(": Connection refused")


def test_a_socket_that_a_dead_tap_left_behind_is_replaced_and_one_that_serves_is_not(tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "tap"))
    stale.close()
    with tapped(tmp_path) as tap:
        command = [sys.executable, "-m", "qmigrate", "tap", tap.listen, "unix:/nowhere", "-o", str(tmp_path / "b.tap")]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        assert (ran.returncode, ran.stderr) == (2, f"qmigrate: {tap.listen}: Address already in use\n")
        assert not (tmp_path / "b.tap").exists()
        (tmp_path / "old.tap").write_bytes(b"what was recorded before")
        command[-1:] = [str(tmp_path / "old.tap"), "--overwrite"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        assert (ran.returncode, ran.stderr) == (2, f"qmigrate: {tap.listen}: Address already in use\n")
        assert (tmp_path / "old.tap").read_bytes() == b"what was recorded before"
        source, destination = tap.connect()
        source.close()
        destination.close()


def test_it_does_not_connect_to_itself(tmp_path: Path) -> None:
    """At once where that can be seen; else its own connection is refused, and with it the first."""
    command = [sys.executable, "-m", "qmigrate", "tap", f"unix:{tmp_path}/a", f"unix:{tmp_path}/./a"]
    command += ["-o", str(tmp_path / "a.tap")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert ran.returncode == 2
    assert ran.stderr.startswith("qmigrate: LISTEN and FORWARD are the same")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("listen", "forward"),
    [
        ("0.0.0.0", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.2"),
        ("127.0.0.1", "localhost"),
        ("localhost", ""),
        ("", "localhost"),
        ("", "0.0.0.0"),
        ("[::]", "127.0.0.1"),
        ("[::]", "[::1]"),
        ("[::]", "[::ffff:127.0.0.1]"),
        ("[::]", "localhost"),
        ("[::1]", "[0:0::1]"),
    ],
)
def test_of_tcp_its_own_connection_is_refused_and_with_it_the_first(listen: str, forward: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        # It is bound as long as the test lasts, so that nobody else is given this port; the tap may share it, for
        # nobody listens here.
        held = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in listen else socket.AF_INET))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("", 0))
        port = held.getsockname()[1]
        command = [sys.executable, "-m", "qmigrate", "tap", f"tcp:{listen}:{port}", f"tcp:{forward}:{port}"]
        command += ["-o", str(tmp_path / "a.tap")]
        process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        assert process.stderr is not None
        assert "listening" in process.stderr.readline()
        reached = "[::1]" if listen == "[::1]" else "127.0.0.1"
        with connected(f"tcp:{reached}:{port}") as source, suppress(ConnectionError):
            source.sendall(HEAD)
            assert source.recv(1) == b""
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == 0
    assert f"connection 1 refused: tcp:{forward}:" in said
    assert "we connected to ourselves: nobody but us listens there" in said
    assert "connection 2" not in said


def test_quietly_it_says_nothing_and_leaves_nothing_but_the_recording(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qmigrate", "tap", f"unix:{tmp_path / 'tap'}", "unix:/nowhere"]
    command += ["-q", "-o", str(tmp_path / "a.tap")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while not (tmp_path / "tap").exists():
                assert time.monotonic() < deadline
                select.select([], [], [], 0.02)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=TIMEOUT_S)[1]
        finally:
            process.kill()
    assert (process.returncode, said) == (0, "")
    assert [each.name for each in tmp_path.iterdir()] == ["a.tap"]


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["udp:1:2", "unix:/b"], " tap: error: 'udp:1:2' is no socket: expected unix:PATH or tcp:HOST:PORT"),
        (["unix:/a", "b"], " tap: error: 'b' is no socket: expected unix:PATH or tcp:HOST:PORT"),
        (
            ["unix:/a", "unix:/b", "-o", "-"],
            " tap: error: -o wants a file: a recording is read by offsets, and - is none",
        ),
        (["tcp::0", "tcp:::0"], ": nobody can listen at FORWARD, tcp:[:]:0: it has no port"),
        (["tcp::0", f"unix:/{'x' * 107}"], f": nobody can listen at FORWARD, unix:/{'x' * 107}: longer than 107 bytes"),
        (["tcp::0", "unix:b", "-o", "."], ": .: Is a directory"),
    ],
)
def test_what_can_t_be_is_refused_and_leaves_nothing(arguments: list[str], wrong: str, tmp_path: Path) -> None:
    for already in (False, True):
        if already:
            (tmp_path / "a.tap").touch()
        command = [sys.executable, "-m", "qmigrate", "tap", "-o", "a.tap", *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, cwd=tmp_path)
        assert (ran.returncode, ran.stderr.splitlines()[-1]) == (2, f"qmigrate{wrong}")
        assert [(each.name, each.stat().st_size) for each in tmp_path.iterdir()] in ([], [("a.tap", 0)])


def test_a_recording_is_followed_while_it_grows(tmp_path: Path) -> None:
    with tapped(tmp_path) as tap:
        source, destination = tap.connect()
        command = [sys.executable, "-m", "qmigrate", "dissect", "--live", str(tap.recording)]
        with (
            source,
            destination,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower,
        ):
            try:
                assert follower.stdout is not None
                source.sendall(HEAD)
                seen = [follower.stdout.readline() for _ in range(3)]
                assert seen[0].endswith("0   opened\n")
                assert seen[1].endswith("0 → is  main, by bytes: it begins with QEVM\n")
                assert seen[2].endswith("0 → HEADER\n")
                destination.sendall(PONG)
                seen = [follower.stdout.readline() for _ in range(2)]
                assert seen[1].endswith("0 ← PONG  token 0x1\n")
                tap.process.kill()  # nobody writes it any more: the follower ends too
                rest, wrong = follower.communicate(timeout=TIMEOUT_S)
            finally:
                follower.kill()
        assert follower.returncode == 1
        assert "a recording without an end, 1 connection" in rest
        assert wrong.startswith(f"qmigrate: {tap.recording}: ")
        assert wrong.endswith(": the recording has no end: the tap was killed, or still runs\n")
