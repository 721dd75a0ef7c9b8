"""A real source and our stand-in destination, and whether both hold the same memory."""

import asyncio
import fcntl
import json
import os
import shlex
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from qmigrate.events import Latency, LiveEvent
from qmigrate.operations.receive import Listening, Receiver, ReceiveResult
from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.guests.build import Guest
from tests.live import monitor
from tests.live.versions import Qemu

TIMEOUT_S: Final = 60.0
FAST: Final = 1 << 40
HELD: Final = 128 << 10  # a minute and more for a guest, but for what is asked for
GUEST: Final = Guest("walker", memory_mib=16, still_mib=8)
LARGER: Final = Guest("walker", memory_mib=32, still_mib=24)
"""Multifd sends 128 pages at a time, whatever the bandwidth: all of it takes four seconds."""
PAGE: Final = 4096


@dataclass
class Receiving:
    """``receiver`` at work, with what it has told; ``result`` waits for its end."""

    receiver: Receiver
    uri: str
    task: "asyncio.Task[ReceiveResult]"
    events: list[LiveEvent]
    news: asyncio.Event

    async def wait_for(self, wanted: Callable[[LiveEvent], bool]) -> LiveEvent:
        """The first event of which this holds, of those that came and those that will."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                for event in self.events:
                    if wanted(event):
                        return event
                assert not self.task.done(), self.task.result()
                self.news.clear()
                await self.news.wait()

    async def wait_for_answers(self, where: str = "requests") -> None:
        """Until pages that were asked for have come, over this channel."""
        await self.wait_for(lambda event: isinstance(event, Latency) and event.where == where)

    async def wait_for_connection(self) -> None:
        """Until a source has come."""
        async with asyncio.timeout(TIMEOUT_S):
            while self.receiver.place_of_guest == "none":  # noqa: ASYNC110 - no event tells it
                await asyncio.sleep(0.01)

    async def result(self) -> ReceiveResult:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.task


@asynccontextmanager
async def receiving(folder: Path, uri: str = "", **wishes: Any) -> AsyncGenerator[Receiving]:
    """Until it listens, at ``uri`` or in ``folder``; ended with the block, whatever it does then."""
    uri = uri or f"unix:{folder / 'in'}"
    events: list[LiveEvent] = []
    listens, news = asyncio.Event(), asyncio.Event()

    def take(event: LiveEvent) -> None:
        events.append(event)
        news.set()
        if isinstance(event, Listening):
            listens.set()

    receiver = Receiver(uri, on_event=take, control=folder / "control", **wishes)
    task = asyncio.ensure_future(receiver.run())
    waiting = asyncio.ensure_future(listens.wait())
    try:
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED, timeout=TIMEOUT_S)
        if not listens.is_set():
            task.result()
        (said,) = [event for event in events if isinstance(event, Listening)]
        yield Receiving(receiver, said.uri, task, events, news)
    except BaseException:
        for event in events:  # pytest shows it with the failure
            print(event.plain())
        raise
    finally:
        for each in (task, waiting):
            each.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)


@asynccontextmanager
async def source_of(
    qemu: Qemu,
    folder: Path,
    *,
    paused: bool = False,
    guest: Guest = GUEST,
    more: tuple[str, ...] = (),
    machine: str = "pc",
) -> AsyncGenerator[Machine]:
    """A real QEMU with a guest that has begun its work, ``paused`` or running."""
    said = folder / "source-console"
    arguments = [*guest.arguments(console=said, machine=machine), *more]
    async with Machine(qemu.path, arguments, name=f"source {qemu.name}") as machine_:
        await console.wait_for_passes(said, 1)
        if paused:
            await machine_.session.execute("stop")
        yield machine_


async def migrate(
    source: Machine,
    uri: str,
    *,
    postcopy: bool,
    capabilities: dict[str, bool] | None = None,
    first: Callable[[], Awaitable[None]] | None = None,
    some_before: bool = True,
) -> None:
    """To its end; postcopy begins when some pages were sent.  ``first``: until it returns only what is asked for comes.

    ``some_before``: not with huge pages, of which one goes at a time, whatever the bandwidth: a guest that stands still
    would have sent all in a second.  Then postcopy is begun at once.
    """
    await start(
        source,
        uri,
        postcopy=postcopy,
        capabilities=capabilities,
        limits=None if first is None else {"max-postcopy-bandwidth": HELD},
        some_before=some_before and postcopy,
    )
    if first is not None:
        await first()
        await hurry(source)
    await migration.wait_until(source.session, "completed", timeout_s=TIMEOUT_S)


async def hurry(source: Machine) -> None:
    """The rest of a postcopy as fast as it goes."""
    await migration.set_parameters(source.session, {"max-postcopy-bandwidth": 0})


async def start(
    source: Machine,
    uri: str,
    *,
    postcopy: bool,
    capabilities: dict[str, bool] | None = None,
    limits: dict[str, int] | None = None,
    some_before: bool = False,
) -> None:
    """Begin; with postcopy at once, or when some pages were sent.

    At once: precopy can't be over before, as QEMU has the switch before it has sent anything.
    """
    session = source.session
    states = {"events": True, "return-path": True, "postcopy-ram": postcopy, **(capabilities or {})}
    await migration.set_capabilities(session, states)
    usual = {"max-bandwidth": HELD, "max-postcopy-bandwidth": 0} if postcopy else {"max-bandwidth": FAST}
    await migration.set_parameters(session, {**usual, **(limits or {})})
    if some_before:
        await migration.start(session, uri)
        await _some_sent(source)
        await session.execute("migrate-start-postcopy")
        return
    # Both lie in QEMU's queue before it does the first, which only begins to connect.
    switch = [session.execute("migrate-start-postcopy")] if postcopy else []
    await asyncio.gather(migration.start(session, uri), *switch)


async def _some_sent(source: Machine) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not (told := await migration.query(source.session)).get("ram", {}).get("normal"):
            assert told["status"] in ("setup", "active"), told
            await asyncio.sleep(0.01)


async def after_passes(source: Machine, count: int) -> None:
    """So many have been made: of the first that is told the number differs from version to version."""
    async with asyncio.timeout(TIMEOUT_S):
        await migration.wait_until(source.session, "active", timeout_s=TIMEOUT_S)
        first = None
        while True:
            ram = (await migration.query(source.session)).get("ram", {})
            passes = ram.get("dirty-sync-count", 0)
            first = passes if first is None and passes else first
            if first is not None and passes >= first + count:
                return
            await asyncio.sleep(0.01)


async def assert_same_ram(source: Machine, folder: Path, scratch: Path) -> set[str]:
    """What ``receive --raw`` wrote, and the memory of the stopped source; the blocks that were compared."""
    compared = set()
    for part in await monitor.mapped_memory(source):
        block, path = _file_of(part.region, folder)
        expected = await monitor.physical_memory(source, part.address, part.length, scratch)
        with path.open("rb") as file:
            file.seek(part.offset)
            _assert_same(file.read(part.length), expected, block, part.offset)
        compared.add(block)
    for block, address in (await monitor.block_addresses(source)).items():
        _, path = _file_of(block, folder)
        _assert_same(path.read_bytes(), _memory_of_process(source.pid, address, path.stat().st_size), block, 0)
        compared.add(block)
    return compared


def _file_of(region: str, folder: Path) -> tuple[str, Path]:
    files = {each["name"]: each["file"] for each in json.loads((folder / "blocks.json").read_text())}
    (block,) = [block for block in files if block == region or block.endswith(f"/{region}")]
    return block, folder / files[block]


def _memory_of_process(pid: int, address: int, length: int) -> bytes:
    """Of a child of ours, which the kernel allows its parent to read."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        return os.pread(memory.fileno(), length, address)


