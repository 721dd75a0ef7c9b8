"""The story of a recording, as a person reads it."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, Final

from rich.text import Text

from qmigrate.analysis.described import in_order, longest
from qmigrate.analysis.latency import Bucket, Latency
from qmigrate.analysis.recording import RecordingStory
from qmigrate.analysis.requests import PageRequest
from qmigrate.analysis.story import ChannelStory, Moment
from qmigrate.errors import TruncatedError
from qmigrate.report.names import clean
from qmigrate.report.paper import BAD, DIM, GOOD, HEAD, KIND, ODD, Paper, text
from qmigrate.report.units import count, duration, plural, share, size

__all__ = ["REQUEST", "moment_line", "moment_words", "request_words", "seconds", "write_ending", "write_recording"]

REQUEST: Final = ("asked", "block", "start", "length", "answered on", "took")
"""Heads of the columns of ``request_words()``."""

_MOST_LINES: Final = 60
_MANY: Final = 5
_BAR: Final = 40  # columns
_ARROWS: Final = {"forward": "→", "return": "←", "": " "}


def write_recording(story: RecordingStory, name: str, paper: Paper) -> None:
    """All but what main holds, which is a stream like any other."""
    paper.line(_verdict(story), lead=text((clean(name), HEAD), "  "))
    _channels(story, paper)
    _phases(story, paper)
    _timeline(story, paper)
    _requests(story, paper)


def write_ending(story: RecordingStory, paper: Paper) -> None:
    """What is known only when all is told, to who has followed it."""
    paper.line()
    paper.line(_verdict(story))
    _phases(story, paper)
    _requests(story, paper)


def _verdict(story: RecordingStory) -> Text:
    recording = story.recording
    if recording.stopped is not None:
        said = text((f"a recording that stopped: {clean(recording.stopped.reason)}", BAD))
    elif not recording.faults:
        said = text(("a recording, complete", GOOD))
    elif isinstance(recording.fault, TruncatedError):
        said = text(("a recording without an end", ODD))
    else:
        said = text(("a damaged recording", BAD))
    how_long = duration(story.last_ns / 1000)
    connections = plural(len(story.channels), "connection")
    return said + text(f", {connections}, {size(story.bytes)} in {how_long}")


def _channels(story: RecordingStory, paper: Paper) -> None:
    if not story.channels:
        return
    paper.heading("Channels")
    rows = []
    for channel in story.channels[:_MOST_LINES]:
        closed = "open" if channel.closed_ns is None else seconds(channel.closed_ns)
        sizes = size(channel.forward_bytes), size(channel.return_bytes)
        rows.append([f"{channel.number} {channel.forward.name}", seconds(channel.opened_ns), closed, *sizes])
    paper.table(["connection", "opened", "closed", "forward", "back"], rows)
    for channel in story.channels[:_MOST_LINES]:
        for lead, said, style in _about(channel):
            paper.line(text((said, style)), lead=text(f"  {lead}  "))
    if len(story.channels) > _MOST_LINES:
        paper.line(text((f"  … and {count(len(story.channels) - _MOST_LINES)} more", DIM)))


def _about(channel: ChannelStory) -> Iterator[tuple[str, str, str]]:
    """By what it is known, and what went wrong on it."""
    number = str(channel.number)
    for arrow, way in (("→", channel.forward), ("←", channel.back)):
        if way is not None:
            yield f"{number} {arrow}", f"{way.name}, by {way.known_by.value}: {clean(way.reason)}", DIM
    for fault in channel.faults:
        yield number, clean(fault), ODD
    if channel.error:
        yield number, clean(channel.error), ODD


def _phases(story: RecordingStory, paper: Paper) -> None:
    if not story.phases:
        return
    paper.heading("Phases")
    rows = []
    for phase in story.phases[:_MOST_LINES]:
        end = story.last_ns if phase.end_ns is None else phase.end_ns
        rows.append([phase.name, seconds(phase.begin_ns), duration((end - phase.begin_ns) / 1000)])
    paper.table(["phase", "from", "took"], rows)
    if len(story.phases) > _MOST_LINES:
        paper.line(text((f"  … and {count(len(story.phases) - _MOST_LINES)} more", DIM)))


def _timeline(story: RecordingStory, paper: Paper) -> None:
    if not story.timeline:
        return
    paper.heading("Timeline", ("seconds from the recording's start; → forward, ← return", DIM))
    groups = list(_folded(in_order(story)))
    for same in groups[:_MOST_LINES]:
        said = _said(same[0]) if len(same) == 1 else text((same[0].name, KIND), f" ×{len(same):,}")
        paper.line(said, lead=_lead(same[0]))
    if len(groups) > _MOST_LINES:
        paper.line(text((f"  … and {count(len(groups) - _MOST_LINES)} more lines: --ndjson", DIM)))


def _folded(moments: list[Moment]) -> Iterator[list[Moment]]:
    """Many of the same, one after the other, are one line."""
    for _, group in groupby(moments, key=_who_says_what):
        same = list(group)
        if len(same) >= _MANY:
            yield same
        else:
            yield from ([moment] for moment in same)


def _who_says_what(moment: Moment) -> tuple[int, str, str]:
    return moment.connection, moment.direction, moment.name


def _lead(moment: Moment) -> str:
    return f"  {seconds(moment.time_ns):>12}  {moment.connection:>2} {_ARROWS[moment.direction]} "


def moment_line(moment: Moment) -> str:
    """One moment on a line, for those who follow."""
    return _lead(moment).lstrip() + _said(moment).plain


def _said(moment: Moment) -> Text:
    words = moment_words(moment)
    return text((moment.name, KIND), f"  {words}" if words else "")


def moment_words(moment: Moment) -> str:
    """What a moment says beyond its name; often nothing."""
    details = dict(moment.details)
    if moment.name == "is":
        return f"{details['channel']}, by {details['known_by']}: {clean(details['reason'])}"
    until = details.pop("until_ns", None)
    parts = [_in_words(name, value) for name, value in details.items() if value not in (None, "")]
    took = "" if until is None or until <= moment.time_ns else f", in {duration((until - moment.time_ns) / 1000)}"
    return "  ".join(parts) + took


def _in_words(name: str, value: Any) -> str:
    if name.endswith("_ns"):
        return f"{name.removesuffix('_ns')} {duration(value / 1000)}"
    if name.endswith("bytes") or name in ("length", "package_length"):
        return f"{name.replace('_', ' ')} {size(value)}"
    if isinstance(value, int) and name in ("start", "token", "summary"):
        return f"{name} {value:#x}"
    return f"{name.replace('_', ' ')} {count(value) if isinstance(value, int) else clean(str(value))}"


def _requests(story: RecordingStory, paper: Paper) -> None:
    requests = story.requests
    if not requests.count:
        return
    said = [count(requests.count), f"{count(requests.answered)} answered"]
    if requests.on_way:
        said.append(f"{count(requests.on_way)} had passed already")
    if requests.unanswered:
        said.append(f"{count(requests.unanswered)} not answered")
    paper.heading("Page requests", ", ".join(said))
    latency = Latency(buckets=requests.histogram)
    half, most = latency.percentile(0.5), latency.percentile(0.99)
    if half is None or most is None:
        return
    most_took = duration(requests.longest_ns / 1000)
    paper.line(f"  half took {_below(half)}, 99 of 100 {_below(most)}, the longest {most_took}; as it passed the tap")
    largest = max(bucket.count for bucket in latency.buckets)
    rows = [
        [_below(bucket), count(bucket.count), share(bucket.count, latency.count), "█" * _bar(bucket.count, largest)]
        for bucket in latency.buckets
    ]
    for took, number, part, bar in rows:
        paper.line(f"  {took:<20} {number:>9} {part:>6}  {bar}")
    paper.heading("Longest waits", ("every request: --ndjson", DIM))
    paper.table(REQUEST, [[clean(cell) for cell in request_words(each)] for each in longest(story)])


def request_words(request: PageRequest) -> list[str]:
    """Of a request that was answered: when, for what, on which connection the answer came, how long that took."""
    what = [seconds(request.asked_ns), request.block, f"{request.start:#x}", size(request.length)]
    return [*what, str(request.answered_on), duration((request.delay_ns or 0) / 1000)]


def _bar(number: int, largest: int) -> int:
    return -(-number * _BAR // largest)


def _below(bucket: Bucket) -> str:
    if bucket.end_us is None:
        return f"{duration(bucket.begin_us)} or more"
    return f"less than {duration(bucket.end_us)}"


def seconds(time_ns: int) -> str:
    """A time of the recording, to the microsecond."""
    return f"{time_ns / 1e9:.6f} s"
