"""``qmigrate diff``: what differs between two captures."""

import argparse
from contextlib import ExitStack
from typing import TYPE_CHECKING, TextIO

from qmigrate.cli.asked import answering
from qmigrate.cli.input import add_reading, open_input
from qmigrate.cli.tell import FAILURES, failed, input_name, tell, tell_faults
from qmigrate.report.units import plural

if TYPE_CHECKING:
    from qmigrate.analysis.diff import Diff, Side

__all__ = ["add_arguments", "run"]

HELP = "what differs between two captures: machine, devices by field, pages of RAM"
DESCRIPTION = (
    "Compare two captures of a machine, whichever way each travelled: the machine, each device's fields, and RAM as "
    "each stream leaves it. Ends with 0 where all is the same, with 1 where something differs or an input is not "
    "whole. RAM of both is put into files without a name in $TMPDIR meanwhile."
)
EXAMPLES = (
    "qmigrate diff before.mig after.mig",
    "qmigrate diff --ignore 'timer.*' --ignore 'cpu*.env.tsc' before.mig after.mig",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("A", "B"):
        parser.add_argument(
            name.lower(),
            metavar=name,
            help="a migration stream, compressed or not; - is standard input, for one of the two",
        )
    parser.add_argument(
        "--ignore",
        metavar="DEVICE.FIELD",
        action="append",
        default=[],
        help="a field that may differ, and all below it, as dissect --field names it; * and ? stand for any "
        "characters; may be repeated",
    )
    parser.add_argument(
        "--strict", action="store_true", help="say no also where something could not be compared, or only as bytes"
    )
    parser.add_argument("--devices-only", action="store_true", help="leave the contents of RAM out")
    parser.add_argument("--all", action="store_true", help="each field and each range of pages, however many")
    parser.add_argument("--json", action="store_true", help="the answer as JSON, with all of them")
    channels = parser.add_argument_group("a migration over several connections, each in a file of its own")
    for name in ("A", "B"):
        channels.add_argument(
            f"--{name.lower()}-channel",
            metavar="FILE",
            action="append",
            default=[],
            help=f"a further connection of {name}: multifd, preempt, or main resumed; may be repeated, in any order",
        )
        channels.add_argument(
            f"--{name.lower()}-return-path",
            metavar="FILE",
            action="append",
            default=[],
            help=f"what came back over one of {name}'s; may be repeated",
        )
    for name in ("--channel", "--return-path"):  # as the other commands have them: whose would it be?
        parser.add_argument(name, action=_Whose, help=argparse.SUPPRESS)
    add_reading(parser)


class _Whose(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        _namespace: argparse.Namespace,
        _values: object,
        option_string: str | None = None,
    ) -> None:
        plain = (option_string or "").removeprefix("--")
        parser.error(f"--{plain}: of which of the two? --a-{plain} or --b-{plain}")


def run(args: argparse.Namespace, out: TextIO) -> int:
    from qmigrate.analysis.diff import describe_diff, diff

    if args.a == args.b == "-":
        args.usage_error("standard input can be one of the two only")
    others = (args.a_channel, args.a_return_path, args.b_channel, args.b_return_path)
    if [args.a, args.b, *(each for files in others for each in files)].count("-") > 1:
        args.usage_error("standard input can be one of the files only")
    with ExitStack() as stack, answering():
        sides: list[Side] = []
        for file, channels, return_paths in (
            (args.a, args.a_channel, args.a_return_path),
            (args.b, args.b_channel, args.b_return_path),
        ):
            own = argparse.Namespace(**vars(args) | {"channel": channels, "return_path": return_paths})
            try:
                sides.append(_read(own, file, out, stack))
            except FAILURES as failure:
                return failed(failure, input_name(file), out)
        found = diff(*sides, ignore=args.ignore)
    if args.json:
        from qmigrate.report.json import write_json

        write_json(describe_diff(found), out)
    else:
        from qmigrate.report.diff import write_diff
        from qmigrate.report.paper import Paper

        write_diff(found, Paper(out), everything=args.all)
    out.flush()
    status = max(0 if found.same else 1, _tell(found))
    if args.strict and (found.not_compared or found.as_bytes):
        bytes_only = plural(len(found.as_bytes), "section")
        tell("--strict", f"{plural(len(found.not_compared), 'thing')} not compared, {bytes_only} only as bytes")
        status = max(status, 1)
    return status


def _read(args: argparse.Namespace, file: str, out: TextIO, stack: ExitStack) -> "Side":
    from qmigrate.analysis.diff import read_side

    with open_input(args, file, out) as migration:
        return read_side(migration, migration.source.name, stack, ram=not args.devices_only)


def _tell(found: "Diff") -> int:
    """What is wrong with either input, and what could not be compared; the exit code that this makes."""
    worst = 0
    for side in (found.a, found.b):
        worst = max(worst, tell_faults(side.name, side.contents.errors))
    for each in found.not_compared:
        tell("not compared", each.name, each.reason)
    for pattern in found.ignored_nothing:
        tell(f"--ignore {pattern!r}", "neither A nor B has such a field")
    return worst
