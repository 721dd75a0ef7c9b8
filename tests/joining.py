"""RAM out of all channels of one migration, in memory: the plainest joiner there can be."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from qmigrate.format.encoded import apply_page
from qmigrate.format.entry import Entry, RamPage
from qmigrate.format.feed import Feed
from qmigrate.format.multifd import PagePacket
from qmigrate.format.multifd_channel import ChannelEntry, read_channel
from qmigrate.format.multifd_pages import PageDecoder
from qmigrate.format.ram import BlockList, Pages, RamFlag, RamRecord


def channel_entries(data: bytes, step: int | None = None, **options: Any) -> Iterator[ChannelEntry]:
    """Each packet of a multifd channel, which comes ``step`` bytes at a time."""
    feed, at = Feed(), 0
    for entry in read_channel(feed, **options):
        if entry is not None:
            yield entry
            continue
        piece = data[at : at + (step or len(data))]
        at += len(piece)
        if piece:
            feed.receive(piece)
        else:
            feed.end()


@dataclass
class Joined:
    """Blocks by name, and what was counted on the way: how many records of each kind gave pages."""

    blocks: dict[str, bytearray] = field(default_factory=dict)
    pages: dict[str, int] = field(default_factory=dict)
    epochs: int = 0

    def count(self, kind: str, pages: int) -> None:
        self.pages[kind] = self.pages.get(kind, 0) + pages


def joined(
    main: Iterable[Entry],
    channels: Sequence[Iterable[ChannelEntry]] = (),
    *,
    on_encoded: Callable[[RamPage, bytes, bytes], None] | None = None,
) -> Joined:
    """What a destination's RAM holds once all is loaded; main is read up to a sync point, then each channel.

    ``on_encoded`` is told of each encoded page what it held before and after.
    """
    found = Joined()
    waiting = [_Channel(found, channel) for channel in channels]
    by_round: bool | None = None  # does MULTIFD_FLUSH end an epoch, or each EOS?
    for entry in main:
        match entry.record:
            case BlockList(blocks=blocks):
                found.blocks = {block.name: bytearray(block.used_length) for block in blocks}
            case Pages() as pages:
                _load_pages(found, pages, entry)
            case RamPage(block=block, record=record) as page:
                contents, at = found.blocks[block], record.word.start
                before = bytes(contents[at : at + page.page_size])
                apply_page(page, contents, offset=entry.offset)
                if on_encoded is not None:
                    on_encoded(page, before, bytes(contents[at : at + page.page_size]))
                found.count(str(RamFlag(record.word.kind).name).lower(), 1)
            case RamRecord(is_marker=True, word=word):
                if by_round is None:
                    by_round = word.flags == RamFlag.MULTIFD_FLUSH
                if word.flags == (RamFlag.MULTIFD_FLUSH if by_round else RamFlag.EOS):
                    for channel in waiting:
                        channel.load(found.epochs)
                    found.epochs += 1
    for channel in waiting:
        channel.load_rest()
    return found


class _Channel:
    """One channel, as far as it is loaded."""

    def __init__(self, found: Joined, entries: Iterable[ChannelEntry]) -> None:
        self.found = found
        self.entries = iter(entries)
        self.decoder = PageDecoder()

    def load(self, epoch: int) -> None:
        """All packets of this epoch, up to its SYNC."""
        for entry in self.entries:
            if isinstance(entry.record, PagePacket):
                assert entry.epoch == epoch
                self._load(entry, entry.record)
                if entry.record.header.is_sync:
                    return
        raise AssertionError(f"no SYNC ends epoch {epoch}")

    def load_rest(self) -> None:
        """Behind the last SYNC no page comes."""
        for entry in self.entries:
            assert isinstance(entry.record, PagePacket)
            assert not entry.record.runs

    def _load(self, entry: ChannelEntry, packet: PagePacket) -> None:
        contents = self.decoder.contents(entry)
        for at, flag, start, page_count in packet.runs:
            block, length = self.found.blocks[packet.header.block], page_count * packet.page_size
            block[start : start + length] = contents[at : at + length] if flag == RamFlag.PAGE else bytes(length)
            assert start + length <= len(block)
            kind = packet.header.compression.name.lower() if flag == RamFlag.PAGE else "zero"
            self.found.count(f"multifd {kind}", page_count)


def pages_of(pages: Pages, view: bytes | memoryview) -> Iterator[tuple[int, bytes]]:
    """Where each page goes in its block, and what it holds; ``view`` is the record's bytes."""
    at = len(pages.block.encode("utf-8", "surrogateescape")) + 1 if pages.named else 0
    for _, flag, start, count in pages.runs:
        for page_at in range(start, start + count * pages.page_size, pages.page_size):
            at += 8
            if flag == RamFlag.PAGE:
                yield page_at, bytes(view[at : at + pages.page_size])
                at += pages.page_size
            else:
                yield page_at, bytes([pages.fill]) * pages.page_size
                at += 1


def _load_pages(found: Joined, pages: Pages, entry: Entry) -> None:
    block = found.blocks[pages.block]
    for start, contents in pages_of(pages, entry.view):
        block[start : start + pages.page_size] = contents
    for run in pages.runs:
        found.count(str(RamFlag(run.flag).name).lower(), run.page_count)
