"""The options of whoever serves a saved guest: what it is read from, and what is kept of that and told."""

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmigrate.operations.reading import Reading

__all__ = ["add_channels", "add_file", "add_index", "add_output", "begun"]


def add_file(parser: argparse.ArgumentParser) -> None:
    """``FILE``."""
    parser.add_argument("file", metavar="FILE", help="a saved migration, of any kind that `dissect` reads; packed too")


def add_channels(parser: argparse.ArgumentParser) -> None:
    """``--channel``."""
    parser.add_argument(
        "--channel",
        metavar="FILE",
        action="append",
        default=[],
        help="a further connection of the saved migration (multifd, preempt, resumed); may be repeated",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """``--json`` and ``--ndjson``."""
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="how it ended as JSON, with all times and latencies")
    output.add_argument("--ndjson", action="store_true", help="every event as a JSON object on a line of its own")


def add_index(parser: argparse.ArgumentParser) -> None:
    """``--index-folder`` and ``--no-kept-index``."""
    index = parser.add_mutually_exclusive_group()
    index.add_argument(
        "--index-folder",
        metavar="FOLDER",
        help="where the index of FILE's pages is kept, and looked for the next time (default: in the user's cache); "
        "pages that do not stand in FILE as they are (it is packed, or they were sent compressed) are kept with it, up "
        "to 1 GiB of them in all: the oldest go, and where one FILE has more no index of it is kept",
    )
    index.add_argument(
        "--no-kept-index",
        dest="keep_index",
        action="store_false",
        help="neither keep an index of FILE's pages nor use one that was kept",
    )


def begun(args: argparse.Namespace) -> "AbstractContextManager[Reading | None]":
    """What is read by a process of its own is begun before all that takes long to import.

    None where that can't be, as of a pipe.  Raises ``OSError``.
    """
    from qmigrate.operations.reading import Reading

    if not Reading.takes(args.file):
        return nullcontext()
    return Reading(args.file, channels=tuple(args.channel), keep=args.keep_index, folder=args.index_folder)
