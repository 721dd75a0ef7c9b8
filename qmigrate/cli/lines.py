"""Events as they come: lines for a person on standard error, or data, a JSON object on a line each."""

import argparse
import sys
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TextIO

from qmigrate.cli.tell import tell

if TYPE_CHECKING:
    from qmigrate.events import LiveEvent, Progressed
    from qmigrate.operations.result import MigrationResult

__all__ = ["EventLines", "line_of"]

PROGRESS_EVERY_S: Final = 2.0
VERBOSE_ONLY: Final = ("command-sent", "pass-began", "qemu-said", "side-found", "began")
NEVER: Final = ("progressed", "finished")


class EventLines:
    """Tells of events.  That nobody listens any more must not end a migration: then there is silence."""

    def __init__(self, args: argparse.Namespace, out: TextIO) -> None:
        self._args = args
        self._out = out
        self._began_us: int | None = None
        self._progress_us = 0
        self._broken: OSError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing is held."""

    def refresh(self) -> None:
        """Time has gone by; lines don't show it."""

    def suspend(self) -> None:
        """The terminal is somebody else's for a while."""

    def resume(self) -> None:
        """It is ours again."""

    def take(self, event: "LiveEvent") -> None:
        """Tell of one event."""
        if self._args.ndjson:
            self._data(event)
        elif not self._args.quiet:
            said = self._progress(event) if event.name == "progressed" else line_of(event, self._args.verbose)
            if said:
                self._say(self._stamped(event, said))

    def finish(self, result: "MigrationResult") -> int:
        """How it ended: the message, where the guest is, what to do.  Returns the exit code."""
        from qmigrate.report.names import clean

        if not result.ok:
            tell(result.message)
        sentences = [result.message] if result.ok else []
        for each in (*sentences, result.guest.sentence, result.guest.advice):
            if not each or self._args.ndjson:
                continue
            if self._args.json == "-":  # standard output is for data
                self._say(clean(each))
            else:
                self._out.write(clean(each) + "\n")
        if self._broken is not None and result.ok:
            raise self._broken
        return result.exit_code

    def _data(self, event: "LiveEvent") -> None:
        import json

        if self._broken is None:
            try:
                self._out.write(json.dumps(event.plain()) + "\n")
                self._out.flush()
            except OSError as exc:
                self._broken = exc

    def _stamped(self, event: "LiveEvent", said: str) -> str:
        if self._began_us is None:
            self._began_us = event.time_us
        return f"{(event.time_us - self._began_us) / 1e6:8.3f} s  {said}"

    def _say(self, line: str) -> None:
        from qmigrate.report.names import clean

        if sys.stderr is not None:
            with suppress(OSError):
                sys.stderr.write(clean(line) + "\n")
                sys.stderr.flush()

    def _progress(self, event: "LiveEvent") -> str:
        from qmigrate.events import Progressed, Side

        if not isinstance(event, Progressed) or event.side is not Side.SOURCE or not event.transferred_bytes:
            return ""
        if event.time_us - self._progress_us < PROGRESS_EVERY_S * 1e6:
            return ""
        self._progress_us = event.time_us
        return numbers(event)


def line_of(event: "LiveEvent", verbose: bool) -> str:
    """What a line says of an event; empty where it is not told of.  Not cleaned yet."""
    from qmigrate.report.wording import wording

    if event.name in NEVER or (event.name in VERBOSE_ONLY and not verbose):
        return ""
    side = str(event.side or ("trouble" if event.name == "troubled" else ""))
    said = wording(event)
    if event.name == "command-sent":
        return f"{side} {said}"
    return f"{side}: {said}" if side else said


def numbers(event: "Progressed") -> str:
    """The numbers of the source in a line."""
    from qmigrate.report.units import size

    parts = [f"{size(event.remaining_bytes or 0)} left"]
    if event.sent_bytes_per_s:
        parts.append(f"{size(event.sent_bytes_per_s)}/s sent")
    if event.dirty_bytes_per_s:
        parts.append(f"{size(event.dirty_bytes_per_s)}/s dirtied")
    if event.page_requests:
        parts.append(f"{event.page_requests} pages requested")
    return ", ".join(parts)
