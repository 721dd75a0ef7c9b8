"""``qmigrate tap``: stand between a source and a destination, and record all that passes."""

import argparse
import shlex
import sys
import time
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from qmigrate import exit_codes
from qmigrate.cli.sizes import size
from qmigrate.cli.tell import tell
from qmigrate.errors import RefusedError

if TYPE_CHECKING:
    import asyncio

    from qmigrate.capture.recorder import Recorder
    from qmigrate.events import LiveEvent
    from qmigrate.operations.tap import Tap

__all__ = ["add_arguments", "allow_many_files", "run", "tell_if_gone"]

HELP = "relay a migration, and record every channel both ways"
DESCRIPTION = (
    "Stand between the source and the destination of a migration: every connection to LISTEN is joined to one to "
    "FORWARD, and what passes is recorded, both ways, with times. A killed tap leaves a file that dissect reads; a "
    "full disk stops the recording, never the migration. Ends with Ctrl-C, when its terminal closes, or with --once: "
    "where connections are open then, when they have closed (a second Ctrl-C cuts them). The exit code is 0, 1 where "
    "the recording stopped early or was deleted, 2 where nothing could be done, 130 where connections were cut."
)
EXAMPLES = (
    "qmigrate tap unix:/run/tap.sock unix:/run/incoming.sock -o migration.tap",
    "qmigrate tap tcp:0.0.0.0:4444 tcp:host2:4444 -o migration.tap --once --reserve 8G",
)

STOPPED_EARLY: Final = 1
_EVERY_S: Final = 0.5
_ERASE: Final = "\r\x1b[K"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("listen", metavar="LISTEN", help="where the source connects to: unix:PATH or tcp:HOST:PORT")
    parser.add_argument("forward", metavar="FORWARD", help="where the destination listens, spelled the same way")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the recording, a new file")
    parser.add_argument(
        "--reserve",
        metavar="SIZE",
        type=size,
        help="set so much of the disk aside before it begins: recording then costs less, and can't meet a full disk "
        "before that; what is not used is given back at the end (default: an eighth of what is free, at most 1G)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a FILE that is there")
    parser.add_argument(
        "--once",
        action="store_true",
        help="end when the first migration is over: all is closed, and no return path ended without SHUT, as one "
        "does that can be recovered",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="say only what is wrong")
    parser.add_argument("-v", "--verbose", action="store_true", help="say also by what each connection is known")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace, _out: TextIO) -> int:
    import asyncio

    from qmigrate.capture.recorder import Recorder
    from qmigrate.endpoint.transport import SocketAddress

    try:
        SocketAddress.parse(args.listen), SocketAddress.parse(args.forward)
    except ValueError as exc:
        args.usage_error(str(exc))
    if args.output == "-":
        args.usage_error("-o wants a file: a recording is read by offsets, and - is none")
    allow_many_files()
    with Recorder(args.output, overwrite=args.overwrite, reserve=args.reserve, on_stop=_stopped) as recorder:
        try:
            return asyncio.run(_tap(args, recorder))
        except (OSError, RefusedError, KeyboardInterrupt):
            if recorder.is_empty:  # it could not even listen
                Path(args.output).unlink(missing_ok=True)
            raise


def _stopped(exc: OSError) -> None:
    tell("the recording stopped, the migration goes on", exc.strerror or str(exc))


async def _tap(args: argparse.Namespace, recorder: "Recorder") -> int:
    import asyncio
    import signal

    from qmigrate.operations.tap import Tap

    screen, interrupted, again = _Screen(args), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: (again if interrupted.is_set() else interrupted).set())
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else nohup has said that it goes on
        loop.add_signal_handler(signal.SIGHUP, interrupted.set)  # a terminal that goes away cuts no migration
    async with Tap(args.listen, args.forward, recorder=recorder, on_event=screen.take) as tap:
        screen.line(f"listening at {tap.address}, forwarding to {tap.forward}, recording to {args.output}")
        showing = asyncio.create_task(screen.show(tap, recorder))
        try:
            was_cut = await _until_over(tap, interrupted, again, screen, once=args.once)
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
            screen.erase()
    recorder.close()
    screen.end(tap, recorder, args.output)
    if was_cut:
        return exit_codes.INTERRUPTED
    return STOPPED_EARLY if recorder.stopped is not None or recorder.is_gone else 0


