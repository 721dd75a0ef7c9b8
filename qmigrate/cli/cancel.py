"""``qmigrate cancel``: end precopy, and leave the guest where it is."""

import argparse
from typing import TextIO

from qmigrate.cli.step import add_source, tell_source

__all__ = ["add_arguments", "run"]

HELP = "end precopy; the guest stays on the source"
DESCRIPTION = "Cancel a migration that is under way, whoever began it. Refused in postcopy: it would lose the guest."
EXAMPLES = ("qmigrate cancel /run/src.qmp",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    from qmigrate.operations.attached import cancel

    return tell_source(args, out, cancel)
