"""The commands for a migration under way, which somebody else began, without events; and Ctrl-C."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmigrate.errors import RefusedError
from qmigrate.operations import attached
from qmigrate.operations.migrate import recover
from qmigrate.operations.plan import Plan
from qmigrate.qmp import migration
from tests.guests import console
from tests.live import versions
from tests.live.command import qmigrate, started
from tests.live.pair import HELD, Pair, pair
from tests.live.some import every_qemu, oldest_and_newest, only_newest
from tests.live.versions import Qemu

pytestmark = [pytest.mark.live, pytest.mark.asyncio]


@asynccontextmanager
async def under_way(qemu: Qemu, folder: Path, *, postcopy: bool = True) -> AsyncGenerator[Pair]:
    """As another tool would begin it: precopy that does not converge, no capability `events`."""
    async with pair(qemu, folder) as two:
        for session in two.sessions:
            await migration.set_capabilities(session, {"postcopy-ram": postcopy})
        limits = {"max-bandwidth": HELD, "downtime-limit": 1, "max-postcopy-bandwidth": HELD}
        await migration.set_parameters(two.source.session, limits)
        await migration.start_incoming(two.destination.session, two.uri)
        await migration.start(two.source.session, two.uri)
        await migration.wait_until(two.source.session, "active", timeout_s=60)
        yield two


@oldest_and_newest
async def test_start_postcopy(qemu: Qemu, tmp_path: Path) -> None:
    async with under_way(qemu, tmp_path) as two:
        source, _ = two.addresses
        code, out, err = await qmigrate("start-postcopy", source)
        assert (code, out, err) == (0, "switched to postcopy\n", "")
        await two.hurry()
        await migration.wait_until(two.source.session, "completed", timeout_s=60)
        assert await qmigrate("start-postcopy", source) == (0, "already complete: there is nothing to switch\n", "")
        await two.assert_guest_goes_on()


@oldest_and_newest
async def test_cancel(qemu: Qemu, tmp_path: Path) -> None:
    async with under_way(qemu, tmp_path) as two:
        source, destination = two.addresses
        code, _, err = await qmigrate("cancel", destination)
        assert code == 2
        assert "it is the destination" in err or "waits for a guest" in err
        assert await qmigrate("cancel", source) == (0, "cancelled; the guest stays on the source\n", "")
        assert await qmigrate("cancel", source) == (0, "it is cancelled already\n", "")
        await two.assert_guest_stayed()


@only_newest
async def test_pause_and_recover(qemu: Qemu, tmp_path: Path) -> None:
    async with under_way(qemu, tmp_path) as two:
        source, destination = two.addresses
        code, _, err = await qmigrate("pause", source, destination)
        assert (code, "only postcopy can be paused" in err) == (2, True)
        await attached.start_postcopy(two.source.session)
        # Paused before its guest has what it needs, the destination may answer nothing.
        await console.wait_for_passes(two.console, 1)
        assert (await qmigrate("pause", source, destination))[:2] == (
            0,
            "paused; `qmigrate recover SRC DST` resumes it\n",
        )
        code, out, _ = await qmigrate("status", source, destination)
        assert (code, "The migration is paused: the guest is on the destination" in out) == (0, True)
        code, out, _ = await qmigrate("status", destination, source)
        assert "The first is the destination, the second the source.\nThe migration is paused" in out
        code, _, err = await qmigrate("recover", destination, source, "--uri", f"unix:{tmp_path / 'again'}")
        assert (code, "source: it receives the guest itself; the source comes first" in err) == (2, True)
        code, _, err = await qmigrate("cancel", source)
        assert (code, "cancelling would lose it" in err) == (2, True)
        await two.hurry()
        code, out, err = await qmigrate("recover", source, destination, "--uri", f"unix:{tmp_path / 'again'}")
        assert (code, out.splitlines()[0]) == (0, "migrated with postcopy, brought back once"), err
        code, _, err = await qmigrate("pause", source, destination)
        assert (code, "already complete" in err) == (2, True)
        await two.assert_guest_goes_on()


@every_qemu
async def test_a_pause_is_refused_while_it_could_lose_the_guest_and_else_can_be_recovered_from(
    qemu: Qemu, tmp_path: Path
) -> None:
    async with under_way(qemu, tmp_path) as two:
        await attached.start_postcopy(two.source.session)
        knows = "postcopy-device" in str(await two.source.session.execute("query-qmp-schema"))
        if knows:
            done = await attached.pause(two.source.session)
        else:
            with pytest.raises(RefusedError, match="give the destination's address too"):
                await attached.pause(two.source.session)
            done = await attached.pause(*two.sessions)
        assert (done.message, done.view.status) == (
            "paused; `qmigrate recover SRC DST` resumes it",
            "postcopy-paused",
        )
        await two.hurry()
        result = await recover(*two.sessions, Plan(uri=f"unix:{tmp_path / 'again'}", recoveries=1))
        assert (result.exit_code, result.recoveries) == (0, 1), result.message
        await two.assert_guest_goes_on()


@only_newest
async def test_status_of_every_kind(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        source, destination = two.addresses
        code, out, _ = await qmigrate("status", "--json", source, destination)
        said = json.loads(out)
        assert (code, said["guest"]["place"]) == (0, "source")
        assert [side["run-state"] for side in said["sides"]] == ["running", "inmigrate"]
        code, out, _ = await qmigrate("status", source, str(tmp_path / "nobody"))
        assert (code, "is gone (No such file or directory)" in out) == (1, True)
        assert (await qmigrate("status", str(tmp_path / "nobody")))[0] == 2


async def interrupted(two: Pair, *words: str, when: bytes) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of `migrate`, which gets Ctrl-C each time it says ``when``."""
    process = await started("migrate", *two.addresses, "--uri", two.uri, "--ndjson", *words)
    assert process.stdout is not None
    assert process.stderr is not None
    said = b""
    async with asyncio.timeout(60):
        async for line in process.stdout:
            said += line
            if when in line:
                process.send_signal(signal.SIGINT)
                when = b'"decision": "leave"'
        err = await process.stderr.read()
        return await process.wait(), said.decode(), err.decode()


