"""Axes, scales and shapes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.report.chart import Axis, Band, Scale, Series, axis_row, lane, percent, plot
from qmigrate.report.units import duration, size

SECOND = 1_000_000


@pytest.mark.parametrize(
    ("length_us", "ticks"),
    [
        (2_120_000, [0, 500_000, 1_000_000, 1_500_000, 2_000_000]),
        (90 * SECOND, [0, 30 * SECOND, 60 * SECOND, 90 * SECOND]),
        (7200 * SECOND, [0, 1800 * SECOND, 3600 * SECOND, 5400 * SECOND, 7200 * SECOND]),
        (1, [0, 1]),
    ],
)
def test_ticks_are_round_times(length_us: int, ticks: list[int]) -> None:
    assert Axis(0, length_us).ticks() == ticks


@given(st.integers(-(10**15), 10**15), st.integers(1, 10**15))
def test_there_are_few_ticks_and_all_are_on_the_axis(begin_us: int, length_us: int) -> None:
    axis = Axis(begin_us, begin_us + length_us, zero_us=begin_us + length_us // 3)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 8
    assert all(axis.begin_us <= at_us <= axis.end_us for at_us in ticks)
    assert axis.zero_us in ticks


def test_a_magnified_axis_counts_from_its_zero() -> None:
    row = axis_row(Axis(1_998_000, 2_003_000, zero_us=2_000_000))
    assert ">-2 ms<" in row
    assert ">0<" in row
    assert ">2 ms<" in row


@given(st.integers(0, 1 << 70), st.booleans())
def test_a_scale_reaches_the_largest_in_few_steps(largest: int, binary: bool) -> None:
    scale = Scale.of(float(largest), str, binary=binary)
    assert scale.top >= largest
    assert len(scale.lines) <= 6
    assert scale.top < max(2.6 * largest, 2)


def test_a_scale_of_bytes_has_binary_steps() -> None:
    scale = Scale.of(14.4 * (1 << 20), lambda value: size(int(value)), binary=True)
    assert [scale.spelled(each) for each in scale.lines[1:]] == ["4 MiB", "8 MiB", "12 MiB", "16 MiB"]


def test_a_band_is_where_its_time_is_and_what_is_outside_is_not_drawn() -> None:
    axis = Axis(0, 1000)
    drawn = lane("Source", [Band(250, 750, "active", "precopy"), Band(2000, 3000, "gone", "precopy")], axis)
    assert 'style="left:25%;width:50%"' in drawn
    assert "gone" not in drawn


def test_a_gap_in_the_numbers_is_a_gap_in_the_line() -> None:
    points = [(0, 1.0), (10, 2.0), (20, None), (30, 3.0)]
    drawn = plot("Left", [Series("left", "left", points)], Axis(0, 30), str)
    assert drawn.count("<path") == 2


def test_steps_hold_until_the_next_value() -> None:
    drawn = plot("Sent", [Series("sent", "sent", [(0, 0.0), (500, 4.0)], "steps")], Axis(0, 1000), str, binary=False)
    assert 'd="M0.00,100.00 500.00,100.00 500.00,0.00"' in drawn


def test_no_numbers_are_no_plot() -> None:
    assert plot("Left", [Series("left", "left", [(0, None)])], Axis(0, 1), str) == ""


@pytest.mark.parametrize(
    ("share", "said"), [(0, "0%"), (1, "100%"), (0.12345678, "12.346%"), (0.5, "50%"), (0.1, "10%")]
)
def test_shares_are_short(share: float, said: str) -> None:
    assert percent(share) == said


@pytest.mark.parametrize(
    ("microseconds", "said"),
    [
        (0, "0 µs"),
        (850, "850 µs"),
        (999.6, "1 ms"),
        (1_024, "1.02 ms"),
        (12_345, "12.3 ms"),
        (999_999, "1 s"),
        (2_123_456, "2.12 s"),
        (59_990_000, "1 min"),
        (185 * SECOND, "3 min 5 s"),
        (7_500 * SECOND, "2 h 5 min"),
        (7_200 * SECOND, "2 h"),
        (-103, "-103 µs"),
    ],
)
def test_durations_are_told_in_three_digits(microseconds: float, said: str) -> None:
    assert duration(microseconds) == said
