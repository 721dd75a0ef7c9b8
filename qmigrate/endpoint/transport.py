"""Sockets by QEMU's URIs: ``unix:PATH`` and ``tcp:HOST:PORT``."""

import asyncio
import errno
import os
import socket
from typing import Final

from qmigrate.value import Value

__all__ = ["SocketAddress", "connect", "is_served", "listen", "listen_anew"]

_LONGEST_PATH: Final = 107  # bytes: sun_path has one more, which is zero


class SocketAddress(Value):
    """Where a stream socket is.  ``path`` for a unix socket, else ``host`` and ``port``."""

    path: str | None = None
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, uri: str) -> "SocketAddress":
        """From ``unix:PATH`` or ``tcp:HOST:PORT`` (``tcp:[::1]:4444``).  Raises ``ValueError``."""
        scheme, _, rest = uri.partition(":")
        if scheme == "unix" and rest:
            return cls(path=rest)
        host, _, port = rest.rpartition(":")
        if scheme == "tcp" and port.isascii() and port.isdigit() and int(port) < 1 << 16:
            return cls(host=host.removeprefix("[").removesuffix("]"), port=int(port))
        raise ValueError(f"{uri!r} is no socket: expected unix:PATH or tcp:HOST:PORT")

    @property
    def unreachable(self) -> str | None:
        """Why nobody can ever connect to it; None where that can't be seen from it."""
        if self.path is None:
            return None if self.port else "it has no port"
        return None if len(os.fsencode(self.path)) <= _LONGEST_PATH else f"longer than {_LONGEST_PATH} bytes"

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


async def listen(address: SocketAddress) -> socket.socket:
    """A listening socket, which does not block.  Port 0 takes a free one.  Raises ``OSError``."""
    if address.path is not None:
        listener = socket.socket(socket.AF_UNIX)
        where: object = address.path
    else:
        family, _, _, _, where = (await _resolve(address, passive=True))[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.setblocking(False)
        listener.bind(where)  # type: ignore[arg-type]  # what getaddrinfo gave
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


async def listen_anew(address: SocketAddress) -> socket.socket:
    """As QEMU does it: a socket that a dead process left behind is replaced; but none at which somebody listens.

    Raises ``OSError``, which names the address.
    """
    try:
        return await listen(address)
    except OSError as exc:
        if exc.errno is None:  # Python's own: a path that is too long
            raise OSError(errno.ENAMETOOLONG, str(exc), str(address)) from exc
        if exc.errno != errno.EADDRINUSE or address.path is None or await is_served(address.path):
            exc.filename = str(address)
            raise
    from pathlib import Path  # takes long to import: who only connects does not wait for it

    Path(address.path).unlink()
    return await listen(address)


async def is_served(path: str) -> bool:
    """Does anybody listen there, or is it no socket at all?"""
    from pathlib import Path  # as above

    if not Path(path).is_socket():
        return True
    try:
        (await connect(SocketAddress(path=path))).close()
    except ConnectionRefusedError:
        return False
    return True


async def connect(address: SocketAddress) -> socket.socket:
    """A connected socket, which does not block.  Raises ``OSError``."""
    candidates: list[tuple[int, object]] = [(socket.AF_UNIX, address.path)]
    if address.path is None:
        candidates = [(family, where) for family, _, _, _, where in await _resolve(address, passive=False)]
    error: OSError = OSError("no address")
    for family, where in candidates:
        peer = socket.socket(family)
        try:
            peer.setblocking(False)
            await asyncio.get_running_loop().sock_connect(peer, where)  # type: ignore[arg-type]
        except OSError as exc:
            peer.close()
            error = exc
        else:
            return peer
    raise error


async def _resolve(address: SocketAddress, *, passive: bool) -> list[tuple[int, int, int, str, object]]:
    found = await asyncio.get_running_loop().getaddrinfo(
        address.host or None,
        address.port,
        type=socket.SOCK_STREAM,
        flags=socket.AI_PASSIVE if passive else 0,
    )
    return list(found)
