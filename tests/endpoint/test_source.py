"""The loop that serves a saved guest, against a peer that is a socket."""

import socket
from pathlib import Path

import pytest

from qmigrate.capture.migration import Migration
from qmigrate.capture.saved import read_saved
from qmigrate.endpoint.source import End, Ended, Server
from tests import streams


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
