"""What ``receive`` tells meanwhile: events as lines, or as data."""

import json
from typing import TYPE_CHECKING, Final

from qmigrate.cli.lines import PROGRESS_EVERY_S, EventLines
from qmigrate.cli.tell import tell

if TYPE_CHECKING:
    from qmigrate.analysis.reception import Reception
    from qmigrate.events import LiveEvent

__all__ = ["ReceiveLines"]

VERBOSE_ONLY: Final = ("channel-came",)
NEVER: Final = ("latency",)


class ReceiveLines(EventLines):
    """For a person on standard error, or, with --ndjson, as data on ``out``.  What ends a reader ends no migration."""

    def take(self, event: "LiveEvent") -> None:
        """Tell of one event."""
        if self._args.ndjson:
            self._data(event)
        elif not self._args.quiet and (said := self._line(event)):
            self._say(self._stamped(event, said))

    def explain(self, said: str) -> None:
        """Something about us, not the migration."""
        tell(said)

    def end(self, found: "Reception") -> int:
        """How it ended: in words or as the last of the data; the exit code."""
        result = found.result
        if not result.ok:
            tell(result.message)
        if self._args.ndjson:
            self._write(json.dumps(result.plain()) + "\n")
        elif self._args.json == "-":  # standard output is for data
            self._say_unless_quiet(result.message if result.ok else "")
        elif result.ok:
            self._print(found)
        if self._broken is not None and result.ok:
            raise self._broken
        return result.exit_code

    def _print(self, found: "Reception") -> None:
        from qmigrate.report.paper import Paper
        from qmigrate.report.reception import write_reception

        try:
            write_reception(found, Paper(self._out))
            self._out.flush()
        except OSError as exc:
            self._broken = exc

    def _write(self, line: str) -> None:
        if self._broken is None:
            try:
                self._out.write(line)
                self._out.flush()
            except OSError as exc:
                self._broken = exc

    def _say_unless_quiet(self, line: str) -> None:
        if line and not self._args.quiet:
            self._say(line)

    def _line(self, event: "LiveEvent") -> str:
        from qmigrate.report.reception_words import moment_words

        if event.name == "received":
            return self._received(event)
        if event.name in NEVER or (event.name in VERBOSE_ONLY and not self._args.verbose):
            return ""
        return moment_words(event)

    def _received(self, event: "LiveEvent") -> str:
        """Now and then."""
        from qmigrate.events import Received
        from qmigrate.report.reception import progress_words

        if not isinstance(event, Received) or event.time_us - self._progress_us < PROGRESS_EVERY_S * 1e6:
            return ""
        is_first, self._progress_us = not self._progress_us, event.time_us
        return "" if is_first else progress_words(event.numbers)
