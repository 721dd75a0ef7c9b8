"""How the tap takes what a source sends: large pieces where there is much, and at once where there is little."""

import os
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from qmigrate.capture.frames import LONGEST_PIECE, Direction
from qmigrate.capture.recorder import Recorder
from qmigrate.capture.recording import Recording
from qmigrate.endpoint import joined
from qmigrate.endpoint.joined import Joined

MUCH = 50_000  # bytes, of which a unix socket holds some
LITTLE = 4104


class Giving:
    """What the source does while it is given way to, and how long that takes by our clock."""

    def __init__(self, source: socket.socket) -> None:
        self.source = source
        self.count = 0
        self.takes_ns = 50_000
        self.now_ns = 0

    def __call__(self) -> int:
        self.count += 1
        self.now_ns += self.takes_ns
        self.source.sendall(bytes(MUCH))
        return 0


Taken = tuple[socket.socket, Giving, Callable[[], int]]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Taken]:
    """A source, what it does when it is given way to, and the taking of one piece: how long that is."""
    ours, source = socket.socketpair()
    destination, reader = socket.socketpair()
    giving = Giving(source)
    monkeypatch.setattr(joined, "_yield", giving)
    monkeypatch.setattr(joined, "time", SimpleNamespace(monotonic_ns=lambda: giving.now_ns))
    relay = Joined(0, ours, destination)

    def take() -> int:
        with joined._Pipe() as pipe:
            return relay._take_into(pipe)

    with ours, source, destination, reader:
        yield source, giving, take


def test_a_source_that_sends_much_is_given_way_to_once_a_piece(taken: Taken) -> None:
    source, giving, take = taken
    for number in range(1, 4):
        source.sendall(bytes(MUCH))
        assert take() == 2 * MUCH
        assert giving.count == number


def test_a_page_that_comes_alone_is_passed_on_at_once(taken: Taken) -> None:
    source, giving, take = taken
    source.sendall(bytes(LITTLE))
    assert take() == LITTLE
    assert giving.count == 0


def test_who_keeps_the_cpu_for_long_is_not_given_way_to_again_for_many_pieces(
    taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, giving, take = taken
    monkeypatch.setattr(joined, "_UNTIL_NEXT_TRY", 3)
    giving.takes_ns = 1_400_000  # a time slice of a machine with two CPUs
    lengths = []
    for _ in range(6):
        source.sendall(bytes(MUCH))
        lengths.append(take())
    assert lengths == [2 * MUCH, MUCH, MUCH, MUCH, 2 * MUCH, MUCH]
    assert giving.count == 2


def test_the_end_of_a_source_is_met_after_what_it_sent(taken: Taken) -> None:
    source, _, take = taken
    source.sendall(bytes(MUCH))
    source.shutdown(socket.SHUT_WR)
    assert take() == MUCH
    assert take() == 0


def test_no_requested_page_waits_in_tcp_for_the_one_before_to_be_acknowledged() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peers = [(socket.create_connection(listener.getsockname()), listener.accept()[0]) for _ in range(2)]
    (source, ours), (theirs, destination) = peers
    closed = threading.Event()
    with ours, theirs:
        with source, destination:
            Joined(0, ours, theirs, on_closed=closed.set).start()
            for peer in (ours, theirs):
                assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert closed.wait(60)  # its threads open files, which are no business of the next test


# -- into a recording that is mapped


@pytest.fixture
def mapped() -> Iterator[Recorder]:
    """Room for two pieces and some."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no tmpfs at /dev/shm")
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        Recorder(Path(folder, "a.tap"), reserve=3 * LONGEST_PIECE) as recorder,
    ):
        assert recorder.has_room
        yield recorder


class Recorded(NamedTuple):
    """Of the one connection."""

    stream: bytes
    ends: list[int]  # of its pieces
    forward_bytes: int
    error: str


def recorded(recorder: Recorder) -> Recorded:
    recorder.close()
    with Recording(recorder.path) as recording:
        recording.read()
        assert recording.fault is None
        assert recording.stopped is None
        (connection,) = recording.connections
        assert connection.closed is not None
        stream = recording.stream(0, Direction.FORWARD).read_at(0, 1 << 30)
        return Recorded(stream, list(connection.forward.ends), connection.closed.forward_bytes, connection.closed.error)


def joined_by(recorder: Recorder, ours: socket.socket, theirs: socket.socket) -> threading.Event:
    """The event is set when both are closed."""
    closed = threading.Event()
    recorder.opened(0, peer="", listen="unix:/a", forward="unix:/b")
    Joined(0, ours, theirs, recorder=recorder, on_closed=closed.set).start()
    return closed


def read_all(peer: socket.socket) -> bytes:
    with peer.makefile("rb") as file:
        return file.read()


def test_what_a_pipe_can_t_hold_at_once_is_recorded_and_passed_on_whole(mapped: Recorder) -> None:
    """A pipe holds 256 pieces, however short they are; a unix socket has one for each call of its peer."""
    (source, ours), (theirs, destination) = socket.socketpair(), socket.socketpair()
    sent = os.urandom(265)
    with source, destination:
        for byte in sent:
            source.send(bytes([byte]))
        source.shutdown(socket.SHUT_WR)
        closed = joined_by(mapped, ours, theirs)
        assert read_all(destination) == sent
        destination.close()
        assert closed.wait(60)
    assert recorded(mapped) == (sent, [len(sent)], len(sent), "")


def test_beyond_what_is_mapped_it_is_recorded_on(mapped: Recorder) -> None:
    (source, ours), (theirs, destination) = socket.socketpair(), socket.socketpair()
    sent = os.urandom(8 * LONGEST_PIECE)
    with source, destination:
        closed = joined_by(mapped, ours, theirs)

        def send() -> None:
            source.sendall(sent)
            source.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        assert read_all(destination) == sent
        sender.join()
        assert not mapped.has_room
        destination.close()
        assert closed.wait(60)
    stream, ends, forward_bytes, error = recorded(mapped)
    assert stream == sent
    assert ends[-1] == forward_bytes == len(sent)
    assert error == ""


def test_a_source_that_breaks_breaks_the_connection_and_not_the_recording(mapped: Recorder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        source = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    theirs, destination = socket.socketpair()
    sent = os.urandom(LITTLE)
    with source, destination:
        closed = joined_by(mapped, ours, theirs)
        source.sendall(sent)
        assert destination.recv(LITTLE, socket.MSG_WAITALL) == sent
        source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        source.close()  # which resets it
        assert closed.wait(60)
    assert mapped.has_room
    assert recorded(mapped) == (sent, [LITTLE], LITTLE, "Connection reset by peer")


def test_a_recording_that_somebody_cuts_breaks_no_connection(mapped: Recorder) -> None:
    (source, ours), (theirs, destination) = socket.socketpair(), socket.socketpair()
    with source, destination:
        closed = joined_by(mapped, ours, theirs)
        os.truncate(mapped.path, 0)
        source.sendall(bytes(MUCH))
        assert destination.recv(MUCH, socket.MSG_WAITALL) == bytes(MUCH)
        assert str(mapped.stopped) == "[Errno 14] Bad address"
        destination.close()
        assert closed.wait(60)
