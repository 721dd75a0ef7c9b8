"""The story of a recording as one plain value: what ``dissect --json`` adds to the summary of its main channel."""

from heapq import nlargest
from typing import Any, Final

from qmigrate.analysis.recording import RecordingStory
from qmigrate.analysis.requests import PageRequest
from qmigrate.analysis.story import ChannelStory, Moment
from qmigrate.capture.recording import Recording

__all__ = ["describe_recording", "in_order", "longest", "read_story"]

_LONGEST: Final = 10


def read_story(recording: Recording) -> RecordingStory:
    """The whole story of a recording that is open elsewhere: it is read anew, from its start."""
    with Recording(recording.path, name=recording.name) as again:
        return RecordingStory(again).read()


def describe_recording(story: RecordingStory) -> dict[str, Any]:
    """Under the names of ``dissect.schema.json``; times in nanoseconds from the recording's start."""
    recording, requests = story.recording, story.requests
    return {
        "recording": {
            "time_ns": recording.header.time_ns,
            "length_ns": story.last_ns,
            "bytes": story.bytes,
            "ended": recording.ended,
            "stopped": None if recording.stopped is None else recording.stopped.reason,
            "fault": None if recording.fault is None else str(recording.fault),
        },
        "channels": [_describe_channel(channel) for channel in story.channels],
        "phases": [{"name": phase.name, "begin_ns": phase.begin_ns, "end_ns": phase.end_ns} for phase in story.phases],
        "timeline": [moment.plain() for moment in in_order(story)],
        "page_requests": {
            "count": requests.count,
            "answered": requests.answered,
            "on_way": requests.on_way,
            "unanswered": requests.unanswered,
            "histogram": [
                {"begin_us": bucket.begin_us, "end_us": bucket.end_us, "count": bucket.count}
                for bucket in requests.histogram
            ],
            "requests": [
                {
                    "block": request.block,
                    "start": request.start,
                    "length": request.length,
                    "asked_ns": request.asked_ns,
                    "connection": request.connection,
                    "answered_ns": request.answered_ns,
                    "answered_on": request.answered_on,
                    "on_way": request.on_way,
                }
                for request in story.asked
            ],
        },
        "left_out": story.left_out,
    }


def _describe_channel(channel: ChannelStory) -> dict[str, Any]:
    ways = {"forward": channel.forward} | ({} if channel.back is None else {"return": channel.back})
    return {
        "connection": channel.number,
        "peer": channel.peer,
        "opened_ns": channel.opened_ns,
        "closed_ns": channel.closed_ns,
        "error": channel.error,
        "faults": channel.faults,
        "directions": {
            name: {
                "kind": way.kind.value,
                "known_by": way.known_by.value,
                "reason": way.reason,
                "bytes": channel.forward_bytes if name == "forward" else channel.return_bytes,
                **({} if way.channel_id is None else {"channel_id": way.channel_id}),
                **({} if way.uuid is None else {"uuid": way.uuid.hex()}),
            }
            for name, way in ways.items()
        },
    }


def in_order(story: RecordingStory) -> list[Moment]:
    """What was told together comes late, and begins earlier."""
    return sorted(story.timeline, key=lambda moment: moment.time_ns)


def longest(story: RecordingStory) -> list[PageRequest]:
    """A few of the answered requests, those that took longest first."""
    answered = (request for request in story.asked if request.answered_ns is not None)
    return nlargest(_LONGEST, answered, key=lambda request: request.delay_ns or 0)
