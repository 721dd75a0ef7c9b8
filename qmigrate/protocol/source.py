"""The source's end of a postcopy whose guest is a saved one: facts and bytes in, bytes and events out.

Nothing here waits, opens or holds pages: an endpoint reads them where they are and sends what is given here.  What
each row of the postcopy design asks for: S1 what comes on the return path; S4 ADVISE; S5 the discards and the package;
S11 END, EOF, SHUT, and a recovery.  Which page is sent next is ``pages_to_send``'s (S12).

What a destination may be told when is ``phases``' table: a command that it would refuse is not said.

migration/migration.c: postcopy_start(), source_return_path_thread(); migration/ram.c: get_queued_page(),
ram_save_host_page(), ram_postcopy_send_discard_bitmap(); migration/savevm.c: qemu_savevm_send_*()
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Final, NamedTuple, TypeAlias

from qmigrate.errors import SequenceError, StreamError
from qmigrate.format.command import (
    Command,
    OpenReturnPath,
    Packaged,
    PageSizes,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRamDiscard,
    PostcopyResume,
    PostcopyRun,
    RecvBitmap,
    encode_command,
)
from qmigrate.format.feed import Feed
from qmigrate.format.ram import RAM_VERSION, BlockList, RamBlock, RamFlag, RamRecord, RamWord
from qmigrate.format.return_path import (
    Message,
    Pong,
    ReceivedBitmap,
    RequestPages,
    RequestPagesId,
    ResumeAck,
    Shut,
    read_return_path,
)
from qmigrate.format.stream import EndOfFile, Footer, SectionHeader, SectionPart, SectionType
from qmigrate.protocol.pages_to_send import HostPages, PagesToSend, Span
from qmigrate.protocol.phases import Fact, Phase, after, turned
from qmigrate.value import Value

__all__ = ["Event", "Ponged", "Requested", "Resumed", "Source", "Stopped"]

LOADED: Final = 3
"""The token of the PING that stands in the package behind the devices: its PONG says that RUN comes next."""

_CONTINUE: Final = int(RamFlag.CONTINUE)
_MOST_RANGES: Final = 12  # in one DISCARD of a QEMU source


class Ponged(Value):
    """The destination has come to the PING of this token."""

    token: int


class Requested(NamedTuple):
    """A fault there waits for these bytes.  ``is_new`` is False where they are on their way, or there, already."""

    block: str
    start: int
    length: int
    is_new: bool


class Resumed(Value):
    """A paused postcopy goes on."""


class Stopped(Value):
    """SHUT: the destination is done.  ``value`` is 0 where all went well."""

    value: int


Event: TypeAlias = "Ponged | Requested | Resumed | Stopped"


class Source:
    """One migration, over as many connections as it takes.

    ``blocks`` in the order of the stream.  ``page_size`` is the target's, in bytes; ``footers``: the machine's sections
    have them.  ``at_once``: how many bytes of pages one span in its turn has at most, if a host page is no longer.
    """

    def __init__(
        self,
        blocks: Sequence[HostPages],
        *,
        page_size: int,
        section_id: int,
        footers: bool = True,
        at_once: int = 1 << 18,
    ) -> None:
        self.phase = Phase.PRECOPY
        self.page_size = page_size
        self.blocks = {block.name: block for block in blocks}
        self.pages = PagesToSend(self.blocks, page_size=page_size, at_once=at_once)
        self._section_id = section_id
        self._footers = footers
        self._named: str | None = None  # the block that the next record may continue
        self._named_urgent: str | None = None  # the same on the preempt channel
        self._asked: str | None = None  # the block of the latest request
        self._awaited: set[str] = set()  # blocks whose bitmap a recovery waits for
        self._feed = Feed(window=1 << 16)
        self._grammar = read_return_path(self._feed)
        self._is_over = False

    # -- what is said before the switch

    def open(self) -> bytes:
        """What follows CONFIGURATION: there is a return path."""
        return self._say(OpenReturnPath(), Ping(token=1))

    def advise(self) -> bytes:
        """What follows that where postcopy may come."""
        sizes = PageSizes(summary=self._summary, target_page_size=self.page_size)
        return self._say(PostcopyAdvise(sizes=sizes))

    @property
    def _summary(self) -> int:
        summary = 0
        for block in self.blocks.values():
            summary |= block.page_size
        return summary

    @property
    def _usual(self) -> int:
        """The host's page size, which a block's entry does not name: the lowest bit of the summary."""
        return self._summary & -self._summary

    def start(self) -> bytes:
        """RAM's START: the block list alone."""
        listed = tuple(
            RamBlock(
                name=block.name,
                used_length=block.length,
                page_size=None if self.phase is Phase.PRECOPY or block.page_size == self._usual else block.page_size,
            )
            for block in self.blocks.values()
        )
        header = SectionHeader(
            kind=SectionType.START, section_id=self._section_id, idstr="ram", instance_id=0, version_id=RAM_VERSION
        )
        listing = BlockList(total=sum(block.used_length for block in listed), blocks=listed)
        return header.build() + listing.build() + self._closing()

    # -- the switch

    def discards(self) -> bytes:
        """What the destination shall forget: all that is dirty or was never sent."""
        commands = []
        for block in self.blocks.values():
            ranges = list(self.pages.to_discard(block))
            for first in range(0, len(ranges), _MOST_RANGES):
                some = tuple(ranges[first : first + _MOST_RANGES])
                commands.append(PostcopyRamDiscard(block=block.name, ranges=some))
        return self._say(*commands, Ping(token=2))

    def package(self, devices: bytes) -> bytes:
        """PACKAGED with all it holds, from LISTEN to RUN; then PING 4."""
        listen = self._say(PostcopyListen(), inside=True)
        contents = listen + devices + self._say(Ping(token=LOADED), PostcopyRun(), inside=True)
        self._named = None  # a source names the block again after the switch
        return encode_command(Packaged(length=len(contents))) + contents + self._say(Ping(token=4))

    def _say(self, *commands: Command, inside: bool = False) -> bytes:
        """Their bytes, and the phase in which they leave the destination.  Raises ``SequenceError``."""
        said = []
        for command in commands:
            self.phase = after(self.phase, command.NUMBER, inside=inside)
            said.append(encode_command(command))
        return b"".join(said)

    # -- pages

    def part(self, span: Span, records: bytearray) -> list[bytes | memoryview]:
        """A PART of RAM with these records, each of which continues its block: pieces to be sent one after another."""
        head, behind = self._part_frame
        named, rest = self._with_name(span, records, self._named)
        self._named = span.block
        return [head + named, rest, behind]

    @cached_property
    def _part_frame(self) -> tuple[bytes, bytes]:
        """What stands around the records of every PART; to build it takes longer than to read the pages in it."""
        return SectionPart(kind=SectionType.PART, section_id=self._section_id).build(), self._closing()

    def urgent(self, span: Span, records: bytearray) -> list[bytes | memoryview]:
        """The same for the preempt channel (since 7.1): records alone, with a block of its own to go on with."""
        named, rest = self._with_name(span, records, self._named_urgent)
        self._named_urgent = span.block
        return [named, rest]

    @staticmethod
    def _with_name(span: Span, records: bytearray, continued: str | None) -> tuple[bytes, memoryview]:
        """The first record's head, if it has to name its block; and what follows."""
        if continued == span.block:
            return b"", memoryview(records)
        name = span.block.encode("utf-8", "surrogateescape")
        word = (int.from_bytes(records[:8]) & ~_CONTINUE).to_bytes(8)
        return word + bytes([len(name)]) + name, memoryview(records)[8:]

    def end_urgent(self) -> bytes:
        """What ends the preempt channel: 7.2 waits for it, later ones take it as well."""
        return self._eos()

    def end(self) -> bytes:
        """RAM's END and EOF, once no page is left.  Raises ``SequenceError`` where one is."""
        if self.pages.left:
            raise SequenceError(f"{self.pages.left} pages are still to be sent")
        return self.finish_ram() + EndOfFile().build()

    def finish_ram(self) -> bytes:
        """RAM's END alone: what else there is follows in a precopy."""
        return SectionPart(kind=SectionType.END, section_id=self._section_id).build() + self._closing()

    def _closing(self) -> bytes:
        return self._eos() + (Footer(section_id=self._section_id).build() if self._footers else b"")

    def _eos(self) -> bytes:
        return RamRecord(word=RamWord(0, int(RamFlag.EOS)), block=None, body=None).build(page_size=self.page_size)

    # -- the return path

    def receive_data(self, data: bytes | memoryview) -> None:
        """Bytes of the return path."""
        self._feed.receive(data)

    def receive_eof(self) -> None:
        """It ends here: with all said, or in the middle (``is_over`` tells)."""
        self._feed.end()

    @property
    def is_over(self) -> bool:
        """Has SHUT come?"""
        return self._is_over

    def events(self) -> Iterator[Event]:
        """What has come since.  Raises ``StreamError`` for a message that a QEMU source would refuse."""
        for entry in self._grammar:
            if entry is None:
                return
            yield from self._message(entry.message, entry.offset)

    def _message(self, message: Message, offset: int) -> Iterator[Event]:
        match message:
            case Pong(token=token):
                yield Ponged(token)
            case RequestPagesId(block=name, start=start, length=length):
                self._asked = name
                yield self._request(name, start, length, offset)
            case RequestPages(start=start, length=length):
                if self._asked is None:
                    raise StreamError("REQ_PAGES has no previous block", offset=offset, trail=_TRAIL)
                yield self._request(self._asked, start, length, offset)
            case ReceivedBitmap():
                self._bitmap(message, offset)
            case ResumeAck():
                yield Resumed()
            case Shut(value=value):
                self._is_over = True
                yield Stopped(value)

    def _request(self, name: str, start: int, length: int, offset: int) -> Requested:
        """migration/migration.c: migrate_handle_rp_req_pages()"""
        block = self.blocks.get(name)
        if block is None:
            raise StreamError(f"a request for pages of {name!r}, which there is not", offset=offset, trail=_TRAIL)
        if start % self._usual or length % self._usual or not length:
            raise StreamError(
                f"misaligned request: start {start:#x}, length {length:#x}", offset=offset, trail=(*_TRAIL, name)
            )
        if start + length > block.count * block.page_size:
            raise StreamError(
                f"a request for {start:#x} to {start + length:#x}, the block ends at {block.length:#x}",
                offset=offset,
                trail=(*_TRAIL, name),
            )
        return Requested(name, start, length, self.pages.ask(name, start, length))

    # -- a broken connection, and the next one

    def lose(self) -> None:
        """The connection broke.  Before RUN that is the end; after it the destination pauses."""
        self.phase = turned(self.phase, Fact.LINK_LOST)

    def adopt(self) -> None:
        """Another served this destination, which is paused since that one's connection broke."""
        self.phase = Phase.PAUSED

    def resume(self) -> bytes:
        """The first bytes on a new connection: ask what has arrived."""
        self.phase = turned(self.phase, Fact.LINK_CAME)
        self._feed = Feed(window=1 << 16)
        self._grammar = read_return_path(self._feed)
        self._named = self._named_urgent = self._asked = None
        self.pages.ask_anew()
        self._awaited = set(self.blocks)
        return self._say(*(RecvBitmap(block=name) for name in self.blocks))

    def resumed(self) -> bytes:
        """What to say once all bitmaps are here; nothing before, or where there is no recovery."""
        if self.phase is not Phase.RECOVERING or self._awaited:
            return b""
        return self._say(PostcopyResume())

    def _bitmap(self, message: ReceivedBitmap, offset: int) -> None:
        """What has not arrived is dirty, whatever was sent.  migration/ram.c: ram_dirty_bitmap_reload()"""
        name = message.block
        if self.phase is not Phase.RECOVERING or name not in self._awaited:
            raise StreamError(f"a bitmap of {name!r} that was not asked for", offset=offset, trail=_TRAIL)
        block = self.blocks[name]
        targets = block.length // self.page_size
        expected = -(-targets // 64) * 8
        if message.bitmap_size != expected:
            raise StreamError(
                f"the bitmap has {message.bitmap_size} bytes, expected {expected}", offset=offset, trail=(*_TRAIL, name)
            )
        self._awaited.remove(name)
        self.pages.arrived(name, message.bitmap)


_TRAIL: Final = ("return path",)
