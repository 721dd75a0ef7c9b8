"""The input that all reading commands take, and how it is opened."""

import argparse
import sys
from typing import TYPE_CHECKING, Any, TextIO

from qmigrate.cli.asked import answer_with
from qmigrate.cli.files import add_jobs
from qmigrate.cli.sizes import page_size, size

if TYPE_CHECKING:
    from qmigrate.capture.migration import Migration

__all__ = ["add_input", "open_input", "reading_options"]


def add_input(parser: argparse.ArgumentParser, *, jobs: bool = True) -> None:
    """FILE…, and what a reader of them must be told or allowed."""
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="a migration stream, compressed or not; - is standard input"
    )
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
    if jobs:
        add_jobs(reading)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on standard error")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="tell on standard error how it was read, and how long it took"
    )
    parser.set_defaults(usage_error=parser.error)


def open_input(args: argparse.Namespace, file: str, out: TextIO, *, streams: bool = False) -> "Migration":
    """The stream in a FILE.  Progress is shown on a terminal, but not between lines that ``streams`` there.

    Raises ``OSError`` where it can't be opened, ``NoStreamError`` where it is a directory.
    """
    from qmigrate.cli.progress import WatchedMigration

    shows = not args.quiet and sys.stderr is not None and sys.stderr.isatty() and not (streams and out.isatty())
    migration = WatchedMigration(file, shows=shows, tells=args.verbose, **reading_options(args))
    answer_with(migration.where)
    return migration


def reading_options(args: argparse.Namespace) -> dict[str, Any]:
    """What ``Migration`` is told."""
    from qmigrate.format.walk import Limits

    return {
        "page_size": args.page_size,
        "limits": Limits(device_state=args.max_device_state, package=args.max_package),
    }
