"""``restore``: a saved guest runs in a stock QEMU at once, and has in the end what the file has."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any, Final

import pytest

from qmigrate.analysis.extract import extract
from qmigrate.capture.migration import Migration
from qmigrate.capture.placed import PlacedPages
from qmigrate.endpoint import transport
from qmigrate.endpoint.transport import SocketAddress
from qmigrate.errors import RefusedError
from qmigrate.events import GuestChanged, LiveEvent
from qmigrate.format.feed import Feed
from qmigrate.format.return_path import RequestPagesId, read_return_path
from qmigrate.operations.reading import Reading
from qmigrate.operations.restore import Indexed, Restorer, ServingResult
from qmigrate.operations.send import Sender
from qmigrate.protocol.pages_to_send import HostPages
from qmigrate.protocol.source import Source
from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.live.receiving import huge_pages
from tests.live.recording import KINDS, Kind, arguments_of, extra
from tests.live.same import assert_same_ram
from tests.live.saved import File, saved
from tests.live.versions import Qemu, installed, newest
from tests.report.test_migration_page import Read

pytestmark = [pytest.mark.live, pytest.mark.asyncio]

TIMEOUT_S: Final = 60.0
every_qemu = pytest.mark.parametrize("qemu", installed(), ids=lambda qemu: qemu.name)


@asynccontextmanager
async def waiting(file: File, folder: Path, more: tuple[str, ...] = (), **changes: Any) -> AsyncGenerator[Machine]:
    """A QEMU of the saved guest's machine, which waits for it."""
    folder.mkdir()
    kind = Kind(**{**vars(file.kind), **changes})
    arguments = [*arguments_of(file.qemu, kind, folder, folder / "console"), *more, "-incoming", "defer"]
    async with Machine(file.qemu.path, arguments, name=f"destination {file.qemu.name}") as machine:
        yield machine


async def restore(file: File, machine: Machine, folder: Path, **wishes: Any) -> ServingResult:
    async with asyncio.timeout(TIMEOUT_S):
        restorer = Restorer(file.stream, channels=file.channels, **wishes)
        return await restorer.run(machine.session, uri=f"unix:{folder / 'in'}")


async def assert_has_all(file: File, machine: Machine, scratch: Path) -> None:
    """Every page of the stopped machine is what the file's last copy of it is."""
    with Migration(file.stream, channels=file.channels) as read:
        extracted = extract(read, scratch / "ram")
    compared = await assert_same_ram(machine, extracted, scratch / "memory")
    assert sum(compared.seen.values()) >= 8 << 20


def hold(index: PlacedPages, until: Callable[[], bool]) -> None:
    """Serving holds still before it reads its first page until this holds."""
    records = index.records

    def held_records(block: str, first: int, count: int) -> bytearray:
        deadline = time.monotonic() + TIMEOUT_S
        while not until():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        index.records = records  # type: ignore[method-assign]
        return records(block, first, count)

    index.records = held_records  # type: ignore[method-assign]  # of this one object


class Withholding(Source):
    """Keeps the last block back, which no device reads; when all else is sent it waits, and does ``then``, not END."""

    go_on: Event
    then: Callable[[str], object]

    def __init__(self, blocks: Sequence[HostPages], **how: Any) -> None:
        super().__init__(blocks, **how)
        self._kept = blocks[-1]
        self.pages._dirty[self._kept.name] = bytearray(self._kept.count)
        self.pages._sent[self._kept.name] = bytearray(self._kept.count)  # so that it is discarded all the same
        self.pages.left -= self._kept.count

    def end(self) -> bytes:
        assert self.go_on.wait(TIMEOUT_S)
        type(self).then(self._kept.name)
        return b""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> list[socket.socket]:
    """The connections that are made to destinations."""
    made: list[socket.socket] = []

    async def connect(address: SocketAddress) -> socket.socket:
        made.append(await transport.connect(address))
        return made[-1]

    monkeypatch.setattr("qmigrate.operations.serving.connect", connect)
    return made


