"""Two QEMUs that share nothing but a network: QMP and the migration over TCP, each at an address of its own."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmigrate import events
from qmigrate.errors import QmigrateError, RefusedError
from qmigrate.operations import attached
from qmigrate.operations.migrate import migrate
from qmigrate.operations.plan import Plan
from qmigrate.qmp.session import Session
from tests.live.command import qmigrate, started
from tests.live.pair import HELD, Pair, pair
from tests.live.some import only_newest
from tests.live.versions import Qemu

pytestmark = [pytest.mark.live, pytest.mark.asyncio]


HERE, THERE = "127.0.0.1", "127.0.0.2"


@asynccontextmanager
async def two_hosts(qemu: Qemu, folder: Path) -> AsyncGenerator[tuple[Pair, str, str]]:
    """A pair, and where QMP of each is: HOST:PORT."""
    one, two = [
        ["-chardev", f"socket,id=far,host={host},port=0,server=on,wait=off", "-mon", "chardev=far,mode=control"]
        for host in (HERE, THERE)
    ]
    async with pair(qemu, folder, source_more=one, destination_more=two) as both:
        yield both, await address_of(both.source.session), await address_of(both.destination.session)


async def address_of(session: Session) -> str:
    devices = {each["label"]: each["filename"] for each in await session.execute("query-chardev")}
    found = re.search(r"tcp:([0-9.]+:\d+)", devices["far"])
    assert found, devices["far"]
    return found[1]


@only_newest
async def test_a_postcopy_between_two_hosts_is_paused_and_brought_back_through_another_port(
    qemu: Qemu, tmp_path: Path
) -> None:
    async with two_hosts(qemu, tmp_path) as (both, source, destination):
        assert (source.partition(":")[0], destination.partition(":")[0]) == (HERE, THERE)
        code, _, err = await qmigrate("migrate", source, destination)
        assert (code, "where it shall listen isn't known: say it with --uri" in err) == (2, True)

        slow = ["--bandwidth", str(HELD), "--postcopy-bandwidth", str(HELD), "--downtime-limit", "1"]
        any_port = ["--uri", f"tcp:{THERE}:0"]
        process = await started("migrate", source, destination, *any_port, "--postcopy", *slow, "--ndjson")
        while process.returncode is None:
            try:
                await attached.pause(*both.sessions)
                break
            except QmigrateError:  # it is not in postcopy yet
                await asyncio.sleep(0.01)
        said, _ = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 5, said.decode().splitlines()[-1]

        await both.hurry()
        code, out, err = await qmigrate("recover", source, destination, *any_port, "--ndjson")
        heard = [json.loads(line) for line in out.splitlines()]
        assert (code, heard[-1]["message"]) == (0, "migrated with postcopy, brought back once"), err
        resumed = [each["arguments"] for each in heard if each.get("command") == "migrate"]
        assert re.search(rf"{re.escape(THERE)}\D+[1-9]\d+", json.dumps(resumed)), resumed
        await both.assert_guest_goes_on()


@only_newest
async def test_a_destination_that_listens_at_any_address_is_connected_to_by_the_name_that_was_given(
    qemu: Qemu, tmp_path: Path
) -> None:
    async with two_hosts(qemu, tmp_path) as (both, _, destination):
        with pytest.raises(RefusedError, match="at any address of its host: say with --uri which"):
            await migrate(*both.sessions, Plan(listen="tcp:0.0.0.0:0"))
        async with Session.connect((THERE, int(destination.partition(":")[2]))) as there:
            plan = Plan(listen="tcp:0.0.0.0:0", uri=f"tcp:{THERE}:0", answer_timeout_s=60.0)
            result = await migrate(both.source.session, there, plan)
        assert result.exit_code == 0, result.message
        commands = [each for each in result.events if isinstance(each, events.CommandSent)]
        (uri,) = [each.arguments["uri"] for each in commands if each.command == "migrate"]
        assert re.fullmatch(rf"tcp:{re.escape(THERE)}:[1-9]\d+", uri)
        await both.assert_guest_goes_on()
