"""``qmigrate restore``: run a saved guest at once, in any stock QEMU; its pages come as it asks for them."""

import argparse
import sys
from typing import TYPE_CHECKING, Final, TextIO

from qmigrate import exit_codes
from qmigrate.cli.live import add_patience
from qmigrate.cli.restored import Kept
from qmigrate.cli.serving import add_channels, add_file, add_index, add_output, begun
from qmigrate.cli.tell import tell
from qmigrate.errors import RefusedError

if TYPE_CHECKING:
    from qmigrate.events import LiveEvent
    from qmigrate.operations.reading import Reading
    from qmigrate.operations.restore import Restorer, Served, ServingResult

__all__ = ["Lines", "add_arguments", "run"]

HELP = "run a saved guest at once, in any stock QEMU: its pages come as it asks for them"
DESCRIPTION = (
    "Serve a saved stream over postcopy to a QEMU that waits with -incoming defer: its devices first, then the guest "
    "runs, and each page comes when it is asked for, the rest in between. The QEMU is one that runs (--qmp), or one "
    "that is started here and ends with this command (-- QEMU...; its standard streams go nowhere). A terminal that "
    "goes away ends nothing once the guest runs. Ends with 0 when all is in, with 2 when nothing began, with 3 when it "
    "failed before the guest ran, with 4 to 7 as `migrate` does by where the guest is then."
)
EXAMPLES = (
    "qmigrate restore guest.mig --qmp /run/vm/qmp.sock",
    "qmigrate restore guest.mig -- qemu-system-x86_64 -machine pc -m 1G -display none",
    "qmigrate restore --resume guest.mig --qmp /run/vm/qmp.sock",
    "qmigrate restore --eager --paused guest.mig --qmp localhost:4444",
)

PROGRESS_EVERY_US: Final = 1_000_000
RECOVERIES: Final = 5