async def _until_over(
    tap: "Tap", interrupted: "asyncio.Event", again: "asyncio.Event", screen: "_Screen", *, once: bool
) -> bool:
    """Until it shall end.  Were connections cut for it?"""
    over = [tap.wait_until_over()] if once else []
    await _first(interrupted.wait(), *over)
    if not interrupted.is_set():
        return False
    await tap.stop_listening()
    if tap.open_count:
        open_ones = "1 open connection has" if tap.open_count == 1 else f"{tap.open_count} open connections have"
        screen.line(f"ending when {open_ones} closed; Ctrl-C again cuts them")
        await _first(again.wait(), tap.wait_until_closed())
    return tap.open_count > len(tap.left_open)


async def _first(*waits: Awaitable[object]) -> None:
    """Until one of them comes true."""
    import asyncio

    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def tell_if_gone(recorder: "Recorder") -> bool:
    """Of a recorder that is closed."""
    if recorder.is_gone:
        tell(recorder.path, "it was deleted while it was written: what was recorded is lost")
    return recorder.is_gone


def allow_many_files() -> None:
    """A connection that is recorded takes ten descriptors, and multifd may have 255 of them."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Screen:
    """What is said on standard error meanwhile: a line for each event, and on a terminal how far it has come."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._quiet = args.quiet or sys.stderr is None
        self._verbose = args.verbose
        self._shows = not self._quiet and sys.stderr.isatty()

    def line(self, said: str) -> None:
        """One line, unless it is to be quiet."""
        if not self._quiet:
            self.erase()
            tell(said)

    def erase(self) -> None:
        """Take the progress away."""
        self._show("")

    def _show(self, said: str) -> None:
        if self._shows:
            with suppress(OSError):  # the terminal may go; the migration stays
                sys.stderr.write(_ERASE + said)
                sys.stderr.flush()

    def take(self, event: "LiveEvent") -> None:
        """Tell of one event."""
        from qmigrate.operations import tap
        from qmigrate.report import units

        match event:
            case tap.ConnectionOpened():
                self.line(f"connection {event.number} opened{event.peer and ' from ' + event.peer}")
            case tap.ConnectionTold():
                known = f": {event.reason}" if self._verbose else ""
                self.line(f"connection {event.number} is {event.channel}{known}")
            case tap.ConnectionRefused():
                tell(f"connection {event.number} refused", event.error)
            case tap.ConnectionClosed():
                passed = f"{units.size(event.forward_bytes)} forward, {units.size(event.return_bytes)} back"
                why = f", {event.error}" if event.error else ""
                open_end = "; its return path has no end" if event.unfinished else ""
                open_end += ": it may be recovered" if event.broken else ""
                self.line(f"connection {event.number} closed, {passed}{why}{open_end}")

    async def show(self, tap: "Tap", recorder: "Recorder") -> None:
        """How far it has come, on a terminal, until it is cancelled."""
        import asyncio

        from qmigrate.report import units

        before, at = 0, time.monotonic()
        while self._shows:
            await asyncio.sleep(_EVERY_S)
            passed, now = _passed(tap), time.monotonic()
            if tap.open_count:
                speed = units.size(int((passed - before) / (now - at)))
                recorded = "recording stopped" if recorder.stopped else f"{units.size(recorder.size)} recorded"
                count = units.plural(tap.open_count, "connection")
                self._show(f"{count}, {units.size(passed)} passed on, {speed}/s, {recorded}")
            before, at = passed, now

    def end(self, tap: "Tap", recorder: "Recorder", path: str) -> None:
        """What came of it."""
        from qmigrate.report import units

        count = units.plural(len(tap.connections), "connection")
        sizes = f"{units.size(_passed(tap))} passed on, {units.size(recorder.size)} recorded"
        if not tell_if_gone(recorder):
            self.line(f"{count}, {sizes}: qmigrate dissect {shlex.quote(path)}")


def _passed(tap: "Tap") -> int:
    return sum(each.forward_bytes + each.return_bytes for each in tap.connections)
