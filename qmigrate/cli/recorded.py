"""``dissect`` of what ``tap`` recorded: at rest, or while it is still written."""

import argparse
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, TextIO

from qmigrate.cli.tell import BAD_STREAM, NOTHING_DONE, tell, tell_faults
from qmigrate.errors import NoStreamError, StreamError

if TYPE_CHECKING:
    from qmigrate.analysis.recording import RecordingStory
    from qmigrate.analysis.story import Moment
    from qmigrate.capture.migration import Contents, Migration
    from qmigrate.capture.recording import Recording

__all__ = ["follow", "write_moments", "write_recorded"]

_EVERY_S: Final = 0.1


def write_recorded(args: argparse.Namespace, migration: "Migration", recording: "Recording", out: TextIO) -> int:
    """The story of all channels in the order of time, then what they hold, joined, as of any stream."""
    from qmigrate.analysis.described import describe_recording, read_story

    story, (contents, has_stream) = read_story(recording), _joined(migration)
    if args.report is not None:
        _write_page(args, story, migration.source.name)
    if args.json:
        from qmigrate.analysis.summary import summarize
        from qmigrate.report.json import write_json

        write_json(summarize(contents) | describe_recording(story), out)
    else:
        from qmigrate.report.paper import Paper
        from qmigrate.report.recording import write_recording
        from qmigrate.report.text import write_story

        paper = Paper(out)
        write_recording(story, migration.source.name, paper)
        if contents.length:
            paper.line()
            write_story(contents, f"{migration.source.name}: its channels, joined", paper)
    out.flush()
    status = tell_faults(migration.source.name, contents.errors)
    return status if has_stream else NOTHING_DONE


def write_moments(recording: "Recording", out: TextIO, *, file: str | None) -> int:
    """A moment a line, as JSON, in the order of the recording; each request and each answer has its own."""
    from qmigrate.analysis.recording import RecordingStory
    from qmigrate.capture.recording import Recording
    from qmigrate.report.json import write_json_line

    named = {} if file is None else {"file": file}
    with Recording(recording.path, name=recording.name) as again:
        story = RecordingStory(again)
        for moment in story.advance():
            write_json_line(named | moment.plain(), out)
        again.finish()
        for moment in story.finish():
            write_json_line(named | moment.plain(), out)
    out.flush()
    return max(_tell_streams(recording, story), _tell_recording(recording.name, story))


def follow(args: argparse.Namespace, file: str, out: TextIO) -> int:
    """What a tap records into ``file``, while it does, until it ends."""
    from qmigrate.analysis.recording import RecordingStory
    from qmigrate.capture.recording import Recording
    from qmigrate.cli.asked import answer_with
    from qmigrate.report import units
    from qmigrate.report.json import write_json_line
    from qmigrate.report.paper import Paper
    from qmigrate.report.recording import moment_line, write_ending

    with Recording(file) as recording:
        answer_with(lambda: f"{file}: {units.size(recording.position)} of the recording read")
        story, paper = RecordingStory(recording), Paper(out)
        for moment in _moments(story):
            if args.ndjson:
                write_json_line(moment.plain(), out)
            elif moment.name not in ("answer", "REQ_PAGES_ID"):  # they are told together
                paper.line(moment_line(moment))
            out.flush()
        if not args.ndjson:
            write_ending(story, paper)
        out.flush()
        return max(_tell_streams(recording, story), _tell_recording(file, story))


def _moments(story: "RecordingStory") -> "Iterator[Moment]":
    """As they come, until the recording has an end, or nobody writes it any more."""
    while True:
        is_written = story.recording.is_written  # asked first: what was written before it ended is read below
        yield from story.advance()
        if story.recording.ended or story.recording.fault is not None or not is_written:
            break
        time.sleep(_EVERY_S)
    story.recording.finish()
    yield from story.finish()


def _write_page(args: argparse.Namespace, story: "RecordingStory", name: str) -> None:
    from qmigrate.cli.newfile import NewFile
    from qmigrate.report.recording_page import recording_page

    with NewFile(args.report, inputs=args.files) as file:
        file.finish(recording_page(story, name))


def _joined(migration: "Migration") -> "tuple[Contents, bool]":
    """What the channels hold, and whether that is a stream at all."""
    from qmigrate.capture.migration import Contents

    try:
        return migration.contents, True
    except NoStreamError as exc:
        why = StreamError(str(exc.args[0]))
        why.input = exc.input
        return Contents(errors=[why, *migration.recording_faults]), False


def _tell_streams(recording: "Recording", story: "RecordingStory") -> int:
    """Is there no stream, or what is wrong with those that are there?  Told by who does not join them."""
    if not story.has_stream:
        try:
            number = recording.main().connection.number
            why = next(iter(story.channels[number].faults), "no migration stream").removeprefix("forward: ")
        except NoStreamError as exc:
            why = str(exc)
        tell(recording.name, why)
        return NOTHING_DONE
    status = 0
    for number, fault in (*story.faults, *story.untold):
        tell(recording.name, f"connection {number}, {fault}")
        status = BAD_STREAM
    return status


def _tell_recording(name: str, story: "RecordingStory") -> int:
    return tell_faults(name, story.recording.faults)