def attempts(argument: str) -> int:
    """A number from 0."""
    if not (argument.isascii() and argument.isdigit()):
        raise argparse.ArgumentTypeError(f"{argument!r} is no number of attempts")
    return int(argument)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    parser.add_argument("qemu", metavar="QEMU", nargs="*", help="behind --: a QEMU to start, and its arguments")
    parser.add_argument(
        "--qmp", metavar="ADDRESS", help="the QMP of a QEMU that waits: a unix socket's path, HOST:PORT"
    )
    parser.add_argument("--uri", help="where it is to listen, as we reach it (default: beside its QMP socket)")
    parser.add_argument("--listen", metavar="URI", help="where it is to listen itself, if that is not --uri: a tunnel")
    add_channels(parser)
    how = parser.add_argument_group("how")
    how.add_argument("--eager", action="store_true", help="by precopy: all pages are there before the guest runs")
    how.add_argument("--paused", action="store_true", help="the guest is not to run until somebody says `cont`")
    how.add_argument(
        "--resume",
        action="store_true",
        help="go on with a destination that is postcopy-paused, since whoever served it FILE was ended",
    )
    how.add_argument(
        "--no-preempt",
        dest="preempt",
        action="store_false",
        help="one connection for all pages (default: what is asked for has its own, where QEMU can, since 7.1)",
    )
    how.add_argument(
        "--auto-recover",
        metavar="N",
        type=attempts,
        default=RECOVERIES,
        help=f"a connection that breaks is made anew, N times at most (default: {RECOVERIES}; 0: not)",
    )
    add_index(parser)
    parser.add_argument(
        "--report", metavar="FILE", help="a page for a browser: what came when, and how long pages took"
    )
    add_output(parser)
    add_patience(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    if (args.qmp is None) == (not args.qemu):
        raise RefusedError("restore into which QEMU? Give --qmp ADDRESS, or behind -- one to start")
    if args.resume and (args.qemu or args.eager or args.paused):
        raise RefusedError("--resume is for a guest that runs already: give --qmp, and neither --eager nor --paused")
    with begun(args) as reading:
        return _restore(args, out, reading)


def _restore(args: argparse.Namespace, out: TextIO, reading: "Reading | None") -> int:
    import gc

    gc.disable()  # to import so much makes much and frees nothing
    import asyncio

    from qmigrate.operations.restore import Restorer

    gc.freeze()
    gc.enable()
    with Kept(args.report, inputs=(args.file, *args.channel)) as kept:
        lines = Lines(args, out, kept)
        restorer = Restorer(
            args.file,
            channels=tuple(args.channel),
            eager=args.eager,
            paused=args.paused,
            resume=args.resume,
            preempt=args.preempt,
            recoveries=args.auto_recover,
            owned=bool(args.qemu),
            answer_timeout_s=args.answer_timeout,
            reading=reading,
            on_event=lines.take,
        )
        status = asyncio.run(_interruptible(args, restorer, lines))
    lines.raise_what_broke(status)
    return status


async def _interruptible(args: argparse.Namespace, restorer: "Restorer", lines: "Lines") -> int:
    from asyncio import CancelledError

    from qmigrate.cli.until_done import until_served

    try:
        return await until_served(
            _into_running(args, restorer, lines) if args.qmp else _started(args, restorer, lines),
            lambda: restorer.interrupt() or lines.warns_of_end(),
            lambda: restorer.hang_up() or lines.ends_with_us,
        )
    except CancelledError:
        if lines.status is None:
            tell("interrupted before anything began: the guest is in the file, as it was")
        return exit_codes.INTERRUPTED


async def _into_running(args: argparse.Namespace, restorer: "Restorer", lines: "Lines") -> int:
    """A QEMU that somebody else has started."""
    from qmigrate.qmp.session import Session

    async with Session.connect(args.qmp, timeout_s=min(10.0, args.answer_timeout)) as session:
        return lines.finish(await restorer.run(session, uri=args.uri, listen=args.listen))


async def _started(args: argparse.Namespace, restorer: "Restorer", lines: "Lines") -> int:
    """One of our own, started while the file is read; it ends with us."""
    import tempfile

    from qmigrate.qmp.machine import Machine

    command = [*args.qemu, *([] if "-incoming" in args.qemu else ["-incoming", "defer"])]
    if "-daemonize" in command:
        raise RefusedError("-daemonize: start it yourself, with -incoming defer, and give --qmp")
    with tempfile.TemporaryDirectory("-qmigrate") as folder:
        async with (
            restorer.opened() as opening,
            Machine(command[0], command[1:], own_group=True) as machine,
        ):
            uri = args.uri or f"unix:{folder}/incoming"
            result = await restorer.run_opening(opening, machine.session, uri=uri, listen=args.listen)
            status = lines.finish(result)
            if result.exit_code in (0, 4):
                lines.ends_with_us = True
                await machine.wait()
            elif not 0 < result.exit_code < 4:
                machine.kill()  # it waits for pages, and would not end when asked
            return status


class Lines:
    """Events as lines: for a person on standard error, or, with --ndjson, as data on ``out``.

    That nobody reads them any more ends nothing: then there is silence, and what it was is told at the end.
    """

    def __init__(self, args: argparse.Namespace, out: TextIO, kept: Kept | None = None) -> None:
        self._args = args
        self._out = out
        self._kept = kept
        self._broken: OSError | None = None
        self._began_us: int | None = None
        self._progress_us = 0
        self.status: int | None = None
        self.ends_with_us = False

    def warns_of_end(self) -> bool:
        """Told to stop while all that runs is a QEMU of ours: once it is said what that means."""
        warns, self.ends_with_us = self.ends_with_us, False
        if warns:
            tell("the guest is all there, in a QEMU that ends with this command: once more ends both")
        return warns

    def take(self, event: "LiveEvent") -> None:
        """Tell of one event."""
        import json

        if self._kept is not None:
            self._kept.take(event)
        if self._args.ndjson:
            self._write(json.dumps(event.plain()))
        elif not self._args.quiet and (said := self._line(event)):
            self._began_us = event.time_us if self._began_us is None else self._began_us
            self._say(f"{(event.time_us - self._began_us) / 1e6:8.3f} s  {said}")

    def finish(self, result: "ServingResult") -> int:
        """How it ended; the exit code."""
        import json

        self.status = result.exit_code
        if not result.ok:
            tell(result.message)
        if self._args.ndjson or self._args.json:
            self._write(json.dumps(result.plain()))
        elif result.ok:
            self._write("\n  ".join([result.message, *_numbers(result)]))
        if self._kept is not None:
            self._kept.write(self._args, result)
        return result.exit_code

    def raise_what_broke(self, status: int) -> None:
        """Where all else went well, that standard output did not take what was to be said."""
        if self._broken is not None and not status:
            raise self._broken

    def _write(self, text: str) -> None:
        if self._broken is None:
            try:
                self._out.write(text + "\n")
                self._out.flush()
            except OSError as exc:
                self._broken = exc

    def _say(self, line: str) -> None:
        from contextlib import suppress

        from qmigrate.report.names import clean

        if sys.stderr is not None:
            with suppress(OSError):  # nobody reads it any more: that ends nothing
                sys.stderr.write(clean(line) + "\n")
                sys.stderr.flush()

    def _line(self, event: "LiveEvent") -> str:
        from qmigrate import events
        from qmigrate.operations import restore
        from qmigrate.report.units import size
        from qmigrate.report.wording import wording

        match event:
            case restore.Indexed():
                machine = event.machine_type or "a machine that it does not name"
                return f"{size(event.total_bytes)} of RAM in {event.blocks} blocks, for {machine}"
            case restore.Restored():
                return event.moment
            case restore.Served():
                return self._progress(event)
            case events.StatusChanged():
                return f"destination: {event.status}"
            case events.GuestChanged():
                return f"destination: the guest {'runs' if event.running else 'stopped'}"
            case events.Decided():
                return f"{event.decision}: {event.reason}"
            case events.Recovering():
                return wording(event)
            case events.Troubled():
                return event.message
            case events.CommandSent() if self._args.verbose:
                return f"destination is told: {event.command} {dict(event.arguments)}"
        return ""

    def _progress(self, event: "Served") -> str:
        from qmigrate.report.units import count, size

        if event.time_us - self._progress_us < PROGRESS_EVERY_US or not event.bytes_per_s:
            return ""
        self._progress_us = event.time_us
        share = 100 * event.pages // max(event.total, 1)
        return (
            f"{share:3} % in, {count(event.pages)} of {count(event.total)} pages, {count(event.requested)} of them "
            f"asked for, {size(event.bytes_per_s)}/s"
        )


def _numbers(result: "ServingResult") -> list[str]:
    """What a person wants to know of it."""
    from qmigrate.report.restore_page import MOMENTS
    from qmigrate.report.units import count, duration, size

    counts, moments = result.counts, result.moments
    lines = [
        f"{count(counts.pages)} pages, {count(counts.requested)} of them asked for, {size(counts.sent_bytes)} sent"
    ]
    lines += [f"{words} after {duration(moments[name])}" for name, words in MOMENTS.items() if name in moments]
    if answered := sum(result.latency.counts):
        lines.append(
            f"a page that was asked for was sent after {duration(result.latency.total_ns / 1000 / answered)} on "
            f"average, after {duration(result.latency.longest_ns / 1000)} at most"
        )
    return lines