def _assert_same(ours: bytes, theirs: bytes, block: str, start: int) -> None:
    assert len(ours) == len(theirs) > 0, f"{block}: {len(ours)} bytes at {start:#x}, QEMU has {len(theirs)}"
    differ = [start + at for at in range(0, len(ours), PAGE) if ours[at : at + PAGE] != theirs[at : at + PAGE]]
    assert not differ, f"{block}: {len(differ)} pages differ, the first at {differ[0]:#x}"


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """So many more of 2 MiB than there were, given back at the end; skips where they can't be had."""
    try:
        had = _more_huge_pages(count)
    except OSError:
        pytest.skip("no huge pages: nr_hugepages can't be set")
    try:
        if had < count:
            pytest.skip(f"no {count} huge pages")
        yield
    finally:
        _more_huge_pages(-had)


def _more_huge_pages(count: int) -> int:
    """By how many there are more now: fewer than asked for where memory is in pieces.  Others may do the same."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    with setting.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = int(setting.read_text())
        setting.write_text(f"{max(0, before + count)}")
        return int(setting.read_text()) - before


@asynccontextmanager
async def loading(
    qemu: Qemu, folder: Path, stream: Path, *, guest: Guest = GUEST, machine: str = "pc", more: tuple[str, ...] = ()
) -> AsyncGenerator[Path]:
    """A stock QEMU that has loaded a saved stream and runs it; where its guest speaks."""
    said = folder / "loaded-console"
    arguments = [*guest.arguments(console=said, machine=machine), *more, "-incoming", "defer"]
    async with Machine(qemu.path, arguments, name=f"loads {qemu.name}") as loads:
        await migration.set_capabilities(loads.session, {"events": True})
        await migration.start_incoming(loads.session, f"exec:cat {shlex.quote(str(stream))}")
        await migration.wait_until(loads.session, "completed", timeout_s=TIMEOUT_S)
        await loads.session.execute("cont")  # its source may have been stopped
        yield said
