"""A real QEMU that loads a stream of ours, as ``-incoming`` would any other."""

import asyncio
import shlex
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from tests.live.recording import TIMEOUT_S, Kind, arguments_of
from tests.live.versions import Qemu


@dataclass(frozen=True)
class Loaded:
    """A machine that has loaded a stream.  ``back``: what it said on the return path, where it has one."""

    machine: Machine
    console: Path
    back: bytes


@asynccontextmanager
async def loaded(
    qemu: Qemu, kind: Kind, folder: Path, stream: bytes, *, stopped: bool = False
) -> AsyncGenerator[Loaded]:
    """A machine of this kind that loads ``stream``; everything it needs is in the new ``folder``.

    ``stopped``: it is not to run, whatever the stream says.
    """
    folder.mkdir()
    said = folder / "console"
    arguments = [*arguments_of(qemu, kind, folder, said), "-incoming", "defer", *(["-S"] if stopped else [])]
    async with Machine(qemu.path, arguments, name=f"destination {qemu.name}") as machine:
        await migration.set_capabilities(machine.session, {"events": True, **kind.capabilities})
        back = await (_through_socket if kind.through_relay else _through_file)(machine, folder, stream)
        await migration.wait_until(machine.session, "completed", timeout_s=TIMEOUT_S)
        yield Loaded(machine, said, back)


async def _through_file(machine: Machine, folder: Path, stream: bytes) -> bytes:
    path = folder / "stream.mig"
    path.write_bytes(stream)
    # The transport `file:` exists since 8.2 only; pages at their places can't be read from a pipe.
    is_mapped = (await migration.capabilities(machine.session)).get("mapped-ram", False)
    uri = f"file:{path}" if is_mapped else f"exec:cat {shlex.quote(str(path))}"
    await migration.start_incoming(machine.session, uri)
    return b""


async def _through_socket(machine: Machine, folder: Path, stream: bytes) -> bytes:
    """A stream that opens a return path needs a peer that listens to it, until the peer closes."""
    path = folder / "socket"
    await migration.start_incoming(machine.session, f"unix:{path}")
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(stream)
        try:
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()
