"""Real sources of every version migrate into ``receive``, in every way, whole and broken.

It passes when the source says ``completed``, our memory is the stopped source's, page for page, and what was saved is
loaded by a stock QEMU whose guest goes on.  5.2 and 7.2 lose writes of a running guest (see the tests' README): their
memory is compared where the guest is stopped, and where it runs it is the guest that looks at its pages.
"""

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qmigrate.endpoint.destination import Workload
from qmigrate.endpoint.relay import Channel, Relay
from qmigrate.events import StatusChanged
from qmigrate.operations.control import ask
from qmigrate.operations.receive import NotSaved, Paused
from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.guests.build import Guest
from tests.live.receiving import (
    FAST,
    Receiving,
    after_passes,
    assert_same_ram,
    huge_pages,
    loading,
    receiving,
    source_of,
    start,
)
from tests.live.versions import Qemu, installed
from tests.soak.migrations import Unit

__all__ = ["units"]

MIB: Final = 1 << 20
TIMEOUT_S: Final = 120.0
CUTS: Final = 20
SMALL: Final = Guest("walker", memory_mib=32)
HUGE: Final = ("-object", "memory-backend-memfd,id=ram0,size=32M,hugetlb=on,hugetlbsize=2M")
TOUCHERS: Final = (Workload(pattern="random", seed=1), Workload(pattern="zipf", seed=2, rate=500))


@dataclass(frozen=True)
class Way:
    """How a guest comes.  ``after``: postcopy after so many passes, 0 at once, None never; ``since``: of QEMU."""

    after: int | None = None
    capabilities: Mapping[str, bool] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    guest: Guest = SMALL
    machine: str = "pc"
    more: tuple[str, ...] = ()
    since: tuple[int, ...] = (5,)
    until: tuple[int, ...] = (99,)


def _multifd(method: str) -> dict[str, Any]:
    return {"capabilities": {"multifd": True}, "parameters": {"multifd-compression": method, "multifd-channels": 3}}


PREEMPT: Final = {"postcopy-preempt": True}
WAYS: Final = {
    "precopy": Way(),
    "at-once": Way(after=0),
    "after-pass": Way(after=1),
    "after-passes": Way(after=3),
    "preempt": Way(after=0, capabilities=PREEMPT, since=(7, 1)),
    "preempt-after-pass": Way(after=1, capabilities=PREEMPT, since=(7, 1)),
    "multifd": Way(**_multifd("none")),
    "multifd-zlib": Way(**_multifd("zlib")),
    "multifd-zstd": Way(**_multifd("zstd"), since=(7,)),  # Debian's 5.2 has none
    "multifd-postcopy": Way(after=1, **_multifd("none"), since=(11,)),  # 7.2 aborts, 10.0 refuses the two together
    "huge": Way(after=0, machine="pc,memory-backend=ram0", more=HUGE),
    "huge-preempt": Way(after=0, machine="pc,memory-backend=ram0", more=HUGE, capabilities=PREEMPT, since=(7, 1)),
}


@dataclass(frozen=True)
class Size:
    """A guest with much memory: ``mib``, of which it fills up to 2 GiB; by postcopy or precopy."""

    mib: int
    postcopy: bool


SIZES: Final = {
    "2GiB-precopy": Size(2048, postcopy=False),
    "2GiB-postcopy": Size(2048, postcopy=True),
    "8GiB-precopy": Size(8192, postcopy=False),
    "8GiB-postcopy": Size(8192, postcopy=True),
}


def units() -> Iterator[Unit]:
    """All, in the order of the issue; a soak shuffles them."""
    for qemu in installed():
        for name, way in WAYS.items():
            if way.since <= qemu.number < way.until:
                yield Unit(f"receive {name} {qemu.name}", _whole(qemu, way))
        for name, size in SIZES.items():
            yield Unit(f"receive {name} {qemu.name}", _big(qemu, size))
        for number in range(CUTS):
            yield Unit(f"receive cut {number} {qemu.name}", _cut(qemu, number))
        for phase in ("precopy", "postcopy"):
            yield Unit(f"receive source-killed {phase} {qemu.name}", _source_killed(qemu, phase == "postcopy"))
            yield Unit(f"receive disk-full {phase} {qemu.name}", _disk_full(qemu, phase == "postcopy"))
        yield Unit(f"receive killed {qemu.name}", _killed(qemu))


def _loses_writes(qemu: Qemu) -> bool:
    return qemu.number < (10,)


# -- whole migrations


