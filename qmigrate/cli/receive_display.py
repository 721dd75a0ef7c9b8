"""The live display of ``receive`` on a terminal: what happens goes by above, how it stands is below, renewed."""

import argparse
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Final, TextIO

from rich.console import Console
from rich.text import Text

from qmigrate.analysis.latency import Bucket, latency_in
from qmigrate.cli.panel_below import PanelBelow, console_for
from qmigrate.cli.receiving import ReceiveLines
from qmigrate.events import BlocksCame, ChannelCame, Latency, LiveEvent, Received, StatusChanged
from qmigrate.report.names import clean
from qmigrate.report.units import count, duration, plural, size

if TYPE_CHECKING:
    from qmigrate.analysis.reception import Reception

__all__ = ["ReceiveDisplay", "ReceivePanel"]

_LABEL: Final = 11  # columns
_FIGURE: Final = 38
_LEAST_BAR: Final = 12
_MOST_BAR: Final = 40
_RATE_OVER_US: Final = 2_000_000
_STYLES: Final = {
    "running": "magenta",
    "paused": "bold yellow",
    "recovering": "yellow",
    "ended": "green",
}
_STILL: Final = frozenset({"paused", "recovering", "ended"})  # nothing comes: what came lately says nothing
_WAITED: Final = (("touchers", "touched"), ("requests", "answered"), ("preempt", "preempted"))


class ReceiveDisplay(PanelBelow, ReceiveLines):
    """Events as lines, and below them the panel."""

    def __init__(self, args: argparse.Namespace, out: TextIO, console: Console | None = None) -> None:
        super().__init__(args, out)
        console = console or console_for(sys.stderr)
        self.panel = ReceivePanel(ascii_only=console.options.ascii_only)
        self.show(self.panel, console)

    def take(self, event: LiveEvent) -> None:
        self.panel.take(event)
        super().take(event)

    def explain(self, said: str) -> None:
        self._say(f"qmigrate: {said}")

    def end(self, found: "Reception") -> int:
        self._quietly(self._live.stop)
        return super().end(found)

    def _received(self, event: LiveEvent) -> str:  # noqa: ARG002 - the panel shows it
        return ""


class ReceivePanel:
    """How it stands."""

    def __init__(self, *, ascii_only: bool = False) -> None:
        self._full, self._empty, self._dot = ("#", "-", " - ") if ascii_only else ("━", "─", " · ")
        self._micro = "us" if ascii_only else "µs"
        self._began = time.monotonic()
        self._phase = ""
        self._total_bytes = 0
        self._now: Received | None = None
        self._lately: deque[tuple[int, int]] = deque()  # (time in µs, bytes)
        self._waited: dict[str, Latency] = {}

    def take(self, event: LiveEvent) -> None:
        """Another event."""
        match event:
            case ChannelCame() if not self._phase:
                self._began = time.monotonic()
            case StatusChanged():
                self._phase = event.status
            case BlocksCame():
                self._total_bytes = sum(length for _, length, _ in event.blocks)
            case Latency():
                self._waited[event.where] = event
            case Received():
                self._now = event
                self._lately.append((event.time_us, event.received_bytes))
                while event.time_us - self._lately[0][0] > _RATE_OVER_US and len(self._lately) > 2:
                    self._lately.popleft()

    def text(self, width: int) -> Text:
        """The panel, so many columns wide; no line is longer."""
        room = max(width - 1, 1)
        lines = [self._head(), *self._rows(room)]
        for line in lines:
            line.truncate(room, overflow="ellipsis" if self._full != "#" else "crop")
        return Text("\n").join(lines)

    def _head(self) -> Text:
        line = Text()
        line.append(duration(1e6 * (time.monotonic() - self._began)).replace("µs", self._micro).rjust(8) + "  ", "dim")
        line.append(clean(self._phase) or "waiting for a source", _STYLES.get(self._phase, "bold cyan"))
        return line

    def _rows(self, width: int) -> list[Text]:
        now = self._now
        if now is None:
            return []
        rows = [self._row("received", f"{size(now.received_bytes)}{self._rate()}")]
        pages = f"{count(now.normal)} and {plural(now.zero, 'zero page')}"
        rows.append(self._row("pages", pages, now.normal, now.normal + now.zero, "cyan", width))
        if now.faults:
            asked = f"{count(now.requested)} of {plural(now.faults, 'fault')}"
            rows.append(self._row("requested", asked, now.requested, now.faults, "magenta", width))
        if now.touches:
            rows.append(self._row("touches", f"{count(now.touches)}{self._dot}{plural(now.writes, 'write')}"))
        for where, label in _WAITED:
            if where in self._waited:
                rows.append(self._row(label, self._latency(self._waited[where])))
        return rows

    def _rate(self) -> str:
        (begin_us, begin), (end_us, end) = self._lately[0], self._lately[-1]
        if end_us <= begin_us or self._phase in _STILL:
            return ""
        return f"{self._dot}{size(int(1e6 * max(end - begin, 0) / (end_us - begin_us)))}/s"

    def _latency(self, waited: Latency) -> str:
        latency = latency_in({"postcopy-latency-dist": list(waited.counts)})
        half, most = latency.percentile(0.5), latency.percentile(0.99)
        if half is None or most is None:
            return ""
        return f"half {self._below(half)}, 99 of 100 {self._below(most)}{self._dot}{count(latency.count)}"

    def _below(self, bucket: Bucket) -> str:
        if bucket.end_us is None:
            return f"{duration(bucket.begin_us)} or more"
        return f"< {duration(bucket.end_us)}".replace("µs", self._micro)

    def _row(self, label: str, figure: str, part: int = 0, whole: int = 0, style: str = "", width: int = 0) -> Text:
        line = Text()
        line.append(f"{label:>{_LABEL - 1}} ", "dim")
        line.append(figure)
        room = min(width - _LABEL - _FIGURE, _MOST_BAR)
        if whole and room >= _LEAST_BAR:
            filled = min(-(-room * part // whole), room)
            line.append(" " * max(_FIGURE - len(figure), 1))
            line.append(self._full * filled, style)
            line.append(self._empty * (room - filled), "dim")
        return line
