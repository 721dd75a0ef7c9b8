"""One pass over the records of a migration: passed on, and what they hold gathered."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from qmigrate.capture.contents import KINDS, Block, ChannelContents, CommandPlace, Contents, Section
from qmigrate.capture.epochs import Epochs
from qmigrate.capture.passes import PassCounter
from qmigrate.capture.seen import SeenPages
from qmigrate.errors import NoStreamError, StreamError, StreamErrors, counted
from qmigrate.format.command import Command, Packaged, PostcopyRamDiscard
from qmigrate.format.device import Elements, decode_state
from qmigrate.format.mapped_ram import Gap, MappedBitmap, MappedBlock, MappedPages
from qmigrate.format.ram import BlockList, BlockListHeader, Pages, RamBlock, RamRecord
from qmigrate.format.stream import (
    ConfigurationCapabilities,
    ConfigurationTargetPageBits,
    Footer,
    SectionHeader,
    SectionPart,
)
from qmigrate.format.stretch import count_pages, intervals_of
from qmigrate.format.walk import (
    Configuration,
    DeviceState,
    Entry,
    RamPage,
    Trailing,
    Undecoded,
    VmDescription,
)

if TYPE_CHECKING:
    from qmigrate.format.multifd import PagePacket

__all__ = ["Gathering"]

_MAGIC_BYTES: Final = 8


def _block(block: RamBlock, index: int) -> Block:
    return Block(
        name=block.name, length=block.used_length, page_size=block.page_size, address=block.address, index=index
    )


def _merged(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """In order, those that meet as one."""
    first = end = 0
    for begin, after in sorted(ranges):
        if begin > end:
            yield first, end
            first = begin
        end = max(end, after)
    yield first, end


class Gathering:
    """Pass the entries on and gather what they hold in ``contents``, also when a fault ends them."""

    def __init__(
        self,
        entries: Iterator[Entry],
        channels: Sequence[ChannelContents] = (),
        container: Sequence[StreamError] = (),
    ) -> None:
        """``container``: what is known to be wrong with the file that the streams lie in."""
        self.contents = Contents(channels=list(channels))
        self._entries = entries
        self._container = container
        self._channel = 0
        self._open: Section | None = None
        self._headers: dict[int, SectionHeader] = {}
        self._kept: dict[int, tuple[Section, int, bytes]] = {}
        self._packages: list[CommandPlace] = []
        self._passes = PassCounter()
        self._epochs = Epochs()
        self._multifd = next((channel for channel in channels if channel.kind == "multifd"), None)
        self._switched = False
        self._discarded: dict[str, list[tuple[int, int]]] = {}
        self._after: dict[str, SeenPages] = {}  # what came after the switch

    def __iter__(self) -> Iterator[Entry]:
        contents = self.contents
        try:
            for entry in self._entries:
                if contents.channels:
                    self._take_of(entry, contents.channels[entry.channel])
                else:
                    self._take(entry)
                if not entry.channel:
                    contents.length = max(contents.length, entry.offset + entry.length)
                yield entry
        except NoStreamError:
            raise
        except StreamError as exc:
            errors = exc.errors if isinstance(exc, StreamErrors) else [exc]
            # A traceback would hold the reader and its window, in a circle that is freed late.
            contents.errors += [*(error.with_traceback(None) for error in errors), *self._container]
            return
        self._close(contents.length)
        self._count_lost()
        contents.complete = True
        contents.errors += self._container

    def _take_of(self, entry: Entry, channel: ChannelContents) -> None:
        """An entry of one of several channels."""
        from qmigrate.format.multifd import DeviceStatePacket, PagePacket
        from qmigrate.format.return_path import Message

        if entry.channel != self._channel:
            self._channel, self._open = entry.channel, None  # a section ends with its connection
        channel.length = max(channel.length, entry.offset + entry.length)
        match entry.record:
            case PagePacket() as packet:
                self._packet(packet, entry.channel, channel)
            case DeviceStatePacket(header=header, data=data):
                self.contents.device_state[f"{header.idstr}/{header.instance_id}"] += len(data)
            case Message() as message:
                channel.messages[message.name] += 1
            case Pages(runs=runs):
                normal, zero = count_pages(runs)
                channel.pages += Counter({name: count for name, count in (("normal", normal), ("zero", zero)) if count})
                self._take(entry)
            case RamPage(record=record):
                channel.pages[KINDS[record.word.kind]] += 1
                self._take(entry)
            case _:
                self._take(entry)

    def _packet(self, packet: "PagePacket", number: int, channel: ChannelContents) -> None:
        header = packet.header
        channel.syncs += header.is_sync
        if not header.normal_pages and not header.zero_pages:
            return
        method = header.compression.name.lower()
        channel.pages["normal" if method == "nocomp" else method] += header.normal_pages
        channel.pages["zero"] += header.zero_pages
        block, intervals = self.contents.blocks[header.block], intervals_of(packet.runs, packet.page_size)
        again = block.seen.add_intervals(intervals, packet.page_size)
        block.again += again
        # A SYNC that comes with pages ends the epoch that they are in.
        epoch = channel.syncs - header.is_sync
        block.in_doubt = self._epochs.take(number, epoch, block.name, intervals, packet.page_size, again=again)
        block.unordered += len(block.in_doubt)
        block.counts["normal"] += header.normal_pages
        block.counts["zero"] += header.zero_pages

    def _take(self, entry: Entry) -> None:  # noqa: PLR0912 - one row a record
        while self._packages and entry.depth < len(self._packages):
            self._packages.pop()
        record = entry.record
        match record:
            case Pages():
                self._pages(record)
            case RamPage():
                self._odd_page(record)
            case RamRecord() | BlockListHeader() | MappedBitmap() | Gap():
                pass
            case MappedBlock(block=block, header=header):
                if not record.is_left_out:
                    self.contents.base = header.bitmap_offset - entry.offset - entry.length
                self.contents.blocks[block.name] = _block(block, len(self.contents.blocks))
            case MappedPages():
                self._pages(record)
                self.contents.stale += record.stale
            case SectionHeader() | SectionPart():
                self._close(entry.offset)
                self._section(entry, record)
            case Footer():
                self.contents.footers = True
                self._close(entry.offset + entry.length)
            case DeviceState(state=state, schema=schema):
                if self._open is not None:
                    self._open.state, self._open.schema = state, schema
            case Undecoded(data=data, reason=reason):
                self._undecoded(entry, data, reason)
            case BlockList():
                self._blocks(record)
            case Command():
                self._close(entry.offset)
                self._command(entry, record)
            case Configuration():
                self._configuration(record)
            case VmDescription():
                self._close(entry.offset)
                self.contents.description = record.description
                self.contents.description_fault = record.fault
                self.contents.description_length = len(record.text)
                self._decode_early()
            case Trailing(data=data, zeros=zeros):
                self.contents.trailing += len(data) + zeros
                data = data or bytes(min(zeros, _MAGIC_BYTES))
                self.contents.trailing_head += data[: _MAGIC_BYTES - len(self.contents.trailing_head)]
            case _:
                self._close(entry.offset)

    def _close(self, end: int) -> None:
        """The open section ends here: at its footer, or where the next thing begins."""
        if self._open is not None:
            self._open.length = end - self._open.offset
            self._open.whole = True
            self._open = None

    def _section(self, entry: Entry, record: SectionHeader | SectionPart) -> None:
        if isinstance(record, SectionHeader):
            self._headers[record.section_id] = record
        header = self._headers[record.section_id]
        package = self._packages[-1] if self._packages else None
        section = Section(
            offset=entry.offset,
            kind=record.kind,
            name=header.idstr,
            instance_id=header.instance_id,
            version_id=header.version_id,
            section_id=header.section_id,
            package=None if package is None else package.offset,
            length=entry.length,
            channel=entry.channel,
        )
        self._open = section
        self.contents.sections.append(section)
        if package is not None:
            package.contents.append(section)

    def _undecoded(self, entry: Entry, data: bytes, reason: str) -> None:
        if self._open is None:
            self.contents.undecoded.append((entry.offset, entry.length, reason))
        else:
            self._open.reason = reason
            self._kept[id(self._open)] = (self._open, entry.offset, data)

    def _decode_early(self) -> None:
        """Sections that came before the description, now that it is here."""
        description = self.contents.description
        if description is None:
            return
        elements = Elements()
        for section, offset, data in self._kept.values():
            device = description.device(section.name, section.instance_id)
            if device is None or section.package is not None:
                continue
            try:
                state, used = decode_state(device.body, data, offset=offset, trail=(section.name,), elements=elements)
            except StreamError as exc:
                section.reason = f"the description does not fit: {exc}"
                continue
            if used == len(data):
                section.state, section.reason = state, None
            else:
                section.reason = f"its footer stands after {counted(len(data), 'bytes')}, the description says {used}"

    def _command(self, entry: Entry, command: Command) -> None:
        place = CommandPlace(entry.offset, entry.length, command, channel=entry.channel)
        holder = self._packages[-1].contents if self._packages else self.contents.commands
        holder.append(place)
        if isinstance(command, PostcopyRamDiscard):
            self._discard(command)
        if isinstance(command, Packaged):
            self._packages.append(place)
            self._switched = True

    def _discard(self, command: PostcopyRamDiscard) -> None:
        ranges = self._discarded.setdefault(command.block, [])
        ranges += [(each.start, each.start + each.length) for each in command.ranges]

    def _count_lost(self) -> None:
        """Each page that was discarded comes again, each once: those that do not are on a channel that is not here."""
        page_size = self.contents.page_size
        for name, ranges in self._discarded.items():
            block, came = self.contents.blocks.get(name), self._after.get(name, SeenPages())
            if block is not None:
                pages = [[min(at, block.length) // page_size for at in each] for each in _merged(ranges)]
                block.lost = sum(end - first for first, end in pages) - came.within(pages)

    def _configuration(self, record: Configuration) -> None:
        self.contents.configuration = record
        self.contents.machine_type = record.machine_type
        for subsection in record.subsections:
            match subsection.body:
                case ConfigurationCapabilities() as body:
                    self.contents.capabilities = tuple(name.name for name in body.names)
                case ConfigurationTargetPageBits() as body:
                    self.contents.target_page_bits = body.target_page_bits

    def _blocks(self, record: BlockList) -> None:
        self.contents.blocks = {block.name: _block(block, index) for index, block in enumerate(record.blocks)}

    def _pages(self, pages: Pages | MappedPages) -> None:
        contents = self.contents
        block, page_size, runs = contents.blocks[pages.block], pages.page_size, pages.runs
        contents.page_size = page_size
        intervals, (normal, zero) = intervals_of(runs, page_size), count_pages(runs)
        again = block.seen.add_intervals(intervals, page_size)
        block.again += again
        block.counts["normal"] += normal
        block.counts["zero"] += zero
        if self._switched:
            self._after.setdefault(block.name, SeenPages()).add_intervals(intervals, page_size)
        elif isinstance(pages, Pages):
            self._passes.take(block.index, intervals)
            contents.passes = self._passes.count
            if self._multifd is not None:  # all of these channels are where main is
                epoch = self._multifd.syncs
                block.in_doubt = self._epochs.take(0, epoch, block.name, intervals, page_size, again=again)
                block.unordered += len(block.in_doubt)
        if self._open is not None:
            self._open.page_count += normal + zero

    def _odd_page(self, page: RamPage) -> None:
        self.contents.page_size = page.page_size
        block = self.contents.blocks[page.block]
        start = page.record.word.start
        block.counts[KINDS[page.record.word.kind]] += 1
        block.again += block.seen.add(start // page.page_size, 1)
        if self._switched:
            self._after.setdefault(block.name, SeenPages()).add(start // page.page_size, 1)
        else:
            self._passes.take(block.index, [(start, start + page.page_size)])
            self.contents.passes = self._passes.count
        if self._open is not None:
            self._open.page_count += 1