def _whole(qemu: Qemu, way: Way) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(_: random.Random, folder: Path) -> str:
        with ExitStack() as stack:
            if way.more is HUGE:
                stack.enter_context(huge_pages(32))
            # A stopped guest dirties nothing, so there is one pass alone.
            states = [False] if not _loses_writes(qemu) else [False, True] if not way.after else [False]
            notes = [await _one(qemu, way, _folder(folder, f"{paused}"), paused=paused) for paused in states]
        return next(filter(None, notes), "")

    return run


def _folder(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


async def _one(qemu: Qemu, way: Way, folder: Path, *, paused: bool) -> str:
    raw, saved = folder / "ram", folder / "guest.mig"
    machine: dict[str, Any] = {"guest": way.guest, "machine": way.machine, "more": way.more}
    wishes: dict[str, Any] = {"raw": raw, "save": saved, "workloads": [] if way.after is None else TOUCHERS}
    async with source_of(qemu, folder, paused=paused, **machine) as source, receiving(folder, **wishes) as receiver:
        await migration.set_parameters(source.session, way.parameters)
        limits = {"max-bandwidth": FAST if way.after is None else 16 * MIB, "max-postcopy-bandwidth": 64 * MIB}
        at_once = way.after == 0
        await start(source, receiver.uri, postcopy=at_once, limits=limits, capabilities=_states(way))
        if way.after:
            await after_passes(source, way.after)
            await source.session.execute("migrate-start-postcopy")
        await migration.wait_until(source.session, "completed", timeout_s=TIMEOUT_S)
        result = await receiver.result()
        assert (result.exit_code, result.numbers["duplicates"]) == (0, 0), result.message
        assert result.is_postcopy or not at_once
        if paused or not _loses_writes(qemu):
            compared = await assert_same_ram(source, raw, folder / "memory")
            assert {"pc.bios", "ram0" if way.more else "pc.ram"} <= compared
    more = tuple(word.replace("hugetlb=on,hugetlbsize=2M", "share=on") for word in way.more)
    async with loading(qemu, folder, saved, guest=way.guest, machine=way.machine, more=more) as said:
        await console.assert_goes_on(said)
    return "" if result.is_postcopy == (way.after is not None) else "completed before the switch"


def _states(way: Way) -> dict[str, bool]:
    return {"postcopy-ram": way.after is not None, **way.capabilities}


# -- much memory


def _big(qemu: Qemu, size: Size) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(_: random.Random, folder: Path) -> str:
        guest = Guest("walker", memory_mib=size.mib, zero_share=0.125, lot_pages=16, pages_per_tick=256)
        raw, said = folder / "ram", folder / "console"
        memory = ("-object", f"memory-backend-memfd,id=ram0,size={size.mib}M")
        arguments = [*guest.arguments(console=said, machine="pc,memory-backend=ram0"), *memory]
        async with Machine(qemu.path, arguments, name=f"source {qemu.name}") as source:
            await console.wait_until_ready(said, timeout_s=TIMEOUT_S)
            if _loses_writes(qemu):
                await source.session.execute("stop")
            async with receiving(folder, raw=raw, workloads=[Workload(seed=1, rate=2000)]) as receiver:
                limits = {"max-bandwidth": 64 * MIB if size.postcopy else FAST, "max-postcopy-bandwidth": FAST}
                await start(source, receiver.uri, postcopy=size.postcopy, limits=limits)
                await migration.wait_until(source.session, "completed", timeout_s=TIMEOUT_S)
                async with asyncio.timeout(TIMEOUT_S):
                    result = await receiver.task
                assert (result.exit_code, result.is_postcopy) == (0, size.postcopy), result.message
                filled = _assert_same_file(raw / "ram0.raw", _memfd_of(source.pid))
                assert filled > size.mib * MIB // 5
        return ""

    return run


def _memfd_of(pid: int) -> Path:
    """The file of the source's RAM, which its parent may open."""
    (path,) = {
        each.stat().st_ino: each
        for each in Path(f"/proc/{pid}/fd").iterdir()
        if "memfd:memory-backend-memfd" in str(each.readlink())
    }.values()
    return path


def _assert_same_file(ours: Path, theirs: Path) -> int:
    """Byte for byte; how many bytes there are that are no hole in theirs."""
    filled = 0
    with ours.open("rb", buffering=0) as one, theirs.open("rb", buffering=0) as other:
        length = os.fstat(one.fileno()).st_size
        assert length == os.fstat(other.fileno()).st_size
        for at in range(0, length, MIB):
            if _is_hole(one.fileno(), at) and _is_hole(other.fileno(), at):
                continue
            mine, expected = os.pread(one.fileno(), MIB, at), os.pread(other.fileno(), MIB, at)
            assert mine == expected, f"the MiB at {at:#x} differs"
            filled += len(expected)
    return filled


def _is_hole(descriptor: int, at: int) -> bool:
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA) >= at + MIB
    except OSError:  # nothing but a hole from there on
        return True


