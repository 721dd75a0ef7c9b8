"""The command ``qmigrate``: which command is meant, and what its end means to the shell.

Nothing is imported here that ``qmigrate --version`` does not need: each command imports its own when it runs.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Final, NoReturn, TextIO

from qmigrate import __version__
from qmigrate.cli import check, dissect, extract
from qmigrate.cli.tell import tell
from qmigrate.errors import NoStreamError, QmigrateError, StreamError

__all__ = ["entry_point", "main"]

BAD_STREAM: Final = 1
NOTHING_DONE: Final = 2
INTERRUPTED: Final = 130  # 128 + SIGINT, as a shell reports it
BROKEN_PIPE: Final = 141  # 128 + SIGPIPE: what a tool that does not catch it ends with


class _Parser(argparse.ArgumentParser):
    """Loads what makes help beautiful when help is asked for."""

    def format_help(self) -> str:
        from rich_argparse import RichHelpFormatter

        class Formatter(RichHelpFormatter):
            group_name_formatter = str.capitalize

        self.formatter_class = partial(Formatter, max_help_position=28)
        return super().format_help()


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
        return BROKEN_PIPE
    except KeyboardInterrupt:
        _give_up_stdout()
        return INTERRUPTED
    except OSError as exc:
        _give_up_stdout()
        tell("standard output", exc.strerror or str(exc))
        return NOTHING_DONE


def _answer(argv: Sequence[str]) -> int:
    try:
        status = _run(_parser().parse_args(argv), sys.stdout)
    except SystemExit as end:  # argparse: help, version, or a usage error that it has told
        status = end.code if isinstance(end.code, int) else NOTHING_DONE
    sys.stdout.flush()
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qmigrate",
        description="Opens up QEMU live migration: dissects migration streams byte by byte.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"qmigrate {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, prog="qmigrate", parser_class=_Parser
    )
    for module in (dissect, check, extract):
        command = commands.add_parser(
            module.__name__.rpartition(".")[2], help=module.HELP, description=module.DESCRIPTION, allow_abbrev=False
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _run(args: argparse.Namespace, out: TextIO) -> int:
    """The command's own answer, or what its failure means."""
    name = "standard input" if args.file == "-" else args.file
    try:
        status: int = args.run(args, out)
    except BrokenPipeError:
        raise
    except NoStreamError as exc:
        return _failed(out, NOTHING_DONE, name, str(exc))
    except StreamError as exc:
        return _failed(out, BAD_STREAM, name, str(exc))
    except QmigrateError as exc:
        return _failed(out, NOTHING_DONE, str(exc))
    except OSError as exc:
        if exc.filename is None:  # a write: whatever is opened has a name
            raise
        named = name if isinstance(exc.filename, int) else os.fsdecode(exc.filename)
        return _failed(out, NOTHING_DONE, named, exc.strerror or str(exc))
    return status


def _failed(out: TextIO, status: int, *parts: str) -> int:
    out.flush()  # what was good is given, and stands before what is said of the rest
    tell(*parts)
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
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
