"""``qmigrate pause``: break the connection of a postcopy on purpose."""

import argparse
from typing import TYPE_CHECKING, TextIO

from qmigrate.cli.live import SIDE_HELP, add_one_side, add_patience, do_one

if TYPE_CHECKING:
    from qmigrate.operations.attached import Done
    from qmigrate.qmp.session import Session

__all__ = ["add_arguments", "run"]

HELP = "pause a postcopy, to resume it later or elsewhere"
DESCRIPTION = (
    "Pause a postcopy, whoever began it. Too early a pause loses the guest: it is refused until the destination "
    "has taken over, which is asked of DST; without DST it is refused where the source alone can't know."
)
EXAMPLES = ("qmigrate pause /run/src.qmp /run/dst.qmp",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_one_side(parser, "SRC", "the QEMU that sends the guest")
    parser.add_argument("dst", metavar="DST", nargs="?", help=f"the QEMU that takes it: {SIDE_HELP}")
    parser.add_argument("--force", action="store_true", help="do it also when it may lose the guest")
    add_patience(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    from qmigrate.operations.attached import pause

    async def work(sessions: "list[Session]") -> "Done":
        destination = sessions[1] if len(sessions) > 1 else None
        return await pause(sessions[0], destination, force=args.force, timeout_s=args.answer_timeout)

    return do_one(args, out, [args.src, *([args.dst] if args.dst else [])], work)
