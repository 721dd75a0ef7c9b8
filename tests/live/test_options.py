"""What a plan asks for reaches a real QEMU, and what can't be had is refused before anything begins."""

from pathlib import Path
from typing import Any

import pytest

from qmigrate import events
from qmigrate.errors import RefusedError
from qmigrate.events import LiveEvent
from qmigrate.operations.migrate import migrate
from qmigrate.operations.plan import Plan
from qmigrate.operations.policy import AtOnce
from qmigrate.operations.result import Outcome
from qmigrate.qmp import migration
from qmigrate.qmp.features import Features
from tests.live.command import qmigrate
from tests.live.pair import AT_ONCE, Pair, pair
from tests.live.some import every_qemu, oldest_and_newest, only_newest
from tests.live.versions import Qemu

pytestmark = [pytest.mark.live, pytest.mark.asyncio]


def plan_for(two: Pair, **wishes: Any) -> Plan:
    return Plan(**{"uri": two.uri, "answer_timeout_s": 60.0, **wishes})


async def capabilities(two: Pair) -> dict[str, bool]:
    return await migration.capabilities(two.source.session)


async def refused(two: Pair, message: str, **wishes: Any) -> None:
    """Refused in these words; and nothing has begun, nor was anything changed."""
    before = [await migration.capabilities(session) for session in two.sessions]
    with pytest.raises(RefusedError, match=message):
        await migrate(*two.sessions, plan_for(two, **wishes))
    assert [await migration.capabilities(session) for session in two.sessions] == before
    assert (await migration.query(two.source.session))["status"] == "none"
    assert (await two.source.session.execute("query-status"))["running"]


