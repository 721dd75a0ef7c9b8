"""A conversation with one QEMU over QMP: commands with time-outs, events without loss, an end when QEMU dies.

    async with Session.connect("/run/vm/qmp.sock") as session:
        with session.listen("STOP") as stops:
            await session.execute("stop")
            event = await stops.get(timeout_s=10)

Underneath works qemu.qmp.  What it leaves to its user is done here: it has no time-outs, its listeners keep
all that they ever heard and never learn that QEMU has gone, and an event between ``qmp_capabilities`` and its
reply makes it give up.
"""

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from os import PathLike, fspath
from typing import Any, Final, Self, TypeAlias

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate
from qemu.qmp.message import Message
from qemu.qmp.protocol import StateError

from qmigrate.errors import QemuDiedError, QmpCommandError, QmpConnectError, QmpError, QmpTimeoutError
from qmigrate.value import Value

__all__ = ["Address", "Event", "Listener", "Session"]

Address: TypeAlias = str | PathLike[str] | tuple[str, int] | socket.socket
"""A path, ``host:port``, the pair of both, or a socket that is connected (the session closes it)."""

COMMAND_TIMEOUT_S: Final = 30.0
CONNECT_TIMEOUT_S: Final = 10.0
CLOSE_TIMEOUT_S: Final = 2.0

EVENTS_KEPT: Final = 16_384
"""So many events wait for the reader of a listener; when more come, the oldest are dropped and counted."""

_EVENTS_A_TURN: Final = 256
# qemu.qmp reads what lies in its buffer, up to 10 MiB, without letting any other task run.  After this many
# events we step aside, so that a listener that is being read never overflows.


class Event(Value):
    """Something QEMU said unasked.  ``timestamp_us``: QEMU's clock, microseconds since 1970; 0 is unknown."""

    name: str
    data: Mapping[str, Any]
    timestamp_us: int

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Self:
        data = message.get("data")
        return cls(
            name=str(message["event"]),
            data=data if isinstance(data, dict) else {},
            timestamp_us=_microseconds(message.get("timestamp")),
        )


