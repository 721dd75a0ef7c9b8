"""Which record follows which: the one grammar of a migration stream.

``walk`` is a generator over a feed.  It yields an ``Entry`` for each record, in order and without a gap, and
None where bytes are missing: its driver then gives the feed more, or ends it, and goes on.

migration/savevm.c: qemu_loadvm_state(), qemu_loadvm_state_main()
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeAlias

from qmigrate.errors import NoStreamError, StreamError, TruncatedError, UnsupportedError
from qmigrate.format import pages
from qmigrate.format._record import Record
from qmigrate.format.command import (
    Packaged,
    PageSizes,
    PostcopyAdvise,
    read_command,
)
from qmigrate.format.device import VmState
from qmigrate.format.feed import Feed
from qmigrate.format.ram import (
    PAGE_KINDS,
    RAM_VERSION,
    BlockList,
    BlockListHeader,
    PageRun,
    Pages,
    RamBlock,
    RamBlockHead,
    RamFlag,
    RamRecord,
)
from qmigrate.format.stream import (
    MAGIC,
    VERSION,
    ConfigurationCapabilities,
    ConfigurationHeader,
    ConfigurationTargetPageBits,
    ConfigurationUuid,
    EndOfFile,
    FileHeader,
    Footer,
    SectionHeader,
    SectionPart,
    SectionType,
    SubsectionHeader,
    VmDescriptionHeader,
)
from qmigrate.format.tail import FOOTER_BYTES, Item, find_description, plausible_header, read_tail
from qmigrate.format.vmdesc import Description, parse_description

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


@dataclass(frozen=True, kw_only=True)
class ConfigurationSubsection:
    """One of CONFIGURATION's subsections, its body by name."""

    header: SubsectionHeader
    body: Record


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The machine type's name, and what both ends must agree on.  migration/savevm.c: vmstate_configuration"""

    machine_type: str
    subsections: tuple[ConfigurationSubsection, ...] = ()


@dataclass(frozen=True)
class DeviceState:
    """A FULL section's data, decoded by the description."""

    state: VmState


@dataclass(frozen=True)
class Undecoded:
    """Bytes that were not decoded, and why."""

    data: bytes
    reason: str


@dataclass(frozen=True)
class RamPage:
    """A page record that is no plain page: xbzrle, compressed."""

    block: str
    record: RamRecord


@dataclass(frozen=True)
class VmDescription:
    """The JSON text at the end; ``description`` is what it says, None where it is empty or no description."""

    text: bytes
    description: Description | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Trailing:
    """Bytes behind the stream's end."""

    data: bytes


StreamRecord: TypeAlias = "Record | Configuration | DeviceState | Undecoded | Pages | RamPage | BlockList | VmDescription | Trailing"