def has_asked(restorer: Restorer, peer: socket.socket) -> bool:
    """Was a request for a page heard, or does one lie in the socket, unread?"""
    if restorer._server is not None and restorer._server.counts.requests:
        return True
    feed = Feed(window=1 << 16)
    with contextlib.suppress(BlockingIOError):
        feed.receive(peer.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    entries = itertools.takewhile(bool, read_return_path(feed))
    return any(isinstance(entry.message, RequestPagesId) for entry in entries if entry)


@every_qemu
async def test_a_guest_runs_before_its_pages_are_there_and_goes_on(
    qemu: Qemu, tmp_path: Path, peers: list[socket.socket]
) -> None:
    file = await saved(qemu, "pc-running", tmp_path / "saved")
    async with waiting(file, tmp_path / "d") as machine:
        restorer = Restorer(file.stream)
        with Migration(file.stream) as read, restorer.read(read) as indexed:
            hold(indexed.index, lambda: has_asked(restorer, peers[0]))
            async with asyncio.timeout(TIMEOUT_S):
                result = await restorer.run_saved(indexed, machine.session, uri=f"unix:{tmp_path / 'd' / 'in'}")
        assert (result.exit_code, result.running, result.counts.pages) == (0, True, result.counts.total)
        assert 0 < sum(result.latency.counts) <= result.counts.requested
        await console.assert_goes_on(tmp_path / "d" / "console")


@every_qemu
async def test_a_paused_guest_has_every_page_of_the_file(qemu: Qemu, tmp_path: Path) -> None:
    """By both ways, of a recording of several passes, and by an index that was kept."""
    file = await saved(qemu, "pc-running", tmp_path / "saved")
    said: list[LiveEvent] = []
    for how in ("lazy", "eager", "lazy-again"):
        async with waiting(file, tmp_path / how) as machine:
            wishes = {"paused": True, "eager": how == "eager", "index_folder": tmp_path / "indexes"}
            result = await restore(file, machine, tmp_path / how, **wishes, on_event=said.append)
            assert (result.exit_code, result.running) == (0, False)
            await assert_has_all(file, machine, tmp_path / how)
    assert [each.kept for each in said if isinstance(each, Indexed)] == [False, True, True]


@every_qemu
async def test_a_long_file_is_served_while_it_is_read(qemu: Qemu, tmp_path: Path) -> None:
    """As if these were long: of one pass each page at once, of several once the last copies are known."""
    for name, runs in (("pc-paused", 1), ("pc-running", 2)):
        file = await saved(qemu, name, tmp_path / name)
        folder = tmp_path / f"{name}-d"
        async with waiting(file, folder) as machine:
            reading = Reading(str(file.stream), keep=False, at_once_from=0)
            restorer = Restorer(file.stream, reading=reading, paused=runs == 1)
            async with asyncio.timeout(TIMEOUT_S):
                result = await restorer.run(machine.session, uri=f"unix:{folder / 'in'}")
            assert (result.exit_code, result.counts.pages) == (0, result.counts.total)
            assert reading._arriving is not None
            if runs == 1:
                await assert_has_all(file, machine, folder)
            else:
                await console.assert_goes_on(folder / "console")


@pytest.mark.parametrize("name", ["q35-many", "pc-postcopy", "pc-mapped", "pc-multifd-zlib", "pc-xbzrle"])
async def test_whatever_way_ram_travelled_it_is_restored(name: str, tmp_path: Path) -> None:
    qemu = newest()
    if qemu is None:
        pytest.skip("no QEMU")
    file = await saved(qemu, name, tmp_path / "saved")
    async with waiting(file, tmp_path / "paused") as machine:
        result = await restore(file, machine, tmp_path / "paused", paused=True)
        assert (result.exit_code, result.message) == (0, "all is in; the guest is paused there")
        await assert_has_all(file, machine, tmp_path / "paused")


async def test_a_guest_is_restored_onto_huge_pages(tmp_path: Path) -> None:
    qemu = newest()
    if qemu is None:
        pytest.skip("no QEMU")
    huge = "memory-backend-memfd,id=pc.ram,size=8M,hugetlb=on,hugetlbsize=2M,x-use-canonical-path-for-ramblock-id=off"
    file = await saved(qemu, "pc-paused", tmp_path / "saved")
    with huge_pages(8):
        async with waiting(file, tmp_path / "d", ("-object", huge), machine="pc,memory-backend=pc.ram") as machine:
            result = await restore(file, machine, tmp_path / "d")
            assert result.exit_code == 0, result.message
            await console.assert_goes_on(tmp_path / "d" / "console")


@every_qemu
@pytest.mark.parametrize("why", ["told to stop twice", "the file was changed", "its pages are others"])
async def test_a_guest_whose_server_ends_is_paused_and_can_be_resumed(
    qemu: Qemu, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = await saved(qemu, "pc-running", tmp_path / "saved")
    whole = file.stream.read_bytes()
    said: list[LiveEvent] = []
    Withholding.go_on = Event()
    async with waiting(file, tmp_path / "d") as machine:
        restorer = Restorer(file.stream, on_event=said.append)
        with Migration(file.stream) as read, restorer.read(read) as indexed:
            Withholding.then = lambda block: indexed.index.records(block, 0, 1)
            with monkeypatch.context() as patched:
                patched.setattr("qmigrate.endpoint.source.Source", Withholding)
                task = asyncio.ensure_future(
                    restorer.run_saved(indexed, machine.session, uri=f"unix:{tmp_path / 'd' / 'in'}")
                )
                async with asyncio.timeout(TIMEOUT_S):
                    await until(lambda: any(isinstance(each, GuestChanged) and each.running for each in said))
                    if why == "the file was changed":
                        os.truncate(file.stream, len(whole) - 1)  # in one step, as a Path can't
                    elif why == "its pages are others":
                        patched.setattr(indexed.index, "check", lambda: None)  # as if its times did not tell
                        with file.stream.open("r+b") as changed:
                            changed.write(bytes(len(whole)))
                    else:
                        assert restorer.interrupt()
                        assert "needs this process" in str(said[-1])
                        assert restorer.interrupt()
                    Withholding.go_on.set()
                    result = await task
        assert result.exit_code == 5
        expected = {
            "told to stop twice": "told to stop",
            "the file was changed": "the input was changed since its pages were indexed",
            "its pages are others": "no longer where",
        }
        assert expected[why] in result.message
        assert (await migration.query(machine.session))["status"] == "postcopy-paused"
        file.stream.write_bytes(whole)
        async with asyncio.timeout(TIMEOUT_S):
            again = Restorer(file.stream, resume=True)
            result = await again.run(machine.session, uri=f"unix:{tmp_path / 'd' / 'again'}")
        assert (result.exit_code, result.counts.pages) == (0, result.counts.total)
        await console.assert_goes_on(tmp_path / "d" / "console")


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - by no single event
        await asyncio.sleep(0.01)


async def test_a_file_that_was_changed_before_it_is_served_is_not(tmp_path: Path) -> None:
    qemu = newest()
    if qemu is None:
        pytest.skip("no QEMU")
    file = await saved(qemu, "pc-paused", tmp_path / "saved")
    async with waiting(file, tmp_path / "d") as machine:
        restorer = Restorer(file.stream)
        with Migration(file.stream) as read, restorer.read(read) as indexed:
            with file.stream.open("r+b") as changed:
                changed.truncate(file.stream.stat().st_size // 2)
            async with asyncio.timeout(TIMEOUT_S):
                result = await restorer.run_saved(indexed, machine.session, uri=f"unix:{tmp_path / 'd' / 'in'}")
        assert result.exit_code == 3
        assert "the input was changed since its pages were indexed" in result.message


async def test_what_does_not_fit_is_refused_before_anything_begins(tmp_path: Path) -> None:
    qemu = newest()
    if qemu is None:
        pytest.skip("no QEMU")
    file = await saved(qemu, "pc-paused", tmp_path / "saved")
    whole = file.stream.read_bytes()
    refusals: dict[str, tuple[dict[str, Any], str]] = {
        "q35": ({"machine": "q35"}, "its machine is pc-q35-"),
        "more": ({}, "destination: it has no RAM block"),
        "cut": ({}, "stream.mig: 0x"),
    }
    for name, (changes, reason) in refusals.items():
        file.stream.write_bytes(
            whole.replace(b"\x06pc.rom", b"\x06pc.rum")
            if name == "more"
            else whole[:-20000]
            if name == "cut"
            else whole
        )
        async with waiting(file, tmp_path / name, **changes) as machine:
            with pytest.raises(RefusedError, match=reason):
                await restore(file, machine, tmp_path / name)
            assert (await machine.session.execute("query-status"))["status"] == "inmigrate"


@every_qemu
async def test_a_destination_that_refuses_the_devices_leaves_the_guest_in_the_file(qemu: Qemu, tmp_path: Path) -> None:
    file = await saved(qemu, replace(KINDS["pc-paused"], devices=extra("-device virtio-rng-pci")), tmp_path / "saved")
    async with waiting(file, tmp_path / "d", devices=None) as machine:
        result = await restore(file, machine, tmp_path / "d")
        assert result.exit_code == 3
        assert "the destination failed before the guest ran" in result.message


async def test_the_command_starts_a_qemu_which_ends_with_it(tmp_path: Path) -> None:
    qemu = newest()
    if qemu is None:
        pytest.skip("no QEMU")
    file = await saved(qemu, "pc-running", tmp_path / "saved")
    said = tmp_path / "console"
    arguments = [str(qemu.path), *arguments_of(qemu, file.kind, tmp_path, said)]
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmigrate", "restore", "--json", str(file.stream), "--", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert command.stdout is not None
    assert command.stderr is not None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            answer = json.loads(await command.stdout.readline())
            assert (answer["exit_code"], answer["pages"]) == (0, answer["total"])
            await console.assert_goes_on(said)
            command.send_signal(signal.SIGINT)
            while b"once more ends both" not in await command.stderr.readline():
                assert command.returncode is None
            await console.assert_goes_on(said)
            command.send_signal(signal.SIGINT)
            assert await command.wait() == 130
    finally:
        if command.returncode is None:
            command.kill()
            await command.wait()


async def test_the_command_restores_into_a_qemu_that_waits(tmp_path: Path) -> None:
    qemu = newest()
    if qemu is None:
        pytest.skip("no QEMU")
    file = await saved(qemu, "pc-paused", tmp_path / "saved")
    qmp = tmp_path / "qmp"
    async with waiting(file, tmp_path / "d", ("-qmp", f"unix:{qmp},server=on,wait=off")) as machine:
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "qmigrate", "restore", "-q", str(file.stream), "--qmp", str(qmp)),
            *("--report", str(tmp_path / "page.html")),
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(TIMEOUT_S):
            out, _ = await command.communicate()
        assert (command.returncode, out.splitlines()[0]) == (0, b"the guest runs, all its pages are in")
        assert b"guest runs after" in out
        page = Read((tmp_path / "page.html").read_text())
        # Not "Answers": so small a guest may have all its pages before it asks for one.
        for expected in ("Restored lazily", f"into QEMU {qemu.version}", "postcopy-active", "Memory missing"):
            assert expected in page.text, expected
        await console.assert_goes_on(tmp_path / "d" / "console")
        assert (await migration.query(machine.session))["status"] == "completed"


@every_qemu
@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_a_guest_is_sent_to_a_qemu_that_listens(qemu: Qemu, postcopy: bool, tmp_path: Path) -> None:
    file = await saved(qemu, "pc-running", tmp_path / "saved")
    async with waiting(file, tmp_path / "d") as machine:
        await migration.set_capabilities(machine.session, {"postcopy-ram": postcopy})
        uri = f"unix:{tmp_path / 'd' / 'in'}"
        await migration.start_incoming(machine.session, uri)
        async with asyncio.timeout(TIMEOUT_S):
            result = await Sender(file.stream, postcopy=postcopy).run(uri)
        assert (result.exit_code, result.message) == (0, "the destination has it all")
        await console.assert_goes_on(tmp_path / "d" / "console")


async def test_a_qemu_that_refuses_what_is_sent_has_no_guest(tmp_path: Path) -> None:
    qemu = newest()
    if qemu is None:
        pytest.skip("no QEMU")
    file = await saved(qemu, "pc-paused", tmp_path / "saved")
    async with waiting(file, tmp_path / "d", machine="q35") as machine:
        uri = f"unix:{tmp_path / 'd' / 'in'}"
        await migration.start_incoming(machine.session, uri, {"exit-on-error": False})
        async with asyncio.timeout(TIMEOUT_S):
            result = await Sender(file.stream).run(uri)
        assert result.exit_code == 3
