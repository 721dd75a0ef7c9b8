"""The page about a migration that came in: how it ended, its course on one axis of time, and how long pages took."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from qmigrate import events
from qmigrate.analysis.latency import Bucket
from qmigrate.analysis.reception import WAITED, Reception, Sample, Waited
from qmigrate.report.chart import Axis, Band, Series, axis_row, lane, percent, plot, stacked
from qmigrate.report.latency import histogram
from qmigrate.report.page import data, document, escaped, facts, section, table, tiles
from qmigrate.report.reception import WAITED_WORDS, middle
from qmigrate.report.reception_words import moment_words
from qmigrate.report.units import count, duration, plural, size

__all__ = ["receive_page"]

# Phases by what they mean; the class in the style sheet.
KINDS: Final = {
    "precopy": "precopy",
    "advised": "precopy",
    "discarding": "switch",
    "listening": "switch",
    "running": "postcopy",
    "paused": "paused",
    "recovering": "recover",
    "ended": "completed",
    "failed": "failed",
}
PLACES: Final = {
    "none": "No source came.",
    "source": "The guest is the source's.",
    "here": "All of the guest came.",
    "lost": "The guest is lost.",
}
OUTCOMES: Final = {"none": "cancelled", "source": "cancelled", "here": "completed", "lost": "failed"}
_MOST_BANDS: Final = 500
_MOST_SAMPLES: Final = 500
_MOST_RATES: Final = 160
_MOST_ROWS: Final = 300


def receive_page(found: Reception) -> str:
    """The page, complete."""
    return document(
        _title(found),
        [
            _header(found),
            _figures(found),
            _course(found),
            *(_waiting(WAITED_WORDS[where], found.waited[where]) for where in WAITED if where in found.waited),
            _pages(found),
            _memory(found),
            _troubles(found),
            _happened(found),
        ],
    )


def _title(found: Reception) -> str:
    way = "with postcopy" if found.result.is_postcopy else "by precopy"
    match found.result.place:
        case "here":
            return f"Received {way}"
        case "none":
            return "Nothing was received"
    return f"Receiving {way} failed"


def _header(found: Reception) -> str:
    result = found.result
    when = datetime.fromtimestamp(found.zero_us / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if found.zero_us else ""
    over = " · ".join(each for each in (found.uri, when) if each)
    said = f'<p class="over">{escaped(over)}</p><h1>{escaped(_title(found))}</h1>'
    where = f'<p class="where">{escaped(PLACES.get(result.place, ""))}</p>'
    body = "" if result.ok else f"<p>{escaped(result.message)}</p>"
    return f'<header class="outcome {OUTCOMES.get(result.place, "failed")}">{said}{where}{body}</header>'


def _figures(found: Reception) -> str:
    numbers = found.result.numbers
    figures = [("received", size(found.received_bytes), f"on {plural(len(found.channels), 'connection')}")]
    if found.bytes_per_s is not None:
        figures.append(("throughput", f"{size(round(found.bytes_per_s))}/s", f"in {duration(found.receiving_us)}"))
    figures.append(("pages", count(numbers.get("normal", 0)), f"and {plural(numbers.get('zero', 0), 'zero page')}"))
    if found.result.is_postcopy:
        figures.append(
            (
                "requested",
                count(numbers.get("requested", 0)),
                f"of {plural(numbers['faults'], 'fault')}" if numbers.get("faults") else "",
            )
        )
        figures.append(("came twice", count(numbers.get("duplicates", 0)), ""))
    waited = found.waited.get("touchers")
    if waited is not None and (half := waited.latency.percentile(0.5)) is not None:
        figures.append(("a touch waited", _below(half), f"half of them; the longest {duration(waited.longest_us)}"))
    return tiles(figures)


# ---- the course of it ----


def _course(found: Reception) -> str:
    axis = Axis(0, max(found.length_us, 1))
    phases = [
        Band(each.begin_us, each.end_us, each.status, KINDS.get(each.status, "unknown"))
        for each in found.phases[-_MOST_BANDS:]
    ]
    if not phases:
        return ""
    marks = [(each.begin_us, each.end_us, "stop") for each in phases if each.kind == "paused"]
    rows = [lane("Phases", phases, axis), *_plots(found, axis), axis_row(axis)]
    drawing = f'<div id="course" data-length="{axis.length_us}">{stacked(rows, axis, marks)}</div>'
    hover = data("samples", [_short(each) for each in _thinned(found.samples)]) if found.samples else ""
    readout = '<p class="readout" id="readout" aria-hidden="true"></p>' if found.samples else ""
    begins = table(
        ["phase", "began", "lasted"],
        [[each.status, _time(each.begin_us), duration(each.length_us)] for each in found.phases[-_MOST_BANDS:]],
    )
    lead = "Time counts from the source's first connection."
    return section("How it went", _legend(phases), readout, drawing, hover, _folded("Each phase", begins), lead=lead)


def _plots(found: Reception, axis: Axis) -> Iterator[str]:
    rates = found.rates(_MOST_RATES)
    came: list[tuple[int, float | None]] = [(each.begin_us, each.bytes_per_s) for each in rates]
    if rates:
        came.append((rates[-1].end_us, rates[-1].bytes_per_s))
    yield plot("Received", [_series("received", "sent", came, _rate, shape="steps")], axis, _rate)
    samples = _thinned(found.samples)
    for title, name, kind in (
        ("Pages requested, in all", "requested", "asked"),
        ("Touches, in all", "touches", "left"),
    ):
        if found.result.numbers.get(name):
            points: list[tuple[int, float | None]] = [(each.at_us, each.numbers.get(name, 0)) for each in samples]
            yield plot(title, [_series(name, kind, points, _count)], axis, _count, binary=False)


def _series(
    name: str, kind: str, points: Sequence[tuple[int, float | None]], spelled: Any, *, shape: str = "line"
) -> Series:
    return Series(name, kind, points, shape, told=f"at most {spelled(Series(name, kind, points).largest)}")


def _rate(value: float) -> str:
    return f"{size(round(value))}/s" if value else "0"


def _count(value: float) -> str:
    return count(round(value))


def _thinned(samples: Sequence[Sample]) -> Sequence[Sample]:
    step = -(-len(samples) // _MOST_SAMPLES)
    return samples if step <= 1 else [*samples[:-1:step], samples[-1]]


def _short(sample: Sample) -> list[Any]:
    """What hovering tells: when (µs), and words."""
    numbers = sample.numbers
    said = [f"{size(numbers.get('received_bytes', 0))} received"]
    said += [
        f"{count(numbers[name])} {words}"
        for name, words in (("normal", "pages"), ("zero", "zero pages"), ("requested", "requested"))
        if numbers.get(name)
    ]
    return [sample.at_us, " · ".join(said)]


def _legend(phases: Sequence[Band]) -> str:
    """What the colours mean; only those that are there."""
    kinds: dict[str, list[str]] = {}
    for each in phases:
        names = kinds.setdefault(each.kind, [])
        if each.label not in names:
            names.append(each.label)
    keys = "".join(f'<li><i class="band {kind}"></i>{escaped(", ".join(names))}</li>' for kind, names in kinds.items())
    return f'<ul class="legend">{keys}</ul>'


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{escaped(title)}</summary>{body}</details>"


# ---- how long pages took ----


def _waiting(title: str, waited: Waited) -> str:
    """A bar for each of QEMU's buckets; nothing where nothing was waited for."""
    if not waited.latency.count:
        return ""
    lead = f"{plural(waited.latency.count, 'page')}: {middle(waited)}; {duration(waited.mean_us)} on average."
    return section(title, histogram(waited.latency), lead=lead)


