"""``qmigrate extract``: RAM out of a stream."""

import argparse
from typing import TextIO

from qmigrate.cli.input import add_input, open_input
from qmigrate.cli.tell import tell, tell_faults

__all__ = ["add_arguments", "run"]

HELP = "RAM of each block, as a sparse file"
DESCRIPTION = "Write the RAM of a migration stream, as its end leaves it: each block in a sparse file."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--raw",
        metavar="DIR",
        required=True,
        help="where a file for each block goes, and blocks.json that maps the names; made if need be",
    )
    parser.add_argument("--json", action="store_true", help="what was written as JSON")
    add_input(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    from qmigrate.analysis.extract import extract

    with open_input(args, out) as migration:
        name = migration.source.name
        try:
            extracted = extract(migration, args.raw)
        except OSError as exc:
            if exc.filename is None:  # a write to one of the files
                exc.filename = args.raw
            raise
    if args.json:
        from qmigrate.report.answers import plain_extract
        from qmigrate.report.json import write_json

        write_json(plain_extract(extracted), out)
    else:
        from qmigrate.report.answers import write_extract
        from qmigrate.report.paper import Paper

        write_extract(extracted, Paper(out))
    out.flush()
    status = tell_faults(name, extracted.gathering.contents.errors)
    if not extracted.files and not status:
        tell(name, "there is no RAM in this stream")
        return 1
    return status
