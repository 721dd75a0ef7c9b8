"""What of a stream is no page of RAM, kept while it comes: a stream that is saved is put together from it."""

from dataclasses import dataclass, field

from qmigrate.format.command import Command
from qmigrate.format.entry import Configuration, Entry, RamPage
from qmigrate.format.ram import BlockList, Pages, RamRecord
from qmigrate.format.stream import EndOfFile, FileHeader, Footer, SectionHeader, SectionPart, SectionType

__all__ = ["WithoutRam"]


@dataclass
class WithoutRam:
    """All of a stream but RAM's sections and the commands, for a stream that is to be saved.

    ``opening``: header and CONFIGURATION; ``live``: what came before the end of RAM, other live sections and early
    FULL ones; ``devices``: FULL sections after it; ``closing``: EOF and the description, where they came.
    """

    opening: bytearray = field(default_factory=bytearray)
    live: bytearray = field(default_factory=bytearray)
    devices: bytearray = field(default_factory=bytearray)
    closing: bytearray = field(default_factory=bytearray)
    footers: bool = False
    ram: SectionHeader | None = None
    ram_ended: bool = False
    _place: bytearray | None = None

    def take(self, entry: Entry) -> None:
        """Keep this entry's bytes, if they are to be kept; in the order of the stream."""
        match entry.record:
            case FileHeader() | Configuration():
                self.opening += entry.view
                return
            case Command() | BlockList() | Pages() | RamRecord() | RamPage():
                return
            case SectionHeader(kind=kind, idstr=name) as header:
                if name == "ram":
                    self.ram = header
                is_live = kind is SectionType.START or not self.ram_ended
                self._place = None if name == "ram" else self.live if is_live else self.devices
            case SectionPart(kind=kind, section_id=number):
                is_ram = self.ram is not None and number == self.ram.section_id
                self._place = None if is_ram else self.live
                self.ram_ended |= is_ram and kind is SectionType.END
            case EndOfFile():
                self._place = self.closing
            case Footer():
                self.footers = True
        if self._place is not None:
            self._place += entry.view
