"""The page about one migration: how it ended, what both sides did on one axis of time, and the numbers."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from qmigrate.analysis.timeline import Sample, SideLine, Stop, Timeline
from qmigrate.events import Progressed
from qmigrate.report.chart import Axis, Band, Series, axis_row, lane, plot, stacked
from qmigrate.report.latency import latency_section
from qmigrate.report.migration_words import happened, setting, troubles
from qmigrate.report.page import data, document, escaped, section, table, tiles
from qmigrate.report.units import count, duration, plural, size
from qmigrate.report.wording import wording

__all__ = ["migration_page"]

TITLES: Final = {
    "completed": "Migrated",
    "cancelled": "Migration cancelled",
    "paused": "Migration paused",
    "left": "Migration left to itself",
    "failed": "Migration failed",
}
# Statuses by what they mean; the class in the style sheet.  One that is not known is drawn as such.
KINDS: Final = {
    "setup": "setup",
    "wait-unplug": "setup",
    "active": "precopy",
    "colo": "precopy",
    "pre-switchover": "switch",
    "device": "switch",
    "postcopy-device": "switch",
    "postcopy-active": "postcopy",
    "postcopy-paused": "paused",
    "postcopy-recover": "recover",
    "postcopy-recover-setup": "recover",
    "completed": "completed",
    "failed": "failed",
    "failing": "failed",
    "cancelling": "cancelled",
    "cancelled": "cancelled",
}
_MOST_BANDS: Final = 500
_MOST_RATES: Final = 160  # more of them are a thicket


def migration_page(timeline: Timeline) -> str:
    """The page, complete."""
    return document(
        _title(timeline),
        [
            _header(timeline),
            _figures(timeline),
            _course(timeline),
            *(_switchover(timeline, stop) for stop in timeline.stops if stop.resumed_on is not None),
            latency_section(timeline.latency),
            troubles(timeline),
            happened(timeline),
            setting(timeline),
        ],
    )


def _title(timeline: Timeline) -> str:
    finished = timeline.finished
    if finished is None:
        return "Migration without an end"
    title = TITLES.get(finished.outcome, f"Migration {finished.outcome}")
    if finished.outcome == "completed" and timeline.began is not None and timeline.began.operation == "recover":
        return "Postcopy brought back"
    if finished.outcome == "completed":
        title += " with postcopy" if finished.switched else " by precopy"
    return title


def _header(timeline: Timeline) -> str:
    finished = timeline.finished
    when = (
        datetime.fromtimestamp(timeline.zero_us / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        if timeline.zero_us
        else ""
    )
    versions = [line.version.partition(" ")[0] for line in timeline.sides.values()]
    between = f"QEMU {versions[0] or '?'} → {versions[1] or '?'}" if any(versions) else ""
    over = " · ".join(each for each in (between, when) if each)
    said = f'<p class="over">{escaped(over)}</p><h1>{escaped(_title(timeline))}</h1>'
    if finished is None:
        return f'<header class="outcome none">{said}<p>What follows is all that was seen.</p></header>'
    sentences = [] if finished.outcome == "completed" else [finished.message]
    where = f'<p class="where">{escaped(finished.sentence)}</p>' if finished.sentence else ""
    body = "".join(f"<p>{escaped(each)}</p>" for each in sentences)
    advice = f'<p class="advice">{escaped(finished.advice)}</p>' if finished.advice else ""
    return f'<header class="outcome {escaped(finished.outcome)}">{said}{where}{body}{advice}</header>'


# ---- numbers ----


def _figures(timeline: Timeline) -> str:
    figures = [("total time", duration(timeline.length_us), "")]
    stops = [stop for stop in timeline.stops if stop.resumed_on is not None]
    if stops:
        own = "" if timeline.downtime_ms is None else f"QEMU counts {count(timeline.downtime_ms)} ms"
        figures.append(("guest stopped", duration(sum(stop.length_us for stop in stops)), own))
    last = timeline.last
    if last is not None:
        if last.transferred_bytes is not None:
            of = f"of {size(last.total_bytes)} of memory" if last.total_bytes else ""
            figures.append(("sent", size(last.transferred_bytes), of))
        if last.remaining_bytes:
            figures.append(("still on the source", size(last.remaining_bytes), "when last asked"))
        if last.page_requests:
            figures.append(("pages requested", count(last.page_requests), ""))
    if timeline.passes:
        figures.append(("passes", count(timeline.passes[-1].number), "as QEMU counts them"))
    if timeline.finished is not None and timeline.finished.recoveries:
        figures.append(("brought back", plural(timeline.finished.recoveries, "time"), ""))
    return tiles(figures)


# ---- the course of it ----


def _course(timeline: Timeline) -> str:
    axis = Axis(0, max(timeline.length_us, 1))
    rows = [*_lanes(timeline, axis), *_passes(timeline, axis), *_plots(timeline, axis), axis_row(axis)]
    marks = [(stop.begin_us, stop.end_us, "stop") for stop in timeline.stops]
    lead = "" if timeline.length_us else "Nothing was seen to happen."
    legend = _legend(timeline)
    hover = data("samples", [_short(each) for each in timeline.thinned()]) if timeline.samples else ""
    readout = '<p class="readout" id="readout" aria-hidden="true"></p>' if timeline.samples else ""
    drawing = f'<div id="course" data-length="{axis.length_us}">{stacked(rows, axis, marks)}</div>'
    return section("How it went", legend, readout, drawing, hover, lead=lead)


def _short(sample: Sample) -> list[Any]:
    """What hovering tells: when (µs), and words."""
    said = [
        (sample.remaining_bytes, "left", size),
        (sample.dirty_bytes_per_s if sample.looks_for_dirt else None, "dirtied", lambda each: f"{size(each)}/s"),
        (sample.transferred_bytes, "sent", size),
        (sample.page_requests, "requested", lambda each: plural(each, "page")),
    ]
    return [sample.at_us, " · ".join(f"{spell(value)} {what}" for value, what, spell in said if value)]


def _lanes(timeline: Timeline, axis: Axis) -> Iterator[str]:
    for side, line in timeline.sides.items():
        yield lane(side.title(), _phases(line), axis)
        runs = [Band(run.begin_us, run.end_us, f"the guest runs on the {side}", "runs") for run in line.runs]
        yield lane("", runs, axis, slim=True)


def _phases(line: SideLine) -> list[Band]:
    return [
        Band(
            phase.begin_us,
            phase.end_us,
            phase.status,
            KINDS.get(phase.status, "unknown"),
            "" if phase.heard else " · found by asking",
        )
        for phase in line.phases[-_MOST_BANDS:]
    ]


def _passes(timeline: Timeline, axis: Axis) -> Iterator[str]:
    """From each announcement to the next; the last ends when the guest stops, or with all.  One alone says nothing."""
    if len(timeline.passes) < 2:
        return
    announced = timeline.passes[-_MOST_BANDS:]
    stops = [stop.begin_us for stop in timeline.stops if stop.begin_us > announced[-1].at_us]
    ends = [each.at_us for each in announced[1:]] + [min([*stops, timeline.length_us])]
    bands = [
        Band(
            each.at_us, end_us, str(each.number), f"pass {'odd' if index % 2 else 'even'}", " from one pass to the next"
        )
        for index, (each, end_us) in enumerate(zip(announced, ends, strict=True))
    ]
    yield lane("Passes", bands, axis)


def _plots(timeline: Timeline, axis: Axis) -> Iterator[str]:
    samples, rates = timeline.thinned(), timeline.rates(_MOST_RATES)
    left = [(each.at_us, _float(each.remaining_bytes)) for each in samples]
    yield plot("Memory left to send", [_series("left", "left", left, size, shape="area")], axis, _size)
    sent = [(each.begin_us, each.sent_bytes_per_s) for each in rates]
    dirty = [(each.begin_us, _float(each.dirty_bytes_per_s)) for each in rates]
    if rates:
        sent.append((rates[-1].end_us, rates[-1].sent_bytes_per_s))
        dirty.append((rates[-1].end_us, _float(rates[-1].dirty_bytes_per_s)))
    both = [_series("sent", "sent", sent, _rate, shape="steps")]
    if any(value for _, value in dirty):
        both.append(_series("dirtied", "dirty", dirty, _rate, shape="steps"))
    yield plot("Sent against dirtied" if len(both) > 1 else "Sent", both, axis, _rate)
    if timeline.last is not None and timeline.last.page_requests:
        asked = [(each.at_us, _float(each.page_requests)) for each in samples]
        yield plot("Pages requested, in all", [_series("requests", "asked", asked, count)], axis, _count, binary=False)


def _series(
    name: str, kind: str, points: Sequence[tuple[int, float | None]], spelled: Any, *, shape: str = "line"
) -> Series:
    largest = Series(name, kind, points).largest
    return Series(name, kind, points, shape, told=f"at most {spelled(round(largest))}")


def _float(value: int | None) -> float | None:
    return None if value is None else float(value)


def _size(value: float) -> str:
    return size(round(value)) if value else "0"


def _rate(value: float) -> str:
    return f"{size(round(value))}/s" if value else "0"


def _count(value: float) -> str:
    return count(round(value))


def _legend(timeline: Timeline) -> str:
    """What the colours of the lanes mean; only those that are there."""
    kinds: dict[str, list[str]] = {}
    for line in timeline.sides.values():
        for phase in line.phases:
            names = kinds.setdefault(KINDS.get(phase.status, "unknown"), [])
            if phase.status not in names:
                names.append(phase.status)
    keys = [f'<li><i class="band {kind}"></i>{escaped(", ".join(names))}</li>' for kind, names in kinds.items()]
    if any(line.runs for line in timeline.sides.values()):
        keys.append('<li><i class="band runs"></i>the guest runs</li>')
    if timeline.stops:
        keys.append('<li><i class="band stop"></i>it runs nowhere</li>')
    return f'<ul class="legend">{"".join(keys)}</ul>' if keys else ""


# ---- the switch, magnified ----


def _switchover(timeline: Timeline, stop: Stop) -> str:
    around_us = max(int(stop.length_us * 0.6), 2_000)
    axis = Axis(stop.begin_us - around_us, stop.end_us + around_us, stop.begin_us)
    rows = [
        [
            duration(each.at_us - stop.begin_us) if each.at_us != stop.begin_us else "0",
            str(each.event.side or ""),
            wording(each.event),
        ]
        for each in timeline.moments
        if axis.begin_us <= each.at_us <= axis.end_us and not isinstance(each.event, Progressed)
    ]
    lead = (
        f"From STOP on one side to RESUME on the {stop.resumed_on} it ran nowhere for {duration(stop.length_us)}. "
        "Time is counted from STOP."
    )
    error_us = sum(line.clock.error_us for line in timeline.sides.values() if line.clock.offset_us)
    if error_us:
        lead += f" The clocks of two hosts are compared: this may be wrong by {duration(error_us)}."
    drawing = stacked([*_lanes(timeline, axis), axis_row(axis)], axis, [(stop.begin_us, stop.end_us, "stop")])
    return section("The guest moves", drawing, table(["time", "side", "what"], rows[:60], kind="events"), lead=lead)
