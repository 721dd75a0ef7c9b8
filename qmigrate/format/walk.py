"""Which record follows which: the one grammar of a migration stream.

``walk`` is a generator over a feed.  It yields an ``Entry`` for each record, in order and without a gap, and
None where bytes are missing: its driver then gives the feed more, or ends it, and goes on.

migration/savevm.c: qemu_loadvm_state(), qemu_loadvm_state_main()
"""

from typing import Final

from qmigrate.errors import NoStreamError, SequenceError, StreamError, TruncatedError, UnsupportedError, counted
from qmigrate.format.command import Packaged, PostcopyAdvise, read_command
from qmigrate.format.configuration import announced_capabilities, announced_page_bits, read_configuration
from qmigrate.format.device_sections import read_behind_ram, read_package
from qmigrate.format.early import end_of_early, is_before_tail
from qmigrate.format.entry import (
    Configuration,
    ConfigurationSubsection,
    DeviceState,
    Entry,
    RamPage,
    Step,
    StreamRecord,
    Trailing,
    Undecoded,
    VmDescription,
)
from qmigrate.format.feed import Feed
from qmigrate.format.page_size import page_size_of_machine
from qmigrate.format.ram import RAM_VERSION
from qmigrate.format.ram_section import RamSection
from qmigrate.format.stream import (
    MAGIC,
    VERSION,
    EndOfFile,
    FileHeader,
    Footer,
    SectionHeader,
    SectionPart,
    SectionType,
    VmDescriptionHeader,
)
from qmigrate.format.tail import Chooser
from qmigrate.format.vmdesc import Description
from qmigrate.format.walk_state import Limits, WalkState

__all__ = [
    "Configuration",
    "ConfigurationSubsection",
    "DeviceState",
    "Entry",
    "Limits",
    "RamPage",
    "StreamRecord",
    "Trailing",
    "Undecoded",
    "VmDescription",
    "Walker",
    "walk",
]

MULTIFD_MAGIC: Final = 0x11223344


def walk(
    feed: Feed,
    *,
    description: Description | Chooser | None = None,
    page_size: int | None = None,
    limits: Limits | None = None,
) -> Step:
    """All entries of the stream.  Raises ``StreamError`` at a fault, ``NoStreamError`` where there is none.

    ``description`` decodes device state where the stream has none of its own (postcopy), or a chooser finds one
    that does; ``page_size`` is the target's, in bytes, where the caller knows it.
    """
    yield from Walker(feed, description=description, page_size=page_size, limits=limits).run()


