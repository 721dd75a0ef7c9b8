"""``restore`` and its connections, against a peer that is a socket; against real QEMUs: tests/live/test_restore*.py."""

import asyncio
import socket
from pathlib import Path

import pytest

from qmigrate.capture.migration import Migration
from qmigrate.capture.saved import read_saved
from qmigrate.endpoint.served import End
from qmigrate.endpoint.source import Server
from qmigrate.operations.restore import Restorer
from tests import streams

TIMEOUT_S = 60.0


@pytest.mark.asyncio
async def test_the_preempt_channel_stays_until_the_destination_shuts_it_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The main one is closed before; 11.1 may hang for ever where it is the other way round."""
    monkeypatch.setattr("qmigrate.operations.restore.SHUT_TIMEOUT_S", TIMEOUT_S)
    path = tmp_path / "guest.mig"
    path.write_bytes(streams.minimal())
    (main, main_there), (urgent, urgent_there) = socket.socketpair(), socket.socketpair()
    sizes = dict.fromkeys(streams.BLOCKS, streams.PAGE)
    with (
        main_there,
        urgent_there,
        Migration(path) as migration,
        read_saved(migration) as saved,
        Server(saved, sizes) as at,
    ):
        over = asyncio.create_task(Restorer(path)._over([main, urgent], at, at.serve))
        main_there.settimeout(TIMEOUT_S)
        assert await asyncio.to_thread(main_there.recv, 1)
        main_there.shutdown(socket.SHUT_WR)
        while await asyncio.to_thread(main_there.recv, 1 << 16):
            pass
        urgent_there.settimeout(0.1)
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(_read_to_end, urgent_there)  # bytes may have come there, the end has not
        urgent_there.close()
        ended = await asyncio.wait_for(over, TIMEOUT_S)
    assert (ended.end, urgent.fileno()) == (End.BROKEN, -1)


def _read_to_end(peer: socket.socket) -> None:
    while peer.recv(1 << 16):
        pass
