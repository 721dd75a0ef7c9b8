"""The records of a stream, one a line, as they are read.

Every byte belongs to one line: each begins where the one before ended, so lengths add up to the stream's.
A FULL section is one line, its footer included; page runs are whole, however the bytes arrived; PARTs that
hold nothing are folded, with their count, as a source that waits sends thousands.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.text import Text

from qmigrate.analysis.records import coalesce, describe_record, record_name
from qmigrate.format.command import Command
from qmigrate.format.dirty_bitmap import BitmapFlag, DirtyBitmapRecord
from qmigrate.format.entry import (
    Configuration,
    ConfigurationSubsection,
    DeviceState,
    Entry,
    RamPage,
    Trailing,
    Undecoded,
    VmDescription,
)
from qmigrate.format.mapped_ram import Gap, MappedBitmap, MappedBlock, MappedPages
from qmigrate.format.ram import BlockList, BlockListHeader, PageRun, Pages, RamFlag, RamRecord
from qmigrate.format.stream import (
    ConfigurationCapabilities,
    ConfigurationTargetPageBits,
    ConfigurationUuid,
    EndOfFile,
    FileHeader,
    Footer,
    SectionHeader,
    SectionPart,
    SectionType,
    VmDescriptionHeader,
)
from qmigrate.report.commands import details
from qmigrate.report.names import clean
from qmigrate.report.paper import DIM, KIND, ODD, Paper, text
from qmigrate.report.units import count, plural, size

__all__ = ["write_structure"]


def write_structure(entries: Iterable[Entry], paper: Paper) -> None:
    """Write a line a record, in bounded memory.  Raises what reading raises, once all before it is written."""
    writer = _Writer(paper)
    try:
        writer.take_all(coalesce(entries))
    finally:
        writer.flush()


@dataclass
class _Fold:
    """PARTs with nothing in them, one after the other, of one section or of several in turn."""

    offset: int
    depth: int
    length: int = 0
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class _Full:
    """A FULL section whose footer may still come."""

    offset: int
    depth: int
    length: int
    said: Text


class _Writer:
    """What is held back: a FULL section until its footer, a PART until something stands in it, empty PARTs
    until something else comes."""

    def __init__(self, paper: Paper) -> None:
        self.paper = paper
        self.names: dict[int, str] = {}
        self.in_section = 0
        self.full: _Full | None = None
        self.held: list[Entry] = []
        self.fold: _Fold | None = None

    def take_all(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry.length and not self.is_held(entry):  # an empty description has no bytes to show
                self.flush()
                self.take(entry)

    # -- what is held back

    def is_held(self, entry: Entry) -> bool:
        """Keep this one, where what comes next may belong to it."""
        record = entry.record
        if self.full is not None:
            return self.belongs_to_full(entry)
        if isinstance(record, SectionPart) and record.kind is SectionType.PART:
            self.close_part()
            self.release()
            self.in_section = 0
            self.held = [entry]
            return True
        if len(self.held) == 1 and _says_nothing(entry):
            self.held.append(entry)
            return True
        if len(self.held) == 2 and isinstance(record, Footer):
            self.held.append(entry)
            self.close_part()
            return True
        return False

    def belongs_to_full(self, entry: Entry) -> bool:
        assert self.full is not None
        match entry.record:
            case DeviceState() | Footer():
                pass
            case Undecoded(reason=reason):
                self.full.said.append_text(text((", not decoded", ODD), (f": {clean(reason)}", DIM)))
            case _:
                return False
        self.full.length += entry.length
        return True

    def close_part(self) -> None:
        """Where the PART at hand holds nothing, it goes into the fold."""
        if len(self.held) < 2:
            return
        first, part = self.held[0], self.held[0].record
        assert isinstance(part, SectionPart)
        if self.fold is None:
            self.fold = _Fold(first.offset, first.depth)
        name = self.name(part.section_id)
        self.fold.length += sum(entry.length for entry in self.held)
        self.fold.counts[name] = self.fold.counts.get(name, 0) + 1
        self.held = []

    def flush(self) -> None:
        """Write all that is held."""
        self.close_part()
        if self.full is not None:
            full, self.full = self.full, None
            self.line(full.offset, full.length, full.depth, full.said)
        if self.fold is not None:
            fold, self.fold = self.fold, None
            said = ", ".join(
                name if number == 1 else f"{name} ×{count(number)}" for name, number in fold.counts.items()
            )
            self.line(fold.offset, fold.length, fold.depth, text(("PART", KIND), f"  {said}", (", empty", DIM)))
        self.release()

    def release(self) -> None:
        """The PART at hand holds something, or is cut off: write it as it is, after what was folded."""
        if not self.held:
            return
        held, self.held = self.held, []
        if self.fold is not None:
            self.flush()
        for entry in held:
            self.take(entry)

    # -- a line a record

    def line(self, offset: int, length: int, depth: int, said: Text) -> None:
        lead = text((f"{offset:#10x}", DIM), f"  {length:>8}  ", "  " * depth)
        self.paper.line(said, lead=lead)

    def name(self, section_id: int) -> str:
        return self.names.get(section_id, f"section {section_id}")

    def take(self, entry: Entry) -> None:
        record = entry.record
        if isinstance(record, SectionHeader):
            self.names[record.section_id] = f"{clean(record.idstr)}/{record.instance_id}"
        if isinstance(record, SectionHeader | SectionPart | Command | EndOfFile | Trailing):
            self.in_section = 0
        depth = entry.depth + self.in_section
        if isinstance(record, SectionHeader) and record.kind is SectionType.FULL:
            self.full = _Full(entry.offset, depth, entry.length, self.said(entry))
            return
        if isinstance(record, BlockList):
            self.block_list(entry, record, depth)
            return
        self.line(entry.offset, entry.length, depth, self.said(entry))
        if isinstance(record, SectionHeader | SectionPart | VmDescriptionHeader):
            self.in_section = 1
        elif isinstance(record, Footer):
            self.in_section = 0

    def block_list(self, entry: Entry, record: BlockList, depth: int) -> None:
        said = f"  {plural(len(record.blocks), 'block')}, {size(record.total)}"
        self.line(entry.offset, 8, depth, text(("MEM_SIZE", KIND), said))
        at = entry.offset + 8
        for block in record.blocks:
            length = len(block.build())
            host_page = "" if block.page_size is None else f", pages of {size(block.page_size)}"
            address = "" if block.address is None else f", at {block.address:#x}"
            self.line(
                at, length, depth + 1, text(f"{clean(block.name)}  {size(block.used_length)}{host_page}{address}")
            )
            at += length

    def said(self, entry: Entry) -> Text:
        says = self.says(entry)
        rest, dim = _anything(entry) if says is None else says
        return text(
            (f"channel {entry.channel}  " if entry.channel else "", DIM),
            (clean(record_name(entry.record)), KIND),
            f"  {rest}" if rest else "",
            (f"  {dim}" if dim else "", DIM),
        )

    def says(self, entry: Entry) -> tuple[str, str] | None:  # noqa: PLR0912 - one row a record
        """What a record says beyond its name, and what of it is of less weight; None without words of its own."""
        record = entry.record
        match record:
            case Pages(runs=(run, *_)) | MappedPages(runs=(run, *_)):
                return _pages(record, run)
            case BlockListHeader(word=word):
                return size(word & ~0xFF), "each page at its place"
            case MappedBlock(block=block, header=header):
                said = f"{clean(block.name)}  {size(block.used_length)}"
                if record.is_left_out:
                    return said, "left out, as it is shared"
                return said, f"bitmap at {header.bitmap_offset:#x}, pages at {header.pages_offset:#x} of the file"
            case MappedBitmap(block=name, bits=bits):
                return f"{clean(name)}  {plural(bits.bit_count(), 'page')} with contents", ""
            case Gap(data=data):
                return "" if data is None else "not zero", ""
            case RamPage(block=block, record=page):
                return f"{clean(block)}  {page.word.start:#x}", "named" if page.block is not None else ""
            case RamRecord() | EndOfFile():
                return "", ""
            case FileHeader():
                return "", f"version {record.version}"
            case Configuration():
                return "  ".join((clean(record.machine_type), *map(_subsection, record.subsections))), ""
            case SectionHeader():
                return self.name(record.section_id), f"section {record.section_id}, version {record.version_id}"
            case SectionPart():
                return self.name(record.section_id), ""
            case Footer():
                return "", f"section {record.section_id}"
            case Command():
                return details(record), ""
            case Undecoded(reason=reason):
                return clean(reason), ""
            case VmDescriptionHeader():
                return f"{record.length:,} bytes", ""
            case VmDescription(description=description):
                return "" if description is None else plural(len(description.devices), "device"), ""
            case Trailing():
                return "behind the end of the stream", ""
            case _:
                return None


def _pages(pages: Pages | MappedPages, run: PageRun) -> tuple[str, str]:
    end = run.start + run.page_count * pages.page_size
    said = f"{clean(pages.block)}  {run.start:#x}–{end:#x}  {plural(run.page_count, 'page')}"
    if isinstance(pages, MappedPages):
        return said, ""
    return said + (f", each byte {pages.fill:#04x}" if pages.fill else ""), "named" if pages.named else ""


def _anything(entry: Entry) -> tuple[str, str]:
    """A record that has no words of its own here: its values by name, but for long data."""
    described = describe_record(entry)
    for left_out in ("record", "offset", "length", "depth", "channel", "data", "words"):
        described.pop(left_out, None)
    values = (f"{clean(name)} {clean(str(value))}" for name, value in described.items() if value is not None)
    return "  ".join(values), ""


def _subsection(subsection: ConfigurationSubsection) -> str:
    name = clean(subsection.header.name.removeprefix("configuration/"))
    match subsection.body:
        case ConfigurationTargetPageBits(target_page_bits=bits):
            return f"{name} {bits}"
        case ConfigurationCapabilities(names=names):
            return f"{name} {', '.join(clean(item.name) for item in names)}"
        case ConfigurationUuid(uuid=uuid):
            return f"{name} {uuid.hex()}"
        case _:
            return name


def _says_nothing(entry: Entry) -> bool:
    """A PART with this alone is empty."""
    match entry.record:
        case RamRecord(word=word):
            return word.flags == RamFlag.EOS
        case DirtyBitmapRecord(flags=flags):
            return flags == BitmapFlag.EOS
    return False
