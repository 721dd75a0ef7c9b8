"""Saved guests restored by an index that was kept, or that is still being made while they are served.

The files of the latter are long: from 256 MiB on a plain file is served before all of it has been read.  Where its end
or what breaks must come before that, the process that reads it is stopped (SIGSTOP) once the server has begun.
"""

import asyncio
import filecmp
import gzip
import os
import random
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from qmigrate.analysis.extract import extract
from qmigrate.capture.migration import Migration
from qmigrate.endpoint.destination import Workload
from qmigrate.endpoint.relay import Relay
from qmigrate.endpoint.served import Moment
from qmigrate.errors import QmpTimeoutError
from qmigrate.events import GuestChanged, LiveEvent
from qmigrate.format.ram_flag import RamFlag
from qmigrate.operations.migrate import migrate
from qmigrate.operations.plan import Plan
from qmigrate.operations.reading import Reading
from qmigrate.operations.restore import Indexed, Restored, ServingResult
from qmigrate.operations.send import Sender
from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.guests.build import Guest
from tests.live.pair import AT_ONCE, pair
from tests.live.receiving import huge_pages, receiving
from tests.live.recording import FAST, KINDS, Kind, at_once
from tests.live.tapping import tapped
from tests.live.versions import Qemu
from tests.soak import encodings
from tests.soak.migrations import Unit
from tests.soak.restores_broken import Acting, assert_has_not_run, cut, relayed, settled
from tests.soak.restoring import Input, command_of, proved, recorded_input, restored, restorer_of, waiting

__all__ = ["units"]

MIB: Final = 1 << 20
TIMEOUT_S: Final = 60.0
LONG_MIB: Final = 768
LONG: Final = Guest("walker", memory_mib=LONG_MIB, walked_share=1 / 256, pages_per_tick=256)
PASSES: Final = {
    "one pass": Kind("long, of one pass", guest=LONG, paused=True, course=at_once),
    # The source goes as fast as it can, and yet does not converge before it may.
    "many passes": Kind("long, of several", machine="q35", guest=LONG, parameters={"max-bandwidth": FAST}),
}
# q35 has its hole below 4 GiB.
LARGE: Final = Kind(
    "large, of several passes",
    machine="q35",
    guest=replace(LONG, memory_mib=4096, zero_share=0.5, pages_per_tick=1024),
    parameters={"max-bandwidth": FAST},
)
KEPT: Final = ("plain", "packed", "channels", "channels zlib", "recording", "recording of postcopy")
# Without the option ROM of its APIC: there, at 0xC0000, loading the devices waits for a page, and of a file of several
# passes no page is served before all are known.  hw/i386/kvmvapic.c
RUNNING: Final = "many passes of a guest that runs at once"
LONG_KINDS: Final = PASSES | {
    RUNNING: replace(
        PASSES["many passes"],
        shows="long, of several, and no page is needed to begin to run",
        devices=lambda *_: ["-global", "apic-common.vapic=off"],
    )
}
CUTS_WHILE_READ: Final = 3
CUTS_AFTERWARDS: Final = 2
DAMAGED_BYTES: Final = 1 << 16
PAGE_BYTES: Final = 4096
RECORD_BYTES: Final = 8 + PAGE_BYTES
PAGE_WORD: Final = RamFlag.PAGE | RamFlag.CONTINUE


def units(qemu: Qemu) -> Iterator[Unit]:
    """Those of one version."""
    for what in KEPT:
        yield Unit(f"restore kept {what} {qemu.name}", _kept(qemu, what))
    for passes in PASSES:
        yield Unit(f"restore long {passes} {qemu.name}", _long(qemu, passes))
        yield Unit(f"restore long {passes} damaged in the middle {qemu.name}", _damaged(qemu, passes))
        yield Unit(f"restore long {passes} server killed while it is read {qemu.name}", _kill_server(qemu, passes))
        yield Unit(f"restore long {passes} cut while it is read {qemu.name}", _cut(qemu, passes))
        yield Unit(f"restore long {passes} into our stand-in {qemu.name}", _stand_ins(qemu, passes))
    yield Unit(f"restore long {RUNNING} cut again and again {qemu.name}", _cut_again(qemu))
    yield Unit(f"restore long many passes of 4096 MiB {qemu.name}", _large(qemu))
    yield Unit(f"restore long onto huge pages {qemu.name}", _long_onto_huge_pages(qemu))


# ---- kept ---------------------------------------------------------------------------------------------------