class Listener:
    """Events in the order in which they came, from the moment the listener was opened.

    Each listener gets its own copy.  ``async for`` and ``get()`` take first what came already.  When QEMU has
    gone, the one ends and the other raises QemuDiedError.  Nobody need read: EVENTS_KEPT are kept, older ones
    are dropped and counted in ``dropped``.
    """

    def __init__(self, session: "Session", names: Collection[str], capacity: int) -> None:
        self._session = session
        self._names = frozenset(names)
        self._waiting: deque[Event] = deque(maxlen=capacity)
        self._news = asyncio.Event()
        self._ended = False
        self.dropped = 0

    def _put(self, event: Event) -> None:
        if self._names and event.name not in self._names:
            return
        if len(self._waiting) == self._waiting.maxlen:
            self.dropped += 1
        self._waiting.append(event)
        self._news.set()

    def _end(self) -> None:
        self._ended = True
        self._news.set()

    async def _next(self) -> Event | None:
        while not self._waiting:
            if self._ended:
                return None
            self._news.clear()
            await self._news.wait()
        return self._waiting.popleft()

    async def get(self, *, timeout_s: float = COMMAND_TIMEOUT_S) -> Event:
        """The next event."""
        return await self.wait_for(timeout_s=timeout_s)

    async def wait_for(
        self,
        *names: str,
        predicate: Callable[[Event], bool] = lambda _: True,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> Event:
        """The next event of these names (none: any) that the predicate holds for; others are skipped."""
        wanted = " or ".join(sorted(names or self._names)) or "event"
        try:
            async with asyncio.timeout(timeout_s):
                while (event := await self._next()) is not None:
                    if (not names or event.name in names) and predicate(event):
                        return event
        except TimeoutError as exc:
            raise QmpTimeoutError(f"no {wanted} within {timeout_s:g} s", address=self._session.address) from exc
        raise await self._session.death(f"waiting for {wanted}")

    def get_nowait(self) -> Event | None:
        """The next event that has come already, or None."""
        return self._waiting.popleft() if self._waiting else None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        event = await self._next()
        if event is None:
            raise StopAsyncIteration
        return event


class _Client(QMPClient):
    """qemu.qmp, with some of its steps replaced (hence its version is pinned)."""

    def __init__(self, on_event: Callable[[Message], None]) -> None:
        super().__init__()
        self._on_event = on_event
        self._dispatched = 0

    async def _event_dispatch(self, msg: Message) -> None:
        # Instead of the listeners there, each of which has a history without end.
        self._on_event(msg)
        self._dispatched += 1
        if self._dispatched % _EVENTS_A_TURN == 0:
            await asyncio.sleep(0)

    async def _do_recv(self) -> Message:
        # While connecting, qemu.qmp takes the next message for the reply to qmp_capabilities.  QEMU lets
        # events through as soon as it has switched to its full set of commands; that is before it replies.
        message = await super()._do_recv()
        while self.runstate is Runstate.CONNECTING and "event" in message:
            await self._event_dispatch(message)
            message = await super()._do_recv()
        return message

    # qemu.qmp spells every message out, with indents, before it asks whether anybody logs it.  For the answer to
    # query-qmp-schema that took 20 ms of CPU, five times as long as to read it.

    def _cb_outbound(self, msg: Message) -> Message:
        return super()._cb_outbound(msg) if self.logger.isEnabledFor(logging.DEBUG) else msg

    def _cb_inbound(self, msg: Message) -> Message:
        return super()._cb_inbound(msg) if self.logger.isEnabledFor(logging.DEBUG) else msg

    def begin_disconnect(self) -> None:
        self._schedule_disconnect()

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()


Autopsy: TypeAlias = Callable[[str], Awaitable[QemuDiedError]]
"""Whoever started QEMU can say more about its death.  The argument is what was being done."""


class Session:
    """One connection to one QEMU's QMP monitor.  Made by ``connect()`` or ``open()``.

    After QEMU has gone every command raises QemuDiedError, and every listener ends once it is empty.
    """

    def __init__(self, address: str, autopsy: Autopsy | None = None) -> None:
        self.address = address
        self._autopsy = autopsy
        self._reached: Address | None = None
        self._client = _Client(self._on_event)
        self._watch: asyncio.Task[None] | None = None
        self._reason = "the session is closed"
        self._died = False
        self._listeners: list[Listener] = []
        self._events = self._listener((), EVENTS_KEPT)

    @classmethod
    @asynccontextmanager
    async def connect(cls, address: Address, *, timeout_s: float = CONNECT_TIMEOUT_S) -> AsyncGenerator[Self, None]:
        """A session for the length of a ``with`` block."""
        session = await cls.open(address, timeout_s=timeout_s)
        try:
            yield session
        finally:
            await session.close()

    @classmethod
    async def open(
        cls,
        address: Address,
        *,
        timeout_s: float = CONNECT_TIMEOUT_S,
        name: str | None = None,
        autopsy: Autopsy | None = None,
    ) -> Self:
        """A session that lasts until ``close()``.  ``name`` is what errors call it, if not by its address."""
        session = cls(_spell(address) if name is None else name, autopsy)
        await session._connect(address, timeout_s)
        return session

    async def _connect(self, address: Address, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.connect(_for_qemu_qmp(address))
        except TimeoutError as exc:
            raise QmpConnectError(
                f"no QMP greeting within {timeout_s:g} s (QEMU talks to one client: is there another?)",
                address=self.address,
            ) from exc
        except ConnectError as exc:
            raise QmpConnectError(_why_not_connected(exc), address=self.address) from exc
        except AssertionError:
            # qemu.qmp asserts that what it has just connected lasts for a turn of the loop.  If it did not,
            # here is a session that has ended.
            if self._client.runstate is not Runstate.DISCONNECTING:
                raise
        self._reached = None if isinstance(address, socket.socket) else address
        self._watch = asyncio.create_task(self._watch_connection(), name=f"qmp {self.address}")

    async def again(self, *, timeout_s: float = CONNECT_TIMEOUT_S) -> "Session | None":
        """A new connection to where this one went.  None where that was a socket: it can't be connected twice."""
        if self._reached is None:
            return None
        return await Session.open(self._reached, timeout_s=timeout_s, name=self.address)

    async def _watch_connection(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        # disconnect() returns qemu.qmp to rest and raises what ended the connection.  Before that it waits
        # until the peer has taken all that was sent, which may be never.
        disconnect = asyncio.create_task(self._client.disconnect())
        if not (await asyncio.wait([disconnect], timeout=CLOSE_TIMEOUT_S))[0]:
            self._client.abort()
        try:
            await disconnect
        except (EOFError, OSError):
            self._died = True
            self._reason = "QEMU closed the connection"
        except Exception as exc:
            self._reason = f"what came is not QMP: {_first_line(exc)}"
        for listener in self._listeners:
            listener._end()

    @property
    def connected(self) -> bool:
        return self._client.runstate is Runstate.RUNNING

    @property
    def path(self) -> str | None:
        """The unix socket that was connected to, if it was one by name."""
        if self._reached is None:
            return None
        where = _for_qemu_qmp(self._reached)
        return where if isinstance(where, str) else None

    @property
    def greeting(self) -> Mapping[str, Any]:
        """What QEMU introduced itself with: ``version`` and ``capabilities``."""
        greeting = self._client.greeting
        if greeting is None:
            return {}
        return {"version": greeting.QMP.version, "capabilities": greeting.QMP.capabilities}

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        oob: bool = False,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> Any:
        """Have QEMU execute a command, and return what it returned.

        After QmpTimeoutError the command may still be carried out: ask QEMU what it did.
        """
        message = self._client.make_execute_msg(command, arguments, oob=oob)
        bytes(message)  # raises here what is no JSON; in qemu.qmp's writer it would end the connection
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute_msg(message)
        except TimeoutError as exc:
            raise QmpTimeoutError(f"{command}: no answer within {timeout_s:g} s", address=self.address) from exc
        except ExecuteError as exc:
            raise QmpCommandError(str(exc), command=command, error_class=exc.error_class, address=self.address) from exc
        except (ExecInterruptedError, StateError) as exc:
            raise await self.death(command) from exc
        except QMPError as exc:
            raise QmpError(f"{command}: the answer is not QMP: {_first_line(exc)}", address=self.address) from exc

    async def human_monitor_command(self, line: str, *, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """What the human monitor prints.  It has no errors, only words."""
        printed = await self.execute("human-monitor-command", {"command-line": line}, timeout_s=timeout_s)
        return str(printed)

    async def quit(self, *, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Ask QEMU to end.  It may be gone before its reply is."""
        with suppress(QemuDiedError):
            await self.execute("quit", timeout_s=timeout_s)

    @contextmanager
    def listen(self, *names: str, capacity: int = EVENTS_KEPT) -> Generator[Listener]:
        """A listener for events of these names (none: all), which hears all that comes inside the block.

        Open it before the command whose effect is to be heard.
        """
        listener = self._listener(names, capacity)
        try:
            yield listener
        finally:
            self._listeners.remove(listener)
            listener._end()

    def events(self) -> Listener:
        """All events since the session began; there is one such listener, and an event is given out once."""
        return self._events

    def _listener(self, names: Collection[str], capacity: int) -> Listener:
        listener = Listener(self, names, capacity)
        self._listeners.append(listener)
        if self._watch is not None and self._watch.done():
            listener._end()
        return listener

    def _on_event(self, message: Message) -> None:
        event = Event.from_message(message)
        for listener in self._listeners:
            listener._put(event)

    async def death(self, doing: str) -> QmpError:
        """The error for something that cannot go on because the connection has ended."""
        if self._watch is not None:
            await asyncio.wait([self._watch])
        if not self._died:
            return QmpError(f"{doing}: {self._reason}", address=self.address)
        if self._autopsy is not None:
            return await self._autopsy(doing)
        return QemuDiedError(f"{doing}: {self._reason}", address=self.address)

    async def close(self) -> None:
        """End the connection, in whatever state it is.  QEMU is not told, and goes on."""
        if self._watch is None:
            return
        if self.connected:
            self._client.begin_disconnect()
        await asyncio.wait([self._watch])


def _microseconds(timestamp: object) -> int:
    if not isinstance(timestamp, dict):
        return 0
    seconds, microseconds = timestamp.get("seconds"), timestamp.get("microseconds")
    if not (isinstance(seconds, int) and isinstance(microseconds, int)) or seconds < 0:
        return 0  # QEMU sends -1 when its host has no time
    return seconds * 1_000_000 + microseconds


def _for_qemu_qmp(address: Address) -> str | tuple[str, int] | socket.socket:
    if isinstance(address, tuple | socket.socket):
        return address
    path = fspath(address)
    host, colon, port = path.rpartition(":")
    if colon and port.isdecimal() and "/" not in path:
        return host.removeprefix("[").removesuffix("]") or "localhost", int(port)
    return path


def _spell(address: Address) -> str:
    if isinstance(address, tuple):
        host, port = address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if isinstance(address, socket.socket):
        return f"socket {address.fileno()}"
    return fspath(address)


def _why_not_connected(error: ConnectError) -> str:
    cause: BaseException = error.exc
    if isinstance(cause, EOFError):
        return "the connection was closed before the QMP greeting was complete"
    if isinstance(cause, OSError):
        # Of a TCP connection asyncio puts words of its own in strerror; a name that is not found has a negative number.
        if cause.errno is not None and cause.errno > 0:
            return os.strerror(cause.errno)
        return cause.strerror or str(cause)
    if isinstance(cause, OverflowError):
        return "a port is a number from 0 to 65535"
    return f"this is not QMP: {_first_line(cause)}"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(": ")
