"""``qmigrate send``: stand in for a source."""

import argparse
from typing import TYPE_CHECKING, TextIO

from qmigrate import exit_codes
from qmigrate.cli.indexed import add_index, begun
from qmigrate.cli.restore import Lines
from qmigrate.cli.sizes import size
from qmigrate.cli.tell import tell

if TYPE_CHECKING:
    from qmigrate.operations.reading import Reading
    from qmigrate.operations.send import Sender

__all__ = ["add_arguments", "run"]

HELP = "stand in for a source: a saved stream goes to a destination that listens"
DESCRIPTION = (
    "Send a saved stream to whoever listens there as QEMU's -incoming does, by precopy or postcopy, over a connection "
    "with a return path: to test a destination, or to load what it could not read from a file. For a QEMU with QMP "
    "`restore` is the better way. Ends with 0 when the destination said that it has it all, with 3 when it did not, "
    "with 6 when that was after the guest ran there, with 2 when nothing could begin."
)
EXAMPLES = (
    "qmigrate send guest.mig tcp:127.0.0.1:4444",
    "qmigrate send --postcopy guest.mig unix:/run/in.sock",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a saved migration, of any kind that `dissect` reads; packed too")
    parser.add_argument("uri", metavar="URI", help="tcp:HOST:PORT or unix:PATH")
    parser.add_argument(
        "--channel",
        metavar="FILE",
        action="append",
        default=[],
        help="a further connection of the saved migration (multifd, preempt, resumed); may be repeated",
    )
    parser.add_argument("--postcopy", action="store_true", help="devices first, then pages, those asked for at once")
    parser.add_argument(
        "--host-page",
        metavar="BLOCK=SIZE",
        type=_host_page,
        action="append",
        default=[],
        help="with --postcopy: the destination's pages under this RAM block, where it has huge ones; may be repeated",
    )
    add_index(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="how it ended as JSON, with all times and latencies")
    output.add_argument("--ndjson", action="store_true", help="every event as a JSON object on a line of its own")


def _host_page(argument: str) -> tuple[str, int]:
    name, _, length = argument.rpartition("=")
    pages = size(length)
    if not name or pages & (pages - 1) or pages < 1 << 12:
        raise argparse.ArgumentTypeError(f"{argument!r}: expected a block's name, =, and a power of two from 4K")
    return name, pages


def run(args: argparse.Namespace, out: TextIO) -> int:
    with begun(args) as reading:
        return _send(args, out, reading)


def _send(args: argparse.Namespace, out: TextIO, reading: "Reading | None") -> int:
    import asyncio

    from qmigrate.operations.send import Sender

    lines = Lines(args, out)
    sender = Sender(
        args.file,
        channels=tuple(args.channel),
        postcopy=args.postcopy,
        page_sizes=dict(args.host_page),
        reading=reading,
        on_event=lines.take,
    )
    status = asyncio.run(_interruptible(args.uri, sender, lines))
    lines.raise_what_broke(status)
    return status


async def _interruptible(uri: str, sender: "Sender", lines: Lines) -> int:
    import asyncio
    import signal

    task = asyncio.ensure_future(sender.run(uri))

    def interrupt() -> None:
        if not sender.interrupt():
            task.cancel()

    def hang_up() -> None:
        if not sender.hang_up():
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    loop.add_signal_handler(signal.SIGHUP, hang_up)
    try:
        return lines.finish(await task)
    except asyncio.CancelledError:
        tell("interrupted before anything began")
        return exit_codes.INTERRUPTED
