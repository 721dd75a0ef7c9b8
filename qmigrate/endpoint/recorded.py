"""Records what a stand-in destination says and hears: a relay of our own in each of its connections.

The tap's own ``Joined``, whose other end is the destination's processes: they notice nothing of it, and where nobody
records there is none.
"""

import asyncio
import os
import socket
import threading
from contextlib import suppress
from typing import Final

from qmigrate.capture.recorder import Recorder
from qmigrate.endpoint.incoming import Arrived
from qmigrate.endpoint.joined import Joined
from qmigrate.endpoint.transport import SocketAddress

__all__ = ["Recorded"]

_FORWARD: Final = "receive"  # where a recording has the destination's address
_PIECE: Final = 1 << 18
_CLOSING_TIMEOUT_S: Final = 5.0


class Recorded:
    """Connections on their way.  The recorder stays open."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._connections: list[Joined] = []

    def through(self, arrived: Arrived, listen: str) -> Arrived:
        """The same connection, recorded.  ``arrived.descriptor`` stays the caller's; so is the new one's."""
        number = len(self._connections)
        source = _socket_of(arrived) if arrived.way_back else _fed_by(arrived.descriptor)
        self._recorder.opened(number, peer=_peer(arrived), listen=listen, forward=_FORWARD)
        ours, theirs = socket.socketpair()
        joined = Joined(number, source, ours, recorder=self._recorder)
        self._connections.append(joined)
        joined.start()
        return Arrived(arrived.kind, theirs.detach(), arrived.way_back)

    async def close(self) -> None:
        """All has been said: until it has been passed on, too.  What does not end by itself is cut."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSING_TIMEOUT_S):
                await self._closed()
        for each in self._connections:
            each.cut()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSING_TIMEOUT_S):
                await self._closed()

    async def _closed(self) -> None:
        while any(each.is_open for each in self._connections):  # noqa: ASYNC110 - threads of their own end them
            await asyncio.sleep(0.01)


def _socket_of(arrived: Arrived) -> socket.socket:
    return socket.socket(fileno=os.dup(arrived.descriptor))


def _fed_by(descriptor: int) -> socket.socket:
    """A socket from which a file, or what else can only be read, comes."""
    mine, (ours, theirs) = os.dup(descriptor), socket.socketpair()

    def feed() -> None:
        with theirs, suppress(OSError):  # whoever reads has gone; or it can't be read on, which is an end, too
            try:
                while piece := os.read(mine, _PIECE):
                    theirs.sendall(piece)
                theirs.shutdown(socket.SHUT_WR)
            finally:
                os.close(mine)
            theirs.recv(1)  # until it is closed

    threading.Thread(target=feed, name="feed", daemon=True).start()
    return ours


def _peer(arrived: Arrived) -> str:
    """Its address as a URI; empty where it has none."""
    if not arrived.way_back:
        return ""
    with _socket_of(arrived) as peer:
        try:
            name = peer.getpeername()
        except OSError:  # gone already
            return ""
    if isinstance(name, tuple):
        return str(SocketAddress(host=name[0], port=name[1]))
    return f"unix:{os.fsdecode(name)}" if name else ""
