"""``qmigrate receive``: stand in for a destination."""

import argparse
import sys
from typing import TYPE_CHECKING, Final, TextIO

from qmigrate.cli.migrate import positive
from qmigrate.cli.tell import tell
from qmigrate.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmigrate.endpoint.destination import Workload
    from qmigrate.events import LiveEvent
    from qmigrate.operations.receive import ReceiveResult

__all__ = ["add_arguments", "run"]

HELP = "stand in for a destination: a real QEMU migrates into it, by precopy or postcopy"
DESCRIPTION = (
    "Listen as QEMU's -incoming does, and take what comes, precopy or postcopy: RAM into memory that faults where a "
    "page is missing (userfaultfd), device state unread. Ends with 0 when all was received, with 3 when it failed and "
    "the guest is still the source's, with 6 when it failed in postcopy and the guest is lost, with 2 when nothing "
    "could begin."
)
EXAMPLES = (
    "qmigrate receive unix:/run/in.sock --raw ram/",
    "qmigrate receive tcp:0.0.0.0:4444 --touch random --touch zipf --touch-rate 1000",
    "qmigrate receive tcp:0.0.0.0:4444 --save guest.mig",
    "qmigrate receive --recover tcp:0.0.0.0:4445 --control /run/receive.control",
)

PATTERNS: Final = ("sequential", "random", "zipf", "working-set")  # of uffd.toucher, which is loaded later
INTERRUPTED: Final = 130
WAITED: Final = {
    "touchers": "from touch to read, touchers",
    "package": "from touch to read, in the package",
    "requests": "from request to place",
    "preempt": "from request to place, on the preempt channel",
}


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
    _add_control(parser)
    _add_touching(parser)
    parser.add_argument("--ndjson", action="store_true", help="every event as a JSON object on a line of its own")


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
    import signal

    from qmigrate.operations.receive import Receiver

    lines = _Lines(args, out)
    receiver = Receiver(
        args.uri,
        raw=args.raw,
        save=args.save,
        control=args.control,
        workloads=_workloads(args),
        touch_in_package=args.touch_in_package,
        on_event=lines.take,
    )

    async def work() -> int:
        task = asyncio.ensure_future(receiver.run())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        try:
            return lines.finish(await task)
        except asyncio.CancelledError:
            return _interrupted(receiver.place_of_guest)

    return asyncio.run(work())


def _ask(args: argparse.Namespace, out: TextIO) -> int:
    """Something of a receive that runs."""
    import asyncio
    from pathlib import Path

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


def _interrupted(place: str) -> int:
    """Where the guest is, now that its connection is closed."""
    match place:
        case "source":
            tell("interrupted: the guest is the source's")
            return 3
        case "lost":
            tell("interrupted in postcopy: the guest is lost")
            return 6
    tell("interrupted before anything began")
    return INTERRUPTED


def _workloads(args: argparse.Namespace) -> "list[Workload]":
    from qmigrate.endpoint.destination import Workload

    return [
        Workload(pattern=pattern, writes=args.touch_writes, rate=args.touch_rate, seed=args.touch_seed + number)
        for number, pattern in enumerate(args.touch)
    ]


def _share(argument: str) -> float:
    try:
        number = float(argument)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{argument!r} is no share: expected 0 to 1")
    return number


class _Lines:
    """Events as lines: for a person on standard error, or, with --ndjson, as data on ``out``."""

    def __init__(self, args: argparse.Namespace, out: TextIO) -> None:
        self._args = args
        self._out = out
        self._began_us: int | None = None

    def take(self, event: "LiveEvent") -> None:
        """Tell of one event."""
        import json

        if self._args.ndjson:
            self._out.write(json.dumps(event.plain()) + "\n")
            self._out.flush()
        elif not self._args.quiet and (said := self._line(event)):
            self._began_us = event.time_us if self._began_us is None else self._began_us
            self._say(f"{(event.time_us - self._began_us) / 1e6:8.3f} s  {said}")

    def finish(self, result: "ReceiveResult") -> int:
        """How it ended; the exit code."""
        if not result.ok:
            tell(result.message)
        elif not self._args.ndjson:
            self._out.write(result.message + "\n")
            for line in _numbers(result):
                self._out.write(f"  {line}\n")
        if self._args.ndjson:
            import json

            self._out.write(json.dumps(result.plain()) + "\n")
        self._out.flush()
        return result.exit_code

    def _say(self, line: str) -> None:
        from qmigrate.report.names import clean

        if sys.stderr is not None:
            sys.stderr.write(clean(line) + "\n")
            sys.stderr.flush()

    def _line(self, event: "LiveEvent") -> str:
        from qmigrate import events
        from qmigrate.operations import receive
        from qmigrate.report.units import size

        match event:
            case receive.Listening():
                return f"listening at {event.uri}; control socket {event.control}"
            case receive.Paused():
                return (
                    f"the connection broke: {event.reason}. The guest's memory is kept here: have the source resume "
                    f"after qmigrate receive --recover URI --control {event.control}"
                )
            case receive.NotSaved():
                return (
                    f"this memory is the only copy of the guest. Save it elsewhere: qmigrate receive --save FILE "
                    f"--control {event.control}"
                )
            case receive.BlocksCame():
                total = sum(length for _, length, _ in event.blocks)
                return f"{len(event.blocks)} blocks of RAM, {size(total)}"
            case receive.Latency():
                return f"{WAITED[event.where]}: {_buckets(event.counts)}"
            case events.StatusChanged():
                return str(event.status)
            case events.Troubled():
                return event.message
            case receive.Received() if self._args.verbose:
                return f"{size(event.received_bytes)}, {event.normal} pages, {event.zero} zero pages"
        return ""


def _buckets(counts: "Sequence[int]") -> str:
    return ", ".join(f"{count} in {1 << bucket} to {2 << bucket} µs" for bucket, count in enumerate(counts) if count)


def _numbers(result: "ReceiveResult") -> list[str]:
    """What a person wants to know of the pages."""
    numbers = result.numbers
    lines = [f"{numbers.get('normal', 0)} pages, {numbers.get('zero', 0)} zero pages"]
    if result.is_postcopy:
        lines.append(
            f"{numbers.get('discarded', 0)} discarded, {numbers.get('requested', 0)} requested, "
            f"{numbers.get('duplicates', 0)} that were there already"
        )
        lines.append(f"{numbers.get('touches', 0)} touches, {numbers.get('writes', 0)} of them writes")
    return lines
