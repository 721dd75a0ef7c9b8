"""A QMP server that does what a test tells it, for what a real QEMU cannot be made to do."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Self

from qmigrate.qmp.session import Session

GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""},
        "capabilities": ["oob"],
    }
}


class ScriptedQemu:
    """QEMU's end of a QMP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._heard = ""

    @classmethod
    async def at(cls, sock: socket.socket) -> Self:
        return cls(*await asyncio.open_connection(sock=sock))

    async def say(self, message: Any) -> None:
        await self.say_bytes(json.dumps(message).encode() + b"\r\n")

    async def say_bytes(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def hear(self) -> dict[str, Any]:
        """The next command.  qemu.qmp ends none with a newline: an object ends where its JSON does."""
        while True:
            with suppress(json.JSONDecodeError):
                command, end = json.JSONDecoder().raw_decode(self._heard)
                self._heard = self._heard[end:].lstrip()
                assert isinstance(command, dict)
                return command
            data = await self._reader.read(65536)
            if not data:
                raise EOFError
            self._heard += data.decode()

    async def greet(self) -> None:
        await self.say(GREETING)
        command = await self.hear()
        assert command["execute"] == "qmp_capabilities"
        await self.answer(command)

    async def answer(self, command: dict[str, Any], value: Any = None) -> None:
        await self.say(
            {"return": {} if value is None else value, "id": command["id"]} if "id" in command else {"return": {}}
        )

    async def refuse(self, command: dict[str, Any], description: str, error_class: str = "GenericError") -> None:
        await self.say({"error": {"class": error_class, "desc": description}, "id": command["id"]})

    async def event(self, name: str, **data: Any) -> None:
        await self.say({"event": name, "data": data, "timestamp": {"seconds": 5, "microseconds": 7}})

    async def until_left(self) -> None:
        """Answer nothing more, and wait until the other side goes."""
        with suppress(EOFError, ConnectionError):
            while True:
                await self.hear()

    def hang_up(self) -> None:
        self._writer.close()


Script = Callable[[ScriptedQemu], Awaitable[None]]


@asynccontextmanager
async def playing(script: Script) -> AsyncGenerator[socket.socket, None]:
    """The other end of a connection to a server that plays the script; the script is played to its end."""
    ours, theirs = socket.socketpair()
    server = await ScriptedQemu.at(theirs)

    async def play() -> None:
        try:
            await script(server)
        finally:
            server.hang_up()

    async with asyncio.TaskGroup() as group:
        group.create_task(play())
        yield ours


@asynccontextmanager
async def session_with(script: Script) -> AsyncGenerator[Session, None]:
    """A session with a server that greets as it should and then plays the script."""

    async def greet_first(qemu: ScriptedQemu) -> None:
        await qemu.greet()
        await script(qemu)

    async with playing(greet_first) as sock, Session.connect(sock) as session:
        yield session
