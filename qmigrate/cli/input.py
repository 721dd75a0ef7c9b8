"""The input that all reading commands take, and how it is opened."""

import argparse
import sys
from typing import TYPE_CHECKING, TextIO

from qmigrate.cli.sizes import page_size, size

if TYPE_CHECKING:
    from qmigrate.capture.migration import Migration

__all__ = ["add_input", "open_input"]


def add_input(parser: argparse.ArgumentParser) -> None:
    """FILE, and what a reader of it must be told or allowed."""
    parser.add_argument("file", metavar="FILE", help="a migration stream, compressed or not; - is standard input")
    reading = parser.add_argument_group("reading")
    reading.add_argument(
        "--page-size",
        metavar="BYTES",
        type=page_size,
        help="the target's page size, where the stream does not say it (default: what its machine has, mostly 4K)",
    )
    reading.add_argument(
        "--max-device-state",
        metavar="SIZE",
        type=size,
        default=1 << 30,
        help="how much device state may be kept in memory (default: 1G)",
    )
    reading.add_argument(
        "--max-package",
        metavar="SIZE",
        type=size,
        default=1 << 30,
        help="how long a postcopy package may be, which is kept in memory (default: 1G)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on standard error")


def open_input(args: argparse.Namespace, out: TextIO, *, streams: bool = False) -> "Migration":
    """The stream in FILE.  Progress is shown on a terminal, but not between lines that ``streams`` there.

    Raises ``OSError`` where it can't be opened, ``NoStreamError`` where it is a directory.
    """
    from qmigrate.capture.migration import Migration
    from qmigrate.format.walk import Limits

    kind = Migration
    if not args.quiet and sys.stderr is not None and sys.stderr.isatty() and not (streams and out.isatty()):
        from qmigrate.cli.progress import WatchedMigration

        kind = WatchedMigration
    limits = Limits(device_state=args.max_device_state, package=args.max_package)
    return kind(args.file, page_size=args.page_size, limits=limits)
