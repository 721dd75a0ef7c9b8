"""``qmigrate receive``: stand in for a destination."""

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from qmigrate.cli.input import add_limits
from qmigrate.cli.migrate import positive
from qmigrate.cli.receiving import ReceiveLines
from qmigrate.cli.seen import Seen, add_seen
from qmigrate.cli.tap import allow_many_files, tell_if_gone
from qmigrate.cli.tell import tell
from qmigrate.errors import RefusedError

if TYPE_CHECKING:
    from qmigrate.capture.recorder import Recorder
    from qmigrate.endpoint.destination import Workload
    from qmigrate.operations.receive import Receiver, ReceiveResult

__all__ = ["add_arguments", "run"]

HELP = "stand in for a destination: a real QEMU migrates into it, by precopy or postcopy"
DESCRIPTION = (
    "Listen as QEMU's -incoming does, and take what comes, precopy or postcopy: RAM into memory that faults where a "
    "page is missing (userfaultfd), device state unread. Ends with 0 when all was received, with 3 when it failed and "
    "the guest is still the source's, with 6 when it failed in postcopy and the guest is lost, with 2 when nothing "
    "could begin, with 130 when it was interrupted before a source came. Ctrl-C in postcopy says what it would cost; "
    "again, it ends."
)
EXAMPLES = (
    "qmigrate receive unix:/run/in.sock --raw ram/",
    "qmigrate receive tcp:0.0.0.0:4444 --touch random --touch zipf --touch-rate 1000",
    "qmigrate receive tcp:0.0.0.0:4444 --save guest.mig",
    "qmigrate receive unix:/run/in.sock --record in.tap --report in.html",
    "qmigrate receive --recover tcp:0.0.0.0:4445 --control /run/receive.control",
)

PATTERNS: Final = ("sequential", "random", "zipf", "working-set")  # of uffd.toucher, which is loaded later


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "uri",
        metavar="URI",
        nargs="?",
        help="tcp:HOST:PORT, unix:PATH, fd:N, exec:COMMAND, file:PATH[,offset=N], or - for stdin",
    )
    keeping = parser.add_argument_group("what is kept")
    keeping.add_argument("--raw", metavar="DIR", help="write RAM there when all of it is here, a sparse file a block")
    keeping.add_argument(
        "--save",
        metavar="FILE",
        help="write all that came as one stream that a stock QEMU loads; the source is told that all went well only "
        "once it is on disk",
    )
    keeping.add_argument(
        "--record",
        metavar="FILE",
        help="record all connections, both ways, as `qmigrate tap` does, for `dissect`; a full disk ends the "
        "recording, not the migration",
    )
    keeping.add_argument("--overwrite", action="store_true", help="replace a recording that is there")
    _add_channels(parser)
    _add_control(parser)
    _add_touching(parser)
    add_limits(parser.add_argument_group("limits"))
    add_seen(
        parser,
        page="a page for a browser: the phases and what came on one axis of time, and how long missing pages took",
        schema="receive",
    )
    parser.add_argument("--ndjson", action="store_true", help="every event as a JSON object on a line of its own")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but how it ended")
    parser.add_argument("-v", "--verbose", action="store_true", help="say also of each connection that comes")


def _add_channels(parser: argparse.ArgumentParser) -> None:
    channels = parser.add_argument_group("what connections are: their bytes tell, but not how many are to come")
    channels.add_argument(
        "--multifd",
        metavar="N",
        type=positive,
        default=0,
        help="wait for N multifd channels (default: those that are here when RAM begins; over a slow network one may "
        "come later)",
    )
    channels.add_argument(
        "--preempt",
        action="store_true",
        help="a connection that says nothing until postcopy begins is the one for requested pages, and they are waited "
        "for at the end",
    )


def _add_control(parser: argparse.ArgumentParser) -> None:
    control = parser.add_argument_group("when the connection breaks in postcopy, or what came by it can't be saved")
    control.add_argument("--control", metavar="PATH", help="the control socket (default: one that is printed)")
    control.add_argument(
        "--recover",
        metavar="URI",
        help="without URI, with --control: have the receive that has this control socket take a new connection there",
    )


