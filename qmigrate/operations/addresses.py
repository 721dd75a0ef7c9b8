"""Where a destination listens, and where a source is to connect to: not always the same words.

Port 0 means any that is free; the destination says which it took.  Where it listens at all addresses of its host,
only the user knows by which of them the source reaches it.
"""

import os
from collections.abc import Mapping
from typing import Any, Final

from qmigrate.errors import RefusedError
from qmigrate.operations.watch import Watched

__all__ = ["SPOILED", "check", "default_uri", "reachable", "takes_any_port", "uri_of", "where_to_connect"]

UNIX_PATH_LENGTH: Final = 107
LAST_PORT: Final = 65535
WILDCARDS: Final = frozenset({"", "0.0.0.0", "::"})
SAY_WHICH: Final = "at any address of its host: say with --uri which the source is to connect to"

# Since 10.0 (seen; 7.2 is not so) a destination that could not listen stays in `setup`, and refuses any other address.
SPOILED: Final = "; this QEMU can't be told another address after that: start the destination anew"


def check(*uris: str | None) -> None:
    """Refuse what QEMU would take, and could not be told to forget: see ``SPOILED``."""
    for uri in uris:
        scheme, _, rest = (uri or "").partition(":")
        if scheme == "unix" and len(os.fsencode(rest)) > UNIX_PATH_LENGTH:
            raise RefusedError(f"{uri}: the path of a unix socket has {UNIX_PATH_LENGTH} bytes at most")
        port = rest.partition(",")[0].rpartition(":")[2]
        if scheme == "tcp" and port.isascii() and port.isdigit() and int(port) > LAST_PORT:
            raise RefusedError(f"{uri}: the last port is {LAST_PORT}")


def takes_any_port(uri: str) -> bool:
    """Is it known only by asking where somebody listens who was told to listen here?"""
    return uri.startswith("tcp:") and uri.endswith(":0")


def where_to_connect(uri: str, destination: Watched) -> str:
    """This URI; if its port is 0, with the port that the destination took."""
    if not takes_any_port(uri) or not destination.info.get("socket-address"):
        return uri
    host = uri.removeprefix("tcp:").removesuffix(":0").strip("[]")
    return uri_of(destination.info, host="" if host in WILDCARDS else host)


def uri_of(info: Mapping[str, Any], *, host: str = "") -> str:
    """Where a destination listens, by its own word: the newest address comes first.

    ``host``: by what name to connect if that word is "at all addresses".
    """
    address = info["socket-address"][0]
    if address.get("type") == "unix":
        return f"unix:{address['path']}"
    if address.get("type") != "inet":
        raise RefusedError(f"destination: it listens at {address}: say with --uri where the source is to connect to")
    if address["host"] not in WILDCARDS:
        return _tcp(address["host"], address["port"])
    if not host:
        raise RefusedError(f"destination: it listens at {_tcp(address['host'], address['port'])}, {SAY_WHICH}")
    alike = (each for each in info["socket-address"] if (":" in each.get("host", "")) == (":" in host))
    return _tcp(host, next(alike, address)["port"])


def _tcp(host: str, port: str | int) -> str:
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


def reachable(listen: str) -> str:
    """This URI, at which a destination is to listen, as one to connect to."""
    if listen.startswith("tcp:") and listen.removeprefix("tcp:").rpartition(":")[0].strip("[]") in WILDCARDS:
        raise RefusedError(f"destination: it would listen at {listen}, {SAY_WHICH}")
    return listen


def default_uri(destination: Watched) -> str:
    """Where it listens; if it does not, beside its QMP socket, where it could make one before."""
    if destination.info.get("socket-address"):
        return uri_of(destination.info)
    path = destination.session.path
    if path is None or len(os.fsencode(f"{path}.migration")) > UNIX_PATH_LENGTH:
        raise RefusedError(
            "destination: where it shall listen isn't known: say it with --uri, such as tcp:HOST:0 or unix:PATH"
        )
    return f"unix:{path}.migration"
