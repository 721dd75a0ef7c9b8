"""``qmigrate recover``: bring back a postcopy that is paused."""

import argparse
from typing import TextIO

from qmigrate.cli.live import add_side, add_telling, drive
from qmigrate.cli.migrate import positive, seconds
from qmigrate.cli.seen import looks_closely

__all__ = ["add_arguments", "run"]

HELP = "bring back a postcopy that is paused"
DESCRIPTION = (
    "Bring back a postcopy whose connection broke, whoever began it: the destination listens anew, the source "
    "resumes. Ends with 0 when it is complete; else the code says where the guest is, as for migrate."
)
EXAMPLES = ("qmigrate recover /run/src.qmp /run/dst.qmp",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_side(parser, "SRC", "the QEMU that sends the guest")
    add_side(parser, "DST", "the QEMU that takes it")
    parser.add_argument(
        "--uri", help="where the source connects to, e.g. tcp:HOST:PORT or unix:PATH (default: beside DST's socket)"
    )
    parser.add_argument("--listen", metavar="URI", help="where the destination listens, if not at that very URI")
    parser.add_argument("--attempts", metavar="N", type=positive, default=1, help="try N times (default: 1)")
    parser.add_argument(
        "--stall-timeout", metavar="SECONDS", type=seconds, default=120.0, help="give up when nothing moves for so long"
    )
    parser.add_argument("--force", action="store_true", help="try again also where that may end the source")
    add_telling(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    from qmigrate.operations.drive import Driver
    from qmigrate.operations.plan import Plan

    plan = Plan(
        uri=args.uri,
        listen=args.listen,
        recoveries=args.attempts,
        force=args.force,
        closely=looks_closely(args),
        answer_timeout_s=args.answer_timeout,
        stall_timeout_s=args.stall_timeout,
    )
    return drive(args, out, Driver.recover, lambda source, destination, tell: Driver(source, destination, plan, tell))
