"""What is told of a migration that comes in, from what the processes say."""

from typing import Any

from qmigrate.events import Latency, LiveEvent, Received, StatusChanged
from qmigrate.operations.receive_events import ReceiveEvents


def counted(**numbers: int) -> dict[str, int]:
    """What the listener says of itself."""
    return {**dict.fromkeys(("received_bytes", "normal", "zero", "duplicates", "discarded"), 0), **numbers}


def measured(*counts: int, total_ns: int = 0, longest_ns: int = 0) -> dict[str, Any]:
    return {"counts": list(counts), "total_ns": total_ns, "longest_ns": longest_ns}


def paged(**counts: int) -> dict[str, Any]:
    """What the pager says of itself."""
    return {
        "counts": {"normal": 0, "zero": 0, **counts},
        **{"faults": 5, "requested": 4, "received_bytes": 100},
        "waited": measured(),
    }


def test_what_each_process_has_counted_is_told_as_one_sum() -> None:
    told: list[LiveEvent] = []
    events = ReceiveEvents(told.append)
    events.counted(counted(received_bytes=1000, normal=3, zero=1))
    events.paged(paged(normal=2, zero=1))
    events.counted(counted(received_bytes=2000, normal=7, zero=1))
    last = told[-1]
    assert isinstance(last, Received)
    assert {name: count for name, count in last.numbers.items() if count} == {
        **{"received_bytes": 2100, "normal": 9, "zero": 2, "requested": 4, "faults": 5, "preempt": 3},
    }
    assert events.totals() == {name: last.numbers[name] for name in events.totals()}


def test_of_a_histogram_that_grows_the_last_alone_is_kept_and_all_are_told() -> None:
    told: list[LiveEvent] = []
    events = ReceiveEvents(told.append)
    events.measured("requests", measured(1, 0, total_ns=1500, longest_ns=1500))
    events.measured("preempt", measured(1))
    events.measured("requests", measured(1, 1, total_ns=6000, longest_ns=4500))
    assert len(told) == 3
    assert [(event.where, event.counts) for event in events.events if isinstance(event, Latency)] == [
        *(("preempt", [1]), ("requests", [1, 1])),
    ]
    (requests,) = [each for each in events.events if isinstance(each, Latency) and each.where == "requests"]
    assert (requests.mean_us, requests.longest_us) == (3.0, 4.5)


def test_where_nothing_was_counted_no_histogram_is_told() -> None:
    events = ReceiveEvents(None)
    events.measured("requests", measured(0, 0))
    assert events.events == []


def test_it_is_postcopy_from_listening_on() -> None:
    events = ReceiveEvents(None)
    seen = []
    for phase in ("precopy", "advised", "discarding", "listening", "running", "ended"):
        events.phase_began(phase, 1)
        seen.append(events.is_postcopy)
    assert seen == [False, False, False, True, True, True]
    assert [(event.status, event.time_us) for event in events.events if isinstance(event, StatusChanged)] == [
        (phase, 1) for phase, _ in events.phases
    ]
