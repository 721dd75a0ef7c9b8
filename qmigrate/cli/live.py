"""What all commands that drive live QEMUs share: addresses, what is told meanwhile, Ctrl-C, the end."""

import argparse
import os
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TextIO

from qmigrate import exit_codes
from qmigrate.cli.lines import EventLines
from qmigrate.cli.seen import Seen, add_seen
from qmigrate.cli.tell import tell
from qmigrate.errors import RefusedError

if TYPE_CHECKING:
    from qmigrate.operations.attached import Done
    from qmigrate.operations.drive import Driver
    from qmigrate.operations.result import MigrationResult
    from qmigrate.qmp.session import Session

__all__ = ["add_one_side", "add_patience", "add_side", "add_telling", "address", "do_one", "drive"]


SIDE_HELP: Final = "where its QMP is: a unix socket's path, or HOST:PORT"


def add_side(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    parser.add_argument(name.lower(), metavar=name, help=f"{what}: {SIDE_HELP}")


def add_one_side(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    """One side, which $QMP_SOCKET may name."""
    parser.add_argument(name.lower(), metavar=name, nargs="?", help=f"{what}: {SIDE_HELP} (default: $QMP_SOCKET)")


def address(given: str | None) -> str:
    """What was given, or $QMP_SOCKET."""
    found = given or os.environ.get("QMP_SOCKET")
    if not found:
        raise RefusedError("which QEMU? Give the address of its QMP, or set QMP_SOCKET")
    return found


def add_telling(parser: argparse.ArgumentParser) -> None:
    add_seen(parser)
    parser.add_argument("--ndjson", action="store_true", help="every event as a JSON object on a line of its own")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but how it ended")
    parser.add_argument("-v", "--verbose", action="store_true", help="say also what QEMU is told")
    add_patience(parser)


def add_patience(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--answer-timeout",
        metavar="SECONDS",
        type=_patience,
        default=30.0,
        help="a QEMU this silent hangs (default: 30)",
    )


def _patience(argument: str) -> float:
    try:
        number = float(argument)
    except ValueError:
        number = -1.0
    if not 0 < number < 1e9:  # which NaN is not, either
        raise argparse.ArgumentTypeError(f"{argument!r} is no number of seconds above 0")
    return number


async def with_sessions(
    addresses: list[str], work: "Callable[[list[Session]], Awaitable[int]]", *, timeout_s: float
) -> int:
    """Do it with a session at each address.  Raises QmpConnectError where nobody answers."""
    from contextlib import AsyncExitStack

    from qmigrate.qmp.session import Session

    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(Session.connect(each, timeout_s=timeout_s)) for each in addresses]
        return await work(sessions)


def do_one(
    args: argparse.Namespace,
    out: TextIO,
    addresses: "list[str | None]",
    do: "Callable[[list[Session]], Awaitable[Done]]",
) -> int:
    """Do one step in a migration that is under way, and say what was done."""
    import asyncio

    async def work(sessions: "list[Session]") -> int:
        from qmigrate.report.names import clean

        done = await do(sessions)
        out.write(clean(done.message) + "\n")
        return 0

    found = [address(each) for each in addresses]
    return asyncio.run(with_sessions(found, work, timeout_s=min(10.0, args.answer_timeout)))


def drive(
    args: argparse.Namespace, out: TextIO, start: "Callable[[Driver], Awaitable[MigrationResult]]", make: "_MakeDriver"
) -> int:
    """Run a driver for SRC and DST; the exit code that its result means."""
    import asyncio

    from qmigrate.events import Began

    if args.src == args.dst:
        raise RefusedError("SRC and DST are the same QEMU")

    with Seen(args, out) as seen:

        async def work(sessions: "list[Session]") -> int:
            with _teller(args, out) as teller:
                driver = make(sessions[0], sessions[1], teller.take)
                try:
                    result = await _driven(driver, start, teller)
                except asyncio.CancelledError:
                    tell("interrupted before anything began: the guest is where it was, on the source")
                    return exit_codes.INTERRUPTED
                finally:  # also where we failed ourselves: what was seen is kept
                    if driver.started and any(isinstance(each, Began) for each in driver.events):
                        seen.write(driver.events)
            return teller.finish(result)

        return asyncio.run(with_sessions([args.src, args.dst], work, timeout_s=min(10.0, args.answer_timeout)))


async def _driven(
    driver: "Driver", start: "Callable[[Driver], Awaitable[MigrationResult]]", teller: EventLines
) -> "MigrationResult":
    """To its end, with signals.  CancelledError: interrupted before it began."""
    import asyncio
    import signal

    from qmigrate.cli.until_done import until_done

    task = asyncio.ensure_future(start(driver))

    def interrupt() -> None:
        if driver.started:
            driver.interrupt()
        else:
            task.cancel()

    return await until_done(task, teller, {signal.SIGINT: interrupt, signal.SIGTERM: interrupt})


def _teller(args: argparse.Namespace, out: TextIO) -> EventLines:
    """A display where there is a terminal for it, else lines."""
    if sys.stderr is not None and sys.stderr.isatty():
        from qmigrate.cli.display import Display
        from qmigrate.cli.panel_below import is_for

        if is_for(args):
            return Display(args, out)
    return EventLines(args, out)


_MakeDriver = Callable[..., "Driver"]
