"""The loop that serves a saved guest, against a peer that is a socket."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qmigrate.capture.migration import Migration
from qmigrate.capture.plain import plain_guest
from qmigrate.capture.plain_ends import read_head, read_tail
from qmigrate.capture.saved import read_saved
from qmigrate.capture.saved_guest import SavedGuest
from qmigrate.endpoint.served import End, Ended, Moment
from qmigrate.endpoint.source import Server
from qmigrate.format.return_path import RequestPagesId, Shut, encode_message
from tests import streams
from tests.capture.test_arriving import ONCE, Arriving, arriving
from tests.streams import PAGE


def test_a_destination_that_does_not_answer_a_new_connection_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It was postcopy-paused, and takes the connection: then a QEMU that hangs says nothing more."""
    monkeypatch.setattr("qmigrate.endpoint.source.RESUME_TIMEOUT_MS", 50)
    path = tmp_path / "guest.mig"
    path.write_bytes(streams.minimal())
    ours, theirs = socket.socketpair()
    sizes = dict.fromkeys(streams.BLOCKS, streams.PAGE)
    with ours, theirs, Migration(path) as migration, read_saved(migration) as saved, Server(saved, sizes) as server:
        assert server.resume(ours) == Ended(End.BROKEN, "the destination does not answer on its new connection")


TIMEOUT_S = 60.0
SIZES = dict.fromkeys(streams.BLOCKS, streams.PAGE)


def guest_of(one: Arriving) -> SavedGuest:
    return plain_guest(read_head(one.file), read_tail(one.file, read_head(one.file)), one.index)


@pytest.mark.parametrize("urgent", [False, True], ids=["one connection", "preempt"])
def test_no_page_goes_out_before_its_index_knows_the_last_copy(urgent: bool, tmp_path: Path) -> None:
    """A destination is told all else, asks, and waits; what it then gets is what the file has."""
    lines = [socket.socketpair() for _ in range(2 if urgent else 1)]
    moments: list[Moment] = []
    refused = threading.Event()
    with (
        arriving(tmp_path / "guest.mig", ONCE + ONCE, is_once=False) as one,
        ThreadPoolExecutor(1) as threads,
        Server(guest_of(one), SIZES, on_moment=moments.append) as server,
    ):
        has = one.index.has

        def noted(block: str, first: int, count: int, search: bool) -> bool:
            answer = has(block, first, count, search)
            if search and not answer:
                refused.set()
            return answer

        server._core.pages.has = noted
        ending = threads.submit(server.serve, lines[0][0], lines[1][0] if urgent else None)
        try:
            peer = lines[0][1]
            peer.settimeout(TIMEOUT_S)
            peer.sendall(encode_message(RequestPagesId(start=15 * PAGE, length=PAGE, block="pc.ram")))
            assert refused.wait(TIMEOUT_S)
            assert not server.has_sent_pages
            one.read()
            one.say(done=True, absent=0, one_pass=False)
            last, came, wanted = lines[-1][1], b"", streams.page(15 * PAGE)[8:]
            last.settimeout(TIMEOUT_S)
            while wanted not in came:
                data = last.recv(1 << 16)
                assert data
                came += data
            assert Moment.INDEXED in moments
        finally:
            peer.sendall(encode_message(Shut(value=0)))
            for _, theirs in lines:
                theirs.close()
            ending.result(TIMEOUT_S)
            for ours, _ in lines:
                ours.close()
