"""Migrations that were cancelled while RAM was sent, each way in which it can travel.

What is there is read and the same again, it is said that it ends too soon, and each page that came is that of the
source, whose guest was stopped before and goes on after.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

from qmigrate.analysis.check import check
from qmigrate.analysis.extract import Extracted, extract
from qmigrate.analysis.summary import oddities
from qmigrate.capture.migration import Migration
from qmigrate.endpoint.relay import Relay
from qmigrate.qmp import migration as qmp_migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.live import monitor
from tests.live.recording import FAST, SLOW, TIMEOUT_S, Kind
from tests.live.versions import Qemu
from tests.soak.encodings import GUEST
from tests.soak.migrations import Unit

PAGE: Final = 4096
SENTENCE: Final = "The stream ends while RAM is sent: the migration was cancelled, or it failed."
ENOUGH: Final = 2 << 20  # of the ten that are not zero
cancelled = partial(Kind, "cancelled while RAM was sent", guest=GUEST, paused=True)
CANCELLED: Final = {
    "into a pipe": cancelled(),
    "into a file": cancelled(capabilities={"mapped-ram": True}, since=(9,)),
    "into a file by channels": cancelled(capabilities={"mapped-ram": True, "multifd": True}, since=(9,)),
    "to a peer": cancelled(through_relay=True),
    "compress": cancelled(through_relay=True, capabilities={"compress": True}, before=(9, 1)),
    "before postcopy": cancelled(through_relay=True, capabilities={"postcopy-ram": True}),
    **{
        f"multifd {method}": cancelled(
            through_relay=True, capabilities={"multifd": True}, parameters={"multifd-compression": method}, since=since
        )
        for method, since in (("none", ()), ("zlib", ()), ("zstd", (7,)))
    },
}


def units() -> Iterator[Unit]:
    """All ways of all versions."""
    for name, kind in CANCELLED.items():
        for qemu in kind.qemus():
            yield Unit(f"cancelled {name} {qemu.name}", _cancel(qemu, kind))


def _cancel(qemu: Qemu, kind: Kind) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(chance: random.Random, folder: Path) -> str:
        said = folder / "console"
        async with Machine(qemu.path, kind.guest.arguments(console=said), name=f"source {qemu.name}") as source:
            await console.wait_for_passes(said, 1)
            await source.session.execute("stop")
            async with _where_to(qemu, kind, folder) as (uri, files):
                await _begin_and_cancel(source, kind, uri, ENOUGH + chance.randrange(ENOUGH))
            stream, *channels = files()
            with Migration(stream, channels=channels) as migration:
                checked = check(migration)
                contents = checked.gathering.contents
                assert (checked.valid, checked.identical) == (False, True)
                extracted = extract(migration, folder / "ram")
            same = await _assert_only_what_the_source_has(source, extracted, folder / "memory")
            await source.session.execute("cont")
            await console.assert_goes_on(said)
        said_of_it = oddities(contents)
        assert SENTENCE in said_of_it
        if "mapped-ram" not in kind.capabilities:
            assert same > 0
            return ""
        assert any("bytes stand in the places of pages that no bitmap names" in sentence for sentence in said_of_it)
        return f"{same} pages came: bitmaps are written at the end"

    return run


@asynccontextmanager
async def _where_to(qemu: Qemu, kind: Kind, folder: Path) -> AsyncGenerator[tuple[str, Callable[[], list[Path]]]]:
    """The URI, and what is in files after it: main first."""
    if not kind.through_relay:
        stream = folder / "stream.mig"
        yield f"file:{stream}" if "mapped-ram" in kind.capabilities else f"exec:cat > {stream}", lambda: [stream]
        return
    arguments = [*kind.guest.arguments(console=folder / "other-console"), "-incoming", "defer"]
    target = f"unix:{folder / 'incoming'}"
    async with (
        Machine(qemu.path, arguments, name=f"destination {qemu.name}") as destination,
        Relay(f"unix:{folder / 'relay'}", target, folder) as relay,
    ):
        await _set(destination, kind)
        await qmp_migration.start_incoming(destination.session, target)
        yield (
            f"unix:{folder / 'relay'}",
            lambda: sorted((each.forward_path for each in relay.channels), key=_is_no_main),
        )
        await relay.wait_closed(timeout_s=TIMEOUT_S)


def _is_no_main(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) != b"QEVM"


async def _set(machine: Machine, kind: Kind) -> None:
    await qmp_migration.set_capabilities(machine.session, kind.capabilities)
    if kind.parameters:
        await qmp_migration.set_parameters(machine.session, kind.parameters)


async def _begin_and_cancel(source: Machine, kind: Kind, uri: str, enough: int) -> None:
    await _set(source, kind)
    await qmp_migration.set_parameters(source.session, {"max-bandwidth": SLOW, "downtime-limit": 1})
    await qmp_migration.start(source.session, uri)
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            told = await qmp_migration.query(source.session)
            if told.get("ram", {}).get("transferred", 0) >= enough:
                break
            await asyncio.sleep(0.02)
    assert told["status"] == "active", told
    await source.session.execute("migrate_cancel")
    await qmp_migration.wait_until(source.session, "cancelled", timeout_s=TIMEOUT_S)
    await qmp_migration.set_parameters(source.session, {"max-bandwidth": FAST})


async def _assert_only_what_the_source_has(source: Machine, extracted: Extracted, scratch: Path) -> int:
    """Each page is the source's or did not come; how many came, of those that are not zero."""
    same = 0
    for part in await monitor.mapped_memory(source):
        blocks = [block for block in extracted.files if block.rpartition("/")[2] == part.region]
        for block in blocks:  # of a block that no page came of there is no file
            theirs = await monitor.physical_memory(source, part.address, part.length, scratch)
            with (extracted.directory / extracted.files[block]).open("rb") as file:
                file.seek(part.offset)
                ours = file.read(part.length)
            for at in range(0, len(ours), PAGE):
                page = ours[at : at + PAGE]
                if any(page):
                    assert page == theirs[at : at + PAGE], f"{block}: another page at {part.offset + at:#x}"
                    same += 1
    return same
