"""How the tap takes what a source sends: large pieces where there is much, and at once where there is little."""

import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

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
