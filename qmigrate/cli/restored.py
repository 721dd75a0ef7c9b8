"""What is kept of a restore when it is over: ``--report``."""

import argparse
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from qmigrate.cli.tell import tell

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qmigrate.analysis.restore_story import RestoreStory, Row
    from qmigrate.cli.newfile import NewFile
    from qmigrate.events import LiveEvent
    from qmigrate.operations.restore import Indexed, ServingResult

__all__ = ["Kept"]

_NUMBERS: Final = ("served", "progressed")
_MOST_EVENTS: Final = 20_000


class Kept:
    """The file that was asked for.  Refused at once where it can't be written, or is one of the ``inputs``, before
    anything begins: ``OSError``, ``RefusedError``.
    """

    def __init__(self, path: str | None, *, inputs: "Iterable[str]" = ()) -> None:
        self._file: "NewFile | None" = None  # noqa: UP037 - it is imported below, where it is needed
        self._events: list[LiveEvent] = []
        self._stack = ExitStack()
        if path is not None:
            from qmigrate.cli.newfile import NewFile

            self._file = self._stack.enter_context(NewFile(path, inputs=inputs))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def take(self, event: "LiveEvent") -> None:
        """An event; numbers aside, which the result has."""
        if self._file is not None and event.name not in _NUMBERS and len(self._events) < _MOST_EVENTS:
            self._events.append(event)

    def write(self, args: argparse.Namespace, result: "ServingResult") -> None:
        """All of it.  The restore is over: that a disk is full is told, and changes nothing of how it ended."""
        if self._file is None:
            return
        from qmigrate.report.restore_page import restore_page

        try:
            self._file.finish(restore_page(_story(args, self._events, result)))
        except OSError as exc:
            tell(self._file.path, exc.strerror or str(exc))


def _story(args: argparse.Namespace, events: "list[LiveEvent]", result: "ServingResult") -> "RestoreStory":
    import time

    from qmigrate.analysis.restore_story import RestoreStory, latency_of, phases_of, runs_of, troubles_of
    from qmigrate.events import SideFound
    from qmigrate.operations.restore import Indexed, Restored

    now_us = time.time_ns() // 1000
    # Both of these say when they came and how long after the beginning that was.
    zeros = [each.time_us - each.after_us for each in events if isinstance(each, Restored)]
    zero_us = min(zeros, default=events[0].time_us if events else now_us)
    end_us = max(now_us - zero_us, 1)
    moments = dict(result.moments)
    indexed = next((each for each in events if isinstance(each, Indexed)), None)
    if indexed is not None:
        moments["indexed"] = max(indexed.time_us - zero_us, 0)
    found = next((each for each in events if isinstance(each, SideFound)), None)
    plain = result.plain()
    latency, over_time = plain["latency"], plain["over_time"] or {}
    return RestoreStory(
        file=args.file,
        way="eagerly" if args.eager else "taken over" if args.resume else "lazily",
        exit_code=result.exit_code,
        message=result.message,
        began_us=zero_us,
        length_us=end_us,
        version=found.version if found is not None else "",
        moments=moments,
        phases=phases_of(events, zero_us, end_us),
        runs=runs_of(events, zero_us, end_us),
        page_size=indexed.total_bytes // result.counts.total if indexed is not None and result.counts.total else 4096,
        total=result.counts.total,
        pages=result.counts.pages,
        requested=result.counts.requested,
        requests=result.counts.requests,
        sent_bytes=result.counts.sent_bytes,
        recoveries=result.recoveries,
        latency=latency_of(latency["counts"]),
        mean_us=latency["mean_us"],
        longest_us=latency["longest_us"],
        slice_us=over_time.get("slice_us", 1000),
        requests_in=over_time.get("requests", ()),
        pages_in=over_time.get("pages", ()),
        bytes_in=over_time.get("sent_bytes", ()),
        troubles=troubles_of(events, zero_us),
        rows=list(_rows(events, zero_us)),
        facts=list(_facts(args, indexed)),
    )


def _rows(events: "list[LiveEvent]", zero_us: int) -> "Iterator[Row]":
    from qmigrate.analysis.restore_story import Row
    from qmigrate.operations.restore import Indexed, Restored
    from qmigrate.report.units import size
    from qmigrate.report.wording import wording

    for each in events:
        words = wording(each)
        if isinstance(each, Restored):
            words = each.moment
        elif isinstance(each, Indexed):
            words = f"{size(each.total_bytes)} of RAM in {each.blocks} blocks found in the file"
        if words:
            yield Row(each.time_us - zero_us, str(each.side or ""), words)


def _facts(args: argparse.Namespace, indexed: "Indexed | None") -> "Iterator[tuple[str, str]]":
    from qmigrate.report.units import count, size

    yield "File", args.file
    for each in args.channel:
        yield "Further channel", each
    if indexed is not None:
        yield "Machine", indexed.machine_type or "not named in the file"
        yield "RAM", f"{size(indexed.total_bytes)} in {count(indexed.blocks)} blocks"
        yield "Device state", size(indexed.device_bytes)
    yield "Destination", args.qmp or " ".join(args.qemu)
    yield "Way", "by precopy, all pages first" if args.eager else "by postcopy, pages on demand"
