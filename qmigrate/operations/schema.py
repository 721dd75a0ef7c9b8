"""A device schema from QEMU itself: a machine is started as a command line says, and migrated to nowhere.

Its guest never runs (``-S``), so nothing is written to its disks.  QEMU describes the devices as they are at that
moment: what a running guest adds, such as the state of queues that it has set up, is not in the description.
"""

import asyncio
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from qmigrate.capture.migration import Migration
from qmigrate.capture.schemas import Schema, read_schema
from qmigrate.errors import QmpError, RefusedError, about_file
from qmigrate.qmp import migration
from qmigrate.qmp.machine import START_TIMEOUT_S, Machine

__all__ = ["make_schema"]

TIMEOUT_S: Final = 600.0
FAST: Final = 1 << 40  # bytes a second
LONGEST_SOCKET_PATH: Final = 107  # bytes: sun_path of <linux/un.h>, with the 0 behind it
ADDED: Final = ("-S", "-display", "none")
# What leaves no guest to migrate, or no process to talk to.
REFUSED: Final = frozenset({"incoming", "daemonize", "preconfig"})


async def make_schema(command: Sequence[str], *, timeout_s: float = TIMEOUT_S) -> Schema:
    """The schema of the machine that the command line ``command`` makes.

    Raises ``RefusedError`` where the command line leaves no guest to migrate, ``OSError`` where there is no room for
    its stream in $TMPDIR, ``QmpError`` where QEMU does not start or does not migrate, ``SchemaError`` where its stream
    has no description.
    """
    if not command or not command[0]:
        raise RefusedError("the command line names no program")
    for word in command[1:]:
        if word.startswith("-") and word.lstrip("-") in REFUSED:
            raise RefusedError(f"{word} can't be in the command line: the machine is started to be migrated from")
    with TemporaryDirectory(prefix="qmigrate-schema-") as folder:
        stream = Path(folder) / "stream"
        version = await _migrate_into(stream, command, timeout_s)
        with Migration(stream) as found:
            return read_schema(found, made_from=shlex.join(command), qemu=version)


async def _migrate_into(stream: Path, command: Sequence[str], timeout_s: float) -> str:
    """Start QEMU, and take what it migrates; returns its version.

    Through a socket: a QEMU that may start no programs (-sandbox) can do that too, and every version can.
    """
    taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with about_file(stream.parent), stream.open("wb") as file:
                while piece := await _read(reader):
                    file.write(piece)
            taken.set_result(None)
        except OSError as exc:
            taken.set_exception(exc)
        finally:
            writer.close()

    path = stream.with_name("socket")
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise RefusedError(f"{path} is too long for the path of a socket: set TMPDIR to a shorter one")
    server = await asyncio.start_unix_server(take, path)
    starting = min(timeout_s, START_TIMEOUT_S)
    async with server, Machine(command[0], [*command[1:], *ADDED], start_timeout_s=starting) as machine:
        version = _version_of(machine.session.greeting)
        try:
            await migration.set_parameters(machine.session, {"max-bandwidth": FAST})
            await migration.start(machine.session, f"unix:{path}")
            await migration.wait_until(machine.session, "completed", timeout_s=timeout_s)
        except QmpError:
            if taken.done():
                taken.result()  # it is we who did not take it
            raise
        await taken  # QEMU has closed the connection
    return version


async def _read(reader: asyncio.StreamReader) -> bytes:
    """What came; nothing where QEMU is gone, which it is asked about elsewhere."""
    try:
        return await reader.read(1 << 20)
    except ConnectionError:
        return b""


def _version_of(greeting: Mapping[str, Any]) -> str:
    """As ``-version`` prints it, e.g. ``7.2.22``."""
    version = greeting.get("version", {}).get("qemu", {})
    return ".".join(str(version.get(part, 0)) for part in ("major", "minor", "micro"))