# -- broken ones


@asynccontextmanager
async def _in_postcopy(
    qemu: Qemu, folder: Path, bandwidth: int, *, relay: Relay | None = None, **wishes: Any
) -> AsyncGenerator[tuple[Machine, Receiving]]:
    """Both are in it, with most of the memory on the source's side still.

    The source's own word is waited for too: before it, a break can lose the guest by QEMU's fault (hazard 1).
    """
    async with (
        source_of(qemu, folder, paused=_loses_writes(qemu), guest=SMALL) as source,
        receiving(folder, **wishes) as receiver,
    ):
        uri = receiver.uri if relay is None else str(relay.address)
        await start(source, uri, postcopy=True, limits={"max-postcopy-bandwidth": bandwidth})
        await _status(receiver, "running")
        await migration.wait_until(source.session, "postcopy-active", timeout_s=TIMEOUT_S)
        yield source, receiver


async def _status(receiver: Receiving, status: str) -> None:
    await receiver.wait_for(lambda event: isinstance(event, StatusChanged) and event.status == status)


class _Cutter:
    """Cuts all of a relay's channels when so many bytes more have passed."""

    def __init__(self) -> None:
        self.relay: Relay | None = None
        self._at: int | None = None

    @property
    def _passed(self) -> int:
        assert self.relay is not None
        return sum(channel.forward_bytes for channel in self.relay.channels)

    def after(self, count: int) -> None:
        self._at = self._passed + count

    def passed(self, _: Channel) -> None:
        if self._at is None or self._passed < self._at:
            return
        self._at = None
        assert self.relay is not None
        for channel in self.relay.channels:
            channel.cut()


def _cut(qemu: Qemu, number: int) -> Callable[[random.Random, Path], Awaitable[str]]:
    """Each in its own twentieth of the first 10 MiB; every fourth is cut again after it was recovered."""

    async def run(rng: random.Random, folder: Path) -> str:
        step = 10 * MIB // CUTS
        moments = [number * step + rng.randrange(step), *([rng.randrange(MIB)] if number % 4 == 0 else [])]
        raw, cutter = folder / "ram", _Cutter()
        wishes = {"raw": raw, "workloads": [Workload(seed=number, rate=1000)]}
        relay = Relay(f"unix:{folder / 'relay'}", f"unix:{folder / 'in'}", folder / "0", on_bytes=cutter.passed)
        async with relay, _in_postcopy(qemu, folder, 8 * MIB, relay=relay, **wishes) as (source, receiver):
            cutter.relay = relay
            for index, moment in enumerate(moments):
                cutter.after(moment)
                if await _ended_or_paused(source) == "completed":
                    break
                is_last = index == len(moments) - 1
                await _recover(source, receiver, folder, index, cutter, fast=is_last)
            await migration.wait_until(source.session, "completed", timeout_s=TIMEOUT_S)
            result = await receiver.result()
            assert (result.exit_code, result.numbers["duplicates"]) == (0, 0), result.message
            assert {"pc.ram", "pc.bios"} <= await assert_same_ram(source, raw, folder / "memory")
            paused = sum(isinstance(event, Paused) for event in receiver.events)
        return "" if paused == len(moments) else "over before the cut"

    return run


async def _ended_or_paused(source: Machine) -> str:
    return await migration.wait_until(source.session, {"completed", "postcopy-paused"}, timeout_s=TIMEOUT_S)


async def _recover(
    source: Machine, receiver: Receiving, folder: Path, index: int, cutter: _Cutter, *, fast: bool
) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not receiver.receiver.is_paused:  # noqa: ASYNC110 - the same event comes at each break
            await asyncio.sleep(0.01)
    inner = f"unix:{folder / f'in-{index}'}"
    assert await ask(receiver.receiver.control, "recover", inner) == inner
    assert cutter.relay is not None
    cutter.relay.forward = type(cutter.relay.forward).parse(inner)
    if fast:
        await migration.set_parameters(source.session, {"max-postcopy-bandwidth": 0})
    await migration.start(source.session, str(cutter.relay.address), {"resume": True})
    await migration.wait_until(source.session, {"postcopy-active", "completed"}, timeout_s=TIMEOUT_S)


