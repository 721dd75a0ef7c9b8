"""The page about one restore: how soon the guest ran, what came when, and how long it took to answer for a page."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

from qmigrate.analysis.restore_story import RestoreStory, Row, Stretch
from qmigrate.report.chart import Axis, Band, Series, axis_row, lane, plot, stacked
from qmigrate.report.latency import histogram
from qmigrate.report.migration_page import KINDS
from qmigrate.report.page import data, document, escaped, facts, section, table, tiles
from qmigrate.report.units import count, duration, plural, share, size

__all__ = ["MOMENTS", "restore_page"]

MOMENTS: Final = {
    "switched": "device state sent",
    "loaded": "devices loaded",
    "running": "guest runs",
    "sign": "guest's first sign",
    "first_answer": "first page answered",
    "filled": "all sent",
}
"""By the names that they have in the result, in the order in which they mostly come."""

_SHORT: Final = {
    "loaded": "devices loaded",
    "running": "guest runs",
    "sign": "first sign of it",
    "first_answer": "first answer",
    "filled": "all sent",
}
_REMARKS: Final = {
    "loaded": "says the destination",
    "running": "its CPUs were started",
    "sign": "it asked for a page",
    "first_answer": "a requested page was sent",
    "filled": "the last page left",
}
_TITLES: Final = {"lazily": "Restored lazily", "eagerly": "Restored eagerly", "taken over": "Taken over, and finished"}
_OUTCOMES: Final = {0: "completed", 3: "cancelled", 4: "paused", 5: "paused"}
_FAILED: Final = {
    3: "Not restored: the guest is in the file",
    4: "The guest runs there, though serving it failed",
    5: "Paused: the guest waits for pages",
    6: "The guest is lost",
}
_MOST_BANDS: Final = 500
_MOST_SLICES: Final = 160  # more of them are a thicket
_MOST_ROWS: Final = 300
_BEGINNING: Final = 0.2  # of all time; a beginning that is shorter is drawn once more, alone


def restore_page(story: RestoreStory) -> str:
    """The page, complete."""
    return document(
        _title(story),
        [
            _header(story),
            _figures(story),
            _course(story),
            _beginning(story),
            _answers(story),
            _troubles(story),
            _happened(story),
            section("The setting", facts(story.facts)),
        ],
    )


def _title(story: RestoreStory) -> str:
    if story.exit_code:
        return _FAILED.get(story.exit_code, "It is not known where the guest is")
    return _TITLES.get(story.way, "Restored")


def _header(story: RestoreStory) -> str:
    when = datetime.fromtimestamp(story.began_us / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if story.began_us else ""
    into = f"into QEMU {story.version.partition(' ')[0]}" if story.version else ""
    over = " · ".join(each for each in (story.file, into, when) if each)
    outcome = _OUTCOMES.get(story.exit_code, "failed")
    said = f'<p class="over">{escaped(over)}</p><h1>{escaped(_title(story))}</h1>'
    message = story.message[:1].upper() + story.message[1:]
    where = f'<p class="where">{escaped(message.rstrip("."))}.</p>'
    return f'<header class="outcome {outcome}">{said}{where}</header>'


# ---- numbers ----


def _figures(story: RestoreStory) -> str:
    """When what came; then how much of it there was."""
    times = [(_SHORT[name], duration(story.moments[name]), _REMARKS[name]) for name in _SHORT if name in story.moments]
    amounts = []
    if story.total:
        amounts.append(("memory", size(story.total * story.page_size), plural(story.total, "page")))
    if story.requests:
        asked = f"{share(story.requested, story.total)} of all, in {plural(story.requests, 'request')}"
        amounts.append(("pages asked for", count(story.requested), asked))
    amounts.append(("sent", size(story.sent_bytes), ""))
    if story.recoveries:
        amounts.append(("connection made anew", plural(story.recoveries, "time"), ""))
    return (tiles(times) if times else "") + tiles(amounts)


# ---- the course of it ----


def _course(story: RestoreStory) -> str:
    axis = Axis(0, max(story.length_us, 1))
    rows = [*_lanes(story, axis), *_plots(story, axis), axis_row(axis)]
    marks = [(each.begin_us, each.end_us, "stop") for each in story.phases if each.what == "postcopy-paused"]
    hover = data("samples", _samples(story)) if story.pages_in else ""
    readout = '<p class="readout" id="readout" aria-hidden="true"></p>' if story.pages_in else ""
    drawing = f'<div id="course" data-length="{axis.length_us}">{stacked(rows, axis, marks)}</div>'
    lead = "Time is counted from when this command had begun its work; all times are its own."
    return section("How it went", _legend(story), readout, drawing, hover, lead=lead)


def _beginning(story: RestoreStory) -> str:
    """Until the guest gave a sign, magnified, where that is but a little of all."""
    ready = max(
        (story.moments[name] for name in ("running", "sign", "first_answer") if name in story.moments), default=0
    )
    if not 0 < ready < _BEGINNING * story.length_us:
        return ""
    axis = Axis(0, int(1.25 * ready))
    named = [Row(at, "", MOMENTS[name]) for name, at in story.moments.items() if name in MOMENTS and at <= axis.end_us]
    events = table(["time", "what"], [[duration(each.at_us), each.words] for each in _in_order(named)], kind="events")
    drawing = stacked([*_lanes(story, axis), *_plots(story, axis, only_asked=True), axis_row(axis)], axis)
    running = story.moments.get("running")
    missing = "" if running is None else f" Of its memory, {_missing(story, running)} was there when it began to run."
    return section("Until it ran", drawing, events, lead=f"The beginning alone.{missing}")


def _missing(story: RestoreStory, at_us: int) -> str:
    """Which share of the pages had been sent by then; in words."""
    sent = sum(story.pages_in[: at_us // story.slice_us])
    return share(sent, story.total) if sent else "nothing"


def _in_order(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.at_us)


def _lanes(story: RestoreStory, axis: Axis) -> Iterator[str]:
    yield lane("qmigrate", [Band(each.begin_us, each.end_us, each.what, kind) for each, kind in _ours(story)], axis)
    phases = story.phases[-_MOST_BANDS:]
    bands = [Band(each.begin_us, each.end_us, each.what, KINDS.get(each.what, "unknown")) for each in phases]
    yield lane("Destination", bands, axis)
    yield lane("", [Band(each.begin_us, each.end_us, "the guest runs", "runs") for each in story.runs], axis, slim=True)


def _ours(story: RestoreStory) -> Iterator[tuple[Stretch, str]]:
    """What we did, from one moment to the next."""
    steps = [("indexed", "reads the file", "setup"), ("switched", "until devices are sent", "precopy")]
    steps += [("loaded", "devices load", "switch"), ("filled", "serves pages", "postcopy")]
    begin = 0
    for name, what, kind in steps:
        if name in story.moments and story.moments[name] >= begin:
            yield Stretch(begin, story.moments[name], what), kind
            begin = story.moments[name]
    rest = "ends" if "filled" in story.moments else "serves pages" if "loaded" in story.moments else "waits"
    yield Stretch(begin, max(story.length_us, begin), rest), "completed" if rest == "ends" else "postcopy"


def _plots(story: RestoreStory, axis: Axis, *, only_asked: bool = False) -> Iterator[str]:
    first, last = axis.begin_us // story.slice_us, -(-axis.end_us // story.slice_us)
    most = min(last, len(story.pages_in))
    group = max(-(-max(most - first, 1) // _MOST_SLICES), 1)
    begins = range(first, most, group)
    length_s = group * story.slice_us / 1e6

    def rates(counts: Sequence[int]) -> list[tuple[int, float | None]]:
        rated: list[tuple[int, float | None]] = [
            (begin * story.slice_us, sum(counts[begin : begin + group]) / length_s) for begin in begins
        ]
        return [*rated, (min(most * story.slice_us, axis.end_us), rated[-1][1])] if rated else []

    if not only_asked:
        missing = [(at_us, float(left)) for at_us, left in _left(story, begins)]
        told = f"of {size(story.total * story.page_size)}"
        yield plot("Memory missing", [Series("missing", "left", missing, "area", told)], axis, _size)
        sent = Series("sent", "sent", rates(story.bytes_in), "steps")
        yield plot("Sent", [_with_most(sent, f"{size(round(sent.largest))}/s")], axis, _rate)
    if any(story.requests_in):
        asked = Series("requests", "asked", rates(story.requests_in), "steps")
        most_asked = f"{count(round(asked.largest))} a second"
        yield plot("Pages asked for", [_with_most(asked, most_asked)], axis, _per_second, binary=False)


def _with_most(series: Series, told: str) -> Series:
    return Series(series.name, series.kind, series.points, series.shape, f"at most {told}")


def _left(story: RestoreStory, begins: range) -> Iterator[tuple[int, int]]:
    """What was missing, in bytes, when each of these slices began; and at the end."""
    sent, at = 0, 0
    for begin in (*begins, len(story.pages_in)):
        sent += sum(story.pages_in[at:begin])
        at = begin
        yield begin * story.slice_us, max(story.total - sent, 0) * story.page_size


def _samples(story: RestoreStory) -> list[list[object]]:
    """What hovering tells: when (µs), and words."""
    group = max(-(-len(story.pages_in) // (4 * _MOST_SLICES)), 1)
    begins = range(0, len(story.pages_in), group)
    said = []
    for (at_us, left), begin in zip(_left(story, begins), begins, strict=False):
        asked = sum(story.requests_in[begin : begin + group])
        words = [f"{size(left)} missing"] if left else ["all is in"]
        words += [f"{plural(asked, 'request')} in {duration(group * story.slice_us)}"] if asked else []
        said.append([at_us, " · ".join(words)])
    return said


def _size(value: float) -> str:
    return size(round(value)) if value else "0"


def _rate(value: float) -> str:
    return f"{size(round(value))}/s" if value else "0"


def _per_second(value: float) -> str:
    return f"{count(round(value))}/s" if value else "0"


def _legend(story: RestoreStory) -> str:
    """What the colours of the destination's lane mean."""
    kinds: dict[str, list[str]] = {}
    for phase in story.phases:
        names = kinds.setdefault(KINDS.get(phase.what, "unknown"), [])
        if phase.what not in names:
            names.append(phase.what)
    keys = [f'<li><i class="band {kind}"></i>{escaped(", ".join(names))}</li>' for kind, names in kinds.items()]
    if story.runs:
        keys.append('<li><i class="band runs"></i>the guest runs</li>')
    return f'<ul class="legend">{"".join(keys)}</ul>' if keys else ""


