"""``receive`` as it is used: recorded, interrupted, out of space, with real sources."""

import asyncio
import json
import resource
import shlex
import socket
import sys
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest

import qmigrate
from qmigrate.analysis.extract import extract
from qmigrate.analysis.recording import RecordingStory
from qmigrate.capture.migration import Migration
from qmigrate.capture.recorder import Recorder
from qmigrate.capture.recording import Recording
from qmigrate.endpoint.destination import Workload
from qmigrate.events import NotSaved
from qmigrate.operations.control import ask
from qmigrate.qmp import migration
from tests.guests import console
from tests.live.receiving import (
    HELD,
    LARGER,
    TIMEOUT_S,
    assert_same_ram,
    hurry,
    loading,
    migrate,
    receiving,
    source_of,
    start,
)
from tests.live.some import oldest_and_newest
from tests.live.versions import Qemu, newest

pytestmark = [pytest.mark.live, pytest.mark.asyncio]

SCHEMA: Final = json.loads((Path(qmigrate.__file__).parent / "report" / "receive.schema.json").read_text())


def the_newest() -> Qemu:
    qemu = newest()
    if qemu is None:
        pytest.skip("no QEMU")
    return qemu


async def command(*words: str, **how: Any) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmigrate", "receive", *words), stdout=asyncio.subprocess.PIPE, **how
    )


async def event(process: asyncio.subprocess.Process, name: str, status: str = "") -> dict[str, Any]:
    """The next of these that it tells."""
    assert process.stdout is not None
    async with asyncio.timeout(TIMEOUT_S):
        async for line in process.stdout:
            said: dict[str, Any] = json.loads(line)
            if said["event"] == name and said.get("status", "") == status:
                return said
    raise AssertionError(f"it ended without {name} {status}")


