"""``qmigrate check``: is a stream valid, and the same when rebuilt from its values?"""

import argparse
from typing import TextIO

from qmigrate.cli.input import add_input, open_input
from qmigrate.cli.tell import tell, tell_faults
from qmigrate.report.units import plural

__all__ = ["add_arguments", "run"]

HELP = "is a stream valid, and identical when rebuilt from its values?"
DESCRIPTION = "Read a migration stream, rebuild every record from its typed values, and compare the bytes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strict", action="store_true", help="say no where the state of a device was not decoded")
    parser.add_argument("--json", action="store_true", help="the answer as JSON")
    add_input(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    from qmigrate.analysis.check import check

    with open_input(args, out) as migration:
        name = migration.source.name
        checked = check(migration)
    if args.json:
        from qmigrate.report.answers import plain_check
        from qmigrate.report.json import write_json

        write_json(plain_check(checked), out)
    else:
        from qmigrate.report.answers import write_check
        from qmigrate.report.paper import Paper

        write_check(checked, name, Paper(out))
    out.flush()
    status = tell_faults(name, checked.gathering.contents.errors)
    if args.strict and checked.undecoded:
        tell(name, f"--strict: not decoded: {plural(checked.undecoded, 'device section')}")
        status = 1
    return status if checked.valid and checked.identical else 1