# ---- the rest ----


def _answers(story: RestoreStory) -> str:
    """How long answers took, in this process."""
    latency = story.latency
    if not latency.count:
        return ""
    half, most = latency.percentile(0.5), latency.percentile(0.99)
    lead = (
        f"{plural(latency.count, 'page')} that the destination asked for, by how long it took from the arrival of its "
        "request until the page was handed to the connection."
    )
    if half is not None and most is not None:
        lead += f" Half of them took {_below(half.end_us)}, 99 of 100 {_below(most.end_us)}."
    rows = []
    if story.mean_us is not None:
        rows.append(("Mean", duration(story.mean_us)))
    if story.longest_us is not None:
        rows.append(("Longest", duration(story.longest_us)))
    return section("Answers", histogram(latency), facts(rows), lead=lead)


def _below(end_us: int | None) -> str:
    return "longer than can be told" if end_us is None else f"less than {duration(end_us)}"


def _time(at_us: int) -> str:
    return duration(at_us) if abs(at_us) < 1_000_000 else f"{at_us / 1e6:,.3f} s"


def _troubles(story: RestoreStory) -> str:
    rows = [[_time(each.at_us), each.side, each.words] for each in story.troubles[:100]]
    return section("What was said of it", table(["time", "side", "what"], rows, kind="events") if rows else "")


def _happened(story: RestoreStory) -> str:
    rows = [[_time(each.at_us), each.side, each.words] for each in story.rows[-_MOST_ROWS:]]
    if not rows:
        return ""
    lead = f"The last {count(_MOST_ROWS)} of {count(len(story.rows))} events." if len(story.rows) > _MOST_ROWS else ""
    events = table(["time", "side", "what"], rows, kind="events")
    return section(
        "Every event", f"<details><summary>{plural(len(story.rows), 'event')}</summary>{events}</details>", lead=lead
    )
