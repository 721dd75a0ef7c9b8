"""The words of the page about a migration: what went wrong, all that happened, and what it was done with."""

from typing import Any, Final

from qmigrate.analysis.clock import Clock
from qmigrate.analysis.timeline import Timeline
from qmigrate.events import Began, CommandSent, Progressed, QemuSaid, Troubled
from qmigrate.report.page import facts, section, table
from qmigrate.report.units import count, duration, plural, size
from qmigrate.report.wording import wording

__all__ = ["happened", "setting", "troubles"]

_RATES: Final = ("bandwidth", "postcopy_bandwidth")
_LATEST_ROWS: Final = 300


def troubles(timeline: Timeline) -> str:
    """What was said to be wrong, in the order in which it came; nothing where nothing was."""
    rows = [
        [_time(each.at_us), str(each.event.side or ""), each.event.message]
        for each in timeline.moments
        if isinstance(each.event, Troubled)
    ]
    for side, line in timeline.sides.items():
        if line.statistics.get("error-desc"):
            rows.append(["at the end", str(side), f"QEMU says: {line.statistics['error-desc']}"])
    if not rows:
        return ""
    cancelled = timeline.finished is not None and timeline.finished.outcome == "cancelled"
    lead = "To a destination, a source that cancels is a stream that breaks off." if cancelled else ""
    title = "What was said of it" if cancelled else "What went wrong"
    return section(title, table(["time", "side", "what"], rows[:100], kind="events"), lead=lead)


def happened(timeline: Timeline) -> str:
    """Each event, the numbers aside."""
    rows = [
        [_time(each.at_us), str(each.event.side or ""), wording(each.event)]
        for each in timeline.moments
        if not isinstance(each.event, Progressed)
    ]
    if not rows:
        return ""
    said = f"The last {count(_LATEST_ROWS)} of {count(len(rows))} events." if len(rows) > _LATEST_ROWS else ""
    events = table(["time", "side", "what"], rows[-_LATEST_ROWS:], kind="events")
    return section(
        "Every event", f"<details><summary>{plural(len(rows), 'event')}</summary>{events}</details>", lead=said
    )


def setting(timeline: Timeline) -> str:
    """Who took part, by which plan, and by which clocks."""
    began = timeline.began
    rows = []
    for side, line in timeline.sides.items():
        if line.version or line.address:
            rows.append((side.title(), f"QEMU {line.version or 'of unknown version'}, at {line.address}"))
        rows.append((f"Clock of the {side}", _clock(line.clock)))
    plan = facts([("Operation", began.operation), ("Through", began.uri), *_plan(began)]) if began else ""
    told = [
        [str(each.event.side), each.event.command] for each in timeline.moments if isinstance(each.event, CommandSent)
    ]
    said = sum(isinstance(each.event, QemuSaid) for each in timeline.moments)
    rows.append(("Commands sent", count(len(told)) + (f"; other events of QEMU: {count(said)}" if said else "")))
    return section("The setting", plan, facts(rows))


def _time(at_us: int) -> str:
    """On the axis: to a millisecond at least, since much happens within one."""
    return duration(at_us) if abs(at_us) < 1_000_000 else f"{at_us / 1e6:,.3f} s"


def _plan(began: Began) -> list[tuple[str, str]]:
    """What is not as by default, but for what is said elsewhere."""
    return [
        (name.replace("_", " "), _per_second(value) if name in _RATES and isinstance(value, int) else _spelled(value))
        for name, value in began.plan.items()
        if name not in ("uri", "closely")
    ]


def _spelled(value: Any) -> str:
    if value is True:
        return "yes"
    if isinstance(value, dict) and "policy" in value:
        return " ".join(str(each) for each in value.values())
    if isinstance(value, dict):
        return ", ".join(f"{name}={_spelled(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_spelled, value))
    return str(value)


def _clock(clock: Clock) -> str:
    if not clock.stamp_count:
        return "QEMU gave no times: those at which we heard of it"
    if not clock.offset_us:
        return f"taken to be ours: what it said came at least {duration(clock.error_us)} after its own time for it"
    direction = "behind" if clock.offset_us > 0 else "ahead of"
    return (
        f"{duration(abs(clock.offset_us))} {direction} ours, to within {duration(clock.error_us)}: found by when its "
        "events came, and half the time that a question took; corrected on this page"
    )


def _per_second(value: int) -> str:
    return f"{size(value)}/s" if value else "0"