class Walker(WalkState):
    """One walk over one main channel; and over those that belong to it, once that has said what they need."""

    reads_mapped = True
    """False: pages of mapped-ram are given without runs, to who goes by their bitmaps and does not read them."""

    # -- the top

    def run(self) -> Step:
        """The main channel, from its header on."""
        yield from self._header()
        if (yield from self.feed.peek()) == SectionType.CONFIGURATION:
            yield from self._configuration()
        yield from self._sections()

    def resume(self, feed: Feed) -> Step:
        """Main goes on over a new connection, after a postcopy was paused: without a header.

        What sections there are was said before.  migration/migration.c: postcopy_do_resume()
        """
        self.feed = feed
        self.switched = True
        if self.ram is not None:
            self.ram = self.ram.over(feed)
        yield from self._sections()

    def preempt(self, feed: Feed) -> Step:
        """The channel of pages that were asked for: records of RAM, and no section around them.

        migration/ram.c: postcopy_preempt_setup(), ram_load_postcopy()
        """
        ram = RamSection(
            feed, page_size=self.page_size, is_known=True, capabilities=self.capabilities, advised=self.advised
        )
        if self.ram is not None:
            ram.page_size, ram.blocks = self.ram.page_size, self.ram.blocks
        while len(feed) or (yield from feed.more()):
            yield from ram.records(until_end=True)

    def _sections(self) -> Step:
        while True:
            kind = yield from self.feed.peek(("a section",))
            match kind:
                case SectionType.COMMAND:
                    yield from self._command()
                case SectionType.START | SectionType.FULL:
                    header, length = yield from self.feed.record(SectionHeader)
                    if self.ram is not None and not (yield from is_before_tail(self, header, length)):
                        yield from self._tail()
                        yield from self._trailing()
                        return
                    yield self.consume(header, length)
                    yield from self._opened(header)
                case SectionType.PART | SectionType.END:
                    yield from self._part()
                case SectionType.EOF:
                    yield self.consume(EndOfFile(), 1)
                    yield from self._after_eof()
                    return
                case _:
                    raise StreamError(
                        f"found {kind:#x}, expected a section type: START 0x1, PART 0x2, END 0x3, FULL 0x4, "
                        "COMMAND 0x8 or EOF 0x0",
                        offset=self.feed.offset,
                    )

    def _header(self) -> Step:
        try:
            header, length = yield from self.feed.record(FileHeader)
        except TruncatedError as exc:
            raise NoStreamError(
                f"no migration stream: {counted(len(self.feed), 'bytes', 'are')} there, its header has 8"
            ) from exc
        if header.magic == MULTIFD_MAGIC:
            raise NoStreamError("a multifd channel; its migration is read with its main channel (--channel)")
        if header.magic != MAGIC:
            raise NoStreamError(f"no migration stream: it begins with {header.magic:08x}, expected {MAGIC:08x} (QEVM)")
        if header.version != VERSION:
            raise NoStreamError(f"a migration stream of version {header.version}, expected {VERSION}")
        yield self.consume(header, length)

    def _configuration(self) -> Step:
        configuration, length = yield from read_configuration(self.feed)
        self.machine_type = configuration.machine_type
        self.capabilities = announced_capabilities(configuration)
        bits = announced_page_bits(configuration)
        if bits is not None:
            self.page_size = 1 << bits
            self.page_size_is_known = True
        elif not self.page_size_is_known and (size := page_size_of_machine(configuration.machine_type)) is not None:
            self.page_size = size
            self.page_size_is_known = True
        yield self.consume(configuration, length)

    # -- commands

    def _command(self) -> Step:
        command, length = yield from read_command(self.feed)
        yield self.consume(command, length)
        if isinstance(command, PostcopyAdvise) and command.sizes is not None:
            self.advised = command.sizes
            size = command.sizes.target_page_size
            if size & (size - 1) or not 1 << 8 <= size <= 1 << 16:
                raise StreamError(
                    f"target page size is {size:#x}, expected a power of two from 0x100 to 0x10000",
                    offset=self.feed.offset - 8,
                    trail=(command.name,),
                )
            self.page_size = size
            self.page_size_is_known = True
        elif isinstance(command, Packaged):
            yield from self._package(command)
            self.switched = True
            if self.ram is not None:
                self.ram.forget_block()

    def _package(self, command: Packaged) -> Step:
        """All of it.  Who lets another load it takes it out here."""
        yield from read_package(self, command)

    # -- sections

    def _opened(self, header: SectionHeader) -> Step:
        """What follows a START header, or a FULL header before RAM."""
        self.sections[header.section_id] = header
        if header.kind == SectionType.FULL:
            yield from self._early(header)
        elif header.idstr == "ram":
            if header.version_id != RAM_VERSION:
                raise UnsupportedError(
                    f"version {header.version_id} of the ram section, expected {RAM_VERSION}",
                    offset=self.feed.offset - 4,
                    trail=("ram",),
                )
            if self.ram is not None:
                raise SequenceError("a second START of ram", offset=self.feed.offset, trail=("ram",))
            self.ram = RamSection(
                self.feed,
                page_size=self.page_size,
                is_known=self.page_size_is_known,
                capabilities=self.capabilities,
                advised=self.advised,
                reads_mapped=self.reads_mapped,
            )
            yield from self.ram.block_list()
            yield from self.ram.records()
            yield from self._footer(header)
        else:
            yield from self._live(header, SectionType.START)

    def _live(self, header: SectionHeader, kind: SectionType) -> Step:
        """A live section other than RAM, as far as ``live`` knows it."""
        trail = (header.idstr,)
        from qmigrate.format.live import LiveState, reader_of  # few streams have another live section than ram

        reader = reader_of(header.idstr)
        if reader is None:
            raise UnsupportedError("the inside of this live section is not known", offset=self.feed.offset, trail=trail)
        state = self.live.setdefault(header.section_id, LiveState(section_id=header.section_id))
        state.footers = self.footers
        for item in reader(self.feed, kind, state, trail):
            if item is None:
                yield None
                continue
            data = getattr(item.record, "data", None)
            view = self.feed.behind(item.length) if data is None else memoryview(data)
            yield Entry(item.offset, item.length, item.record, view)
        yield from self._footer(header)

    def _part(self) -> Step:
        part, length = yield from self.feed.record(SectionPart)
        header = self.sections.get(part.section_id)
        if header is None:
            raise StreamError(
                f"{part.kind.name} names section {part.section_id}, and no START did",
                offset=self.feed.offset + 1,
            )
        yield self.consume(part, length)
        if header.idstr == "ram" and self.ram is not None:
            yield from self.ram.records()
            yield from self._footer(header)
            self.ram_ended = part.kind == SectionType.END
        else:
            yield from self._live(header, part.kind)

    def _footer(self, header: SectionHeader) -> Step:
        trail = (header.idstr,)
        if self.footers is None:
            # Nothing announces footers: the first section whose length is known shows them.
            self.footers = (yield from self.feed.byte(0)) == SectionType.FOOTER
        if not self.footers:
            return
        footer, length = yield from self.feed.record(Footer, trail)
        if footer.section_id != header.section_id:
            raise StreamError(
                f"footer names section {footer.section_id}, section {header.section_id} is open",
                offset=self.feed.offset,
                trail=trail,
            )
        yield self.consume(footer, length)

    def _early(self, header: SectionHeader) -> Step:
        """A FULL section before RAM."""
        end = yield from end_of_early(self, header)
        how = "there are no footers, so it is taken to end where the next header stands"
        if self.footers is not False:
            self.footers = True
            how = "its end was found by its footer"
        reason = f"it comes before the description: {how}"
        yield self.consume(Undecoded(bytes(self.feed.view(end)), reason), end)
        yield from self._footer(header)

    # -- the end

    def _tail(self) -> Step:
        """Device sections behind RAM, to the end.  Who asks of them meanwhile takes a copy here."""
        yield from read_behind_ram(self)

    def _after_eof(self) -> Step:
        """A stream without FULL sections after RAM, or a postcopy stream, which ends with EOF."""
        if not self.switched and (yield from self.feed.byte(0)) == SectionType.VMDESCRIPTION:
            header, length = yield from self.feed.record(VmDescriptionHeader, ("description",))
            yield self.consume(header, length)
            offset = self.feed.offset
            if header.length > self.limits.device_state:
                raise UnsupportedError(
                    f"a description of {counted(header.length, 'bytes')}, the limit is {self.limits.device_state} "
                    "(--max-device-state)",
                    offset=offset - 4,
                    trail=("description",),
                )
            text = yield from self.feed.take(header.length, ("description",))
            yield Entry(offset, len(text), VmDescription.parse(text, offset=offset), memoryview(text))
        yield from self._trailing()

    def _trailing(self) -> Step:
        self.feed.takes_holes = True
        while len(self.feed) or (yield from self.feed.more()):
            offset = self.feed.offset
            if zeros := self.feed.skip_hole():
                yield Entry(offset, zeros, Trailing(zeros=zeros), self.feed.view(0))
                continue
            data = bytes(self.feed.view())
            yield self.consume(Trailing(data), len(data))