def _source_killed(qemu: Qemu, postcopy: bool) -> Callable[[random.Random, Path], Awaitable[str]]:
    """What is said of the guest by the command itself, as a shell starts it."""

    async def run(rng: random.Random, folder: Path) -> str:
        async with _command(folder) as (command, lines), source_of(qemu, folder, guest=SMALL) as source:
            await start(source, f"unix:{folder / 'in'}", postcopy=postcopy, limits={"max-bandwidth": 4 * MIB} | SLOWLY)
            await _line(lines, "running" if postcopy else "blocks-came")
            await asyncio.sleep(rng.random() / 2)  # a random moment
            source.kill()
            if postcopy:
                await _line(lines, '"paused"')
                command.send_signal(signal.SIGINT)
                assert command.stderr is not None
                await _line(command.stderr, "interrupted again, it is lost")
                command.send_signal(signal.SIGINT)
            async with asyncio.timeout(TIMEOUT_S):
                _, said = await command.communicate()
            if postcopy:
                assert (command.returncode, b"the guest is lost" in said) == (6, True), said
            else:
                assert (command.returncode, b"the guest is the source's" in said) == (3, True), said
        return ""

    return run


SLOWLY: Final = {"max-postcopy-bandwidth": 4 * MIB}


@asynccontextmanager
async def _command(folder: Path, *more: str) -> AsyncGenerator[tuple[asyncio.subprocess.Process, asyncio.StreamReader]]:
    words = ["receive", f"unix:{folder / 'in'}", "--ndjson", "--control", str(folder / "control"), *more]
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmigrate", *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )
    assert command.stdout is not None
    try:
        await _line(command.stdout, '"listening"')
        yield command, command.stdout
    finally:
        with suppress(ProcessLookupError):
            command.kill()
        await command.wait()


async def _line(lines: asyncio.StreamReader, word: str) -> None:
    """Until one has this."""
    async with asyncio.timeout(TIMEOUT_S):
        while line := await lines.readline():
            if word in line.decode():
                return
    raise AssertionError(f"it ended without a word of {word}")


def _killed(qemu: Qemu) -> Callable[[random.Random, Path], Awaitable[str]]:
    """Our command, by SIGKILL, with touchers that sleep: no process, no memory and no socket of it is left."""

    async def run(_: random.Random, folder: Path) -> str:
        async with (
            _command(folder, "--touch", "random", "--touch", "sequential") as (command, lines),
            source_of(qemu, folder, guest=SMALL) as source,
        ):
            await start(source, f"unix:{folder / 'in'}", postcopy=True, limits=SLOWLY)
            await _line(lines, '"running"')
            listed = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
            assert len(listed) == 3
            command.kill()
            await command.wait()
            async with asyncio.timeout(TIMEOUT_S):
                while any(_is_alive(int(pid)) for pid in listed):  # noqa: ASYNC110 - they are not our children
                    await asyncio.sleep(0.01)
            for name in ("in", "control"):
                try:
                    await asyncio.open_unix_connection(folder / name)
                except OSError:
                    continue
                raise AssertionError(f"{name} still listens")
        return ""

    return run


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _disk_full(qemu: Qemu, postcopy: bool) -> Callable[[random.Random, Path], Awaitable[str]]:
    """After precopy the source goes on; after postcopy the only copy is held until it is saved elsewhere."""

    async def run(_: random.Random, folder: Path) -> str:
        small, elsewhere = _folder(folder, "small"), folder / "elsewhere.mig"
        with _small_disk(small):
            return await _saved_to(qemu, folder, small / "guest.mig", elsewhere, postcopy)

    return run


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """4 MiB, which takes root."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


async def _saved_to(qemu: Qemu, folder: Path, full: Path, elsewhere: Path, postcopy: bool) -> str:
    async with source_of(qemu, folder, guest=SMALL) as source, receiving(folder, save=full) as receiver:
        await start(source, receiver.uri, postcopy=postcopy)
        if not postcopy:
            assert (await receiver.result()).exit_code == 3
            status = await migration.wait_until(source.session, {"failed", "completed"}, timeout_s=TIMEOUT_S)
            assert list(full.parent.iterdir()) == []
            if status == "failed":
                await console.assert_goes_on(folder / "source-console")
                return ""
            assert _loses_writes(qemu)  # 5.2 and 7.2 do not wait for SHUT in precopy
            return "the source did not wait for SHUT"
        await receiver.wait_for(lambda event: isinstance(event, NotSaved))
        assert list(full.parent.iterdir()) == []
        assert await ask(receiver.receiver.control, "save", str(elsewhere)) == str(elsewhere)
        await migration.wait_until(source.session, "completed", timeout_s=TIMEOUT_S)
        assert (await receiver.result()).exit_code == 0
    async with loading(qemu, folder, elsewhere, guest=SMALL) as said:
        await console.assert_goes_on(said)
    return ""
