"""``qmigrate start-postcopy``: switch a migration that is under way to postcopy."""

import argparse
from typing import TYPE_CHECKING, TextIO

from qmigrate.cli.live import add_one_side, add_patience, do_one

if TYPE_CHECKING:
    from qmigrate.operations.attached import Done
    from qmigrate.qmp.session import Session

__all__ = ["add_arguments", "run"]

HELP = "switch a migration that is under way to postcopy"
DESCRIPTION = "Switch a migration that is under way, whoever began it, to postcopy. One that is complete stays so."
EXAMPLES = ("qmigrate start-postcopy /run/src.qmp",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_one_side(parser, "SRC", "the QEMU that sends the guest")
    add_patience(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    from qmigrate.operations.attached import start_postcopy

    async def work(sessions: "list[Session]") -> "Done":
        return await start_postcopy(sessions[0], timeout_s=args.answer_timeout)

    return do_one(args, out, [args.src], work)
