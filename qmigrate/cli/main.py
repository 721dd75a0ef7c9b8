"""The command ``qmigrate``: which command is meant, and what its end means to the shell.

Nothing is imported here that is not needed: of the commands only that which is named, if one is; and each imports what
it works with when it runs.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO

from qmigrate import __version__, exit_codes
from qmigrate.cli.completion import SHELLS, PrintCompletion
from qmigrate.cli.tell import FAILURES, NOTHING_DONE, Stopped, add_telling, failed, input_name, tell, tell_cost

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["build_parser", "entry_point", "main"]

COMMANDS: Final = (
    "dissect",
    "check",
    "extract",
    "diff",
    "schema",
    "tap",
    "migrate",
    "start-postcopy",
    "pause",
    "recover",
    "cancel",
    "status",
    "receive",
    "send",
    "restore",
)
DESCRIPTION: Final = (
    "Opens up QEMU live migration: takes migration streams apart byte by byte, checks and compares them (dissect, "
    "check, extract, diff, schema), records migrations on their way (tap), drives those of running QEMUs (migrate, "
    "start-postcopy, pause, recover, cancel, status), and stands in for either end (receive, send, restore)."
)


class _Parser(argparse.ArgumentParser):
    """Loads what makes help beautiful when help is asked for."""

    def format_help(self) -> str:
        from rich_argparse import RawDescriptionRichHelpFormatter, RichHelpFormatter

        class Formatter(RichHelpFormatter):
            group_name_formatter = str.capitalize
            help_markup = text_markup = False  # [FILE] is what it looks like

            def _rich_fill_text(self, text: "Text", text_width: int, indent: "Text") -> "Text":
                """Examples keep their lines."""
                fills = RawDescriptionRichHelpFormatter if "\n" in text.plain else RichHelpFormatter
                return fills._rich_fill_text(self, text, text_width, indent)

        self.formatter_class = partial(Formatter, max_help_position=28)
        return super().format_help()

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's own says nothing where help or the version can't be written."""
        if message and file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)


def entry_point() -> NoReturn:
    """Run the command line, and exit with its code."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run the command that ``argv`` names; return its exit code, never a traceback for what a user may do."""
    if sys.stdout is None:
        tell("standard output is closed")
        return NOTHING_DONE
    _never_fail_at_a_character(sys.stdout)
    _never_fail_at_a_character(sys.stderr)
    try:
        return _answer(argv)
    except BrokenPipeError:
        _give_up_stdout()
        return exit_codes.BROKEN_PIPE
    except Stopped as stopped:
        _give_up_stdout()
        return 128 + stopped.number
    except KeyboardInterrupt:
        _give_up_stdout()
        return exit_codes.INTERRUPTED
    except OSError as exc:
        _give_up_stdout()
        tell("standard output", exc.strerror or str(exc))
        return NOTHING_DONE


def _answer(argv: Sequence[str]) -> int:
    try:
        status = _run(build_parser(argv[0] if argv else None).parse_args(argv), sys.stdout)
    except SystemExit as end:  # argparse: help, version, or a usage error that it has told
        status = end.code if isinstance(end.code, int) else NOTHING_DONE
    sys.stdout.flush()
    return status


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; where ``only`` names one, of that alone, which is sooner there."""
    parser = _Parser(
        prog="qmigrate",
        description=DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--print-completion",
        metavar="SHELL",
        choices=SHELLS,
        action=PrintCompletion,
        help="print what makes a shell complete these commands: bash, zsh or fish",
    )
    parser.add_argument("--version", action="version", version=f"qmigrate {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, prog="qmigrate", parser_class=_Parser
    )
    for name in (only,) if only in COMMANDS else COMMANDS:
        module = import_module(f"qmigrate.cli.{name.replace('-', '_')}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog="\n  ".join(["Example:" if len(module.EXAMPLES) == 1 else "Examples:", *module.EXAMPLES]),
            allow_abbrev=False,
        )
        module.add_arguments(command)
        add_telling(command)
        command.set_defaults(run=module.run)
    return parser


def _run(args: argparse.Namespace, out: TextIO) -> int:
    """The command's own answer, or what its failure means."""
    name = input_name(getattr(args, "file", args.command))
    began = time.monotonic()
    try:
        status: int = args.run(args, out)
    except FAILURES as failure:
        status = failed(failure, name, out)
    if args.verbose:
        tell_cost(began)
    return status


def _never_fail_at_a_character(stream: TextIO | None) -> None:
    """A locale that can't hold a character gets it escaped."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _give_up_stdout() -> None:
    """Nobody reads it, or it is full: let what is buffered go nowhere, or Python complains as it ends."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # not a real file: a test's
        return
    with suppress(OSError):  # no further file can be opened
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
