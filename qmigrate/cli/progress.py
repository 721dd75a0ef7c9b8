"""How far reading has come: on a terminal while it goes on, to whoever asks, and with -v at the end."""

import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

from qmigrate.capture.migration import Migration
from qmigrate.cli.tell import tell
from qmigrate.format.command import PostcopyAdvise
from qmigrate.format.entry import Configuration, DeviceState, Entry, RamPage, VmDescription
from qmigrate.format.mapped_ram import MappedPages
from qmigrate.format.ram import Pages
from qmigrate.format.stream import ConfigurationTargetPageBits, Footer, SectionHeader, SectionPart
from qmigrate.report.units import plural, share, size

__all__ = ["WatchedMigration"]

_FIRST_S: Final = 0.5  # what is done sooner needs no progress
_EVERY_S: Final = 0.1
_ERASE: Final = "\r\x1b[K"


class WatchedMigration(Migration):
    """Knows how far each pass over its records has come.  ``shows`` it on standard error as on a terminal;
    ``tells`` there at the end of a pass how it was read.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, shows: bool = True, tells: bool = False, **options: Any
    ) -> None:
        super().__init__(path, **options)
        self._shows = shows
        self._tells = tells
        self._told = "not announced" if self._page_size is None else "--page-size"
        self._shown = False
        self._place = _Place()

    def entries(self) -> Iterator[Entry]:
        return self._watched(super().entries())

    def where(self) -> str:
        """In a line: how much is read, and what is being read."""
        return f"{self.source.name}: {self._amount()}, {self._place}"

    def _watched(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        self._place = place = _Place()
        began = time.monotonic()
        due = began + _FIRST_S
        try:
            for entry in entries:
                place.take(entry)
                yield entry
                now = time.monotonic()
                if self._shows and now >= due:
                    due = now + _EVERY_S
                    self._show()
        finally:
            if self._shown:
                self._shown = False
                self._write(_ERASE)
            if self._tells:
                self._tell(time.monotonic() - began)

    def _amount(self) -> str:
        position, whole = self.source.position, self.source.size
        if position is None or not whole:
            return f"{size(self._place.end)} read"
        return f"{size(position)} of {size(whole)} read, {share(position, whole)}"

    def _show(self) -> None:
        self._shown = True
        self._write(f"{_ERASE}{self._amount()}")

    @staticmethod
    def _write(said: str) -> None:
        sys.stderr.write(said)
        sys.stderr.flush()

    # -- with -v

    def _tell(self, seconds: float) -> None:
        """What was decided about the stream, and how long it took."""
        place, name = self._place, self.source.name
        kind = "a pipe" if self.source.size is None else f"a file of {plural(self.source.size, 'byte')}"
        tell(name, f"{kind}, {self.source.compression or 'not compressed'}")
        if place.page_size:
            tell(name, f"target pages of {size(place.page_size)}: {place.announced or self._told}")
        if place.sections:
            described = "no description" if place.described is None else f"a description of {size(place.described)}"
            if place.schema is not None:
                described += f": {place.schema}"
            tell(name, f"sections {'with' if place.footers else 'without'} footers, {described}")
        speed = f", {size(int(place.end / seconds))}/s" if seconds > 0 else ""
        tell(name, f"{plural(place.end, 'byte')} of stream read in {seconds:.3f} s{speed}")


class _Place:
    """Where in the stream reading is, and what it has met that others were decided by."""

    def __init__(self) -> None:
        self.end = 0
        self.sections = 0
        self.footers = False
        self.described: int | None = None
        self.schema: str | None = None
        self.page_size = 0
        self.announced = ""
        self._names: dict[int, str] = {}
        self._section = ""
        self._block = ""

    def __str__(self) -> str:
        if not self._section:
            return f"at {self.end:#x}"
        return f"at {self.end:#x} in {self._section}{self._block and ': ' + self._block}"

    def take(self, entry: Entry) -> None:
        """The next record was read."""
        self.end = max(self.end, entry.offset + entry.length)
        record = entry.record
        match record:
            case Pages() | RamPage() | MappedPages():
                self._block, self.page_size = record.block, record.page_size
            case SectionHeader():
                self._names[record.section_id] = self._section = f"{record.idstr}/{record.instance_id}"
                self._block = ""
                self.sections += 1
            case SectionPart():
                self._section, self._block = self._names.get(record.section_id, ""), ""
            case Footer():
                self.footers, self._section = True, ""
            case Configuration():
                if any(isinstance(item.body, ConfigurationTargetPageBits) for item in record.subsections):
                    self.announced = "CONFIGURATION says so"
            case PostcopyAdvise(sizes=sizes) if sizes is not None:
                self.announced = self.announced or "POSTCOPY_ADVISE says so"
            case DeviceState(schema=str() as schema):
                self.schema = schema
            case VmDescription():
                self.described, self._section = len(record.text), ""