def _below(bucket: Bucket) -> str:
    return f"≥ {duration(bucket.begin_us)}" if bucket.end_us is None else f"< {duration(bucket.end_us)}"


# ---- pages and memory ----


def _pages(found: Reception) -> str:
    numbers = found.result.numbers
    rows = [
        ("normal", numbers.get("normal", 0)),
        ("zero", numbers.get("zero", 0)),
        ("on the preempt channel", numbers.get("preempt", 0)),
        ("discarded", numbers.get("discarded", 0)),
        ("requested", numbers.get("requested", 0)),
        ("there already", numbers.get("duplicates", 0)),
    ]
    rows = [(name, number) for name, number in rows if number]
    if not rows:
        return ""
    lead = (
        "Those that came are of the size that the source's CPU has; what is discarded, requested or there already is "
        "counted in pages of this host."
    )
    touched = []
    if numbers.get("touches"):
        touched = [("Touches", f"{count(numbers['touches'])}, {count(numbers.get('writes', 0))} of them writes")]
    return section("Pages by kind", _bars(rows, "pages by kind"), facts(touched), lead=lead)


def _bars(rows: Sequence[tuple[str, int]], label: str) -> str:
    largest = max((number for _, number in rows), default=0) or 1
    bars = "".join(
        f'<div class="bar"><span>{escaped(name)}</span>'
        f'<div><i style="width:{percent(number / largest)}"></i></div><b>{count(number)}</b><em></em></div>'
        for name, number in rows
    )
    return f'<div class="histogram" role="group" aria-label="{escaped(label)}">{bars}</div>'


def _memory(found: Reception) -> str:
    if not found.blocks:
        return ""
    total = sum(length for _, length, _ in found.blocks)
    rows = [[name, size(length), size(page)] for name, length, page in found.blocks[:_MOST_ROWS]]
    return section(
        "Memory", table(["block", "length", "pages of"], rows), lead=f"{plural(len(rows), 'block')}, {size(total)}."
    )


# ---- what was said ----


def _troubles(found: Reception) -> str:
    rows = [
        [_time(each.at_us), each.event.message] for each in found.moments if isinstance(each.event, events.Troubled)
    ]
    return section("What went wrong", table(["time", "what"], rows[:100], kind="events")) if rows else ""


def _happened(found: Reception) -> str:
    rows = [[_time(each.at_us), words] for each in found.moments if (words := moment_words(each.event))]
    if not rows:
        return ""
    said = f"The last {count(_MOST_ROWS)} of {count(len(rows))}." if len(rows) > _MOST_ROWS else ""
    return section(
        "Every event",
        _folded(plural(len(rows), "event"), table(["time", "what"], rows[-_MOST_ROWS:], kind="events")),
        lead=said,
    )


def _time(at_us: int) -> str:
    """On the axis: to a millisecond at least, since much happens within one."""
    return duration(at_us) if abs(at_us) < 1_000_000 else f"{at_us / 1e6:,.3f} s"
