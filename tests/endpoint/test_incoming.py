"""Connections that come in, whatever there is too little of."""

import asyncio
import errno
import socket
from pathlib import Path

import pytest

from qmigrate.endpoint import incoming
from qmigrate.endpoint.incoming import ChannelKind, Incoming

TIMEOUT_S = 30.0


@pytest.mark.asyncio
async def test_after_a_time_without_free_descriptors_connections_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who connects a thousand times keeps nobody from recovering a guest."""
    loop = asyncio.get_running_loop()
    accept, refused = loop.sock_accept, 0

    async def accept_later(listener: socket.socket) -> tuple[socket.socket, object]:
        nonlocal refused
        if refused < 3:
            refused += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return await accept(listener)

    monkeypatch.setattr(incoming, "ACCEPT_AGAIN_S", 0.001)
    monkeypatch.setattr(loop, "sock_accept", accept_later)
    async with Incoming(f"unix:{tmp_path / 'in'}") as coming:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(tmp_path / "in"))
            peer.send(b"QEVM")
            async with asyncio.timeout(TIMEOUT_S):
                arrived = await anext(aiter(coming))
        assert (arrived.kind, refused) == (ChannelKind.MAIN, 3)
        socket.socket(fileno=arrived.descriptor).close()
