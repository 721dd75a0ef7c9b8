"""Papers to write reports on: a terminal of some width, and a file."""

import io
import re

import pytest

from qmigrate.report.paper import Paper

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch, width: int, *, colour: bool = True) -> tuple[Paper, Terminal]:
    """A terminal of this width, whatever the tests themselves run in."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "50")
    monkeypatch.setenv("TERM", "xterm-256color")
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    return Paper(out), out


def file(monkeypatch: pytest.MonkeyPatch) -> tuple[Paper, io.StringIO]:
    """Anything that is no terminal."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    out = io.StringIO()
    return Paper(out), out


def lines_without_colour(out: io.StringIO) -> list[str]:
    return ESCAPES.sub("", out.getvalue()).splitlines()
