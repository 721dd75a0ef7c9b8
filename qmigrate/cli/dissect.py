"""``qmigrate dissect``: what is in a stream."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TextIO

from qmigrate.cli.files import Headings, answer_lines, each_file, in_lines
from qmigrate.cli.input import add_input, open_input, reading_options
from qmigrate.cli.tell import tell, tell_faults
from qmigrate.errors import NoStreamError

if TYPE_CHECKING:
    from qmigrate.analysis.devices import Plain
    from qmigrate.capture.migration import Contents, Migration, Section

__all__ = ["add_arguments", "run"]

HELP = "what is in a stream: structure, devices by field, RAM by block, commands, what is odd"
DESCRIPTION = "Tell what is in a migration stream: on one screen, or one thing of it in full."
EXAMPLES = (
    "qmigrate dissect vm.mig",
    "qmigrate dissect --device virtio-net vm.mig",
    "qmigrate dissect --json --jobs 4 *.mig",
)

_MOST_NAMES: Final = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    views = parser.add_argument_group("views, instead of the story").add_mutually_exclusive_group()
    views.add_argument("--structure", action="store_true", help="each record with its offset and length, pages as runs")
    views.add_argument(
        "--device", metavar="NAME", help="the fields of a device: its name, with or without its bus path or /instance"
    )
    views.add_argument("--field", metavar="PATH", help="the value at DEVICE.FIELD, for scripts, e.g. cpu/0.env.eip")
    views.add_argument("--ram", action="store_true", help="RAM by block and by pass")
    forms = parser.add_argument_group("for programs").add_mutually_exclusive_group()
    forms.add_argument(
        "--json",
        action="store_true",
        help="everything, or the view that is asked for, as JSON; of several files an answer a line, with its file",
    )
    forms.add_argument("--ndjson", action="store_true", help="a JSON object for each record, as they are read")
    recordings = parser.add_argument_group("recordings of qmigrate tap")
    recordings.add_argument(
        "--live", action="store_true", help="follow a recording that is still being written, until the tap ends"
    )
    recordings.add_argument(
        "--report", metavar="PAGE", help="write a page for a browser, too: channels on one axis of time"
    )
    add_input(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    if args.live:
        return _live(args, out)
    if args.report is not None and (len(args.files) > 1 or args.jobs or _view_of(args) is not _story):
        args.usage_error("--report is about one recording, and goes with no other view")
    if args.structure and args.json:
        args.usage_error("--structure goes with --ndjson: there is a record a line")
    if args.ndjson and (args.device or args.field or args.ram):
        args.usage_error("--ndjson gives all records: --device, --field and --ram go with --json")
    if in_lines(args):
        return answer_lines(args, out, partial(_answer_of(args), **reading_options(args)), severity=_severity)
    headings = Headings(args, out)
    view = _view_of(args)

    def dissect(file: str) -> int:
        with open_input(args, file, out, streams=args.structure or args.ndjson) as migration:
            status = view(args, migration, headings, out)
            out.flush()
            return status

    return each_file(args, out, dissect)


def _live(args: argparse.Namespace, out: TextIO) -> int:
    from qmigrate.cli.recorded import follow

    if len(args.files) != 1 or args.files == ["-"]:
        args.usage_error("--live follows one recording, which is a file")
    if args.json or args.jobs or args.structure or args.ram or args.device or args.field or args.report:
        args.usage_error("--live goes with --ndjson, or alone")
    return each_file(args, out, lambda file: follow(args, file, out))


_View = Callable[[argparse.Namespace, "Migration", Headings, TextIO], int]


def _view_of(args: argparse.Namespace) -> _View:
    if args.ndjson:
        return _ndjson
    if args.structure:
        return _structure
    if args.ram:
        return _ram
    if args.device is not None:
        return _device
    if args.field is not None:
        return _field
    return _story


def _ndjson(args: argparse.Namespace, migration: "Migration", _headings: Headings, out: TextIO) -> int:
    from qmigrate.report.json import write_ndjson

    file = migration.source.name if len(args.files) > 1 else None
    if migration.source.recording is not None:
        from qmigrate.cli.recorded import write_moments

        return write_moments(migration.source.recording, out, file=file)
    write_ndjson(migration.entries(), out, file=file)
    return 0


def _structure(_args: argparse.Namespace, migration: "Migration", headings: Headings, out: TextIO) -> int:
    from qmigrate.report.paper import Paper
    from qmigrate.report.structure import write_structure

    headings.begin(migration.source.name)
    write_structure(migration.entries(), Paper(out))
    return 0


def _ram(args: argparse.Namespace, migration: "Migration", headings: Headings, out: TextIO) -> int:
    from qmigrate.analysis.ram import describe_ram, tally_ram

    tally = tally_ram(migration)
    if args.json:
        from qmigrate.report.json import write_json

        write_json(describe_ram(tally), out)
    else:
        from qmigrate.report.paper import Paper
        from qmigrate.report.ram import write_ram

        headings.begin(migration.source.name)
        write_ram(tally, Paper(out))
    out.flush()
    return tell_faults(migration.source.name, tally.contents.errors)


def _story(args: argparse.Namespace, migration: "Migration", headings: Headings, out: TextIO) -> int:
    if migration.source.recording is not None:
        from qmigrate.cli.recorded import write_recorded

        headings.begin()
        return write_recorded(args, migration, migration.source.recording, out)
    if args.report is not None:
        raise NoStreamError("no recording of qmigrate tap, which --report is about")
    contents = migration.contents
    if args.json:
        from qmigrate.analysis.summary import summarize
        from qmigrate.report.json import write_json

        write_json(summarize(contents), out)
    else:
        from qmigrate.report.paper import Paper
        from qmigrate.report.text import write_story

        headings.begin()
        write_story(contents, migration.source.name, Paper(out))
    out.flush()
    return tell_faults(migration.source.name, contents.errors)


def _device(args: argparse.Namespace, migration: "Migration", headings: Headings, out: TextIO) -> int:
    from qmigrate.analysis.devices import find_devices

    contents = migration.contents
    sections = find_devices(contents, args.device)
    if not sections:
        out.flush()
        tell(migration.source.name, _no_device(args.device, contents))
    elif args.json:
        from qmigrate.report.json import write_json

        write_json(_plain_devices(sections), out)
    else:
        from qmigrate.report.device import write_devices
        from qmigrate.report.paper import Paper

        headings.begin(migration.source.name)
        write_devices(sections, Paper(out))
    out.flush()
    return max(0 if sections else 1, tell_faults(migration.source.name, contents.errors))


def _field(args: argparse.Namespace, migration: "Migration", headings: Headings, out: TextIO) -> int:
    from qmigrate.analysis.devices import find_field

    contents = migration.contents
    found = find_field(contents, args.field)
    if not found:
        out.flush()
        tell(migration.source.name, _no_field(args.field, contents))
    elif args.json:
        from qmigrate.report.json import write_json

        write_json(_plain_field(found), out)
    else:
        from qmigrate.report.device import write_value
        from qmigrate.report.paper import Paper

        headings.begin(migration.source.name)
        for _, _, value in found:
            write_value(value, Paper(out))
    out.flush()
    return max(0 if found else 1, tell_faults(migration.source.name, contents.errors))


# -- an answer a line: made in processes, so these are functions that can be pickled


def _answer_of(args: argparse.Namespace) -> Callable[..., dict[str, Any]]:
    from qmigrate.analysis.file import answer_file
    from qmigrate.analysis.summary import summarize_file

    if args.ram:
        return partial(answer_file, answer=_ram_answer)
    if args.device is not None:
        return partial(answer_file, answer=partial(_device_answer, args.device))
    if args.field is not None:
        return partial(answer_file, answer=partial(_field_answer, args.field))
    return summarize_file


def _severity(answer: dict[str, Any]) -> int:
    """Is the answer no?"""
    return 1 if "missing" in answer else 0


def _ram_answer(migration: "Migration") -> dict[str, Any]:
    from qmigrate.analysis.ram import describe_ram, tally_ram

    return describe_ram(tally_ram(migration))


def _device_answer(name: str, migration: "Migration") -> dict[str, Any]:
    from qmigrate.analysis.devices import find_devices

    contents = migration.contents
    sections = find_devices(contents, name)
    answer: dict[str, Any] = (
        {"devices": _plain_devices(sections)} if sections else {"missing": _no_device(name, contents)}
    )
    return answer | _errors(contents)


def _field_answer(path: str, migration: "Migration") -> dict[str, Any]:
    from qmigrate.analysis.devices import find_field

    contents = migration.contents
    found = find_field(contents, path)
    answer: dict[str, Any] = {"value": _plain_field(found)} if found else {"missing": _no_field(path, contents)}
    return answer | _errors(contents)


def _errors(contents: "Contents") -> dict[str, Any]:
    from qmigrate.analysis.summary import describe_error

    return {"complete": contents.complete, "errors": [describe_error(error) for error in contents.errors]}


def _plain_devices(sections: "list[Section]") -> dict[str, Any]:
    from qmigrate.analysis.devices import plain

    return {section.key: plain(section.state) for section in sections}


def _plain_field(found: "Sequence[tuple[Section, str, Plain]]") -> "Plain":
    """The value; where several devices have it, each by its device."""
    return found[0][2] if len(found) == 1 else {section.key: value for section, _, value in found}


# -- what is not there


def _no_device(name: str, contents: "Contents") -> str:
    return f"no device {name!r} in this stream{_suggestion(name, contents)}"


def _no_field(path: str, contents: "Contents") -> str:
    return f"no field {path!r} in this stream{_reason(path, contents)}"


def _reason(path: str, contents: "Contents") -> str:
    """Why there is no such field: its device was not decoded, or has others."""
    from qmigrate.analysis.devices import plain

    for section in contents.sections:
        if section.kind.name != "FULL" or not path.startswith((section.name, section.name.rpartition("/")[2])):
            continue
        if section.state is None:
            return f"; {section.key} was not decoded: {section.reason or 'the stream ends inside it'}"
        state = plain(section.state)
        fields = list(state) if isinstance(state, dict) else []
        more = f" and {len(fields) - _MOST_NAMES} more" if len(fields) > _MOST_NAMES else ""
        return f"; {section.key} has {', '.join(fields[:_MOST_NAMES]) or 'none'}{more}"
    return ""


def _suggestion(wanted: str, contents: "Contents") -> str:
    from difflib import get_close_matches

    names = {section.name.rpartition("/")[2] for section in contents.sections if section.kind.name == "FULL"}
    close = get_close_matches(wanted, sorted(names), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