async def ended(process: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(TIMEOUT_S):
        await process.communicate()
    assert process.returncode is not None
    return process.returncode


WAYS: Final = {
    False: {"postcopy-preempt": True},  # by whether it is the oldest
    True: {},
}


@oldest_and_newest
async def test_a_recording_holds_the_ram_that_was_received(qemu: Qemu, tmp_path: Path) -> None:
    """On all channels: multifd before the switch, and the preempt channel after it."""
    raw, tap = tmp_path / "ram", tmp_path / "in.tap"
    is_old = qemu.number < (8,)
    capabilities = {"multifd": True, **WAYS[is_old]}
    with Recorder(tap) as recorder:
        async with (
            source_of(qemu, tmp_path, paused=is_old, guest=LARGER) as source,
            receiving(tmp_path, raw=raw, recorder=recorder, workloads=[Workload(seed=1)], multifd=2) as receiver,
        ):
            await migrate(source, receiver.uri, postcopy=True, capabilities=capabilities)
            result = await receiver.result()
            assert result.exit_code == 0, result.message
            assert result.numbers["duplicates"] == 0
            assert {"pc.ram", "pc.bios"} <= await assert_same_ram(source, raw, tmp_path / "memory")
    with Migration(tap) as recorded:
        extracted = extract(recorded, tmp_path / "recorded")
    assert (extracted.gathering.contents.complete, extracted.gathering.contents.errors) == (True, [])
    for file in raw.glob("*.raw"):
        assert (tmp_path / "recorded" / file.name).read_bytes() == file.read_bytes(), file.name
    with Recording(tap) as recording:
        story = RecordingStory(recording).read()
    assert story.requests.count == result.numbers["requested"]
    assert {channel.forward.kind.name for channel in story.channels} >= {"MAIN", "MULTIFD"}


async def test_a_postcopy_that_breaks_is_recovered_recorded_saved_and_reported(tmp_path: Path) -> None:
    """All by commands, as a person gives them."""
    qemu, control = the_newest(), tmp_path / "control"
    saved, tap, data, page = (tmp_path / name for name in ("guest.mig", "in.tap", "x.json", "page.html"))
    uri, again = f"unix:{tmp_path / 'in'}", f"unix:{tmp_path / 'again'}"
    touch = ["--touch", "random", "--touch-rate", "100"]  # half a minute until all of it was asked for
    kept = ["--save", str(saved), "--record", str(tap), "--json", str(data), "--report", str(page)]
    async with source_of(qemu, tmp_path) as source:
        receive = await command(uri, "--control", str(control), "--ndjson", *touch, *kept)
        try:
            await event(receive, "listening")
            await start(source, uri, postcopy=True, limits={"max-postcopy-bandwidth": HELD})
            await event(receive, "status-changed", "running")
            await migration.wait_until(source.session, "postcopy-active", timeout_s=TIMEOUT_S)
            await source.session.execute("migrate-pause", oob=True)
            await event(receive, "paused")
            await migration.wait_until(source.session, "postcopy-paused", timeout_s=TIMEOUT_S)
            recover = await command("--recover", again, "--control", str(control))
            assert recover.stdout is not None
            assert await recover.stdout.read() == f"it listens at {again} for the source to resume\n".encode()
            assert await recover.wait() == 0
            await hurry(source)
            await migration.start(source.session, again, {"resume": True})
            await migration.wait_until(source.session, "completed", timeout_s=TIMEOUT_S)
            assert await ended(receive) == 0
        finally:
            if receive.returncode is None:
                receive.kill()
                await receive.wait()
    found = json.loads(data.read_text())
    jsonschema.validate(found, SCHEMA)
    phases = [each["phase"] for each in found["phases"]]
    assert phases[0] == "precopy"
    assert phases[-5:] == ["running", "paused", "recovering", "running", "ended"]
    assert (found["guest"], found["numbers"]["duplicates"]) == ("here", 0)
    assert found["waited"]["requests"]["count"] > 0 < found["waited"]["touchers"]["count"]
    assert "Received with postcopy" in page.read_text()
    with Recording(tap) as recording:
        story = RecordingStory(recording).read()
    assert [channel.forward.kind.name for channel in story.channels] == ["MAIN", "RESUMED"]
    assert {path.name for path in tmp_path.iterdir() if path.is_socket()} <= {"source-qmp"}
    async with loading(qemu, tmp_path, saved) as said:
        await console.assert_goes_on(said)


async def test_a_full_disk_in_postcopy_keeps_the_guest_until_it_is_saved_elsewhere(tmp_path: Path) -> None:
    """The source is not let go before."""
    qemu, elsewhere = the_newest(), tmp_path / "elsewhere.mig"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with source_of(qemu, tmp_path) as source, receiving(tmp_path, save=tmp_path / "x.mig") as receiver:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # this process's: it writes the file
        try:
            await start(source, receiver.uri, postcopy=True)
            event = await receiver.wait_for(lambda event: isinstance(event, NotSaved))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert isinstance(event, NotSaved)
        assert "File too large" in event.reason
        assert (await migration.query(source.session))["status"] == "postcopy-active"
        assert not list(tmp_path.glob("*.mig*"))
        assert await ask(Path(event.control), "save", str(elsewhere)) == str(elsewhere)
        await migration.wait_until(source.session, "completed", timeout_s=TIMEOUT_S)
        assert (await receiver.result()).exit_code == 0
    async with loading(qemu, tmp_path, elsewhere) as said:
        await console.assert_goes_on(said)


@pytest.mark.parametrize("listens", [False, True], ids=["connected", "listening"])
async def test_a_socket_is_inherited(listens: bool, tmp_path: Path) -> None:
    """One that listens, as a service manager hands it over, or one that a source is at already."""
    path, raw = str(tmp_path / "in"), tmp_path / "ram"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        async with source_of(the_newest(), tmp_path) as source:
            if listens:
                peer = listener
            else:
                await start(source, f"unix:{path}", postcopy=True)
                peer = await asyncio.to_thread(lambda: listener.accept()[0])
            words = [f"fd:{peer.fileno()}", "--raw", str(raw), "--control", str(tmp_path / "control")]
            receive = await command(*words, pass_fds=[peer.fileno()])
            if listens:
                await start(source, f"unix:{path}", postcopy=True)
            else:
                peer.close()
            await migration.wait_until(source.session, "completed", timeout_s=TIMEOUT_S)
            assert await ended(receive) == 0
            assert {"pc.ram", "pc.bios"} <= await assert_same_ram(source, raw, tmp_path / "memory")


async def test_a_file_is_read_from_an_offset(tmp_path: Path) -> None:
    stream, raw = tmp_path / "stream", tmp_path / "ram"
    async with source_of(the_newest(), tmp_path) as source:
        await migration.start(source.session, f"file:{stream},offset=0x1000")
        await migration.wait_until(source.session, "completed", timeout_s=TIMEOUT_S)
        words = [f"file:{stream},offset=0x1000", "--raw", str(raw), "--control", str(tmp_path / "control")]
        assert await ended(await command(*words)) == 0
        assert {"pc.ram", "pc.bios"} <= await assert_same_ram(source, raw, tmp_path / "memory")


RELAY: Final = """
import os, socket, sys, threading
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
source, _ = listener.accept()
def pass_on(read, write):
    while piece := read(1 << 16):
        write(piece)
threading.Thread(target=pass_on, args=(lambda n: os.read(0, n), source.sendall), daemon=True).start()
pass_on(source.recv, lambda piece: os.write(1, piece))
"""


async def test_a_command_that_also_reads_carries_the_return_path(tmp_path: Path) -> None:
    """``exec:`` of what goes through to another host: postcopy works there, too."""
    path, script, raw = tmp_path / "relayed", tmp_path / "relay.py", tmp_path / "ram"
    script.write_text(RELAY)
    uri = f"exec:exec {shlex.join([sys.executable, str(script), str(path)])}"
    async with source_of(the_newest(), tmp_path) as source, receiving(tmp_path, uri, raw=raw) as receiver:
        async with asyncio.timeout(TIMEOUT_S):
            while not path.exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.01)
        await migrate(source, f"unix:{path}", postcopy=True)
        result = await receiver.result()
        assert (result.exit_code, result.is_postcopy) == (0, True)
        assert {"pc.ram", "pc.bios"} <= await assert_same_ram(source, raw, tmp_path / "memory")
