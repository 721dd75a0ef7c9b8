"""Which packet follows which on a multifd channel: its grammar, over a feed as that of the main channel.

``encode_packet`` of ``multifd.py`` is the mirror: ``encode_packet(entry.record, entry.data)`` gives the same bytes.

migration/multifd.c: multifd_recv_thread(), multifd_recv_unfill_packet()
"""

import struct
from collections.abc import Generator, Mapping
from typing import Final, NamedTuple

from qmigrate.errors import StreamError, UnsupportedError
from qmigrate.format.entry import Entry
from qmigrate.format.feed import Feed
from qmigrate.format.multifd import (
    COMPRESSION_MASK,
    LONGEST_DATA,
    METHODS,
    ChannelRecord,
    Compression,
    DeviceStateHeader,
    DeviceStatePacket,
    InitialPacket,
    MultifdFlag,
    MultifdMagic,
    MultifdVersion,
    PacketHead,
    PageHeader,
    PagePacket,
    header_length,
    page_capacity,
    unpack_offsets,
)

__all__ = ["WINDOW", "ChannelEntry", "packet_entry", "read_channel", "read_header"]

WINDOW: Final = 2 << 20  # for the feed: a packet is longer than 512 KiB, and three fit
MOST_DEVICE_STATE: Final = 1 << 30


class ChannelEntry(NamedTuple):
    """A packet, where it stands in its channel, and how many bytes it takes in all.

    ``epoch`` counts the SYNCs that were there before it: the packet with a SYNC is the last one of its epoch.  On
    main an epoch ends with MULTIFD_FLUSH, or with EOS where START has none (until 8.0): of all that is sent, that of
    an earlier epoch is loaded first.
    ``view`` is the packet's bytes, its data behind ``data_at``; it holds until the reading is resumed.
    """

    offset: int
    length: int
    record: ChannelRecord
    view: memoryview
    epoch: int
    data_at: int

    @property
    def data(self) -> memoryview:
        """What follows the header: the contents of its pages, as they are or compressed."""
        return self.view[self.data_at :]


def packet_entry(entry: Entry, packet: PagePacket) -> ChannelEntry:
    """The same place and bytes, as ``PageDecoder`` wants them."""
    return ChannelEntry(entry.offset, entry.length, packet, entry.view, 0, header_length(packet.page_size))


_TRAIL: Final = ("multifd",)
_HEAD_BYTES: Final = 12
_FIXED_BYTES: Final = 320
_HEAD: Final = struct.Struct(">III")
_HEADER: Final = struct.Struct(">IIIIIIQI28s256s")
_DEVICE_STATE: Final = int(MultifdFlag.DEVICE_STATE)
_ALL_FLAGS: Final = int(MultifdFlag.SYNC) | _DEVICE_STATE | COMPRESSION_MASK
_GOOD_HEAD: Final = (int(MultifdMagic.MAGIC), int(MultifdVersion.VERSION))


def read_channel(
    feed: Feed,
    *,
    page_size: int = 4096,
    blocks: Mapping[str, int] | None = None,
    most_device_state: int = MOST_DEVICE_STATE,
) -> Generator[ChannelEntry | None]:
    """Each packet in turn, None while bytes are missing; ends where the feed ends between packets.

    ``page_size`` is the target's, in bytes; ``blocks`` the lengths of RAM blocks by name: pages are held to them, or by
    the caller where it does not give them.  ``most_device_state``: a packet with more bytes of it is refused.  Of
    pages never more than a packet is kept, which has at most 1 MiB of data; a feed with ``WINDOW`` moves it the least.
    Raises ``StreamError``.
    """
    reader = _Channel(feed, page_size, blocks, most_device_state)
    entry = yield from reader.initial()
    yield entry
    while len(feed) or (yield from feed.more()):
        entry = yield from reader.packet()
        yield entry