class Entry(NamedTuple):
    """A record with its place.  ``depth`` counts the packages around it.

    ``view`` is the record's bytes; it holds until the walk is resumed.
    """

    offset: int
    length: int
    record: StreamRecord
    view: memoryview
    depth: int = 0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is kept in memory at once, in bytes: beyond it the stream is refused."""

    device_state: int = 1 << 30
    package: int = 1 << 30


Step: TypeAlias = Generator[Entry | None]

# The page size of targets that neither announce it nor have 4 KiB; the JSON says it as well, at the end.
_PAGE_SIZES: Final = {
    "clipper": 8192,
    "or1k-sim": 8192,
    "sun4u": 8192,
    "sun4v": 8192,
    "niagara": 8192,
    "tricore_testboard": 16384,
    "KIT_AURIX_TC277_TRB": 16384,
}
_CONFIGURATION_BODIES: Final[dict[str, type[Record]]] = {
    "configuration/target-page-bits": ConfigurationTargetPageBits,
    "configuration/capabilities": ConfigurationCapabilities,
    "configuration/uuid": ConfigurationUuid,
}
_DEEPEST_PACKAGE: Final = 16
_LONGEST_MACHINE_TYPE: Final = 4096


def walk(
    feed: Feed,
    *,
    description: Description | None = None,
    page_size: int | None = None,
    limits: Limits | None = None,
) -> Step:
    """All entries of the stream.  Raises ``StreamError`` at a fault, ``NoStreamError`` where there is none.

    ``description`` decodes device state where the stream has none of its own (postcopy); ``page_size`` is the
    target's, in bytes, where the caller knows it.
    """
    yield from Walker(feed, description=description, page_size=page_size, limits=limits).run()


class Walker:
    """One walk: what the stream has said so far.  A file with these as fields, not a promise of an interface."""

    def __init__(
        self,
        feed: Feed,
        *,
        description: Description | None = None,
        page_size: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.feed = feed
        self.schema = description
        self.limits = limits or Limits()
        self.page_size = page_size or 4096
        self._page_size_is_known = page_size is not None
        self.capabilities: frozenset[str] = frozenset()
        self.advised: PageSizes | None = None
        self.footers: bool | None = None
        self.sections: dict[int, SectionHeader] = {}
        self.blocks: dict[str, int] = {}
        self.block: str | None = None
        self.ram_started = False
        self.switched = False

    # -- the top

    def run(self) -> Step:
        yield from self._header()
        if (yield from self.feed.peek()) == SectionType.CONFIGURATION:
            yield from self._configuration()
        while True:
            kind = yield from self.feed.peek(("a section",))
            match kind:
                case SectionType.COMMAND:
                    yield from self._command()
                case SectionType.START | SectionType.FULL:
                    header, length = yield from self.feed.record(SectionHeader)
                    if kind == SectionType.FULL and self.ram_started:
                        yield from self._tail()
                        return
                    yield self._entry(header, length)
                    yield from self._opened(header)
                case SectionType.PART | SectionType.END:
                    yield from self._part()
                case SectionType.EOF:
                    yield self._entry(EndOfFile(), 1)
                    yield from self._after_eof()
                    return
                case _:
                    raise StreamError(
                        f"found {kind:#x}, expected a section type: START 0x1, PART 0x2, END 0x3, FULL 0x4, "
                        "COMMAND 0x8 or EOF 0x0",
                        offset=self.feed.offset,
                    )

    def _entry(self, record: StreamRecord, length: int, depth: int = 0) -> Entry:
        """Consume ``length`` bytes, which are at hand, as this record."""
        entry = Entry(self.feed.offset, length, record, self.feed.view(length), depth)
        self.feed.skip(length)
        return entry

    def _header(self) -> Step:
        try:
            header, length = yield from self.feed.record(FileHeader)
        except TruncatedError as exc:
            raise NoStreamError(
                f"no migration stream: {len(self.feed)} bytes are there, its header has 8"
            ) from exc
        if header.magic != MAGIC:
            raise NoStreamError(
                f"no migration stream: it begins with {header.magic:08x}, expected {MAGIC:08x} (QEVM)"
            )
        if header.version != VERSION:
            raise NoStreamError(f"a migration stream of version {header.version}, expected {VERSION}")
        yield self._entry(header, length)

    def _configuration(self) -> Step:
        start, trail = self.feed.offset, ("configuration",)
        header, length = yield from self.feed.record(ConfigurationHeader, trail)
        if header.length > _LONGEST_MACHINE_TYPE:
            raise StreamError(
                f"the machine type's name has {header.length} bytes, expected at most {_LONGEST_MACHINE_TYPE}",
                offset=start + 1,
                trail=trail,
            )
        length += header.length
        yield from self.feed.need(length, trail)
        name = bytes(self.feed.view(length)[5:]).decode("utf-8", "surrogateescape")
        subsections: list[ConfigurationSubsection] = []
        while (yield from self._has(length, SectionType.SUBSECTION)):
            subsection, length = yield from self._configuration_subsection(length, trail)
            subsections.append(subsection)
        self._configured(name, subsections)
        yield self._entry(Configuration(machine_type=name, subsections=tuple(subsections)), length)

    def _has(self, at: int, kind: SectionType) -> Generator[None, None, bool]:
        """Does the byte ``at`` bytes ahead open this?"""
        while len(self.feed) <= at:
            if not (yield from self.feed.more()):
                return False
        return self.feed.view(at + 1)[at] == kind

    def _configuration_subsection(
        self, at: int, trail: Sequence[str]
    ) -> Generator[None, None, tuple[ConfigurationSubsection, int]]:
        header, at = yield from self._ahead(SubsectionHeader, at, trail)
        body_class = _CONFIGURATION_BODIES.get(header.name)
        if body_class is None:
            raise UnsupportedError(
                f"unknown subsection {header.name!r}, expected one of {', '.join(_CONFIGURATION_BODIES)}",
                offset=self.feed.offset + at,
                trail=trail,
            )
        body, at = yield from self._ahead(body_class, at, (*trail, header.name))
        return ConfigurationSubsection(header=header, body=body), at

    def _ahead(self, cls: type[Any], at: int, trail: Sequence[str]) -> Generator[None, None, tuple[Any, int]]:
        """A record that begins ``at`` bytes ahead, and where it ends."""
        while True:
            try:
                record, length = cls.read_prefix(
                    self.feed.view()[at : at + 65536], offset=self.feed.offset + at, trail=trail
                )
            except TruncatedError:
                if len(self.feed) - at >= 65536 or not (yield from self.feed.more()):
                    raise
            else:
                return record, at + length

    def _configured(self, machine_type: str, subsections: Sequence[ConfigurationSubsection]) -> None:
        bits: int | None = None
        for subsection in subsections:
            match subsection.body:
                case ConfigurationTargetPageBits() as body:
                    bits = body.target_page_bits
                case ConfigurationCapabilities() as body:
                    self.capabilities = frozenset(capability.name for capability in body.names)
        if bits is not None and 8 <= bits <= 16:
            self.page_size = 1 << bits
        elif not self._page_size_is_known:
            self.page_size = _PAGE_SIZES.get(machine_type, self.page_size)

    # -- commands

    def _command(self) -> Step:
        command, length = yield from read_command(self.feed)
        yield self._entry(command, length)
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
        elif isinstance(command, Packaged):
            yield from self._package(command)
            self.switched = True
            self.block = None  # a source names the block again after the switch

    def _package(self, command: Packaged) -> Step:
        if command.length > self.limits.package:
            raise UnsupportedError(
                f"a package of {command.length} bytes, the limit is {self.limits.package} (--max-package)",
                offset=self.feed.offset - 4,
                trail=(command.name,),
            )
        base = self.feed.offset
        data = yield from self.feed.take(command.length, (command.name,))
        yield from self._packaged(data, base, 1)

    def _packaged(self, data: bytes, base: int, depth: int) -> Step:
        if depth > _DEEPEST_PACKAGE:
            raise UnsupportedError(f"packages nested deeper than {_DEEPEST_PACKAGE}", offset=base)
        tail = read_tail(data, base=base, footers=self.footers, description=self.schema, package=True)
        yield from self._items(tail.items, data, base, depth)
        if tail.error is not None:
            raise tail.error

    def _items(self, items: Sequence[Item], data: bytes, base: int, depth: int) -> Step:
        """Entries for the pieces of a tail, or of a package."""
        view = memoryview(data)
        for item in items:
            if item.command is not None:
                yield from self._packaged_command(item, view, base, depth)
                continue
            if item.header is None:
                undecoded = Undecoded(data[item.begin : item.end], item.reason or "")
                yield Entry(
                    base + item.begin, item.end - item.begin, undecoded, view[item.begin : item.end], depth
                )
                continue
            self.sections[item.header.section_id] = item.header
            yield Entry(
                base + item.begin, item.body - item.begin, item.header, view[item.begin : item.body], depth
            )
            body: StreamRecord = (
                DeviceState(item.state)
                if item.state is not None
                else Undecoded(data[item.body : item.body_end], item.reason or "")
            )
            yield Entry(
                base + item.body, item.body_end - item.body, body, view[item.body : item.body_end], depth
            )
            if item.body_end < item.end:
                footer = Footer(section_id=item.header.section_id)
                yield Entry(base + item.body_end, FOOTER_BYTES, footer, view[item.body_end : item.end], depth)

    def _packaged_command(self, item: Item, view: memoryview, base: int, depth: int) -> Step:
        feed = Feed(offset=base + item.begin, window=max(item.end - item.begin, 64))
        feed.receive(view[item.begin : item.end])
        feed.end()
        command, length = yield from read_command(feed)
        yield Entry(feed.offset, length, command, view[item.begin : item.begin + length], depth)
        if isinstance(command, Packaged):
            inner = bytes(view[item.begin + length : item.end])
            yield from self._packaged(inner, feed.offset + length, depth + 1)

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
                    offset=self.feed.offset,
                    trail=("ram",),
                )
            self.ram_started = True
            yield from self._block_list()
            yield from self._ram_records(header)
            yield from self._footer(header)
        else:
            raise UnsupportedError(
                "the inside of this live section is not known", offset=self.feed.offset, trail=(header.idstr,)
            )

    def _part(self) -> Step:
        part, length = yield from self.feed.record(SectionPart)
        header = self.sections.get(part.section_id)
        if header is None:
            raise StreamError(
                f"{part.kind.name} names section {part.section_id}, and no START did",
                offset=self.feed.offset + 1,
            )
        yield self._entry(part, length)
        if header.idstr == "ram":
            yield from self._ram_records(header)
        yield from self._footer(header)

    def _footer(self, header: SectionHeader) -> Step:
        trail = (header.idstr,)
        if self.footers is None:
            # Nothing announces footers: the first section whose length is known shows them.
            self.footers = yield from self._has(0, SectionType.FOOTER)
        if not self.footers:
            return
        footer, length = yield from self.feed.record(Footer, trail)
        if footer.section_id != header.section_id:
            raise StreamError(
                f"footer names section {footer.section_id}, section {header.section_id} is open",
                offset=self.feed.offset,
                trail=trail,
            )
        yield self._entry(footer, length)

    def _early(self, header: SectionHeader) -> Step:
        """A FULL section before RAM: it ends at the first footer of its own that a plausible header follows."""
        mark = Footer(section_id=header.section_id).build()
        end = yield from self._early_end(header, mark)
        reason = "it comes before RAM: its end was found by its footer"
        yield self._entry(Undecoded(bytes(self.feed.view(end)), reason), end)
        if self.footers is not False and self.feed.view(5) == mark:
            self.footers = True
            yield from self._footer(header)

    def _early_end(self, header: SectionHeader, mark: bytes) -> Generator[None, None, int]:
        searched = 0
        while True:
            data = bytes(self.feed.view())
            end = data.find(mark, searched)
            if end < 0:
                searched = max(0, len(data) - len(mark) + 1)
                if len(data) > self.limits.device_state:
                    raise UnsupportedError(
                        f"a section of more than {self.limits.device_state} bytes (--max-device-state)",
                        offset=self.feed.offset,
                        trail=(header.idstr,),
                    )
                if not (yield from self.feed.more()):
                    raise TruncatedError(
                        "the stream ends here, in a section whose footer has not come",
                        offset=self.feed.offset + len(data),
                        trail=(header.idstr,),
                    )
                continue
            after = end + len(mark)
            if len(data) < after + 272 and not self.feed.ended:
                yield from self.feed.more()
                continue
            if data[after : after + 1] == b"\x08" or plausible_header(data, after) is not None:
                return end
            searched = end + 1

    # -- RAM

    def _block_list(self) -> Step:
        trail = ("ram", "block list")
        start = self.feed.offset
        if "mapped-ram" in self.capabilities:
            raise UnsupportedError("mapped-ram streams are not read yet", offset=start, trail=trail)
        head, at = yield from self._ahead(BlockListHeader, 0, trail)
        total = head.word & ~(self.page_size - 1)
        if head.word & (self.page_size - 1) != RamFlag.MEM_SIZE:
            raise StreamError(
                f"found flags {head.word & (self.page_size - 1):#x}, expected MEM_SIZE 0x4",
                offset=start,
                trail=trail,
            )
        blocks: list[RamBlock] = []
        left = total
        while left:
            block, at = yield from self._listed_block(at, left, trail)
            blocks.append(block)
            left -= block.used_length
        self.blocks = {block.name: block.used_length for block in blocks}
        yield self._entry(BlockList(total=total, blocks=tuple(blocks)), at)

    def _listed_block(
        self, at: int, left: int, trail: Sequence[str]
    ) -> Generator[None, None, tuple[RamBlock, int]]:
        head, after = yield from self._ahead(RamBlockHead, at, trail)
        if head.used_length > left:
            raise StreamError(
                f"{head.name} has {head.used_length:#x} bytes, {left:#x} of the total are left",
                offset=self.feed.offset + after - 8,
                trail=trail,
            )
        if not head.name:
            raise StreamError("a block without a name", offset=self.feed.offset + at, trail=trail)
        page_size = address = None
        is_last = head.used_length == left
        if self.advised is not None and (yield from self._has_page_size(after, is_last)):
            page_size = int.from_bytes(self.feed.view(after + 8)[after:])
            after += 8
        if "x-ignore-shared" in self.capabilities:
            yield from self.feed.need(after + 8, trail)
            address = int.from_bytes(self.feed.view(after + 8)[after:])
            after += 8
        block = RamBlock(name=head.name, used_length=head.used_length, page_size=page_size, address=address)
        return block, after

    def _has_page_size(self, at: int, is_last: bool) -> Generator[None, None, bool]:
        """Does a page-size word follow?  It is a power of two and a bit of ADVISE's summary.

        With x-ignore-shared an address that looks like one may stand there: then a name (its length is never
        0) or, after the last block, a marker follows it at once, and no second word.
        """
        assert self.advised is not None
        yield from self.feed.need(at + 8, ("ram", "block list"))
        word = int.from_bytes(self.feed.view(at + 8)[at:])
        if not word or word & (word - 1) or not word & self.advised.summary or word < self.page_size:
            return False
        if "x-ignore-shared" not in self.capabilities:
            return True
        yield from self.feed.need(at + 16, ("ram", "block list"))
        following = self.feed.view(at + 16)[at + 8 :]
        if is_last:
            return int.from_bytes(following) not in (RamFlag.EOS, RamFlag.HOOK, RamFlag.MULTIFD_FLUSH)
        return following[0] == 0

    def _ram_records(self, header: SectionHeader) -> Step:
        """Records until EOS.  Plain pages are read as runs, all else by the declaration."""
        feed, page_size = self.feed, self.page_size
        while True:
            buffer, begin, end = feed.buffer
            if self.block is not None:
                runs, position = pages.scan(buffer, begin, end, offset=feed.offset, page_size=page_size)
                if runs:
                    batch = Pages(self.block, False, page_size, 0, runs)
                    self._check_bounds(batch)
                    yield self._entry(batch, position - begin)
            trail = ("ram",) if self.block is None else ("ram", self.block)
            record, length = yield from feed.record(RamRecord, trail, page_size=page_size)
            if record.word.kind in PAGE_KINDS:
                yield self._page(record, length, trail)
                continue
            yield self._entry(record, length)
            if record.word.flags == RamFlag.EOS:
                return

    def _page(self, record: RamRecord, length: int, trail: Sequence[str]) -> Entry:
        """One page record by itself: named, not zero-filled, a delta, or cut by the window's end."""
        named = record.block is not None
        if record.block is not None:
            if record.block not in self.blocks:
                raise StreamError(
                    f"a page of the block {record.block!r}, which the block list does not have",
                    offset=self.feed.offset + 8,
                    trail=("ram",),
                )
            self.block = record.block
        if self.block is None:
            raise StreamError(
                "the first page continues a block, and none was named", offset=self.feed.offset, trail=trail
            )
        kind = record.word.kind
        run = PageRun(self.feed.offset, kind, record.word.start, 1)
        fill = getattr(record.body, "fill", 0)
        batch = Pages(self.block, named, self.page_size, fill, (run,))
        self._check_bounds(batch)
        if kind in (RamFlag.PAGE, RamFlag.ZERO):
            return self._entry(batch, length)
        return self._entry(RamPage(self.block, record), length)

    def _check_bounds(self, batch: Pages) -> None:
        length = self.blocks[batch.block]
        for run in batch.runs:
            if run.start + run.page_count * batch.page_size > length:
                outside = max(run.start, length)
                index = (outside - run.start) // batch.page_size
                raise StreamError(
                    f"page at {outside:#x}, the block ends at {length:#x}",
                    offset=run.offset + index * batch.record_bytes(run.flag),
                    trail=("ram", batch.block),
                )

    # -- the end

    def _tail(self) -> Step:
        """Device sections after RAM: kept until the end, where the description is that decodes them."""
        base = self.feed.offset
        kept = bytearray()
        while True:
            kept += self.feed.view()
            self.feed.skip(len(self.feed))
            if len(kept) > self.limits.device_state:
                raise UnsupportedError(
                    f"more than {self.limits.device_state} bytes of device state (--max-device-state)",
                    offset=base,
                )
            if not (yield from self.feed.more()):
                break
        data = bytes(kept)
        tail, description = self._best_tail(data, base)
        yield from self._items(tail.items, data, base, 0)
        if tail.error is not None:
            raise tail.error
        yield from self._closing(data, base, tail.end, description)

    def _best_tail(self, data: bytes, base: int) -> tuple[Any, Description | None]:
        for at, description in find_description(data, base):
            tail = read_tail(
                data[: at + 1], base=base, footers=self.footers, description=description, package=False
            )
            if tail.error is None and tail.end == at:
                return tail, description
        return (
            read_tail(data, base=base, footers=self.footers, description=self.schema, package=False),
            None,
        )

    def _closing(self, data: bytes, base: int, at: int, description: Description | None) -> Step:
        """EOF, the description, and what stands behind it."""
        view = memoryview(data)
        yield Entry(base + at, 1, EndOfFile(), view[at : at + 1])
        at += 1
        if at < len(data):
            length = int.from_bytes(data[at + 1 : at + 5])
            end = at + 5 + length
            yield Entry(base + at, 5, VmDescriptionHeader(length=length), view[at : at + 5])
            text = VmDescription(data[at + 5 : end], description)
            yield Entry(base + at + 5, length, text, view[at + 5 : end])
            at = end
        if at < len(data):
            yield Entry(base + at, len(data) - at, Trailing(data[at:]), view[at:])

    def _after_eof(self) -> Step:
        """A stream without FULL sections after RAM, or a postcopy stream, which ends with EOF."""
        if not self.switched and (yield from self._has(0, SectionType.VMDESCRIPTION)):
            header, length = yield from self.feed.record(VmDescriptionHeader, ("description",))
            yield self._entry(header, length)
            offset = self.feed.offset
            text = yield from self.feed.take(header.length, ("description",))
            description = parse_description(text, offset=offset) if text else None
            yield Entry(offset, len(text), VmDescription(text, description), memoryview(text))
        while len(self.feed) or (yield from self.feed.more()):
            data = bytes(self.feed.view())
            yield self._entry(Trailing(data), len(data))
