"""A postcopy whose connection breaks is brought back, on every version; the guest loses nothing."""

from pathlib import Path
from typing import Any

import pytest

from qmigrate import events
from qmigrate.operations.migrate import migrate, recover
from qmigrate.operations.plan import Plan
from qmigrate.operations.result import Outcome
from qmigrate.operations.whereabouts import Place
from tests.live.broken import broken_pair, broken_plan
from tests.live.pair import HELD, Pair
from tests.live.some import every_qemu, oldest_and_newest, only_newest
from tests.live.versions import Qemu

pytestmark = [pytest.mark.live, pytest.mark.asyncio]


CUT = 256 << 10


def held(two: Pair, **wishes: Any) -> Plan:
    """It is not over for ten seconds, should we be late to hear that it has begun.

    Of 5.2 and 7.2 what is asked for is limited, too: so it takes two cuts a second.
    """
    return broken_plan(two, bandwidth=HELD, postcopy_bandwidth=2 * CUT, **wishes)


@every_qemu
async def test_a_connection_that_breaks_twice_is_brought_back(qemu: Qemu, tmp_path: Path) -> None:
    async with broken_pair(qemu, tmp_path, [CUT, CUT]) as (two, cutter):
        result = await migrate(*two.sessions, held(two), on_event=cutter.heard)
        assert (result.outcome, result.exit_code, result.place) == (Outcome.COMPLETED, 0, Place.DESTINATION)
        assert (cutter.cuts, result.recoveries) == (2, 2)
        assert result.message == "migrated with postcopy, brought back 2 times"
        await two.assert_guest_goes_on()


@only_newest
async def test_without_recovery_it_stays_paused_until_recover(qemu: Qemu, tmp_path: Path) -> None:
    async with broken_pair(qemu, tmp_path, [CUT]) as (two, cutter):
        result = await migrate(*two.sessions, held(two, recoveries=0), on_event=cutter.heard)
        assert (result.outcome, result.exit_code, result.place) == (Outcome.PAUSED, 5, Place.PAUSED)
        assert "qmigrate recover SRC DST" in result.guest.advice
        again = Plan(uri=f"unix:{two.folder / 'again'}", recoveries=1, answer_timeout_s=60.0)
        recovered = await recover(*two.sessions, again)
        assert (recovered.exit_code, recovered.recoveries) == (0, 1)
        assert [each.uri for each in recovered.events if isinstance(each, events.Recovering)] == [again.uri]
        await two.assert_guest_goes_on()


@only_newest
async def test_the_limit_of_recoveries_is_kept(qemu: Qemu, tmp_path: Path) -> None:
    async with broken_pair(qemu, tmp_path, [CUT, CUT // 2]) as (two, cutter):
        result = await migrate(*two.sessions, held(two, recoveries=1), on_event=cutter.heard)
        assert (result.exit_code, result.recoveries, cutter.cuts) == (5, 1, 2)
        # The second cut may come before the driver has looked whether it is back.
        broke = "the connection of the postcopy broke after one attempt to bring it back"
        assert result.message.startswith((f"in postcopy: {broke}", f"in recovery: {broke}")), result.message
        two.kill()


@oldest_and_newest
async def test_nobody_listens_for_a_while(qemu: Qemu, tmp_path: Path) -> None:
    """The source can't reach the destination at first.  One of 5.2 would abort if it tried again."""
    async with broken_pair(qemu, tmp_path, [CUT]) as (two, cutter):
        relay = tmp_path / "relay"

        def heard(event: events.LiveEvent) -> None:
            cutter.heard(event)
            if isinstance(event, events.Recovering):
                (relay.rename if event.attempt == 1 else (tmp_path / "away").rename)(
                    tmp_path / "away" if event.attempt == 1 else relay
                )

        # 5.2 does not say that it could not.
        plan = held(two, connect_timeout_s=1.5 if qemu.name == "5.2" else 60.0)
        result = await migrate(*two.sessions, plan, on_event=heard)
        if qemu.name == "5.2":
            assert (result.exit_code, result.place) == (5, Place.PAUSED)
            assert "it could not connect; a source of QEMU 5.2 aborts when it resumes again" in result.message
            assert two.source.exit_status is None
            two.kill()
            return
        assert (result.exit_code, result.recoveries) == (0, 2), result.message
        await two.assert_guest_goes_on()
