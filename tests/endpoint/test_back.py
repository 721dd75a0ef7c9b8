"""The return path: one message after the other, and a source that does not read it."""

import os
import socket

import pytest

from qmigrate.endpoint import back
from qmigrate.endpoint.back import ReturnPath, limit_sending, new_lock
from qmigrate.format.return_path import Pong, encode_message


def test_a_source_that_does_not_read_what_it_is_told_breaks_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each further message would wait as long again, and might follow half of another."""
    monkeypatch.setattr(back, "SEND_TIMEOUT_S", 0.05)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        limit_sending(ours)
        with ReturnPath(ours.fileno(), new_lock()) as path:
            assert path.send(encode_message(Pong(token=1)))
            assert not path.is_stuck
            assert not path.send(encode_message(Pong(token=2)) * (1 << 20))
            assert path.is_stuck
            assert os.read(ours.fileno(), 1) == b""  # who waits for the source's next bytes is woken
            assert not path.send(encode_message(Pong(token=3)))


def test_a_source_that_has_gone_is_no_stuck_one() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, ReturnPath(ours.fileno(), new_lock()) as path:
        assert not path.send(encode_message(Pong(token=1)))
        assert not path.is_stuck
