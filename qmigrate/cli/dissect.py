"""``qmigrate dissect``: what is in a stream."""

import argparse
from typing import TYPE_CHECKING, Final, TextIO

from qmigrate.cli.input import add_input, open_input
from qmigrate.cli.tell import tell, tell_faults

if TYPE_CHECKING:
    from qmigrate.capture.migration import Contents, Migration

__all__ = ["add_arguments", "run"]

HELP = "what is in a stream: structure, devices by field, RAM by block, commands, what is odd"
DESCRIPTION = "Tell what is in a migration stream: on one screen, or one thing of it in full."

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
    forms.add_argument("--json", action="store_true", help="everything, or the view that is asked for, as JSON")
    forms.add_argument("--ndjson", action="store_true", help="a JSON object for each record, as they are read")
    add_input(parser)
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace, out: TextIO) -> int:
    if args.structure and args.json:
        args.usage_error("--structure goes with --ndjson: there is a record a line")
    if args.ndjson and (args.device or args.field or args.ram):
        args.usage_error("--ndjson gives all records: --device, --field and --ram go with --json")
    streams = args.structure or args.ndjson
    with open_input(args, out, streams=streams) as migration:
        if streams:
            return _records(args, migration, out)
        if args.ram:
            return _ram(args, migration, out)
        contents = migration.contents
        if args.device is not None:
            status = _device(args, contents, migration.source.name, out)
        elif args.field is not None:
            status = _field(args, contents, migration.source.name, out)
        else:
            status = _story(args, contents, migration.source.name, out)
        out.flush()
        return max(status, tell_faults(migration.source.name, contents.errors))


def _records(args: argparse.Namespace, migration: "Migration", out: TextIO) -> int:
    if args.ndjson:
        from qmigrate.report.json import write_ndjson

        write_ndjson(migration.entries(), out)
    else:
        from qmigrate.report.paper import Paper
        from qmigrate.report.structure import write_structure

        write_structure(migration.entries(), Paper(out))
    return 0


def _ram(args: argparse.Namespace, migration: "Migration", out: TextIO) -> int:
    from qmigrate.report.ram import plain_ram, tally_ram, write_ram

    tally = tally_ram(migration)
    if args.json:
        from qmigrate.report.json import write_json

        write_json(plain_ram(tally), out)
    else:
        from qmigrate.report.paper import Paper

        write_ram(tally, Paper(out))
    out.flush()
    return tell_faults(migration.source.name, tally.contents.errors)


def _story(args: argparse.Namespace, contents: "Contents", name: str, out: TextIO) -> int:
    if args.json:
        from qmigrate.analysis.summary import summarize
        from qmigrate.report.json import write_json

        write_json(summarize(contents), out)
    else:
        from qmigrate.report.paper import Paper
        from qmigrate.report.text import write_story

        write_story(contents, name, Paper(out))
    return 0


def _device(args: argparse.Namespace, contents: "Contents", name: str, out: TextIO) -> int:
    from qmigrate.analysis.devices import find_devices, plain

    sections = find_devices(contents, args.device)
    if not sections:
        tell(name, f"no device {args.device!r} in this stream{_suggestion(args.device, contents)}")
        return 1
    if args.json:
        from qmigrate.report.json import write_json

        write_json({section.key: plain(section.state) for section in sections}, out)
    else:
        from qmigrate.report.device import write_devices
        from qmigrate.report.paper import Paper

        write_devices(sections, Paper(out))
    return 0


def _field(args: argparse.Namespace, contents: "Contents", name: str, out: TextIO) -> int:
    from qmigrate.analysis.devices import find_field

    found = find_field(contents, args.field)
    if not found:
        tell(name, f"no field {args.field!r} in this stream{_reason(args.field, contents)}")
        return 1
    if args.json:
        from qmigrate.report.json import write_json

        values = {section.key: value for section, _, value in found}
        write_json(found[0][2] if len(found) == 1 else values, out)
    else:
        from qmigrate.report.device import write_value
        from qmigrate.report.paper import Paper

        for _, _, value in found:
            write_value(value, Paper(out))
    return 0


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
