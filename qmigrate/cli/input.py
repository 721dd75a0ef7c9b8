"""The input that all reading commands take, and how it is opened."""

import argparse
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from qmigrate.cli.asked import answer_with
from qmigrate.cli.files import add_jobs
from qmigrate.cli.sizes import page_size, size
from qmigrate.cli.tell import tell

if TYPE_CHECKING:
    from qmigrate.capture.migration import Migration
    from qmigrate.capture.schemas import Damaged, SchemaCache
    from qmigrate.format.vmdesc import Description

__all__ = ["add_input", "add_reading", "open_input", "reading_options", "refuse_joining", "tell_damaged"]


def add_input(parser: argparse.ArgumentParser, *, jobs: bool = True, devices: bool = True) -> None:
    """FILE…, and what a reader of them must be told or allowed; ``devices`` are looked at."""
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="a migration stream, compressed or not; - is standard input"
    )
    channels = parser.add_argument_group("a migration over several connections, each in a file of its own")
    channels.add_argument(
        "--channel",
        metavar="FILE",
        action="append",
        default=[],
        help="a further connection: multifd, preempt, or main resumed after a pause; may be repeated, in any order",
    )
    channels.add_argument(
        "--return-path",
        metavar="FILE",
        action="append",
        default=[],
        help="what came back over one of them; may be repeated",
    )
    add_reading(parser, jobs=jobs, devices=devices)


def add_reading(parser: argparse.ArgumentParser, *, jobs: bool = False, devices: bool = True) -> None:
    """What a reader must be told or allowed."""
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
    if devices:
        reading.add_argument(
            "--no-schemas",
            dest="schemas",
            action="store_false",
            help="where a FILE has no description, leave its devices undecoded, whatever `qmigrate schema` has made",
        )
    add_limits(reading)
    if jobs:
        add_jobs(reading)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on standard error")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="tell on standard error how it was read, and how long it took"
    )
    parser.set_defaults(usage_error=parser.error)


def add_limits(parser: argparse._ActionsContainer) -> None:
    """The names by which an error speaks of them."""
    parser.add_argument(
        "--max-device-state",
        metavar="SIZE",
        type=size,
        default=1 << 30,
        help="how much device state may be kept in memory (default: 1G)",
    )
    parser.add_argument(
        "--max-package",
        metavar="SIZE",
        type=size,
        default=1 << 30,
        help="how long a postcopy package may be, which is kept in memory (default: 1G)",
    )


def open_input(args: argparse.Namespace, file: str, out: TextIO, *, streams: bool = False) -> "Migration":
    """The stream in a FILE.  Progress is shown on a terminal, but not between lines that ``streams`` there.

    Raises ``OSError`` where it can't be opened, ``NoStreamError`` where it is a directory.
    """
    from qmigrate.cli.progress import WatchedMigration

    channels, return_paths = args.channel, args.return_path
    shows = not args.quiet and sys.stderr is not None and sys.stderr.isatty() and not (streams and out.isatty())
    options = {"channels": channels, "return_paths": return_paths, **reading_options(args)}
    migration = WatchedMigration(file, shows=shows, tells=args.verbose, **options)
    try:
        _tell_strays(migration)
    except BaseException:
        migration.close()
        raise
    answer_with(migration.where)
    return migration


def refuse_joining(args: argparse.Namespace) -> None:
    """Where files are read one by one: those of one migration are joined only where there is one FILE."""
    if args.channel or args.return_path:
        if len(args.files) > 1:
            args.usage_error("--channel and --return-path belong to one migration: give one FILE")
        if getattr(args, "jobs", None) is not None:
            args.usage_error("--jobs reads files one by one: it goes without --channel and --return-path")


def _tell_strays(migration: "Migration") -> None:
    """What was given as a return path and is none.  It is read as what its bytes are, as all are."""
    for part in migration.strays:
        tell(part.readable.name, f"is no return path, and read as {part.name}: {part.channel.reason}")


def reading_options(args: argparse.Namespace) -> dict[str, Any]:
    """What ``Migration`` is told.  A description that is not there is an error of usage."""
    from qmigrate.format.walk import Limits

    path = getattr(args, "description", None)
    return {
        "description": _description(path, args.usage_error) if path is not None else _schemas(args),
        "page_size": args.page_size,
        "limits": Limits(device_state=args.max_device_state, package=args.max_package),
    }


def _schemas(args: argparse.Namespace) -> "SchemaCache | None":
    """Where a description is looked for, if the command looks at devices."""
    if not getattr(args, "schemas", False):
        return None
    from qmigrate.capture.schemas import SchemaCache, cache_folder

    return SchemaCache(cache_folder(), tell_damaged)


@lru_cache(maxsize=256)  # once is enough for each
def tell_damaged(damaged: "Damaged") -> None:
    """A file in the cache can't be used."""
    tell(str(damaged.path), f"not used: {damaged.reason}")


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
