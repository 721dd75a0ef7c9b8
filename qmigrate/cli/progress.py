"""How far reading has come, on a terminal."""

import sys
import time
from collections.abc import Iterator
from typing import Final

from qmigrate.capture.migration import Migration
from qmigrate.format.entry import Entry
from qmigrate.report.units import share, size

__all__ = ["WatchedMigration"]

_FIRST_S: Final = 0.5  # what is done sooner needs no progress
_EVERY_S: Final = 0.1
_ERASE: Final = "\r\x1b[K"


class WatchedMigration(Migration):
    """Tells on standard error how far each pass over its records has come."""

    def entries(self) -> Iterator[Entry]:
        return self._watched(super().entries())

    def _watched(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        due = time.monotonic() + _FIRST_S
        shown = False
        try:
            for entry in entries:
                yield entry
                now = time.monotonic()
                if now >= due:
                    due, shown = now + _EVERY_S, True
                    self._show(entry.offset + entry.length)
        finally:
            if shown:
                sys.stderr.write(_ERASE)
                sys.stderr.flush()

    def _show(self, offset: int) -> None:
        position, whole = self.source.position, self.source.size
        if position is None or not whole:
            said = f"{size(offset)} read"
        else:
            said = f"{size(position)} of {size(whole)} read, {share(position, whole)}"
        sys.stderr.write(f"{_ERASE}{said}")
        sys.stderr.flush()
