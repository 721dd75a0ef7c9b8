"""A terminal on which lines go by above, and a panel stands below them, renewed in place."""

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from qmigrate.report.names import clean

__all__ = ["PanelBelow", "console_for", "is_for"]


class _Steady(Console):
    """The cursor stays seen: so whatever ends us, a signal that can't be caught too, leaves a terminal as it was."""

    def show_cursor(self, show: bool = True) -> bool:
        return show


def console_for(stream: TextIO) -> Console:
    """Where nothing that is printed is read as markup."""
    return _Steady(file=stream, markup=False, highlight=False, emoji=False)


def is_for(args: argparse.Namespace) -> bool:
    """Is there a terminal to show it on, and does anybody want to see it?"""
    if args.quiet or args.ndjson or sys.stderr is None or not sys.stderr.isatty():
        return False
    console = console_for(sys.stderr)
    return console.is_terminal and not console.is_dumb_terminal


class _Panel(Protocol):
    def text(self, width: int) -> Text:
        """So many columns wide; no line is longer."""


class PanelBelow:
    """For a class of lines to have a panel below them.  It is gone when it ends; the lines stay."""

    def show(self, panel: _Panel, console: Console) -> None:
        """This panel there, once the ``with`` block begins."""
        self._panel = panel
        self._console = console
        self._live = self._new_live()

    def _new_live(self) -> Live:
        return Live(
            console=self._console,
            auto_refresh=False,  # by our own turns: no thread
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            get_renderable=lambda: self._panel.text(self._console.width),
        )

    def __enter__(self) -> Self:
        self._quietly(self._live.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._quietly(self._live.stop)

    def refresh(self) -> None:
        self._quietly(self._live.refresh)

    def suspend(self) -> None:
        self._quietly(self._live.stop)

    def resume(self) -> None:
        self._live = self._new_live()  # the old one would go up to where it was, over what others have written since
        self._quietly(self._live.start)

    def _say(self, line: str) -> None:
        self._quietly(lambda: self._console.print(Text(clean(line))))

    @staticmethod
    def _quietly(do: Callable[[], object]) -> None:
        """A terminal that went away ends no migration."""
        with suppress(OSError):
            do()