def _kept(qemu: Qemu, what: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    """Its index is made first, in whatever way; the guest is restored by what was kept of it."""

    async def run(_: random.Random, folder: Path) -> str:
        saved = await _to_be_kept(qemu, what, folder)
        with Reading(str(saved.stream), channels=saved.channels, folder=saved.index_folder) as reading:
            async with asyncio.timeout(TIMEOUT_S):
                (await reading.saved()).close()
            assert (reading.is_kept, reading.not_kept) == (False, None)
        assert saved.index_folder is not None
        before = {each.name: each.stat().st_mtime_ns for each in saved.index_folder.iterdir()}
        assert before
        note = await proved(saved, folder)
        with Reading(str(saved.stream), channels=saved.channels, folder=saved.index_folder) as reading:
            (await reading.saved()).close()
            assert reading.is_kept
        assert before == {each.name: each.stat().st_mtime_ns for each in saved.index_folder.iterdir()}, "it was used"
        return note

    return run


async def _to_be_kept(qemu: Qemu, what: str, folder: Path) -> Input:
    if what.startswith("recording"):
        wishes = AT_ONCE if what.endswith("postcopy") else {"multifd": 2}
        async with pair(qemu, folder) as two, tapped(folder, two.uri) as (listen, recording):
            result = await migrate(*two.sessions, Plan(uri=listen, listen=two.uri, **wishes))
            assert result.exit_code == 0, result.message
        kind = Kind("a guest of a pair", guest=Guest("walker", memory_mib=16))
        return Input(qemu, kind, recording, index_folder=folder / "indexes")
    ways = dict(encodings.ways())
    kind = {"channels": ways["multifd 2 none"], "channels zlib": ways["multifd 2 zlib"]}.get(what, KINDS["pc-running"])
    saved = await recorded_input(qemu, kind, folder / "saved")
    if what != "packed":
        return saved
    packed = saved.stream.with_suffix(".gz")
    packed.write_bytes(gzip.compress(saved.stream.read_bytes(), 1))
    return replace(saved, stream=packed)


# ---- still being made ---------------------------------------------------------------------------------------


def _long(qemu: Qemu, passes: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    """For the first time: it is served while it is read.

    The guest's own addresses are not read one by one: it is saved again and compared whole with what QEMU itself loads.
    """

    async def run(_: random.Random, folder: Path) -> str:
        return await _served_while_read(await _long_input(qemu, passes, folder), folder)

    return run


async def _served_while_read(saved: Input, folder: Path) -> str:
    notes: list[str] = []
    await proved(saved, folder, ram=False, holds=lambda result: notes.append(_while_it_was_read(result)))
    return notes[0]


def _large(qemu: Qemu) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(_: random.Random, folder: Path) -> str:
        return await _served_while_read(await recorded_input(qemu, LARGE, folder / "saved"), folder)

    return run


def _long_onto_huge_pages(qemu: Qemu) -> Callable[[random.Random, Path], Awaitable[str]]:
    """All pages of a huge one are at hand, or none of it is sent."""

    async def run(_: random.Random, folder: Path) -> str:
        memory = f"memory-backend-memfd,id=pc.ram,size={LONG_MIB}M,hugetlb=on,hugetlbsize=2M"
        memory += ",x-use-canonical-path-for-ramblock-id=off"
        saved = await _long_input(qemu, "one pass", folder)
        onto = replace(saved, kind=replace(saved.kind, machine="pc,memory-backend=pc.ram"))
        notes: list[str] = []
        with huge_pages(LONG_MIB // 2 + 8):
            await proved(onto, folder, "-object", memory, holds=lambda result: notes.append(_while_it_was_read(result)))
        return notes[0]

    return run


def _stand_ins(qemu: Qemu, passes: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    """`send` to `receive`, which asks for pages at random: each comes once, and is the file's."""

    async def run(chance: random.Random, folder: Path) -> str:
        saved = await _long_input(qemu, passes, folder)
        workloads = [Workload(pattern="random", seed=chance.randrange(1 << 30))]
        async with receiving(folder, raw=folder / "received", workloads=workloads) as receiver:
            sender = Sender(saved.stream, postcopy=True, keep_index=False)
            sent, received = await sender.run(receiver.uri), await receiver.result()
        assert (sent.exit_code, received.exit_code) == (0, 0), (sent.message, received.message)
        assert (received.is_postcopy, received.numbers["duplicates"]) == (True, 0)
        with Migration(saved.stream) as read:
            files = extract(read, folder / "ram").files
        same, *others = filecmp.cmpfiles(folder / "ram", folder / "received", files.values(), shallow=False)
        assert sorted(same) == sorted(files.values()), others
        return _while_it_was_read(sent)

    return run


async def _long_input(qemu: Qemu, passes: str, folder: Path) -> Input:
    saved = await recorded_input(qemu, LONG_KINDS[passes], folder / "saved")
    assert saved.stream.stat().st_size >= 512 * MIB
    return saved


def _while_it_was_read(result: ServingResult) -> str:
    """Only of such a file it is told when all pages are known."""
    loaded, indexed = (result.moments[each] / 1e6 for each in ("loaded", "indexed"))
    return f"devices loaded {'before' if loaded < indexed else 'after'} all pages were known"


def _damaged(qemu: Qemu, passes: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    """In the middle of its pages, both ends are good: of several passes no page is served, of one none that is wrong.

    Where the guest may have begun to run, it goes on once the file is whole again.
    """

    async def run(chance: random.Random, folder: Path) -> str:
        saved = await _long_input(qemu, passes, folder)
        at = _record_behind(saved.stream, int(saved.stream.stat().st_size * chance.uniform(0.3, 0.7)))
        with saved.stream.open("r+b") as file:
            whole = os.pread(file.fileno(), DAMAGED_BYTES, at)
            os.pwrite(file.fileno(), chance.randbytes(DAMAGED_BYTES), at)
        here = folder / "d"
        async with waiting(saved, here) as machine:
            result = await restored(saved, machine, here)
            assert result.exit_code in ((3,) if passes == "many passes" else (3, 5)), result.message
            assert result.counts.pages < result.counts.total
            if result.exit_code == 3:
                assert result.counts.pages == 0, result.message
                return f"the guest is in the file: {result.message[:60]}"
            assert (await settled(machine)) == "postcopy-paused"
            with saved.stream.open("r+b") as file:
                os.pwrite(file.fileno(), whole, at)
            again = await restorer_of(saved, resume=True).run(machine.session, uri=f"unix:{here / 'again'}")
            assert again.exit_code == 0, again.message
            await console.assert_goes_on(here / "console")
        return f"the guest had begun to run: {result.message[:60]}"

    return run


def _record_behind(path: Path, offset: int) -> int:
    """Where a page's record begins: what is damaged from there on has no page whose word is good, and not its bytes."""
    with path.open("rb") as file:
        data = os.pread(file.fileno(), 1 << 20, offset)
    for at in range(len(data) - 2 * RECORD_BYTES):
        word, following = (int.from_bytes(data[each : each + 8], "big") for each in (at, at + RECORD_BYTES))
        if word & PAGE_BYTES - 1 == PAGE_WORD and following == word + PAGE_BYTES:
            return offset + at
    raise AssertionError("no pages there")


def _kill_server(qemu: Qemu, passes: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    """SIGKILL while the file is read for it; what reads it ends by itself, and another server takes over."""

    async def run(_: random.Random, folder: Path) -> str:
        saved = await _long_input(qemu, passes, folder)
        here, qmp = folder / "d", folder / "qmp"
        more = ("-qmp", f"unix:{qmp},server=on,wait=off")
        async with _held_reader(saved) as held, waiting(saved, here, *more) as machine:
            async with relayed(here, Acting(1, held.stop)) as relay:
                victim = await command_of(saved, qmp, here, "--uri", str(relay.address), "--listen", f"unix:{here}/in")
                await _until_waiting(machine, victim)
                assert victim.returncode is None, "it serves"
                victim.kill()
                await _assert_ends(victim.pid)
                held.go_on()  # it has the victim's own stdout: until it ends that of the victim does not
                await victim.communicate()
            status = await settled(machine)
            for reader in held.pids:
                await _assert_ends(reader)
            if status == "postcopy-paused":
                second = await command_of(saved, qmp, here, "--uri", f"unix:{here / 'again'}", "--resume")
                said = (await second.communicate())[1]
                assert second.returncode == 0, said.decode()
                await console.assert_goes_on(here / "console")
            else:
                machine.kill()
        if status != "postcopy-paused":
            return f"before RUN ({status}): {await _anew(saved, folder)}"
        return "" if held.pids else "all of it was read before the kill"

    return run


def _cut(qemu: Qemu, passes: str) -> Callable[[random.Random, Path], Awaitable[str]]:
    """The connection breaks while the file is read; it is made anew, and only then the last pages become known."""

    async def run(_: random.Random, folder: Path) -> str:
        saved = await _long_input(qemu, passes, folder)
        here = folder / "d"
        async with (
            _held_reader(saved) as held,
            waiting(saved, here) as machine,
            relayed(here, Acting(1, held.stop)) as relay,
        ):
            task = asyncio.ensure_future(
                restorer_of(saved).run(machine.session, uri=f"unix:{here / 'relay'}", listen=f"unix:{here / 'in'}")
            )
            await _until_waiting(machine)
            cut(relay)
            await asyncio.sleep(0.5)
            held.go_on()
            async with asyncio.timeout(TIMEOUT_S):
                result = await task
            if result.exit_code == 0:
                assert result.recoveries == 1, result.message
                await console.assert_goes_on(here / "console")
            else:
                assert_has_not_run(result)
                machine.kill()
        if result.exit_code:
            return f"before RUN: {await _anew(saved, folder)}"
        return "" if held.pids else "all of it was read before the cut"

    return run


def _cut_again(qemu: Qemu) -> Callable[[random.Random, Path], Awaitable[str]]:
    """Its guest has begun to run, and waits for its first page: the connection breaks again and again before one can be
    served, and again while they come.
    """

    async def run(chance: random.Random, folder: Path) -> str:
        saved = await _long_input(qemu, RUNNING, folder)
        here, said = folder / "d", asyncio.Queue[str]()
        async with (
            _held_reader(saved) as held,
            waiting(saved, here) as machine,
            relayed(here, Acting(0, lambda _: None)) as relay,
        ):

            def heard(event: LiveEvent) -> None:
                if isinstance(event, Indexed):
                    held.stop()  # the rest of it
                elif isinstance(event, GuestChanged) and event.running:
                    said.put_nowait("running")
                elif isinstance(event, Restored):
                    said.put_nowait(event.moment)

            restorer = restorer_of(saved, recoveries=None, on_event=heard)
            task = asyncio.ensure_future(
                restorer.run(machine.session, uri=f"unix:{here / 'relay'}", listen=f"unix:{here / 'in'}")
            )
            await _until_said(said, "running", task)
            for _ in range(CUTS_WHILE_READ):
                await asyncio.sleep(chance.uniform(0, 0.3))
                cut(relay)
                await _until_said(said, Moment.RESUMED.value, task)
            # Of a destination that was paused it is told how much it has.
            assert restorer._server is not None
            assert held.pids
            assert restorer._server.counts.pages == 0
            held.go_on()
            await _until_said(said, Moment.INDEXED.value, task)
            part = saved.stream.stat().st_size // (2 * CUTS_AFTERWARDS)
            for number in range(CUTS_AFTERWARDS):
                await _until_passed(relay, int(part * (number + chance.random())), task)
                cut(relay)
                await _until_said(said, Moment.RESUMED.value, task)
            async with asyncio.timeout(TIMEOUT_S):
                result = await task
            assert (result.exit_code, result.recoveries) == (0, CUTS_WHILE_READ + CUTS_AFTERWARDS), result.message
            await console.assert_goes_on(here / "console")
        return ""

    return run


async def _until_said(said: asyncio.Queue[str], word: str, task: asyncio.Future[ServingResult]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not task.done():
            with suppress(TimeoutError):
                if await asyncio.wait_for(said.get(), 0.5) == word:
                    return
    raise AssertionError(f"it ended before it said {word}: {task.result().message}")


async def _until_passed(relay: Relay, count: int, task: asyncio.Future[ServingResult]) -> None:
    while not task.done() and sum(channel.forward_bytes for channel in relay.channels) < count:  # noqa: ASYNC110 - bytes
        await asyncio.sleep(0.001)


async def _anew(saved: Input, folder: Path) -> str:
    """The guest has not begun to run: it is in the file."""
    async with waiting(saved, folder / "anew") as machine:
        result = await restored(saved, machine, folder / "anew")
        assert result.exit_code == 0, result.message
        await console.assert_goes_on(folder / "anew" / "console")
    return "restored anew"


class _Held:
    """The processes that read this file for a server; stopped, so that they are not over too soon."""

    def __init__(self, path: Path) -> None:
        self.pids: list[int] = []
        self._path = os.fsencode(path)

    def stop(self, _: object = None) -> None:
        for each in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (each / "cmdline").read_bytes().split(b"\0")
                if b"qmigrate.operations.indexing" in b"\0".join(words) and self._path in words:
                    os.kill(int(each.name), signal.SIGSTOP)
                    self.pids.append(int(each.name))

    def go_on(self) -> None:
        for each in self.pids:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGCONT)


@asynccontextmanager
async def _held_reader(saved: Input) -> AsyncGenerator[_Held]:
    held = _Held(saved.stream)
    try:
        yield held
    finally:
        held.go_on()


async def _assert_ends(pid: int) -> None:
    """A zombie too has ended."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"process {pid} goes on")


async def _until_waiting(machine: Machine, server: asyncio.subprocess.Process | None = None) -> None:
    """Until it waits for pages: its guest, or its main loop, which loads the devices and answers nothing then."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and (server is None or server.returncode is None):
        try:
            status = (await migration.query(machine.session, timeout_s=2))["status"]
        except QmpTimeoutError:
            return
        if status == "postcopy-active":
            return
        assert status not in ("completed", "failed"), status
        await asyncio.sleep(0.005)
    raise AssertionError("it does not get so far")
