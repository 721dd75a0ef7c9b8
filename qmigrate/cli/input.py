"""The input that all reading commands take, and how it is opened."""

import argparse
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from qmigrate.cli.asked import answer_with
from qmigrate.cli.files import add_jobs
from qmigrate.cli.sizes import page_size, size

if TYPE_CHECKING:
    from qmigrate.capture.migration import Migration
    from qmigrate.format.vmdesc import Description

__all__ = ["add_input", "open_input", "reading_options"]


def add_input(parser: argparse.ArgumentParser, *, jobs: bool = True, devices: bool = True) -> None:
    """FILE…, and what a reader of them must be told or allowed; ``devices`` are looked at."""
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
    if devices:
        reading.add_argument(
            "--description",
            metavar="STREAM",
            help="decode devices by the description in this other stream, where a FILE has none (as after postcopy)",
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
    """What ``Migration`` is told.  A description that is not there is an error of usage."""
    from qmigrate.format.walk import Limits

    path = getattr(args, "description", None)
    return {
        "description": None if path is None else _description(path, args.usage_error),
        "page_size": args.page_size,
        "limits": Limits(device_state=args.max_device_state, package=args.max_package),
    }


@lru_cache(maxsize=1)
def _description(path: str, usage_error: Callable[[str], NoReturn]) -> "Description":
    """The description at the end of another stream; of many files it is read once."""
    from qmigrate.analysis.file import why
    from qmigrate.capture.migration import Migration
    from qmigrate.errors import QmigrateError

    try:
        with Migration(path) as migration:
            contents = migration.contents
    except (QmigrateError, OSError) as exc:
        usage_error(f"--description {path}: {why(exc)}")
    if contents.description is None:
        fault = contents.description_fault or next(iter(contents.errors), None)
        usage_error(f"--description {path}: {fault or 'this stream has no description of its devices'}")
    return contents.description
