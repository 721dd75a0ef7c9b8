"""Progress on a terminal."""

import sys
from pathlib import Path

import pytest

from qmigrate.cli import progress
from tests import streams
from tests.report.papers import Terminal


def standard_error(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in its place; no fixture, as pytest puts its own there when the test begins."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_what_is_shown_is_erased_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_FIRST_S", 0)
    terminal = standard_error(monkeypatch)
    path = tmp_path / "a.mig"
    path.write_bytes(streams.minimal())
    with progress.WatchedMigration(path) as migration:
        assert migration.complete
    assert terminal.getvalue() == "\r\x1b[K21.2 KiB of 21.2 KiB read, 100 %\r\x1b[K"


def test_it_is_erased_where_reading_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_FIRST_S", 0)
    terminal = standard_error(monkeypatch)
    path = tmp_path / "a.mig"
    path.write_bytes(streams.minimal())
    with progress.WatchedMigration(path) as migration:
        entries = migration.entries()
        next(entries)
        next(entries)
        del entries
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_what_is_done_soon_shows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = standard_error(monkeypatch)
    path = tmp_path / "a.mig"
    path.write_bytes(streams.minimal())
    with progress.WatchedMigration(path) as migration:
        assert migration.complete
    assert terminal.getvalue() == ""
