"""Connections that come in, whatever there is too little of."""

import asyncio
import errno
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from qmigrate.endpoint import incoming
from qmigrate.endpoint.incoming import ChannelKind, Incoming

TIMEOUT_S = 60.0


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


@pytest.mark.asyncio
async def test_many_who_say_nothing_keep_nobody_out_and_the_first_of_them_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7.2 says nothing on preempt until it is used; a flood has no end, and descriptors have."""
    monkeypatch.setattr(incoming, "ACCEPT_AGAIN_S", 0.001)
    monkeypatch.setattr(incoming, "SILENT_S", 0.001)
    monkeypatch.setattr(incoming, "MOST_SILENT", 10)
    monkeypatch.setattr(incoming, "MOST_UNIDENTIFIED", 15)
    async with Incoming(f"unix:{tmp_path / 'in'}") as coming:
        with ExitStack() as stack:
            silent = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(100)]
            main = stack.enter_context(socket.socket(socket.AF_UNIX))
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(TIMEOUT_S):
                for peer in (*silent, main):
                    peer.setblocking(False)
                    while True:
                        try:
                            peer.connect(str(tmp_path / "in"))
                            break
                        except BlockingIOError:
                            await asyncio.sleep(0.001)
                await loop.sock_sendall(main, b"QEVM")
                arrived = await anext(aiter(coming))
                for peer in silent[10:]:
                    assert await loop.sock_recv(peer, 1) == b""
            for peer in silent[:10]:
                with pytest.raises(BlockingIOError):
                    peer.recv(1)
        assert arrived.kind is ChannelKind.MAIN
        socket.socket(fileno=arrived.descriptor).close()
