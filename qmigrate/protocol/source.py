"""The source's end of a postcopy whose guest is a saved one: facts and bytes in, bytes and events out.

Nothing here waits, opens or holds pages: an endpoint reads them where they are and sends what is given here.  What
each row of the postcopy design asks for: S1 what comes on the return path; S4 ADVISE; S5 the discards and the package;
S11 END, EOF, SHUT, and a recovery; S12 the maps.

The maps (S12).  ``dirty``: must be sent; ``sent``: was sent before the switch.  A host page is discarded that is
dirty or was never sent.  A saved guest's pages are all dirty and none was sent: each block is discarded whole, and
LISTEN never comes without a discard, with which 11.1 hangs (seen).  After the switch nothing gets dirty again: a page
that is taken to be sent is not dirty any more, so each is sent once, by request or in its turn.

What a destination may be told when is ``phases``' table: a command that it would refuse is not said.

migration/migration.c: postcopy_start(), source_return_path_thread(); migration/ram.c: get_queued_page(),
ram_save_host_page(), ram_postcopy_send_discard_bitmap(); migration/savevm.c: qemu_savevm_send_*()
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Final, NamedTuple, TypeAlias

from qmigrate.errors import SequenceError, StreamError
from qmigrate.format.command import (
    Command,
    DiscardRange,
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
from qmigrate.protocol.phases import Fact, Phase, after, turned
from qmigrate.value import Value

__all__ = ["Event", "HostPages", "Ponged", "Requested", "Resumed", "Source", "Span", "Stopped"]

LOADED: Final = 3
"""The token of the PING that stands in the package behind the devices: its PONG says that RUN comes next."""

_YES: Final = 1
_CONTINUE: Final = int(RamFlag.CONTINUE)
_MOST_RANGES: Final = 12  # in one DISCARD of a QEMU source


class HostPages(Value):
    """A block as the destination has it: ``length`` and ``page_size``, of its host pages, in bytes."""

    name: str
    length: int
    page_size: int

    @property
    def count(self) -> int:
        return -(-self.length // self.page_size)


class Span(NamedTuple):
    """Whole host pages of one block to be sent next, as target pages.  ``requested``: somebody waits for them."""

    block: str
    first: int
    page_count: int
    requested: bool = False


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
        self._section_id = section_id
        self._footers = footers
        self.at_once = at_once
        self.has: Callable[[str, int, int, bool], bool] | None = None
        """Are these target pages at hand, and does somebody wait for them (the last one)?  If not they are sent later.
        None: all are.
        """
        self._order = list(self.blocks)
        self._dirty = {block.name: bytearray([_YES]) * block.count for block in blocks}
        self._sent = {block.name: bytearray(block.count) for block in blocks}
        self._left = sum(block.count for block in blocks)
        self._wanted: deque[tuple[str, int]] = deque()
        self._queued: set[tuple[str, int]] = set()
        self._turn = (0, 0)  # the block and the host page where the search for the next one begins
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
            ranges = list(self._to_discard(block))
            for first in range(0, len(ranges), _MOST_RANGES):
                some = tuple(ranges[first : first + _MOST_RANGES])
                commands.append(PostcopyRamDiscard(block=block.name, ranges=some))
        return self._say(*commands, Ping(token=2))

    def _to_discard(self, block: HostPages) -> Iterator[DiscardRange]:
        dirty, sent = self._dirty[block.name], self._sent[block.name]
        forget = bytes(map(_is_to_discard, dirty, sent)) if sent.count(_YES) else b"\1" * block.count
        at = 0
        while (first := forget.find(_YES, at)) >= 0:
            at = forget.find(0, first)
            at = block.count if at < 0 else at
            yield DiscardRange(start=first * block.page_size, length=(at - first) * block.page_size)

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

    @property
    def left(self) -> int:
        """Host pages that are still to be sent."""
        return self._left

    @property
    def has_taken(self) -> bool:
        """Has any page been given to be sent?"""
        return self._left < sum(block.count for block in self.blocks.values())

    @property
    def left_pages(self) -> int:
        """The same in target pages."""
        return sum(
            self._dirty[name].count(_YES) * (block.page_size // self.page_size) for name, block in self.blocks.items()
        )

    @property
    def waiting(self) -> int:
        """Host pages that were asked for and are still to be sent."""
        return len(self._wanted)

    def next_span(self) -> Span | None:
        """What to send next, requested pages first; it counts as sent.  None where all is, or nothing is at hand."""
        return self.next_requested() or self.next_in_turn()

    def next_requested(self) -> Span | None:
        """The next host page that somebody waits for; it counts as sent.  None where there is none that is at hand."""
        for _ in range(len(self._wanted)):
            name, page = self._wanted.popleft()
            if self._dirty[name][page] and not self._is_at_hand(name, page, 1, is_wanted=True):
                self._wanted.append((name, page))
                continue
            self._queued.discard((name, page))
            if self._dirty[name][page]:
                # What a guest wants next mostly stands behind what it wanted.
                self._turn = (self._order.index(name), page + 1)
                return self._take(name, page, 1, requested=True)
        return None

    def _is_at_hand(self, name: str, first: int, count: int, *, is_wanted: bool = False) -> bool:
        return self.has is None or self.has(name, *self._targets(name, first, count), is_wanted)

    def next_in_turn(self) -> Span | None:
        """The next pages in the order of the blocks, behind those that were asked for last; they count as sent.

        None where there is none, or they are not at hand.
        """
        for _ in range(len(self._order) + 1):
            number, page = self._turn
            name = self._order[number]
            first = self._dirty[name].find(_YES, page)
            if first < 0:
                self._turn = ((number + 1) % len(self._order), 0)
                continue
            return self._in_its_turn(number, name, first)
        return None

    def _in_its_turn(self, number: int, name: str, first: int) -> Span | None:
        most = max(self.at_once // self.blocks[name].page_size, 1)
        end = self._dirty[name].find(0, first, first + most)
        end = min(first + most, self.blocks[name].count) if end < 0 else end
        if not self._is_at_hand(name, first, end - first):
            return None
        self._turn = (number, end)
        return self._take(name, first, end - first)

    def _take(self, name: str, first: int, count: int, *, requested: bool = False) -> Span:
        self._dirty[name][first : first + count] = bytes(count)
        self._left -= count
        return Span(name, *self._targets(name, first, count), requested)

    def _targets(self, name: str, first: int, count: int) -> tuple[int, int]:
        """Host pages as target pages: the first one, and how many."""
        block = self.blocks[name]
        each, whole = block.page_size // self.page_size, block.length // self.page_size
        return first * each, min(count * each, whole - first * each)

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
        if self._left:
            raise SequenceError(f"{self._left} pages are still to be sent")
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
        is_new = False
        for page in range(start // block.page_size, -(-(start + length) // block.page_size)):
            if self._dirty[name][page] and (name, page) not in self._queued:
                self._wanted.append((name, page))
                self._queued.add((name, page))
                is_new = True
        return Requested(name, start, length, is_new)

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
        self._wanted.clear()
        self._queued.clear()
        self._awaited = set(self.blocks)
        return self._say(*(RecvBitmap(block=name) for name in self._order))

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
        bits, each = int.from_bytes(message.bitmap, "little"), block.page_size // self.page_size
        digits = format(bits, f"0{expected * 8}b")[::-1][: block.count * each : each]
        self._left -= self._dirty[name].count(_YES)
        self._dirty[name] = bytearray(digits.encode().translate(_MISSING))
        self._left += self._dirty[name].count(_YES)


_TRAIL: Final = ("return path",)
_MISSING: Final = bytes([_YES if digit == ord("0") else 0 for digit in range(256)])


def _is_to_discard(dirty: int, sent: int) -> int:
    return _YES if dirty or not sent else 0