def _add_touching(parser: argparse.ArgumentParser) -> None:
    touching = parser.add_argument_group("what touches memory, as a guest would, once postcopy runs")
    touching.add_argument(
        "--touch",
        metavar="PATTERN",
        action="append",
        default=[],
        choices=PATTERNS,
        help=f"{', '.join(PATTERNS)}; several at once when given several times",
    )
    touching.add_argument(
        "--touch-writes", metavar="SHARE", type=_share, default=0.0, help="of all touches (default: 0)"
    )
    touching.add_argument("--touch-rate", metavar="N", type=positive, help="touches a second, each (default: no limit)")
    touching.add_argument(
        "--touch-seed", metavar="N", type=int, default=0, help="another seed, other pages (default: 0)"
    )
    touching.add_argument(
        "--touchers", metavar="N", type=positive, default=1, help="so many of each pattern (default: 1)"
    )
    touching.add_argument(
        "--touch-trace",
        metavar="FILE",
        action="append",
        default=[],
        help="touch once what a recording (of tap, or --record) asked for, or what lines of BLOCK START, or BLOCK "
        "START w for a write, say",
    )
    touching.add_argument(
        "--touch-in-package",
        action="store_true",
        help="also touch a missing page before each device in the package, as a device does that reads memory",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    if args.uri is None:
        return _ask(args, out)
    if args.recover is not None:
        raise RefusedError("--recover is for a receive that runs already: give --control and no URI")
    import asyncio

    with Seen(args, out) as seen, _recorder(args) as recorder:
        try:
            code = asyncio.run(_receive(args, out, seen, recorder))
        except (OSError, RefusedError):
            if recorder is not None and recorder.is_empty:  # it could not even listen
                Path(args.record).unlink(missing_ok=True)
            raise
        if recorder is not None:
            recorder.close()
            tell_if_gone(recorder)
        return code


def _recorder(args: argparse.Namespace) -> "AbstractContextManager[Recorder | None]":
    if args.record is None:
        return nullcontext()
    if args.record == "-":
        raise RefusedError("--record wants a file: a recording is read by offsets, and - is none")
    from qmigrate.capture.recorder import Recorder

    allow_many_files()
    return Recorder(args.record, overwrite=args.overwrite, on_stop=_recording_stopped)


def _recording_stopped(exc: OSError) -> None:
    tell("the recording stopped, the migration goes on", exc.strerror or str(exc))


async def _receive(args: argparse.Namespace, out: TextIO, seen: Seen, recorder: "Recorder | None") -> int:
    from qmigrate.format.walk import Limits
    from qmigrate.operations.receive import Receiver
    from qmigrate.operations.traces import read_trace

    with _teller(args, out) as teller:
        receiver = Receiver(
            args.uri,
            raw=args.raw,
            save=args.save,
            control=args.control,
            recorder=recorder,
            workloads=_workloads(args),
            traces=[read_trace(each) for each in args.touch_trace],
            trace_rate=args.touch_rate,
            touch_in_package=args.touch_in_package,
            multifd=args.multifd,
            preempt=args.preempt,
            limits=Limits(device_state=args.max_device_state, package=args.max_package),
            on_event=teller.take,
        )
        found = receiver.reception(await _received(receiver, teller))
        if seen.is_wanted:
            from qmigrate.report.receive_page import receive_page
            from qmigrate.report.reception_json import reception_json

            seen.keep(lambda: receive_page(found), lambda: reception_json(found))
        return teller.end(found)


async def _received(receiver: "Receiver", teller: ReceiveLines) -> "ReceiveResult":
    """To its end, with signals."""
    import asyncio
    import signal

    from qmigrate.cli.until_done import until_done

    task = asyncio.ensure_future(receiver.run())
    was_told = False

    def interrupt() -> None:
        nonlocal was_told
        if receiver.place_of_guest == "lost" and not was_told:
            was_told = True
            teller.explain("postcopy: what is here is the only copy of the guest; interrupted again, it is lost")
        elif receiver.place_of_guest != "here":  # else it is about to end by itself
            task.cancel()

    def hang_up() -> None:
        """A terminal that goes away is no reason to lose a guest."""
        if receiver.place_of_guest in ("none", "source"):
            task.cancel()

    try:
        return await until_done(
            task, teller, {signal.SIGINT: interrupt, signal.SIGTERM: interrupt, signal.SIGHUP: hang_up}
        )
    except asyncio.CancelledError:
        return receiver.interrupted()


def _teller(args: argparse.Namespace, out: TextIO) -> ReceiveLines:
    """A display where there is a terminal for it, else lines."""
    if sys.stderr is not None and sys.stderr.isatty():
        from qmigrate.cli.panel_below import is_for
        from qmigrate.cli.receive_display import ReceiveDisplay

        if is_for(args):
            return ReceiveDisplay(args, out)
    return ReceiveLines(args, out)


def _ask(args: argparse.Namespace, out: TextIO) -> int:
    """Something of a receive that runs."""
    import asyncio

    from qmigrate.operations.control import ask

    if args.control is None or (args.recover is None) == (args.save is None):
        raise RefusedError("give a URI to receive from, or --control with --recover URI or --save FILE")
    if args.recover is not None:
        listens = asyncio.run(ask(Path(args.control), "recover", args.recover))
        out.write(f"it listens at {listens} for the source to resume\n")
    else:
        saved = asyncio.run(ask(Path(args.control), "save", str(Path(args.save).absolute())))
        out.write(f"saved as {saved}\n")
    return 0


def _workloads(args: argparse.Namespace) -> "list[Workload]":
    from qmigrate.endpoint.destination import Workload

    patterns = [pattern for pattern in args.touch for _ in range(args.touchers)]
    return [
        Workload(pattern=pattern, writes=args.touch_writes, rate=args.touch_rate, seed=args.touch_seed + number)
        for number, pattern in enumerate(patterns)
    ]


def _share(argument: str) -> float:
    try:
        number = float(argument)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{argument!r} is no share: expected 0 to 1")
    return number
