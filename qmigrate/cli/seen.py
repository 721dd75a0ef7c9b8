"""What is kept of a migration when it is over: ``--report`` and ``--json``."""

import argparse
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TextIO

from qmigrate.cli.tell import tell
from qmigrate.errors import RefusedError

if TYPE_CHECKING:
    from qmigrate.cli.newfile import NewFile
    from qmigrate.events import LiveEvent

__all__ = ["Seen", "add_seen", "looks_closely"]

STANDARD_OUTPUT: Final = "-"


PAGE_HELP: Final = (
    "a page for a browser: both sides on one axis of time, and in postcopy how long pages took (the destination "
    "measures it then, if it can)"
)


def add_seen(parser: argparse.ArgumentParser, *, page: str = PAGE_HELP, schema: str = "migrate") -> None:
    group = parser.add_argument_group("what is kept of it, however it ends")
    group.add_argument("--report", metavar="FILE", help=page)
    group.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const=STANDARD_OUTPUT,
        type=_output,
        help=f"the same as data, on standard output if no FILE is said (schema: qmigrate/report/{schema}.schema.json)",
    )


def looks_closely(args: argparse.Namespace) -> bool:
    """Is enough kept of it that it is worth looking often?"""
    return args.report is not None or args.json is not None


def _output(argument: str) -> str:
    """A file, and none that is there to talk to: ``--json SRC DST`` means no file."""
    try:
        is_socket = stat.S_ISSOCK(os.stat(argument).st_mode)  # noqa: PTH116 - a Path can't be of any string
    except (OSError, ValueError):
        is_socket = False
    if is_socket:
        raise argparse.ArgumentTypeError(f"{argument!r} is a socket (addresses go before --json)")
    return argument


class Seen:
    """The files that were asked for.  Refused at once where one can't be written, before anything begins."""

    def __init__(self, args: argparse.Namespace, out: TextIO) -> None:
        if args.json == STANDARD_OUTPUT and args.ndjson:
            raise RefusedError("--json and --ndjson both want standard output: say --json FILE")
        from qmigrate.cli.newfile import NewFile

        self._out = out
        self._on_stdout = args.json == STANDARD_OUTPUT
        with ExitStack() as stack:  # one that can't be made takes the other with it
            self._report = stack.enter_context(NewFile(args.report)) if args.report is not None else None
            self._json = stack.enter_context(NewFile(args.json)) if args.json and not self._on_stdout else None
            self._files = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, traceback)

    def write(self, events: Iterable["LiveEvent"]) -> None:
        """All of it.  The migration is over: that a disk is full is told, and changes nothing of how it ended."""
        if not self.is_wanted:
            return
        from qmigrate.analysis.timeline import timeline
        from qmigrate.report.migration_json import migration_json
        from qmigrate.report.migration_page import migration_page

        line = timeline(events)
        self.keep(lambda: migration_page(line), lambda: migration_json(line))

    @property
    def is_wanted(self) -> bool:
        """Was anything of it asked for?"""
        return self._report is not None or self._json is not None or self._on_stdout

    def keep(self, page: Callable[[], str], data: Callable[[], str]) -> None:
        """What of the two was asked for."""
        if self._report is not None:
            _finish(self._report, page())
        if self._json is not None:
            _finish(self._json, data())
        elif self._on_stdout:
            self._out.write(data())


def _finish(file: "NewFile", text: str) -> None:
    try:
        file.finish(text)
    except OSError as exc:
        tell(file.path, exc.strerror or str(exc))