@only_newest
async def test_ctrl_c_in_precopy_leaves_the_guest_on_the_source(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        code, out, err = await interrupted(two, "--bandwidth", "4M", "--downtime-limit", "1", when=b'"pass-began"')
        assert code == 3, err
        assert json.loads(out.splitlines()[-1])["place"] == "source"
        assert "Traceback" not in err
        assert err.endswith("in precopy: interrupted\n")
        await two.assert_guest_stayed()


@oldest_and_newest
async def test_ctrl_c_after_the_switch_explains_then_pauses(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        limits = ["--bandwidth", str(HELD), "--postcopy-bandwidth", str(HELD), "--downtime-limit", "1"]
        code, out, err = await interrupted(two, "--postcopy", *limits, when=b'"decision": "switch"')
        said = [json.loads(line) for line in out.splitlines()]
        decisions = [each["decision"] for each in said if each["event"] == "decided"]
        assert decisions[:3] == ["switch", "leave", "pause"], err
        assert (code, said[-1]["place"]) == (5, "paused"), said[-1]
        assert "qmigrate recover SRC DST" in said[-1]["advice"]
        two.kill()


async def test_a_killed_driver_leaves_a_postcopy_that_ends_well(tmp_path: Path) -> None:
    qemu = versions.newest()
    if qemu is None:
        pytest.skip("no QEMU is installed: scripts/qemu_versions")
    async with pair(qemu, tmp_path) as two:
        process = await started("migrate", *two.addresses, "--uri", two.uri, "--ndjson", "--postcopy")
        assert process.stdout is not None
        async for line in process.stdout:
            if b'"decision": "switch"' in line or b'"postcopy-active"' in line:
                break
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        await migration.wait_until(two.source.session, "completed", timeout_s=60)
        await two.assert_guest_goes_on()
