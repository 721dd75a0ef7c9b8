"""Where a migration comes in, by QEMU's URIs for ``-incoming``, and what each connection is.

``tcp:HOST:PORT``, ``unix:PATH``, ``fd:N``, ``exec:COMMAND``, ``file:PATH[,offset=N]``, and ``-`` for standard input.
A connection is told by its first byte; one that says nothing yet waits.
"""

import asyncio
import ctypes
import os
import select
import signal
import socket
import stat
import subprocess
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from qmigrate.endpoint.transport import SocketAddress, listen_anew
from qmigrate.errors import RefusedError

__all__ = ["Arrived", "ChannelKind", "Incoming"]

EXEC_TIMEOUT_S: Final = 5.0
SETTLE_TIMEOUT_S: Final = 5.0
ACCEPT_AGAIN_S: Final = 0.1
MOST_SILENT: Final = 300
"""Connections that may say nothing for as long as they like: a migration has one such, and 256 more for a moment."""
MOST_UNIDENTIFIED: Final = 400
SILENT_S: Final = 1.0


class ChannelKind(Enum):
    """What a connection is, by its first byte.  migration/channel.c: migration_channel_read_peek()"""

    MAIN = "main"
    MULTIFD = "multifd"
    RESUMED = "resumed"  # a command: the main channel of a recovery
    PAGES = "pages"  # a RAM record: preempt


@dataclass(frozen=True)
class Arrived:
    """A connection.  ``descriptor`` blocks, and belongs to whoever took it; ``way_back``: it can be written to."""

    kind: ChannelKind
    descriptor: int
    way_back: bool


