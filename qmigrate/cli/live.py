"""What all commands that drive live QEMUs share: addresses, what is told meanwhile, Ctrl-C, the end."""

import argparse
import os
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TextIO

from qmigrate.cli.tell import tell
from qmigrate.errors import RefusedError

if TYPE_CHECKING:
    from qmigrate.events import LiveEvent
    from qmigrate.operations.attached import Done
    from qmigrate.operations.drive import Driver
    from qmigrate.operations.result import MigrationResult
    from qmigrate.qmp.session import Session

__all__ = ["EventLines", "add_one_side", "add_patience", "add_side", "add_telling", "address", "do_one", "drive"]

INTERRUPTED: Final = 130
PROGRESS_EVERY_S: Final = 2.0

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
    parser.add_argument("--ndjson", action="store_true", help="every event as a JSON object on a line of its own")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but how it ended")
    parser.add_argument("-v", "--verbose", action="store_true", help="say also what QEMU is told")
    add_patience(parser)


def add_patience(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--answer-timeout", metavar="SECONDS", type=float, default=30.0, help="a QEMU this silent hangs (default: 30)"
    )


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
    import signal

    if args.src == args.dst:
        raise RefusedError("SRC and DST are the same QEMU")

    async def work(sessions: "list[Session]") -> int:
        lines = EventLines(args, out)
        driver = make(sessions[0], sessions[1], lines.take)
        task = asyncio.ensure_future(start(driver))

        def interrupt() -> None:
            if driver.started:
                driver.interrupt()
            else:
                task.cancel()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)
        try:
            return lines.finish(await task)
        except asyncio.CancelledError:
            tell("interrupted before anything began: the guest is where it was, on the source")
            return INTERRUPTED
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    return asyncio.run(with_sessions([args.src, args.dst], work, timeout_s=min(10.0, args.answer_timeout)))


_MakeDriver = Callable[..., "Driver"]


class EventLines:
    """Events as lines: for a person on standard error, or, with --ndjson, as data on ``out``."""

    def __init__(self, args: argparse.Namespace, out: TextIO) -> None:
        self._args = args
        self._out = out
        self._began_us: int | None = None
        self._progress_us = 0

    def take(self, event: "LiveEvent") -> None:
        """Tell of one event."""
        import json

        if self._args.ndjson:
            self._out.write(json.dumps(event.plain()) + "\n")
            self._out.flush()
        elif not self._args.quiet:
            said = self._line(event)
            if said:
                if self._began_us is None:
                    self._began_us = event.time_us
                self._say(f"{(event.time_us - self._began_us) / 1e6:8.3f} s  {said}")

    def finish(self, result: "MigrationResult") -> int:
        """How it ended: the message, where the guest is, what to do.  Returns the exit code."""
        from qmigrate.report.names import clean

        if not result.ok:
            tell(result.message)
        if not self._args.ndjson:
            lines = [result.message] if result.ok else []
            for each in (*lines, result.guest.sentence, result.guest.advice):
                if each:
                    self._out.write(clean(each) + "\n")
        self._out.flush()
        return result.exit_code

    def _say(self, line: str) -> None:
        from qmigrate.report.names import clean

        if sys.stderr is not None:
            sys.stderr.write(clean(line) + "\n")
            sys.stderr.flush()

    def _line(self, event: "LiveEvent") -> str:
        import json

        from qmigrate import events

        match event:
            case events.StatusChanged():
                return f"{event.side}: {event.status}"
            case events.GuestChanged():
                return f"{event.side}: the guest {'runs' if event.running else 'stopped'}"
            case events.Decided():
                return f"{event.decision}: {event.reason}"
            case events.Recovering():
                limit = "" if event.limit is None else f" of {event.limit}"
                return f"recovery, attempt {event.attempt}{limit}, through {event.uri}"
            case events.Troubled():
                return f"{event.side or 'trouble'}: {event.message}"
            case events.Progressed() if event.side is events.Side.SOURCE and event.transferred_bytes:
                return self._progress(event)
            case events.CommandSent() if self._args.verbose:
                return f"{event.side} is told: {event.command} {json.dumps(dict(event.arguments))}"
            case events.PassBegan() if self._args.verbose:
                return f"{event.side}: MIGRATION_PASS {event.number}"
            case events.QemuSaid() if self._args.verbose:
                return f"{event.side}: {event.qemu_event} {json.dumps(dict(event.data))}"
        return ""

    def _progress(self, event: "LiveEvent") -> str:
        from qmigrate.events import Progressed
        from qmigrate.report.units import size

        assert isinstance(event, Progressed)
        if event.time_us - self._progress_us < PROGRESS_EVERY_S * 1e6:
            return ""
        self._progress_us = event.time_us
        parts = [f"{size(event.remaining_bytes or 0)} left"]
        if event.sent_bytes_per_s:
            parts.append(f"{size(event.sent_bytes_per_s)}/s sent")
        if event.dirty_bytes_per_s:
            parts.append(f"{size(event.dirty_bytes_per_s)}/s dirtied")
        if event.page_requests:
            parts.append(f"{event.page_requests} pages requested")
        return ", ".join(parts)
