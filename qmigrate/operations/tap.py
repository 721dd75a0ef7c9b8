"""A tap between the source and the destination of a migration: passes everything on, and records it.

    with Recorder("migration.tap") as recorder:
        async with Tap("unix:/run/a", "unix:/run/b", recorder=recorder) as tap:
            await tap.wait_until_over()

The migration does not depend on the recording: where the file can't be written on, the recording stops and the
connections stay.
"""

import asyncio
import errno
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

from qmigrate.capture.recorder import Recorder
from qmigrate.endpoint.joined import Joined
from qmigrate.endpoint.transport import SocketAddress, connect, listen_anew
from qmigrate.errors import RefusedError
from qmigrate.events import LiveEvent, OnEvent
from qmigrate.format.channel import Channel

__all__ = ["ConnectionClosed", "ConnectionOpened", "ConnectionRefused", "ConnectionTold", "Tap"]

_CONNECT_TIMEOUT_S: Final = 10.0
_BUSY_S: Final = 0.2
_CLOSING_S: Final = 2.0
_CUT: Final = "cut, for the tap ended"
_LEFT_OPEN: Final = "cut: the migration was over, and the destination kept it open"


_Way: TypeAlias = tuple[str, int, str, int]


class ConnectionOpened(LiveEvent):
    """The source connected, and we to the destination.  ``number`` counts from 0."""

    number: int
    peer: str


class ConnectionTold(LiveEvent):
    """What a connection is, by its first bytes; what needs the block list to be told may be wrong here."""

    number: int
    channel: str
    reason: str


class ConnectionClosed(LiveEvent):
    """Both sides are closed.  ``error`` is empty where all went well.

    ``unfinished``: its return path has no end; ``broken``: and it had come to a postcopy, which may be resumed.
    """

    number: int
    forward_bytes: int
    return_bytes: int
    error: str
    unfinished: bool
    broken: bool


class ConnectionRefused(LiveEvent):
    """The source connected, and the destination does not take it: the source's is closed too."""

    number: int
    error: str


