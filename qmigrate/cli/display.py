"""The live display on a terminal: what happens goes by above, how it stands is below it, renewed in place."""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Final, TextIO

from rich.console import Console
from rich.text import Text

from qmigrate.cli.lines import EventLines
from qmigrate.cli.panel_below import PanelBelow, console_for
from qmigrate.events import GuestChanged, LiveEvent, PassBegan, Progressed, Side, SideFound, StatusChanged
from qmigrate.report.names import clean
from qmigrate.report.units import count, duration, plural, size

if TYPE_CHECKING:
    from qmigrate.operations.result import MigrationResult

__all__ = ["Display"]

_LABEL: Final = 11  # columns
_FIGURE: Final = 24
_LEAST_BAR: Final = 12
_MOST_BAR: Final = 48
_STYLES: Final = {
    "completed": "green",
    "failed": "bold red",
    "cancelled": "yellow",
    "postcopy-paused": "bold yellow",
    "postcopy-active": "magenta",
}


class Display(PanelBelow, EventLines):
    """Events as lines, and below them the panel."""

    def __init__(self, args: argparse.Namespace, out: TextIO, console: Console | None = None) -> None:
        super().__init__(args, out)
        console = console or console_for(sys.stderr)
        self.panel = Panel(ascii_only=console.options.ascii_only)
        self.show(self.panel, console)

    def take(self, event: LiveEvent) -> None:
        self.panel.take(event)
        super().take(event)

    def finish(self, result: "MigrationResult") -> int:
        summary = self.panel.summary()
        if summary:
            self._say(summary)
        return super().finish(result)

    def _progress(self, event: LiveEvent) -> str:  # noqa: ARG002 - the panel shows it
        return ""


class Panel:
    """How it stands."""

    def __init__(self, *, ascii_only: bool = False) -> None:
        self._full, self._empty, self._dot = ("#", "-", " - ") if ascii_only else ("━", "─", " · ")
        self._began = time.monotonic()
        self._status: dict[Side, str] = {}
        self._runs: dict[Side, bool] = {}
        self._passes = 0
        self._now: Progressed | None = None

    def take(self, event: LiveEvent) -> None:
        """Another event."""
        match event:
            case StatusChanged(side=Side() as side):
                self._status[side] = event.status
            case GuestChanged(side=Side() as side):
                self._runs[side] = event.running
            case SideFound(side=Side() as side):
                self._runs[side] = event.run_state == "running"
            case PassBegan():
                self._passes = event.number
            case Progressed(side=Side.SOURCE) if event.transferred_bytes is not None:
                self._now = event

    def summary(self) -> str:
        """What it came to, in a line; empty where nothing was sent."""
        now = self._now
        if now is None:
            return ""
        parts = [f"{size(now.transferred_bytes or 0)} sent in {duration(1e6 * (time.monotonic() - self._began))}"]
        if self._passes:
            parts.append(plural(self._passes, "pass", "passes"))
        if now.downtime_ms is not None:
            parts.append(f"downtime {count(now.downtime_ms)} ms")
        if now.page_requests:
            parts.append(f"{plural(now.page_requests, 'page')} requested")
        return self._dot.join(parts)

    def text(self, width: int) -> Text:
        """The panel, so many columns wide; no line is longer."""
        room = max(width - 1, 1)
        head, guest = self._head(), Text(self._guest(), "dim")
        if not guest:
            top = [head]
        elif head.cell_len + len(self._dot) + guest.cell_len <= room:
            top = [head + Text(self._dot, "dim") + guest]
        else:
            top = [head, Text(" " * 10) + guest]
        lines = [*top, *self._rows(room)]
        for line in lines:
            line.truncate(room, overflow="ellipsis" if not self._is_ascii else "crop")
        return Text("\n").join(lines)

    @property
    def _is_ascii(self) -> bool:
        return self._full == "#"

    def _head(self) -> Text:
        source, destination = (self._status.get(side, "") for side in Side)
        line = Text()
        line.append(duration(1e6 * (time.monotonic() - self._began)).rjust(8) + "  ", "dim")
        line.append(clean(source) or "preparing", _STYLES.get(source, "bold cyan"))
        if self._passes and not source.startswith("postcopy"):
            line.append(f", pass {self._passes}")
        if destination and destination != source:
            line.append(self._dot + "destination ")
            line.append(clean(destination), _STYLES.get(destination, "cyan"))
        return line

    def _guest(self) -> str:
        if not self._runs:
            return ""
        running = [str(side) for side, runs in self._runs.items() if runs]
        return f"the guest runs on the {' and the '.join(running)}" if running else "the guest is stopped"

    def _rows(self, width: int) -> list[Text]:
        now = self._now
        if now is None:
            return []
        left, total = now.remaining_bytes or 0, now.total_bytes or 0
        fastest = max(now.sent_bytes_per_s or 0, now.dirty_bytes_per_s or 0)
        rows = [
            self._row("left", f"{size(left)} of {size(total)}" if total else size(left), left, total, "blue", width)
        ]
        for label, rate, style in (
            ("sent", now.sent_bytes_per_s, "cyan"),
            ("dirtied", now.dirty_bytes_per_s, "yellow"),
        ):
            if rate is not None and not (label == "dirtied" and now.status.startswith("postcopy-")):
                rows.append(self._row(label, f"{size(rate)}/s", rate, fastest, style, width))
        if now.downtime_ms is not None:
            rows.append(self._row("downtime", f"{count(now.downtime_ms)} ms"))
        elif now.expected_downtime_ms is not None:
            rows.append(self._row("downtime", f"{count(now.expected_downtime_ms)} ms expected"))
        if now.page_requests:
            rows.append(self._row("requested", plural(now.page_requests, "page")))
        return rows

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
