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
from qmigrate.capture.schemas import Schema, SchemaError, read_schema
from qmigrate.errors import NoStreamError, QmpError, QmpTimeoutError, RefusedError, about_file
from qmigrate.qmp import migration
from qmigrate.qmp.machine import START_TIMEOUT_S, Machine
from qmigrate.qmp.session import Session

__all__ = ["make_schema"]

TIMEOUT_S: Final = 600.0
FAST: Final = 1 << 40  # bytes a second
QUIT_TIMEOUT_S: Final = 2.0  # its guest has done nothing that is to be kept
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
        try:
            with Migration(stream) as found:
                return read_schema(found, made_from=shlex.join(command), qemu=version)
        except NoStreamError as exc:
            raise SchemaError(f"{shlex.join(command)}: {exc}") from exc


async def _migrate_into(stream: Path, command: Sequence[str], timeout_s: float) -> str:
    """Start QEMU, and take what it migrates; returns its version.

    Through a socket: a QEMU that may start no programs (-sandbox) can do that too, and every version can.
    """
    loop = asyncio.get_running_loop()
    taken: asyncio.Future[None] = loop.create_future()
    opened = False

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        if opened:  # with all capabilities off there is one connection only
            writer.close()
            return
        opened = True
        try:
            with about_file(stream.parent), stream.open("wb") as file:
                while piece := await _read(reader):
                    file.write(piece)
            if not taken.done():  # nobody waits any more
                taken.set_result(None)
        except OSError as exc:
            if not taken.done():
                taken.set_exception(exc)
        finally:
            writer.close()

    path = stream.with_name("socket")
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise RefusedError(f"{path} is too long for the path of a socket: set TMPDIR to a shorter one")
    server = await asyncio.start_unix_server(take, path)
    starting = min(timeout_s, START_TIMEOUT_S)
    machine = Machine(
        command[0], [*command[1:], *ADDED], start_timeout_s=starting, quit_timeout_s=min(timeout_s, QUIT_TIMEOUT_S)
    )
    async with server, machine:
        version = _version_of(machine.session.greeting)
        until = loop.time() + timeout_s
        try:
            async with asyncio.timeout_at(until):
                await _start(machine.session, path)
            await migration.wait_until(machine.session, "completed", timeout_s=max(until - loop.time(), 0))
            async with asyncio.timeout_at(until):
                await taken  # QEMU has closed the connection
        except QmpError:
            if taken.done():
                taken.result()  # it is we who did not take it
            raise
        except TimeoutError as exc:
            raise QmpTimeoutError(f"its stream has not ended after {timeout_s:g} s", address=machine.name) from exc
    return version


async def _start(session: Session, path: Path) -> None:
    """Nobody answers there: so nothing may be on that waits for the other side, or opens further connections."""
    on = [name for name, is_on in (await migration.capabilities(session)).items() if is_on and name != "events"]
    await migration.set_capabilities(session, dict.fromkeys(on, False))
    await migration.set_parameters(session, {"max-bandwidth": FAST})
    await migration.start(session, f"unix:{path}")


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