@every_qemu
async def test_preempt(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        wishes = {"preempt": True, **AT_ONCE}
        if "postcopy-preempt" not in await capabilities(two):
            await refused(two, "source: it has no capability postcopy-preempt; it has auto-converge, ", **wishes)
            return
        result = await migrate(*two.sessions, plan_for(two, **wishes))
        assert (result.message, result.exit_code) == ("migrated with postcopy", 0)
        assert (await capabilities(two))["postcopy-preempt"]
        await two.assert_guest_goes_on()


@every_qemu
async def test_multifd_with_compression(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        await refused(two, "multifd-compression can't be lz2031; it can be none, ", multifd=3, compression="lz2031")
        result = await migrate(*two.sessions, plan_for(two, multifd=3, compression="zlib"))
        assert result.exit_code == 0, result.message
        assert result.statistics[events.Side.SOURCE]["ram"]["multifd-bytes"] > 0
        parameters = await two.destination.session.execute("query-migrate-parameters")
        assert (parameters["multifd-channels"], parameters["multifd-compression"]) == (3, "zlib")
        await two.assert_guest_goes_on()


@every_qemu
async def test_multifd_with_postcopy_is_refused_where_it_ends_badly(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        wishes = {"multifd": 2, **AT_ONCE}
        if qemu.name == "7.2":
            await refused(two, "a destination of QEMU 7.2 aborts at the very end .--force does", **wishes)
            return
        if qemu.name == "10.0":
            await refused(two, "source: .*[Mm]ultifd", **wishes)  # in its own words
            return
        result = await migrate(*two.sessions, plan_for(two, **wishes))
        assert (result.message, result.exit_code) == ("migrated with postcopy", 0)
        await two.assert_guest_goes_on()


@oldest_and_newest
async def test_xbzrle_and_limits(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        plan = plan_for(
            two, xbzrle=True, bandwidth=1 << 30, downtime_limit_ms=500, parameters={"xbzrle-cache-size": 1 << 24}
        )
        result = await migrate(*two.sessions, plan)
        assert result.exit_code == 0, result.message
        parameters = await two.source.session.execute("query-migrate-parameters")
        told = [parameters[name] for name in ("max-bandwidth", "downtime-limit", "xbzrle-cache-size")]
        assert told == [1 << 30, 500, 1 << 24]
        assert (await capabilities(two))["xbzrle"]
        await two.assert_guest_goes_on()


@oldest_and_newest
@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_a_hook_runs_before_the_switchover(postcopy: bool, qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        seen: list[Any] = []

        async def hook() -> None:
            seen.append(await migration.query(two.source.session))
            seen.append(await two.source.session.execute("query-status"))

        wishes = AT_ONCE if postcopy else {}
        result = await migrate(*two.sessions, plan_for(two, before_switchover=hook, **wishes))
        assert (result.exit_code, result.switched) == (0, postcopy)
        assert (seen[0]["status"], seen[1]["running"]) == ("pre-switchover", False)
        await two.assert_guest_goes_on()


@only_newest
async def test_a_hook_that_fails_leaves_the_guest_on_the_source(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:

        async def hook() -> None:
            raise RuntimeError("the disk is not there yet")

        result = await migrate(*two.sessions, plan_for(two, before_switchover=hook))
        assert (result.outcome, result.exit_code) == (Outcome.CANCELLED, 3)
        assert "the hook before the switchover failed: the disk is not there yet" in result.message
        await two.assert_guest_stayed()


@oldest_and_newest
async def test_what_can_not_be_had_is_refused_before_anything_begins(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        await refused(
            two, "source: it has no parameter x-of-2031; it has announce-initial, ", parameters={"x-of-2031": 1}
        )
        await refused(two, "source: it has no capability x-2031", capabilities={"x-2031": True})
        await refused(two, "source: it has no TLS credentials tls0; it has none", tls_creds="tls0")
        await refused(two, "through exec: or file: it never completes", uri="exec:cat", postcopy=[AtOnce()])
        await refused(two, "has 107 bytes at most", uri=f"unix:/{'x' * 107}")
        await refused(two, "the last port is 65535", listen="tcp:127.0.0.1:65536")
        with pytest.raises(RefusedError, match="destination: it takes no guest: it is running"):
            await migrate(two.source.session, two.source.session, plan_for(two))
        with pytest.raises(RefusedError, match="source: it waits for a guest itself"):
            await migrate(two.destination.session, two.source.session, plan_for(two))
        # Last, since a newer QEMU takes no other address after that.
        after = "/nowhere.*: start the destination anew" if qemu.number >= (10,) else "/nowhere"
        await refused(two, f"destination: .*{after}", uri="unix:/nowhere/at/all")
        await two.assert_guest_stayed()


@oldest_and_newest
async def test_a_paused_guest_stays_paused_by_precopy_and_is_refused_postcopy(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        await two.source.session.execute("stop")
        with pytest.raises(RefusedError, match="the guest is paused, and after postcopy it would run"):
            await migrate(*two.sessions, plan_for(two, postcopy=[AtOnce()]))
        result = await migrate(*two.sessions, plan_for(two))
        assert (result.exit_code, result.guest.running) == (0, False)
        await two.destination.session.execute("cont")
        await two.assert_guest_goes_on()


@oldest_and_newest
async def test_what_is_refused_is_done_with_force(qemu: Qemu, tmp_path: Path) -> None:
    """The guest runs afterwards, as the refusal said: here this is what is wanted."""
    async with pair(qemu, tmp_path) as two:
        await two.source.session.execute("stop")
        where = [*two.addresses, "--uri", two.uri, "--postcopy"]
        code, _, err = await qmigrate("migrate", *where)
        assert (code, "after postcopy it would run: that it was paused is not sent (--force does it all" in err) == (
            2,
            True,
        )
        code, out, err = await qmigrate("migrate", *where, "--bandwidth", "4M", "--downtime-limit", "1", "--force")
        assert (code, out.splitlines()[0]) == (0, "migrated with postcopy"), err
        await two.assert_guest_goes_on()


@oldest_and_newest
async def test_x_postcopy_ram_by_property(qemu: Qemu, tmp_path: Path) -> None:
    """The capability is on before anybody asks, through the old name of the property."""
    async with pair(qemu, tmp_path, more=["-global", "migration.x-postcopy-ram=on"]) as two:
        assert (await capabilities(two))["postcopy-ram"]
        result = await migrate(*two.sessions, plan_for(two, **AT_ONCE))
        assert (result.message, result.exit_code) == ("migrated with postcopy", 0)
        await two.assert_guest_goes_on()


@only_newest
async def test_the_schema_is_asked_once_a_session(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        first = await Features.of(two.source.session, timeout_s=60)
        again = await Features.of(two.source.session, timeout_s=60)
        assert first.schema is again.schema
        assert "postcopy-active" in first.statuses
        assert first.schema.has_command("migrate-recover")


@only_newest
async def test_channels_take_the_place_of_uri(qemu: Qemu, tmp_path: Path) -> None:
    """No QEMU lacks `uri` yet: take it out of what this one says of itself."""
    async with pair(qemu, tmp_path) as two:
        for session in two.sessions:
            schema = (await Features.of(session, timeout_s=60)).schema
            for command in ("migrate", "migrate-incoming"):
                if "channels" not in schema.arguments(command):
                    pytest.skip(f"QEMU {qemu.name} has no channels")
                kind = schema._entries[schema._entries[command]["arg-type"]]
                kind["members"] = [member for member in kind["members"] if member["name"] != "uri"]
        heard: list[LiveEvent] = []
        result = await migrate(*two.sessions, plan_for(two), on_event=heard.append)
        assert result.exit_code == 0, result.message
        sent = {each.command: each.arguments for each in heard if isinstance(each, events.CommandSent)}
        assert sent["migrate"].keys() == {"channels"}
        assert sent["migrate-incoming"].keys() >= {"channels"}
        await two.assert_guest_goes_on()
