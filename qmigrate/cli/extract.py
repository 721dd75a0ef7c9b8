"""``qmigrate extract``: RAM out of a stream."""

import argparse
from typing import TextIO

from qmigrate.cli.files import Headings, each_file
from qmigrate.cli.input import add_input, open_input, refuse_joining
from qmigrate.cli.tell import FAILURES, tell, tell_faults

__all__ = ["add_arguments", "run"]

HELP = "RAM of each block, as a sparse file"
DESCRIPTION = "Write the RAM of a migration stream, as its end leaves it: each block in a sparse file."
EXAMPLES = ("qmigrate extract --raw ram/ vm.mig",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--raw",
        metavar="DIR",
        type=_folder,
        required=True,
        help="where a file for each block goes, and blocks.json that maps the names; made if need be; of several "
        "files each gets a directory of its own in it",
    )
    parser.add_argument(
        "--json", action="store_true", help="what was written as JSON; of several files one a line, with its file"
    )
    add_input(parser, jobs=False, devices=False)


def _folder(argument: str) -> str:
    if not argument:  # a variable that is not set: not the current folder
        raise argparse.ArgumentTypeError("an empty name: expected a directory")
    return argument


def run(args: argparse.Namespace, out: TextIO) -> int:
    from pathlib import Path

    from qmigrate.analysis.extract import describe_extract, extract, folder_names
    from qmigrate.analysis.file import why
    from qmigrate.analysis.summary import left_out_blocks
    from qmigrate.report.json import write_json, write_json_line

    refuse_joining(args)
    several = len(args.files) > 1
    folders = folder_names(args.files) if several else {args.files[0]: ""}
    headings = Headings(args, out)

    def extract_one(file: str) -> int:
        folder = Path(args.raw, folders[file])
        with open_input(args, file, out) as migration:
            name = migration.source.name
            try:
                extracted = extract(migration, folder, inputs=args.files)
            except OSError as exc:
                if exc.filename is None:  # a write to one of the files
                    exc.filename = str(folder)
                raise
        if args.json and several:
            write_json_line({"file": file} | describe_extract(extracted), out)
        elif args.json:
            write_json(describe_extract(extracted), out)
        elif extracted.files:
            from qmigrate.report.answers import write_extract
            from qmigrate.report.paper import Paper

            headings.begin(name)
            write_extract(extracted, Paper(out))
        out.flush()
        status = tell_faults(name, extracted.gathering.contents.errors)
        if left_out := left_out_blocks(extracted.gathering.contents):
            tell(
                name, f"x-ignore-shared: RAM that was shared is not in it, so all is zero here of {', '.join(left_out)}"
            )
        if not extracted.files and not status:
            tell(name, "there is no RAM in this stream")
            return 1
        return status

    def extract_one_of_several(file: str) -> int:
        try:
            return extract_one(file)
        except FAILURES as failure:
            write_json_line({"file": file, "error": why(failure)}, out)
            raise

    return each_file(args, out, extract_one_of_several if args.json and several else extract_one)
