"""``qmigrate start-postcopy``: switch a migration that is under way to postcopy."""

import argparse
from typing import TextIO

from qmigrate.cli.step import add_source, tell_source

__all__ = ["add_arguments", "run"]

HELP = "switch a migration that is under way to postcopy"
DESCRIPTION = "Switch a migration that is under way, whoever began it, to postcopy. One that is complete stays so."
EXAMPLES = ("qmigrate start-postcopy /run/src.qmp",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    from qmigrate.operations.attached import start_postcopy

    return tell_source(args, out, start_postcopy)
