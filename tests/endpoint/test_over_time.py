"""Counts over time: however long it goes on, slices stay few, and nothing that was counted is lost."""

from hypothesis import given
from hypothesis import strategies as st

from qmigrate.endpoint.over_time import OverTime


@given(st.lists(st.integers(0, 10**12), max_size=60))
def test_each_count_is_in_the_slice_of_its_moment(steps_ns: list[int]) -> None:
    now = 0
    over_time = OverTime(lambda: now + 5_000, began_ns=5_000)
    counted: list[int] = []
    for step_ns in steps_ns:
        now += step_ns
        over_time.now().requests += 1
        counted.append(now)
    assert len(over_time.slices) <= 1024
    slice_ns = 1000 * over_time.slice_us
    expected = [0] * len(over_time.slices)
    for at_ns in counted:
        expected[at_ns // slice_ns] += 1
    assert over_time.plain()["requests"] == expected
