"""Stands between a source and a destination, and records every channel both ways.

Each connection to ``listen`` is joined to one of its own to ``forward``.  What passes is written, before it is
passed on, to two files: ``NN-forward`` (source to destination) and ``NN-return`` (the way back), NN counting
connections in the order in which they came.

A QEMU whose peer has died does not notice while a relay keeps its side open: when one side closes, what came
from it is delivered, then both are closed.
"""

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from qmigrate.endpoint.transport import SocketAddress, connect, listen

__all__ = ["Channel", "Relay"]

_PIECE: Final = 1 << 18


@dataclass(slots=True)
class Channel:
    """One connection and its recording.  The counts are of bytes passed on; ``error`` says how it failed."""

    number: int
    forward_path: Path
    return_path: Path
    forward_bytes: int = 0
    return_bytes: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    error: OSError | None = None
    _sockets: tuple[socket.socket, ...] = ()

    def cut(self) -> None:
        """Break this connection now, as a failing network would: both sides at once, nothing delivered."""
        for peer in self._sockets:
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)


class Relay:
    """``async with Relay(listen, forward, folder) as relay``: listens until it is left; then all is closed.

    ``listen`` and ``forward`` are URIs, ``unix:PATH`` or ``tcp:HOST:PORT``; ``relay.address`` says where it
    listens, with the port that was taken.  ``on_bytes(channel)`` is called after each piece passed on.
    Raises ``OSError`` where it can't listen, ``ValueError`` for a URI of another kind.
    """

    def __init__(
        self,
        listen: str,
        forward: str,
        folder: str | os.PathLike[str],
        *,
        on_bytes: Callable[[Channel], None] | None = None,
    ) -> None:
        self.address = SocketAddress.parse(listen)
        self.forward = SocketAddress.parse(forward)
        self.folder = Path(folder)
        self.channels: list[Channel] = []
        self._on_bytes = on_bytes
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    async def __aenter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._listener = await listen(self.address)
        if self.address.path is None:
            self.address = SocketAddress(host=self.address.host, port=self._listener.getsockname()[1])
        self._start(self._accept(self._listener))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        if self.address.path is not None:
            Path(self.address.path).unlink(missing_ok=True)

    async def wait_closed(self, *, timeout_s: float) -> None:
        """Until every connection made so far is closed and its recording complete.  Raises ``TimeoutError``."""
        async with asyncio.timeout(timeout_s):
            for channel in list(self.channels):
                await channel.closed.wait()

    def _start(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            peer, _ = await asyncio.get_running_loop().sock_accept(listener)
            number = len(self.channels)
            channel = Channel(number, self.folder / f"{number:02}-forward", self.folder / f"{number:02}-return")
            self.channels.append(channel)
            self._start(self._join(channel, peer))

    async def _join(self, channel: Channel, source: socket.socket) -> None:
        try:
            with source, channel.forward_path.open("wb") as forward, channel.return_path.open("wb") as back:
                source.setblocking(False)
                destination = await connect(self.forward)
                with destination:
                    channel._sockets = (source, destination)
                    await self._pass_both(channel, source, destination, forward.fileno(), back.fileno())
        except OSError as exc:
            channel.error = exc
        finally:
            channel._sockets = ()
            channel.closed.set()

    async def _pass_both(
        self, channel: Channel, source: socket.socket, destination: socket.socket, forward: int, back: int
    ) -> None:
        ways = [
            asyncio.ensure_future(self._pass(channel, source, destination, forward, is_forward=True)),
            asyncio.ensure_future(self._pass(channel, destination, source, back, is_forward=False)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        for way in ways:
            if not way.cancelled() and isinstance(error := way.exception(), OSError):
                channel.error = error

    async def _pass(
        self, channel: Channel, reader: socket.socket, writer: socket.socket, record: int, *, is_forward: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        buffer = memoryview(bytearray(_PIECE))
        while count := await loop.sock_recv_into(reader, buffer):
            piece = buffer[:count]
            _write_all(record, piece)
            await loop.sock_sendall(writer, piece)
            if is_forward:
                channel.forward_bytes += count
            else:
                channel.return_bytes += count
            if self._on_bytes is not None:
                self._on_bytes(channel)


def _write_all(descriptor: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(descriptor, piece) :]
