"""What goes wrong with a real QEMU ends in one clear message, and says truly where the guest is."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from qmigrate import events
from qmigrate.events import LiveEvent, Side
from qmigrate.operations.drive import Driver
from qmigrate.operations.migrate import migrate
from qmigrate.operations.plan import Plan
from qmigrate.operations.policy import AtOnce
from qmigrate.operations.result import MigrationResult, Outcome
from qmigrate.operations.whereabouts import Place
from tests.guests import console
from tests.guests.build import Guest
from tests.live.pair import HELD, Pair, pair
from tests.live.some import every_qemu, oldest_and_newest, only_newest
from tests.live.versions import Qemu

pytestmark = [pytest.mark.live, pytest.mark.asyncio]


Act = Callable[[], None]
# Before it hangs, and where it does not, QEMU answers sooner, also on a slow machine that is disturbed.
HANGS_AFTER_S: Final = 2.0


def plan_for(two: Pair, *, switch: bool = False, answer_timeout_s: float = 60.0) -> Plan:
    """Precopy that does not converge, or postcopy slow enough to be interfered with."""
    return Plan(
        uri=two.uri,
        postcopy=[AtOnce()] if switch else [],
        bandwidth=HELD,
        postcopy_bandwidth=HELD,
        downtime_limit_ms=1,
        answer_timeout_s=answer_timeout_s,
    )


def once(condition: Callable[[LiveEvent], bool], act: Act) -> Callable[[LiveEvent], None]:
    """Act at the first event for which this holds."""
    done: list[LiveEvent] = []

    def heard(event: LiveEvent) -> None:
        if not done and condition(event):
            done.append(event)
            act()

    return heard


def in_precopy(event: LiveEvent) -> bool:
    return isinstance(event, events.Progressed) and event.side is Side.SOURCE and bool(event.transferred_bytes)


def taken_over(event: LiveEvent) -> bool:
    return isinstance(event, events.GuestChanged) and event.side is Side.DESTINATION and event.running


def walked(two: Pair) -> Callable[[LiveEvent], bool]:
    """The guest has all that it needs there.

    Before that its first interrupt may wait for a page, and QEMU with it, which then answers nothing.
    """
    return lambda _: bool(console.passes(two.console))


async def interfered(
    two: Pair,
    act: Act,
    *,
    when: Callable[[LiveEvent], bool] | None = None,
    switch: bool = False,
    answer_timeout_s: float = 60.0,
) -> MigrationResult:
    when = when or (taken_over if switch else in_precopy)
    plan = plan_for(two, switch=switch, answer_timeout_s=answer_timeout_s)
    return await migrate(*two.sessions, plan, on_event=once(when, act))


@oldest_and_newest
async def test_a_destination_that_dies_in_precopy_leaves_the_guest_on_the_source(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        result = await interfered(two, two.destination.kill)
        assert (result.outcome, result.exit_code, result.guest.running) == (Outcome.FAILED, 3, True)
        assert "destination, in precopy: " in result.message
        assert "killed by SIGKILL" in result.message
        await two.assert_guest_stayed()


@oldest_and_newest
async def test_a_source_that_dies_in_precopy_takes_the_guest_with_it(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        result = await interfered(two, two.source.kill)
        assert (result.exit_code, result.place) == (6, Place.LOST)
        assert result.message.startswith("source, in precopy: ")
        assert result.guest.sentence.startswith("The guest is lost: ")


@oldest_and_newest
async def test_a_destination_that_dies_in_postcopy_takes_the_guest_with_it(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        result = await interfered(two, two.destination.kill, switch=True)
        assert (result.exit_code, result.place) == (6, Place.LOST)
        assert "destination, in postcopy: " in result.message
        two.kill()


@oldest_and_newest
async def test_a_source_that_dies_in_postcopy_loses_the_guest(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        result = await interfered(two, two.source.kill, switch=True)
        assert (result.exit_code, result.place) == (6, Place.LOST)
        assert "memory that was not sent yet" in result.guest.sentence
        two.kill()


@only_newest
async def test_a_destination_that_hangs_in_precopy_leaves_the_guest_on_the_source(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        hang = lambda: os.kill(two.destination.pid, signal.SIGSTOP)  # noqa: E731
        result = await interfered(two, hang, answer_timeout_s=HANGS_AFTER_S)
        assert (result.outcome, result.exit_code) == (Outcome.FAILED, 3)
        assert "destination, in precopy: " in result.message
        assert f"no answer within {HANGS_AFTER_S:g} s" in result.message
        await two.assert_guest_stayed()
        two.destination.kill()


@only_newest
async def test_a_source_that_hangs_is_nowhere_to_be_asked(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        hang = lambda: os.kill(two.source.pid, signal.SIGSTOP)  # noqa: E731
        result = await interfered(two, hang, answer_timeout_s=HANGS_AFTER_S)
        assert (result.exit_code, result.place) == (7, Place.UNKNOWN)
        assert result.message.startswith(f"source, in precopy: query-migrate: no answer within {HANGS_AFTER_S:g} s")
        assert "was on the source when that last answered" in result.guest.sentence
        two.kill()


@only_newest
async def test_a_source_that_hangs_in_postcopy(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        hang = lambda: os.kill(two.source.pid, signal.SIGSTOP)  # noqa: E731
        result = await interfered(two, hang, when=walked(two), switch=True, answer_timeout_s=HANGS_AFTER_S)
        assert (result.exit_code, result.place) == (4, Place.DESTINATION)
        assert "still on the source, which does not answer" in result.guest.sentence
        two.kill()


@oldest_and_newest
async def test_a_destination_of_another_size_refuses_in_its_own_words(qemu: Qemu, tmp_path: Path) -> None:
    bigger = Guest("walker", memory_mib=24)
    async with pair(qemu, tmp_path, destination_more=["-m", str(bigger.memory_mib)]) as two:
        result = await migrate(*two.sessions, Plan(uri=two.uri, answer_timeout_s=60.0))
        assert (result.exit_code, result.guest.running) == (3, True)
        said = result.message + two.destination.stderr
        assert "Size mismatch: pc.ram" in result.message or "Size mismatch: pc.ram" in said
        await two.assert_guest_stayed()


@only_newest
async def test_nobody_listens(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        plan = Plan(uri=f"unix:{tmp_path / 'nobody'}", listen=two.uri, answer_timeout_s=60.0)
        result = await migrate(*two.sessions, plan)
        assert (result.outcome, result.exit_code) == (Outcome.FAILED, 3)
        assert "No such file or directory" in result.message
        await two.assert_guest_stayed()


@only_newest
@pytest.mark.parametrize("switch", [False, True], ids=["precopy", "postcopy"])
async def test_a_qmp_connection_that_is_cut_is_made_anew_to_ask_where_the_guest_is(
    switch: bool, qemu: Qemu, tmp_path: Path
) -> None:
    from qmigrate.qmp.session import Session

    async with pair(qemu, tmp_path) as two:
        source, destination = two.addresses
        async with Session.connect(source) as one, Session.connect(destination) as other:
            cut = one._client.abort
            plan = plan_for(two, switch=switch)
            result = await migrate(one, other, plan, on_event=once(walked(two) if switch else in_precopy, cut))
        assert result.outcome is Outcome.FAILED
        assert result.message.startswith("source, in ")
        assert result.exit_code == (4 if switch else 3), result
        assert result.views[Side.SOURCE].answers
        two.kill()


@every_qemu
async def test_an_interrupt_in_precopy_leaves_the_guest_on_the_source(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        driver = Driver(*two.sessions, plan_for(two), lambda event: interrupt(event))
        interrupt = once(in_precopy, driver.interrupt)
        result = await driver.migrate()
        assert (result.outcome, result.exit_code) == (Outcome.CANCELLED, 3)
        assert result.message == "in precopy: interrupted"
        await two.assert_guest_stayed()


@only_newest
async def test_two_interrupts_in_postcopy_pause_it(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        driver = Driver(*two.sessions, plan_for(two, switch=True), lambda event: heard(event))

        def heard(event: LiveEvent) -> None:
            first(event)
            second(event)

        first = once(taken_over, driver.interrupt)
        second = once(lambda event: isinstance(event, events.Decided) and event.decision == "leave", driver.interrupt)
        result = await driver.migrate()
        assert (result.outcome, result.exit_code, result.place) == (Outcome.PAUSED, 5, Place.PAUSED)
        two.kill()