class Tap:
    """Listens until it is left; then what is still open is cut.  It leaves the recorder open.

    ``listen`` and ``forward`` are URIs, ``unix:PATH`` or ``tcp:HOST:PORT``; ``address`` says where it listens, with
    the port that was taken.  ``on_event`` hears of connections, in the event loop.
    The recorder begins when it listens: before that an older recording is as it was.
    Raises ``OSError`` where it can't listen or begin to record, ``RefusedError`` where it would connect to itself or
    nobody can be at ``forward``, ``ValueError`` for a URI of another kind.
    """

    def __init__(
        self, listen: str, forward: str, *, recorder: Recorder | None = None, on_event: OnEvent | None = None
    ) -> None:
        self.address = SocketAddress.parse(listen)
        self.forward = SocketAddress.parse(forward)
        self.connections: list[Joined] = []
        self._open: set[Joined] = set()  # until it has been told that they closed
        self._refused = 0
        self._outgoing: set[_Way] = set()
        self._recorder = recorder
        self._on_event = on_event
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        if (why := self.forward.unreachable) is not None:
            raise RefusedError(f"nobody can listen at FORWARD, {self.forward}: {why}")
        if _same(self.address, self.forward):
            raise RefusedError(f"LISTEN and FORWARD are the same, {self.forward}: it would connect to itself")
        self._listener = await listen_anew(self.address)
        if self.address.path is None:
            self.address = SocketAddress(host=self.address.host, port=self._listener.getsockname()[1])
        try:
            if self._recorder is not None:
                self._recorder.begin()
        except BaseException:
            await self.stop_listening()
            raise
        self._accepting = asyncio.create_task(self._accept(self._listener))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop_listening()
        left = self.left_open
        for connection in self.connections:
            connection.cut(_LEFT_OPEN if connection in left else _CUT)
        await self._wait_for(lambda: not self.open_count)

    @property
    def open_count(self) -> int:
        """How many connections are open."""
        return len(self._open)

    @property
    def left_open(self) -> list[Joined]:
        """Connections of a migration that is over, which its destination does not close.

        QEMU 5.2 does that after a postcopy with multifd, until it quits.  Main was closed after SHUT, and theirs has
        been closed by the source, all that came from it was passed on, and no answer is due.
        """
        ended_ns = max((each.closed_ns or 0 for each in self.connections if each.back.is_shut), default=0)
        return [
            each for each in self._open if each.has_said_all and not each.back.is_used and each.opened_ns < ended_ns
        ]

    @property
    def is_over(self) -> bool:
        """Was there a migration, is nothing open but what was left so, and is there no postcopy that broke?"""
        used = [each for each in self.connections if each.forward_bytes]
        with_return = [each for each in used if each.back.is_used]
        return bool(used and self._is_quiet and not (with_return and with_return[-1].back.is_broken))

    async def wait_until_over(self) -> None:
        """Until the first migration is over, its recoveries too."""
        await self._wait_for(lambda: self.is_over)
        await self._give_time_to_close()

    async def wait_until_closed(self) -> None:
        """Until no connection is open, but those that were left so."""
        await self._wait_for(lambda: self._is_quiet)
        await self._give_time_to_close()

    async def stop_listening(self) -> None:
        """No more connections."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
            self._accepting = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            if self.address.path is not None:
                Path(self.address.path).unlink(missing_ok=True)

    # -- inside

    @property
    def _is_quiet(self) -> bool:
        return self.open_count == len(self.left_open)

    async def _give_time_to_close(self) -> None:
        """Nearly all destinations close what is left open here, a moment later."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSING_S):
                await self._wait_for(lambda: not self.open_count)

    async def _wait_for(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)

    async def _accept(self, listener: socket.socket) -> None:
        """One after the other: sources until 7.2 count on the order in which they connect."""
        while True:
            try:
                peer, address = await self._loop.sock_accept(listener)
            except OSError:  # no more files; the peer has gone
                await asyncio.sleep(_BUSY_S)
                continue
            await self._join(peer, _uri(address), time.monotonic_ns())

    async def _join(self, source: socket.socket, peer: str, accepted_ns: int) -> None:
        number = len(self.connections) + self._refused
        if self._recorder is not None:
            self._recorder.opened(number, peer=peer, listen=str(self.address), forward=str(self.forward))
        try:
            self._check_is_not_ours(source)
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                destination = await connect(self.forward)
            if self.forward.path is None:
                self._outgoing.add(_way(destination.getsockname(), destination.getpeername()))
        except (OSError, TimeoutError) as exc:
            self._refuse(number, source, exc)
            return
        source.setblocking(True)
        destination.setblocking(True)
        joined = Joined(
            number,
            source,
            destination,
            opened_ns=accepted_ns,  # before its destination could have it, and end the migration
            recorder=self._recorder,
            on_told=lambda channel: self._from_thread(lambda: self._told(number, channel)),
            on_said_all=lambda: self._from_thread(self._changes),
            on_closed=lambda: self._from_thread(lambda: self._closed(joined)),
        )
        self.connections.append(joined)
        self._open.add(joined)
        self._tell(ConnectionOpened(number=number, peer=peer))
        joined.start()

    def _check_is_not_ours(self, source: socket.socket) -> None:
        """Of tcp the same place has several addresses: it can't be seen before.  Raises ``OSError``."""
        if self.address.path is None and _way(source.getpeername(), source.getsockname()) in self._outgoing:
            raise OSError(errno.ELOOP, "we connected to ourselves: nobody but us listens there")

    def _refuse(self, number: int, source: socket.socket, exc: Exception) -> None:
        source.close()
        self._refused += 1
        why = (exc.strerror if isinstance(exc, OSError) else None) or str(exc) or "no answer in time"
        error = f"{self.forward}: {why}"
        if self._recorder is not None:
            self._recorder.closed(number, forward_bytes=0, return_bytes=0, error=error)
        self._tell(ConnectionRefused(number=number, error=error))

    def _from_thread(self, do: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody listens
            self._loop.call_soon_threadsafe(do)

    def _told(self, number: int, channel: Channel) -> None:
        self._tell(ConnectionTold(number=number, channel=channel.name, reason=channel.reason))

    def _closed(self, joined: Joined) -> None:
        self._open.discard(joined)
        self._tell(
            ConnectionClosed(
                number=joined.number,
                forward_bytes=joined.forward_bytes,
                return_bytes=joined.return_bytes,
                error=joined.error,
                unfinished=joined.back.is_used and not joined.back.is_shut,
                broken=joined.back.is_broken,
            )
        )
        self._changes()

    def _changes(self) -> None:
        """Those who wait look again."""
        task = self._loop.create_task(self._notify())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _tell(self, event: LiveEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)


def _same(listen: SocketAddress, forward: SocketAddress) -> bool:
    if listen.path is None or forward.path is None:
        return listen == forward and listen.port > 0
    return os.path.realpath(listen.path) == os.path.realpath(forward.path)


def _way(begin: Any, end: Any) -> _Way:
    """Of a tcp connection, from where to where: the same whichever of its ends tells it."""
    return _host(begin[0]), begin[1], _host(end[0]), end[1]


def _host(name: str) -> str:
    """An address without its scope, which only one end may have; one of IPv4 as such, where IPv6 mapped it."""
    address = ip_address(name.partition("%")[0])
    return str(getattr(address, "ipv4_mapped", None) or address)


def _uri(address: object) -> str:
    """Of a peer, as ``accept`` gives it; empty where it has no address."""
    if isinstance(address, tuple):
        return str(SocketAddress(host=address[0], port=address[1]))
    return f"unix:{os.fsdecode(address)}" if isinstance(address, str | bytes) and address else ""
