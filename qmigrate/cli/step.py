"""What commands share that take one step in a migration under way, told to its source alone."""

import argparse
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TextIO

from qmigrate.cli.live import add_one_side, add_patience, do_one

if TYPE_CHECKING:
    from qmigrate.operations.attached import Done
    from qmigrate.qmp.session import Session

__all__ = ["add_source", "tell_source"]


def add_source(parser: argparse.ArgumentParser) -> None:
    """SRC, or $QMP_SOCKET, and how long to wait for it."""
    add_one_side(parser, "SRC", "the QEMU that sends the guest")
    add_patience(parser)


def tell_source(args: argparse.Namespace, out: TextIO, step: "Callable[..., Awaitable[Done]]") -> int:
    """Take the step, a coroutine function of ``operations.attached``; the exit code."""

    async def work(sessions: "list[Session]") -> "Done":
        return await step(sessions[0], timeout_s=args.answer_timeout)

    return do_one(args, out, [args.src], work)
