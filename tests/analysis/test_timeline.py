"""Events of two sides with two clocks become one axis of time."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate import events
from qmigrate.analysis.timeline import Pass, Phase, Stop, Stretch, timeline
from qmigrate.events import Side
from tests import stories
from tests.stories import MIB, ZERO_US, Story

SOURCE, DESTINATION = Side.SOURCE, Side.DESTINATION


def test_phases_follow_on_each_other_to_the_end() -> None:
    line = timeline(stories.precopy().events)
    assert line.sides[SOURCE].phases == [
        Phase(1_000, 3_000, "setup"),
        Phase(3_000, 1_997_000, "active"),
        Phase(1_997_000, 2_000_000, "completed"),
    ]
    assert [phase.status for phase in line.sides[DESTINATION].phases] == ["active", "completed"]
    assert (line.zero_us, line.length_us) == (ZERO_US, 2_000_000)


def test_the_guest_runs_on_one_side_then_on_none_then_on_the_other() -> None:
    line = timeline(stories.precopy().events)
    assert line.sides[SOURCE].runs == [Stretch(0, 1_990_000)]
    assert line.sides[DESTINATION].runs == [Stretch(1_995_000, 2_000_000)]
    assert line.stops == [Stop(1_990_000, 1_995_000, DESTINATION)]
    assert line.downtime_ms == 6


def test_a_guest_that_goes_on_nowhere_is_stopped_to_the_end() -> None:
    story = Story()
    story.begins()
    story.status(0, SOURCE, "active")
    story.guest(500, SOURCE, running=False)
    story.ends(1_000, "failed")
    assert timeline(story.events).stops == [Stop(500, 1_000, None)]


def test_a_guest_that_goes_on_where_it_was_is_said_to() -> None:
    story = Story()
    story.begins()
    story.guest(500, SOURCE, running=False)
    story.guest(900, SOURCE, running=True)
    story.ends(1_000, "cancelled")
    assert timeline(story.events).stops == [Stop(500, 900, SOURCE)]


def test_passes_and_samples_are_at_their_times() -> None:
    line = timeline(stories.precopy().events)
    assert line.passes == [Pass(3_500, 1), Pass(1_000_000, 2), Pass(1_800_000, 3)]
    assert [sample.at_us for sample in line.samples[:3]] == [100_000, 200_000, 300_000]
    assert line.last is not None
    assert line.last.transferred_bytes == 40 * MIB


def test_what_was_sent_between_samples_is_all_that_was_sent() -> None:
    line = timeline(stories.precopy().events)
    for limit in (3, 10, 500):
        rates = line.rates(limit)
        assert len(rates) <= max(limit, 20)
        sent = sum((rate.sent_bytes_per_s or 0) * rate.length_us / 1e6 for rate in rates)
        assert sent == pytest.approx(40 * MIB - 2 * MIB)


def test_no_dirty_rate_is_told_of_a_guest_that_has_left() -> None:
    """QEMU goes on to tell the last one."""
    line = timeline(stories.postcopy().events)
    assert {sample.dirty_bytes_per_s for sample in line.samples} == {None, 77}
    assert {rate.dirty_bytes_per_s for rate in line.rates()} == {None}


def test_a_counter_that_begins_anew_is_no_rate() -> None:
    story = Story()
    story.begins()
    for at_us, sent in ((0, 50), (1_000_000, 20), (2_000_000, 30)):
        story.numbers(at_us, transferred_bytes=sent, remaining_bytes=1)
    story.ends(2_000_000)
    assert [rate.sent_bytes_per_s for rate in timeline(story.events).rates()] == [None, 10.0]


def test_many_samples_are_thinned_and_keep_their_peaks() -> None:
    story = Story()
    story.begins()
    for at in range(10_000):
        story.numbers(at * 1_000, remaining_bytes=1_000_000 if at == 4_321 else at, transferred_bytes=at)
    line = timeline(story.events)
    thinned = line.thinned(200)
    assert len(thinned) <= 202
    assert max(each.remaining_bytes or 0 for each in thinned) == 1_000_000
    assert thinned[-1] == line.samples[-1]
    assert len(line.rates(200)) <= 201


# ---- clocks ----


@pytest.mark.parametrize("off_us", [-3_600_000_000, -50_000, 50_000, 7_200_000_000])
def test_the_clock_of_another_host_is_made_ours(off_us: int) -> None:
    here, there = timeline(stories.precopy().events), timeline(stories.precopy(off_us={DESTINATION: off_us}).events)
    clock = there.sides[DESTINATION].clock
    assert clock.offset_us == pytest.approx(-off_us, abs=clock.error_us)
    assert clock.error_us == 200  # half the time that a question took
    for ours, theirs in zip(here.sides[DESTINATION].phases, there.sides[DESTINATION].phases, strict=True):
        assert theirs.begin_us == pytest.approx(ours.begin_us, abs=clock.error_us)
    assert there.sides[SOURCE].clock.offset_us == 0


def test_a_clock_that_nobody_asked_is_known_less_well() -> None:
    clock = timeline(stories.failed(off_us={DESTINATION: 10**9}).events).sides[DESTINATION].clock
    assert (clock.offset_us, clock.error_us) == (300 - 10**9, 20_000)


@pytest.mark.parametrize("off_us", [0, -5_000, 1_500])
def test_a_clock_as_near_as_events_are_late_is_taken_to_be_ours(off_us: int) -> None:
    clock = timeline(stories.precopy(off_us={SOURCE: off_us}).events).sides[SOURCE].clock
    assert (clock.offset_us, clock.error_us, clock.stamp_count) == (0, abs(300 - off_us), 7)


def test_nothing_is_placed_after_we_heard_of_it() -> None:
    line = timeline(stories.precopy(off_us={SOURCE: 40_000_000}).events)
    assert all(each.at_us <= each.event.time_us - ZERO_US for each in line.moments)


def test_without_stamps_the_time_of_hearing_counts() -> None:
    story = Story()
    story.begins()
    story.events.append(events.StatusChanged(side=SOURCE, time_us=ZERO_US + 70, status="active", heard=False))
    story.ends(100)
    source = timeline(story.events).sides[SOURCE]
    assert source.phases == [Phase(70, 100, "active", heard=False)]
    assert source.clock.stamp_count == 0


# ---- what is strange ----


def test_no_events_are_an_empty_axis() -> None:
    line = timeline([])
    assert (line.length_us, line.samples, line.stops, line.moments, line.last, line.rates()) == (
        0,
        [],
        [],
        [],
        None,
        [],
    )
    assert all(not side.phases and not side.runs for side in line.sides.values())


def test_what_an_earlier_migration_left_behind_is_no_phase() -> None:
    old = events.StatusChanged(side=SOURCE, time_us=ZERO_US - 5, status="cancelled", heard=False)
    story = stories.precopy()
    assert timeline([old, *story.events]).sides[SOURCE].phases == timeline(story.events).sides[SOURCE].phases


def test_what_a_recovery_finds_is_its_first_phase() -> None:
    story = Story()
    story.events.append(events.StatusChanged(side=SOURCE, time_us=ZERO_US - 5, status="postcopy-paused", heard=False))
    story.begins(operation="recover")
    story.ends(100)
    assert timeline(story.events).sides[SOURCE].phases == [Phase(0, 100, "postcopy-paused", heard=False)]


@given(st.lists(st.tuples(st.sampled_from(Side), st.integers(-(10**18), 10**18), st.integers(-(10**18), 10**18))))
def test_any_times_make_an_axis(stamps: list[tuple[Side, int, int]]) -> None:
    told: list[Any] = [
        event(side=side, time_us=heard_us, qemu_us=qemu_us, **more)
        for side, heard_us, qemu_us in stamps
        for event, more in (
            (events.StatusChanged, {"status": "active"}),
            (events.GuestChanged, {"running": heard_us % 2 == 0}),
            (events.Progressed, {"status": "", "transferred_bytes": abs(qemu_us)}),
        )
    ]
    line = timeline(told)
    for side in line.sides.values():
        assert all(phase.length_us >= 0 for phase in side.phases)
        assert all(run.length_us >= 0 for run in side.runs)
    assert all(rate.length_us > 0 for rate in line.rates())
    assert all(stop.length_us > 0 for stop in line.stops)