class _Channel:
    """What a channel has said so far: its id, how its pages are compressed, how many SYNCs it had."""

    def __init__(self, feed: Feed, page_size: int, blocks: Mapping[str, int] | None, most_device_state: int) -> None:
        self.feed = feed
        self.page_size = page_size
        self.blocks = blocks
        self.most_device_state = most_device_state
        self.header_length = header_length(page_size)
        self.capacity = page_capacity(page_size)
        self.trail = _TRAIL
        self.method: Compression | None = None
        self.epoch = 0

    def initial(self) -> Generator[None, None, ChannelEntry]:
        record, length = yield from self.feed.record(InitialPacket, self.trail)
        self.trail = (f"multifd {record.channel_id}",)
        return self._entry(record, length, length)

    def packet(self) -> Generator[None, None, ChannelEntry]:
        if len(self.feed) < _HEAD_BYTES:
            yield from self.feed.need(_HEAD_BYTES, self.trail)
        magic, version, flags = _HEAD.unpack(self.feed.view(_HEAD_BYTES))
        if (magic, version) != _GOOD_HEAD:
            # It says what is wrong.
            PacketHead.read(self.feed.view(_HEAD_BYTES), offset=self.feed.offset, trail=self.trail)
        self._check_flags(flags)
        if flags & _DEVICE_STATE:
            return (yield from self._device_state())
        return (yield from self._pages())

    def _check_flags(self, flags: int) -> None:
        unknown = flags & ~_ALL_FLAGS
        if unknown:
            raise self._wrong(f"packet has unknown flags {unknown:#x}", 8)
        if (method := flags & COMPRESSION_MASK) not in METHODS:
            known = ", ".join(f"{member.name} {member.value:#x}" for member in Compression)
            raise self._wrong(f"packet has the unknown compression {method:#x}, expected one of {known}", 8)
        if flags & _DEVICE_STATE and flags != _DEVICE_STATE:
            raise self._wrong(f"DEVICE_STATE comes with the flags {flags & ~_DEVICE_STATE:#x}", 8)

    def _pages(self) -> Generator[None, None, ChannelEntry]:
        if len(self.feed) < self.header_length:
            yield from self.feed.need(self.header_length, self.trail)
        header = read_header(self.feed.view(self.header_length), page_size=self.page_size)
        self._check_counts(header)
        if header.normal_pages:
            self._check_data(header)
        record = PagePacket(header, self.page_size)
        if self.blocks is not None and header.normal_pages + header.zero_pages:
            self._check_block(record, self.blocks)
        length = self.header_length + header.data_length
        if len(self.feed) < length:
            yield from self.feed.need(length, self.trail)
        entry = self._entry(record, length, self.header_length)
        self.epoch += header.is_sync
        return entry

    def _check_counts(self, header: PageHeader) -> None:
        capacity = self.capacity
        if header.pages_alloc > capacity:
            raise self._wrong(f"pages_alloc is {header.pages_alloc}, a packet holds {capacity} pages", 12)
        if header.normal_pages > header.pages_alloc:
            raise self._wrong(f"{header.normal_pages} normal pages, pages_alloc is {header.pages_alloc}", 16)
        left = header.pages_alloc - header.normal_pages
        if header.zero_pages > left:
            raise self._wrong(f"{header.zero_pages} zero pages, {left} are left of pages_alloc", 32)

    def _check_data(self, header: PageHeader) -> None:
        """A length that its pages can have, before it is waited for; QEMU itself looks at it hardly."""
        size, pages, method = header.next_packet_size, header.normal_pages, header.compression
        if method is Compression.NOCOMP:
            good, expected = size == pages * self.page_size, str(pages * self.page_size)
        else:
            good, expected = 0 < size <= LONGEST_DATA, f"1 to {LONGEST_DATA}"
        if not good:
            raise self._wrong(f"next_packet_size is {size} for {pages} pages ({method.name}), expected {expected}", 20)
        if self.method is not None and method is not self.method:
            raise self._wrong(f"packet is {method.name}, those before were {self.method.name}", 8)
        self.method = method

    def _check_block(self, packet: PagePacket, blocks: Mapping[str, int]) -> None:
        header = packet.header
        length = blocks.get(header.block)
        if length is None:
            raise self._wrong(f"pages of the block {header.block!r}, which the block list does not have", 64)
        page_size, below = self.page_size, self.page_size - 1
        for _, _, start, count in packet.runs:
            if start & below or start + count * page_size > length:
                break
        else:
            return
        starts = unpack_offsets(header.offsets[: 8 * (header.normal_pages + header.zero_pages)])
        for index, start in enumerate(starts):
            at = _FIXED_BYTES + 8 * index
            if start + page_size > length:
                raise self._wrong(f"{header.block}: page at {start:#x}, the block ends at {length:#x}", at)
            if start & below:  # QEMU would put it there; who goes by pages can't
                raise self._wrong(f"{header.block}: page at {start:#x}, expected a multiple of {page_size:#x}", at)

    def _device_state(self) -> Generator[None, None, ChannelEntry]:
        start = self.feed.offset
        header, length = yield from self.feed.record(DeviceStateHeader, self.trail)
        size = header.next_packet_size
        if not size:
            raise self._wrong(f"{header.idstr}: a device-state packet without data", 272)
        if size > self.most_device_state:
            raise UnsupportedError(
                f"{header.idstr}: a device-state packet of {size} bytes, the limit is {self.most_device_state}",
                offset=start + 272,
                trail=self.trail,
            )
        packet = memoryview((yield from self.feed.collect(length + size, (*self.trail, header.idstr)))).toreadonly()
        record = DeviceStatePacket(header, packet[length:])
        return ChannelEntry(start, length + size, record, packet, self.epoch, length)

    def _entry(self, record: ChannelRecord, length: int, data_at: int) -> ChannelEntry:
        entry = ChannelEntry(self.feed.offset, length, record, self.feed.view(length), self.epoch, data_at)
        self.feed.skip(length)
        return entry

    def _wrong(self, message: str, at: int) -> StreamError:
        return StreamError(message, offset=self.feed.offset + at, trail=self.trail)


def read_header(data: bytes | memoryview, *, page_size: int) -> PageHeader:
    """``PageHeader.read``, fast: two microseconds for the 128 pages of a packet, not forty.

    Magic and version have been looked at.
    """
    _, _, flags, pages_alloc, normal_pages, next_packet_size, packet_num, zero_pages, unused, name = (
        _HEADER.unpack_from(data)
    )
    return PageHeader(
        flags=flags,
        pages_alloc=pages_alloc,
        normal_pages=normal_pages,
        next_packet_size=next_packet_size,
        packet_num=packet_num,
        zero_pages=zero_pages,
        unused=unused,
        name=name,
        offsets=bytes(data[_FIXED_BYTES : header_length(page_size)]),
    )
