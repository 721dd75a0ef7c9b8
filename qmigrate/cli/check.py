"""``qmigrate check``: is a stream valid, and the same when rebuilt from its values?"""

import argparse
from functools import partial
from typing import Any, TextIO

from qmigrate.cli.files import Headings, answer_lines, each_file, in_lines
from qmigrate.cli.input import add_input, open_input, reading_options, refuse_joining
from qmigrate.cli.tell import tell, tell_faults
from qmigrate.report.units import plural

__all__ = ["add_arguments", "run"]

HELP = "is a stream valid, and identical when rebuilt from its values?"
DESCRIPTION = "Read a migration stream, rebuild every record from its typed values, and compare the bytes."
EXAMPLES = ("qmigrate check --strict vm.mig",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strict", action="store_true", help="say no where the state of a device was not decoded")
    parser.add_argument(
        "--json", action="store_true", help="the answer as JSON; of several files one a line, with its file"
    )
    add_input(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    from qmigrate.analysis.check import check, check_file, describe_check

    refuse_joining(args)
    if in_lines(args):
        answer = partial(check_file, **reading_options(args))
        return answer_lines(args, out, answer, severity=partial(_severity, args.strict))
    headings = Headings(args, out)

    def answer_one(file: str) -> int:
        with open_input(args, file, out) as migration:
            name = migration.source.name
            checked = check(migration)
        if args.json:
            from qmigrate.report.json import write_json

            write_json(describe_check(checked), out)
        else:
            from qmigrate.report.answers import write_check
            from qmigrate.report.paper import Paper

            headings.begin()
            write_check(checked, name, Paper(out))
        out.flush()
        status = tell_faults(name, checked.gathering.contents.errors)
        if args.strict and checked.undecoded:
            tell(name, f"--strict: not decoded: {plural(checked.undecoded, 'device section')}")
            status = 1
        return status if checked.valid and checked.identical else 1

    return each_file(args, out, answer_one)


def _severity(strict: bool, answer: dict[str, Any]) -> int:
    return 0 if answer["valid"] and answer["identical"] and not (strict and answer["undecoded_sections"]) else 1
