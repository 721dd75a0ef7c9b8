"""The page about a recording: its phases and channels on one axis of time, the page requests, what was said."""

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from typing import Final

from qmigrate.analysis.described import in_order, longest
from qmigrate.analysis.latency import Latency
from qmigrate.analysis.recording import RecordingStory
from qmigrate.analysis.story import ChannelStory
from qmigrate.format.channel import ChannelKind
from qmigrate.report.chart import Axis, Band, Series, axis_row, lane, plot, stacked
from qmigrate.report.latency import latency_section
from qmigrate.report.page import document, escaped, section, table, tiles
from qmigrate.report.recording import REQUEST, moment_words, request_words, seconds
from qmigrate.report.units import count, duration, plural, size

__all__ = ["recording_page"]

# Classes in the style sheet.
PHASES: Final = {
    "precopy": "precopy",
    "switchover": "switch",
    "postcopy": "postcopy",
    "paused": "paused",
    "recovery": "recover",
    "ending": "completed",
}
CHANNELS: Final = {
    ChannelKind.MAIN: "precopy",
    ChannelKind.RESUMED: "recover",
    ChannelKind.MULTIFD: "setup",
    ChannelKind.PREEMPT: "postcopy",
}
_MOST_LANES: Final = 64
_MOST_MOMENTS: Final = 1000
_RATES: Final = 200
_SHORTEST_RATE_NS: Final = 10_000_000  # a piece is large: in less it would be a needle
_TIMES: Final = "Times are those at which it passed the tap, counted from the recording's start."
_LATENCY: Final = "by the time from the request to the last of its answer, as they passed the tap"


def recording_page(story: RecordingStory, name: str) -> str:
    """The page, complete."""
    axis = _axis(story)
    rows = [lane("phases", _phases(story), axis), *_lanes(story, axis), *_plots(story, axis), axis_row(axis)]
    stops = [each for each in _phases(story) if each.kind == "paused"]
    marks = [(each.begin_us, each.end_us, "stop") for each in stops]
    return document(
        f"Recording {name}",
        [
            _header(story, name),
            _figures(story),
            section("The course of it", stacked(rows, axis, marks), lead=_TIMES),
            section("Channels", table(["connection", "what", "known by", "forward", "back"], _channels(story))),
            latency_section(Latency(buckets=story.requests.histogram), what=_LATENCY),
            _longest(story),
            _moments(story),
        ],
    )


def _axis(story: RecordingStory) -> Axis:
    """From the first connection to the last that happened: what lies before and after is waiting."""
    begin_ns = min((channel.opened_ns for channel in story.channels), default=0)
    end_ns = max((_end_ns(channel, story) for channel in story.channels), default=story.last_ns)
    return Axis(begin_ns // 1000, max(end_ns // 1000, begin_ns // 1000 + 1))


def _end_ns(channel: ChannelStory, story: RecordingStory) -> int:
    return story.last_ns if channel.closed_ns is None else channel.closed_ns


def _header(story: RecordingStory, name: str) -> str:
    when = datetime.fromtimestamp(story.recording.header.time_ns // 1_000_000_000 % (1 << 37), UTC)
    said = f'<p class="over">{escaped(when.strftime("%Y-%m-%d %H:%M:%S UTC"))}</p><h1>{escaped(name)}</h1>'
    recording = story.recording
    wrong = [str(fault) for fault in recording.faults]
    kind = "failed" if wrong else "completed"
    body = "".join(f"<p>{escaped(each)}</p>" for each in wrong)
    return f'<header class="outcome {kind}">{said}{body}</header>'


def _figures(story: RecordingStory) -> str:
    requests = story.requests
    figures = [
        ("recorded", duration(story.last_ns / 1000), ""),
        ("forward", size(story.flow.forward), ""),
        ("back", size(story.flow.back), ""),
        ("connections", count(len(story.channels)), ""),
    ]
    if requests.count:
        remark = f"{plural(requests.unanswered, 'request')} not answered" if requests.unanswered else ""
        figures.append(("pages requested", count(requests.count), remark))
        figures.append(("longest wait", duration(requests.longest_ns / 1000), ""))
    return tiles(figures)


def _phases(story: RecordingStory) -> list[Band]:
    return [
        Band(
            phase.begin_ns // 1000,
            (story.last_ns if phase.end_ns is None else phase.end_ns) // 1000,
            phase.name,
            PHASES.get(phase.name, "setup"),
        )
        for phase in story.phases[:_MOST_MOMENTS]
    ]


def _lanes(story: RecordingStory, axis: Axis) -> Iterator[str]:
    for channel in story.channels[:_MOST_LANES]:
        kind = CHANNELS.get(channel.forward.kind, "setup")
        band = Band(channel.opened_ns // 1000, _end_ns(channel, story) // 1000, channel.forward.name, kind)
        yield lane(f"connection {channel.number}", [band], axis, slim=True)


def _plots(story: RecordingStory, axis: Axis) -> Iterator[str]:
    least_ns = max(_SHORTEST_RATE_NS, axis.length_us * 1000 // _RATES)
    picked = [(axis.begin_us * 1000, 0, 0)]
    for sample in story.flow.samples:
        if sample[0] - picked[-1][0] >= least_ns:
            picked.append(sample)
    picked += story.flow.samples[-1:]
    forward: list[tuple[int, float | None]] = []
    back: list[tuple[int, float | None]] = []
    for (begin_ns, sent, answered), (end_ns, sent_after, answered_after) in pairwise(picked):
        if end_ns > begin_ns:
            took_s = (end_ns - begin_ns) / 1e9
            forward.append((begin_ns // 1000, (sent_after - sent) / took_s))
            back.append((begin_ns // 1000, (answered_after - answered) / took_s))
    for points in (forward, back):  # the last holds to its end
        if points:
            points.append((picked[-1][0] // 1000, points[-1][1]))
    yield plot("Forward", [Series("bytes a second", "sent", forward, "steps")], axis, _rate)
    yield plot("Back", [Series("bytes a second", "asked", back, "steps")], axis, _rate)


def _rate(value: float) -> str:
    return f"{size(int(value))}/s"


def _channels(story: RecordingStory) -> Iterator[list[str]]:
    for channel in story.channels[:_MOST_MOMENTS]:
        known = "; ".join(_known(channel))
        yield [
            str(channel.number),
            channel.forward.name,
            known,
            size(channel.forward_bytes),
            size(channel.return_bytes),
        ]


def _known(channel: ChannelStory) -> Iterator[str]:
    """By what, each direction; and what went wrong."""
    for way in (channel.forward, channel.back):
        if way is not None:
            yield f"{way.name}, by {way.known_by.value}: {way.reason}"
    yield from channel.faults
    if channel.error:
        yield channel.error


def _longest(story: RecordingStory) -> str:
    rows = [request_words(each) for each in longest(story)]
    return section("Longest waits", table(REQUEST, rows), lead="Every request: dissect --ndjson.") if rows else ""


def _moments(story: RecordingStory) -> str:
    moments = in_order(story)
    rows = [
        [seconds(moment.time_ns), str(moment.connection), moment.direction, moment.name, moment_words(moment)]
        for moment in moments[:_MOST_MOMENTS]
    ]
    left_out = len(moments) - len(rows)
    lead = f"The first {count(len(rows))}; {count(left_out)} more are in dissect --ndjson." if left_out > 0 else ""
    return section("What was said", table(["time", "connection", "direction", "what", "details"], rows), lead=lead)
