"""The options of whoever serves a saved guest: where its pages are is kept for the next time, or not."""

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmigrate.operations.reading import Reading

__all__ = ["add_index", "begun"]


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
