"""The control socket of a ``receive`` that runs: how another process asks something of it.

One request a connection, a JSON object on a line, and one answer: ``{"recover": URI}`` and ``{"save": FILE}`` are
answered by ``{"done": TEXT}`` or ``{"error": TEXT}``.  Only the user whose it is may connect: mode 0600.
"""

import asyncio
import errno
import json
import os
import socket
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from qmigrate.endpoint.transport import is_served
from qmigrate.errors import QmigrateError, RefusedError

__all__ = ["ask", "control_socket", "default_path"]

REQUEST_TIMEOUT_S: Final = 10.0
_LONGEST: Final = 1 << 16

Answer = Callable[[str, str], Awaitable[str]]


def default_path() -> Path:
    """Of this process: in the user's run-time directory, or where temporary files go."""
    return Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"qmigrate-receive-{os.getpid()}.control"


@asynccontextmanager
async def control_socket(path: Path, answer: Answer) -> AsyncGenerator[None]:
    """Listens while the block lasts.  ``answer(what, argument)`` gives the text, or raises ``QmigrateError``.

    Raises ``OSError`` where it can't listen.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                line = await reader.readline()
            reply = await _answered(line, answer)
            writer.write(json.dumps(reply).encode() + b"\n")
            await writer.drain()
        except (TimeoutError, ValueError, OSError):  # ValueError: a line that does not end
            pass
        finally:
            writer.close()

    listener = await _bound(path)
    try:
        async with await asyncio.start_unix_server(serve, sock=listener, limit=_LONGEST):
            yield
    finally:
        path.unlink(missing_ok=True)


async def _bound(path: Path) -> socket.socket:
    """What a dead process left behind is replaced."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        os.fchmod(listener.fileno(), 0o600)  # before bind(): the file has that mode from its first moment
        try:
            listener.bind(str(path))
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or await is_served(str(path)):
                raise
            path.unlink()
            listener.bind(str(path))
    except OSError as exc:
        listener.close()
        # Python itself says, without a number, that a path is too long.
        raise OSError(exc.errno or errno.ENAMETOOLONG, exc.strerror or str(exc), str(path)) from exc
    return listener


async def _answered(line: bytes, answer: Answer) -> dict[str, str]:
    try:
        request = json.loads(line)
        ((what, argument),) = request.items()
        return {"done": await answer(str(what), str(argument))}
    except QmigrateError as exc:
        return {"error": str(exc)}
    except OSError as exc:
        return {"error": f"{exc.filename or argument}: {exc.strerror or exc}"}
    except (ValueError, AttributeError):
        return {"error": "this is no request: expected an object with one member"}


async def ask(path: Path, what: str, argument: str, *, timeout_s: float = 60.0) -> str:
    """Ask the ``receive`` whose control socket this is.  Raises ``RefusedError``, ``OSError``."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(path, limit=_LONGEST)
            try:
                writer.write(json.dumps({what: argument}).encode() + b"\n")
                await writer.drain()
                reply: dict[str, Any] = json.loads(await reader.readline() or b"{}")
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
    except TimeoutError as exc:
        raise RefusedError(f"{path}: no answer in {timeout_s:g} s") from exc
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(path)) from exc
    if "done" not in reply:
        raise RefusedError(f"{path}: {reply.get('error', 'it closed the connection')}")
    return str(reply["done"])
