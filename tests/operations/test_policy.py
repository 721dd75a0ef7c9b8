"""When to switch: rules that are told what was seen."""

import pytest

from qmigrate.operations.policy import (
    AfterPass,
    AfterSeconds,
    AtOnce,
    History,
    IfStuck,
    PassCounter,
    PassStart,
    Policy,
    is_stuck,
    why_switch,
)

MIB = 1 << 20


def start(
    left_mib: float, *, dirty_mib: float = 1, sent_mib: float = 10, pages: int = 0, limit_ms: int = 300
) -> PassStart:
    return PassStart(int(left_mib * MIB), int(dirty_mib * MIB), int(sent_mib * MIB), pages, limit_ms)


def test_at_once_is_at_once() -> None:
    assert why_switch([AtOnce()], History(0.0)) == "at once, as asked"


def test_no_policy_never_switches() -> None:
    assert why_switch([], History(1e6, [start(10)] * 50)) is None


@pytest.mark.parametrize(("seconds", "due"), [(0.0, False), (2.9, False), (3.0, True), (9.0, True)])
def test_after_seconds(seconds: float, due: bool) -> None:
    assert (why_switch([AfterSeconds(3)], History(seconds)) is not None) == due


@pytest.mark.parametrize(("starts", "due"), [(0, False), (1, False), (2, False), (3, True), (4, True)])
def test_after_two_passes_is_at_the_start_of_the_third(starts: int, due: bool) -> None:
    reason = why_switch([AfterPass(2)], History(0.0, [start(10)] * starts))
    assert reason == ("2 passes are over" if due else None)


def test_the_first_policy_that_is_due_decides() -> None:
    policies: list[Policy] = [AfterSeconds(60), AfterPass(1)]
    assert why_switch(policies, History(1.0, [start(64), start(10)])) == "a pass is over"
    assert why_switch(policies, History(61.0, [start(64)])) == "it has gone on for 60 s"


@pytest.mark.parametrize(
    ("starts", "stuck"),
    [
        pytest.param([], False, id="nothing-seen"),
        pytest.param([start(64), start(60)], False, id="the-first-pass-says-nothing"),
        pytest.param([start(64), start(20), start(20)], True, id="it-does-not-shrink"),
        pytest.param([start(64), start(20), start(30)], True, id="it-grows"),
        pytest.param([start(64), start(20), start(18.5)], True, id="it-shrinks-by-less-than-a-tenth"),
        pytest.param([start(64), start(20), start(17)], False, id="it-shrinks"),
        pytest.param([start(64), start(2), start(2)], False, id="what-is-left-fits-into-the-downtime"),
        pytest.param([start(64), start(2), start(2, limit_ms=1)], True, id="the-downtime-is-too-short-for-it"),
        pytest.param(
            [start(64), start(20, dirty_mib=10), start(10, dirty_mib=11)],
            True,
            id="the-guest-writes-as-fast-as-is-sent",
        ),
        pytest.param([start(64), start(20, dirty_mib=3), start(10, dirty_mib=11)], False, id="only-once-faster"),
        pytest.param([start(64), start(20, sent_mib=0), start(10, sent_mib=0)], False, id="a-rate-not-known-yet"),
        pytest.param([start(64), start(60), start(30), start(15), start(15)], True, id="the-last-two-count"),
    ],
)
def test_stuck(starts: list[PassStart], stuck: bool) -> None:
    assert is_stuck(starts) == stuck
    assert (why_switch([IfStuck()], History(0.0, starts)) is not None) == stuck


def test_a_look_at_what_is_dirty_within_a_pass_is_no_pass() -> None:
    """QEMU 11.1 announces one every 100 ms."""
    counter = PassCounter()
    assert counter.announced(start(1, pages=0))  # 256 pages
    assert not counter.announced(start(1, pages=100))
    assert not counter.announced(start(1, pages=255))
    assert counter.completed == 0
    assert counter.announced(start(0.5, pages=256))
    assert counter.completed == 1


def test_where_pages_can_not_be_counted_qemus_word_counts() -> None:
    counter = PassCounter()
    for _ in range(3):
        assert counter.announced(start(1), counts_pages=False)
    assert counter.completed == 2


def test_the_numbers_are_taken_from_qemus_answer() -> None:
    ram = {"remaining": 4096, "dirty-pages-rate": 3, "page-size": 4096, "mbps": 8.0, "normal": 5, "duplicate": 2}
    assert PassStart.of({"ram": ram}, 300) == PassStart(4096, 3 * 4096, 1_000_000, 7, 300)
    assert PassStart.of({}, 300).left_bytes == 0