class Incoming:
    """``async with Incoming(uri) as incoming: async for arrived in incoming: ...``

    A socket that listens gives connection after connection, all else one.  ``uri`` then says the port that was taken.
    Raises ``RefusedError`` for a URI that is none, ``OSError`` where it can't be had.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._listener: socket.socket | None = None
        self._single: tuple[int, bool] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._path: Path | None = None
        self._arrived: asyncio.Queue[Arrived] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._unidentified: dict[socket.socket, asyncio.Future[ChannelKind | None]] = {}  # in order

    async def __aenter__(self) -> Self:
        try:
            await self._begin()
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, exc.filename or self.uri) from exc
        return self

    async def _begin(self) -> None:
        scheme, _, rest = self.uri.partition(":")
        match scheme:
            case "tcp" | "unix":
                await self._listen()
            case "fd" if rest.isascii() and rest.isdigit():
                self._take(int(rest))
            case "exec" if rest:
                self._execute(rest)
            case "file" if rest:
                self._open(rest)
            case "-" if self.uri == "-":
                self._take(0)
            case _:
                raise RefusedError(
                    f"{self.uri!r} is no place to receive from: expected tcp:HOST:PORT, unix:PATH, fd:N, "
                    "exec:COMMAND, file:PATH or -"
                )

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        try:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:  # also where we are interrupted a second time
            self._close()
        await self._end_process()

    def _close(self) -> None:
        while not self._arrived.empty():
            os.close(self._arrived.get_nowait().descriptor)
        if self._listener is not None:
            self._listener.close()
        if self._single is not None:
            os.close(self._single[0])
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def take_silent(self) -> None:
        """Who has connected and said nothing yet is the channel of the requested pages: the first of them."""
        for said in self._unidentified.values():
            if not said.done():
                said.set_result(ChannelKind.PAGES)
                return

    async def settled(self) -> None:
        """Until every connection that was made, and said something, before now has been given."""
        with suppress(TimeoutError):  # where no more can be accepted
            async with asyncio.timeout(SETTLE_TIMEOUT_S):
                while self._is_unsettled():  # noqa: ASYNC110 - there is something to do at once
                    await asyncio.sleep(0)

    def _is_unsettled(self) -> bool:
        poll = select.poll()
        for each in (*self._unidentified, *([] if self._listener is None else [self._listener])):
            poll.register(each, select.POLLIN)
        return not self._arrived.empty() or bool(poll.poll(0))

    async def __aiter__(self) -> AsyncIterator[Arrived]:
        if self._single is not None:
            (descriptor, way_back), self._single = self._single, None
            yield Arrived(ChannelKind.MAIN, descriptor, way_back)
        while True:
            yield await self._arrived.get()

    # -- the kinds of URI

    async def _listen(self) -> None:
        try:
            address = SocketAddress.parse(self.uri)
        except ValueError as exc:
            raise RefusedError(str(exc)) from exc
        self._listener = await listen_anew(address)
        if address.path is None:
            self.uri = str(SocketAddress(host=address.host, port=self._listener.getsockname()[1]))
        else:
            self._path = Path(address.path)
        self._start_accepting(self._listener)

    def _start_accepting(self, listener: socket.socket) -> None:
        task = asyncio.get_running_loop().create_task(self._accept(listener))
        self._tasks.add(task)

    def _take(self, descriptor: int) -> None:
        """A descriptor that we inherited: a file, a connected socket, or one that listens."""
        mine = os.dup(descriptor)
        if not stat.S_ISSOCK(os.fstat(mine).st_mode):
            self._single = (mine, False)
            return
        peer = socket.socket(fileno=mine)
        if peer.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            peer.setblocking(False)
            self._listener = peer
            self._start_accepting(peer)
            return
        peer.setblocking(True)
        self._single = (peer.detach(), True)

    def _execute(self, command: str) -> None:
        """The command's output is the stream; it may read what goes back from its standard input."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                preexec_fn=_end_with_us,  # noqa: PLW1509 - one system call; there is no thread yet whose lock it takes
            )
        self._single = (ours.detach(), True)

    def _open(self, rest: str) -> None:
        path, _, offset = rest.partition(",offset=")
        if offset and not (offset.isascii() and offset.isalnum()):
            raise RefusedError(f"{offset!r} is no offset: expected a number of bytes")
        try:
            start = int(offset, 0) if offset else 0
        except ValueError as exc:
            raise RefusedError(f"{offset!r} is no offset: expected a number of bytes") from exc
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if start:
            os.lseek(descriptor, start, os.SEEK_SET)
        self._single = (descriptor, False)

    async def _end_process(self) -> None:
        """Its pipe is closed: a command that goes on without is ended."""
        if self._process is None:
            return
        try:
            await asyncio.to_thread(self._process.wait, EXEC_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    # -- connections

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while len(self._unidentified) >= MOST_UNIDENTIFIED:  # noqa: ASYNC110 - it is not worth an event
                await asyncio.sleep(ACCEPT_AGAIN_S)
            try:
                peer, _ = await loop.sock_accept(listener)
            except OSError:  # no descriptor is free, mostly: who comes waits in the listener's queue
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            peer.setblocking(False)
            task = loop.create_task(self._identify(peer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _identify(self, peer: socket.socket) -> None:
        """Wait for its first byte, and leave that where it is.

        Each has a descriptor meanwhile: where there are many who say nothing, those who come then have a moment for
        it, and are closed, so that a source can still come.
        """
        with peer:
            if peer.family != socket.AF_UNIX:
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _keep_alive(peer)
            loop = asyncio.get_running_loop()
            said = self._unidentified[peer] = loop.create_future()
            if len(self._unidentified) > MOST_SILENT:
                loop.call_later(SILENT_S, _settle, said)
            try:
                kind = await _said(peer, said)
            except OSError:
                return
            finally:
                del self._unidentified[peer]
            if kind is not None:
                peer.setblocking(True)
                self._arrived.put_nowait(Arrived(kind, peer.detach(), True))


_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def _end_with_us() -> None:
    """In the command's process, before it is: a command that does not look at its pipe would outlive us."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _keep_alive(peer: socket.socket) -> None:
    """A host that vanishes says nothing: after two minutes of that its connection is taken to be broken."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6)):
        peer.setsockopt(socket.IPPROTO_TCP, option, value)


def _kind(first: int) -> ChannelKind:
    match first:
        case 0x51:  # of QEVM
            return ChannelKind.MAIN
        case 0x11:  # of 0x11223344
            return ChannelKind.MULTIFD
        case 0x08:
            return ChannelKind.RESUMED
    return ChannelKind.PAGES


def _settle(said: "asyncio.Future[ChannelKind | None]") -> None:
    if not said.done():
        said.set_result(None)


async def _said(peer: socket.socket, said: "asyncio.Future[ChannelKind | None]") -> ChannelKind | None:
    """What it is, once it has said something, or ``said`` was set; None where it has gone.  Raises ``OSError``."""
    loop = asyncio.get_running_loop()
    loop.add_reader(peer.fileno(), _settle, said)
    try:
        told = await said
    finally:
        loop.remove_reader(peer.fileno())
    if told is not None:
        return told
    first = peer.recv(1, socket.MSG_PEEK)
    return _kind(first[0]) if first else None
