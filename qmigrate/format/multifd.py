"""A multifd channel: one of the extra connections over which pages travel, forward only.

An initial packet says which channel it is; then packets of pages, of device state (since 10.0), or of nothing but
SYNC.  A packet's pages belong to one block; its offsets are in a table of fixed size, and the contents follow as
they are, or compressed as one run.  What is compressed is kept as it is.

The records stand here; which follows which in ``multifd_channel.py``, what the pages are in ``multifd_pages.py``.

The header of a packet says the same in all versions, more or less of it:

===========  ==================================================================================================
until 8.2    no zero pages (they travel on main); in a packet without pages, and behind the offsets that are used,
             block, offsets and ``next_packet_size`` are left over from the packet before
since 9.0    zero pages, whose offsets stand behind those of the others; the rest is zero
since 9.1    five bits of compression, not three; ``pages_alloc`` is 0 where there is but SYNC (seen in 10.0)
since 10.0   device state
===========  ==================================================================================================

migration/multifd.h: MultiFDInit_t, MultiFDPacket_t, MultiFDPacketDeviceState_t
"""

import operator
import struct
import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from functools import cached_property, lru_cache
from typing import Final, NamedTuple, TypeAlias

from construct import Bytes, Int8ub, Int32ub, Int64ub

from qmigrate.errors import StreamError
from qmigrate.format._record import Only, Record, wire
from qmigrate.format.ram import PageRun, RamFlag

__all__ = [
    "COMPRESSION_MASK",
    "LONGEST_DATA",
    "METHODS",
    "ChannelRecord",
    "Compression",
    "DeviceStateHeader",
    "DeviceStatePacket",
    "InitialPacket",
    "MultifdFlag",
    "MultifdMagic",
    "MultifdVersion",
    "PacketHead",
    "PageHeader",
    "PagePacket",
    "encode_packet",
    "header_length",
    "pack_offsets",
    "page_capacity",
    "unpack_offsets",
]

PACKET_PAGES_BYTES: Final = 524288  # of page contents in one packet, at most
LONGEST_DATA: Final = 2 * PACKET_PAGES_BYTES  # compressed data may be longer than its pages; QEMU has so much room
_FIXED_BYTES: Final = 320  # of a page packet's header, before the offsets
_NAME_BYTES: Final = 256


class MultifdMagic(IntEnum):
    """migration/multifd.c: MULTIFD_MAGIC, MULTIFD_VERSION"""

    MAGIC = 0x11223344


class MultifdVersion(IntEnum):
    VERSION = 1


class MultifdFlag(IntFlag):
    """migration/multifd.h: MULTIFD_FLAG_*; the compression is none of these bits but a number among them."""

    SYNC = 0x01
    DEVICE_STATE = 0x40  # since 10.0


class Compression(IntEnum):
    """How a packet's pages travel, as it stands in the flags."""

    NOCOMP = 0x00
    ZLIB = 0x02  # since 5.0, as zstd
    ZSTD = 0x04
    QPL = 0x08  # since 9.1, as uadk
    UADK = 0x10
    QATZIP = 0x20  # since 9.2


_SYNC: Final = int(MultifdFlag.SYNC)  # an IntFlag's own `&` is ten times slower
COMPRESSION_MASK: Final = 0x3E  # until 9.0 it was 0x0e: the others were not used
METHODS: Final = {int(method): method for method in Compression}


def page_capacity(page_size: int) -> int:
    """How many pages a packet holds: as many as fill 512 KiB.  ``page_size`` is the target's, in bytes."""
    return PACKET_PAGES_BYTES // page_size


def header_length(page_size: int) -> int:
    """Of a page packet, in bytes: it has a place for the offset of each page that it could hold."""
    return _FIXED_BYTES + 8 * page_capacity(page_size)


class InitialPacket(Record):
    """The first of a channel, and its only one of this kind: ``channel_id`` counts from 0.

    ``uuid`` is the source's, zeros where it has none; a destination wants it to be its own.
    migration/multifd.c: multifd_send_initial_packet()
    """

    magic: MultifdMagic = wire(Only(MultifdMagic.MAGIC, Int32ub), default=MultifdMagic.MAGIC)
    version: MultifdVersion = wire(Only(MultifdVersion.VERSION, Int32ub), default=MultifdVersion.VERSION)
    uuid: bytes = wire(Bytes(16), default=bytes(16))
    channel_id: int = wire(Int8ub)
    unused: bytes = wire(Bytes(39), default=bytes(39))


class PacketHead(Record):
    """How each later packet begins: enough to tell which it is."""

    magic: MultifdMagic = wire(Only(MultifdMagic.MAGIC, Int32ub), default=MultifdMagic.MAGIC)
    version: MultifdVersion = wire(Only(MultifdVersion.VERSION, Int32ub), default=MultifdVersion.VERSION)
    flags: int = wire(Int32ub)


class PageHeader(Record):
    """The header of a packet with pages, or with none; the context has ``page_size``.

    ``pages_alloc`` is the capacity, ``packet_num`` one count over all channels, which nobody checks.  ``name``
    and ``offsets`` (u64s) are kept with what is left over in them: ``block``, ``normal`` and ``zero`` say what counts.
    migration/multifd.c: multifd_send_fill_packet()
    """

    magic: MultifdMagic = wire(Only(MultifdMagic.MAGIC, Int32ub), default=MultifdMagic.MAGIC)
    version: MultifdVersion = wire(Only(MultifdVersion.VERSION, Int32ub), default=MultifdVersion.VERSION)
    flags: int = wire(Int32ub)
    pages_alloc: int = wire(Int32ub)
    normal_pages: int = wire(Int32ub)
    next_packet_size: int = wire(Int32ub)
    packet_num: int = wire(Int64ub)
    zero_pages: int = wire(Int32ub, default=0)
    unused: bytes = wire(Bytes(28), default=bytes(28))
    name: bytes = wire(Bytes(_NAME_BYTES))
    offsets: bytes = wire(Bytes(lambda this: 8 * page_capacity(this._params.page_size)))

    @property
    def is_sync(self) -> bool:
        """Does it close an epoch of its channel?"""
        return bool(self.flags & _SYNC)

    @property
    def compression(self) -> Compression:
        """How its pages travel.  Of a packet that has none it says nothing: 0 in 5.2, 7.2, and for SYNC alone."""
        return METHODS[self.flags & COMPRESSION_MASK]

    @property
    def block(self) -> str:
        """The name of its pages' block: what stands before the first NUL, 255 bytes at most, as QEMU reads it."""
        return _block_name(self.name)

    @property
    def normal(self) -> "array[int]":
        """Where in the block each page goes whose contents follow, in their order; in bytes."""
        return unpack_offsets(self.offsets[: 8 * self.normal_pages])

    @property
    def zero(self) -> "array[int]":
        """Where in the block zero pages go; in bytes."""
        return unpack_offsets(self.offsets[8 * self.normal_pages : 8 * (self.normal_pages + self.zero_pages)])

    @property
    def data_length(self) -> int:
        """How many bytes follow: what ``next_packet_size`` says, but none where no page has contents."""
        return self.next_packet_size if self.normal_pages else 0


@lru_cache(maxsize=256)
def _block_name(raw: bytes) -> str:
    return raw[: _NAME_BYTES - 1].partition(b"\0")[0].decode("utf-8", "surrogateescape")


def unpack_offsets(data: bytes) -> "array[int]":
    """The u64s of a table as an array: a packet has 128 of them, and they are no objects of their own."""
    offsets = array("Q", data)
    if sys.byteorder == "little":
        offsets.byteswap()
    return offsets


def pack_offsets(offsets: Iterable[int], *, page_size: int) -> bytes:
    """A whole table, for ``PageHeader.offsets``: behind these it is zero."""
    packed = array("Q", offsets)
    if sys.byteorder == "little":
        packed.byteswap()
    return packed.tobytes().ljust(8 * page_capacity(page_size), b"\0")


@dataclass(frozen=True)
class PagePacket:
    """Pages of one block; or none, where it is there for its SYNC.  ``page_size`` is the target's, in bytes."""

    header: PageHeader
    page_size: int

    @cached_property
    def runs(self) -> list[PageRun]:
        """Its pages, neighbours as one: normal pages first, then zero pages.

        ``PageRun.offset`` of normal pages counts from where the packet's contents begin (of what ``PageDecoder``
        gives, where they are compressed); of zero pages it is 0.
        """
        header = self.header
        middle = 8 * header.normal_pages
        end = middle + 8 * header.zero_pages
        runs = _runs(header.offsets[:middle], int(RamFlag.PAGE), self.page_size, self.page_size) if middle else []
        if end > middle:
            runs += _runs(header.offsets[middle:end], int(RamFlag.ZERO), self.page_size, 0)
        return runs


def _runs(offsets: bytes, flag: int, page_size: int, stride: int) -> list[PageRun]:
    count, first = len(offsets) // 8, int.from_bytes(offsets[:8])
    # Mostly, in the first pass, they are one run: as numbers of so many bytes that is seen at once.
    ones, steps = _ramp(count, page_size)
    if first + count * page_size < 1 << 64 and int.from_bytes(offsets) == first * ones + steps:
        return [PageRun(0, flag, first, count)]
    starts = unpack_offsets(offsets)
    differences = map(operator.sub, starts[1:], starts)
    cuts = [index for index, step in enumerate(differences, 1) if step != page_size]
    return [
        PageRun(one * stride, flag, starts[one], two - one) for one, two in zip((0, *cuts), (*cuts, count), strict=True)
    ]


@lru_cache(maxsize=1024)
def _ramp(count: int, page_size: int) -> tuple[int, int]:
    """So many u64s as one number: all 1; and each ``page_size`` more than the one before, the first 0."""
    table = struct.Struct(f">{count}Q")
    one, step = table.pack(*[1] * count), table.pack(*range(0, count * page_size, page_size))
    return int.from_bytes(one), int.from_bytes(step)


class DeviceStateHeader(Record):
    """Opens a packet of device state: which section of it is meant, and how many bytes follow.  Since 10.0.

    migration/multifd-device-state.c
    """

    magic: MultifdMagic = wire(Only(MultifdMagic.MAGIC, Int32ub), default=MultifdMagic.MAGIC)
    version: MultifdVersion = wire(Only(MultifdVersion.VERSION, Int32ub), default=MultifdVersion.VERSION)
    flags: int = wire(Int32ub, default=int(MultifdFlag.DEVICE_STATE))
    name: bytes = wire(Bytes(_NAME_BYTES))
    instance_id: int = wire(Int32ub)
    next_packet_size: int = wire(Int32ub)

    @property
    def idstr(self) -> str:
        """The section's name: what stands before the first NUL."""
        return _block_name(self.name)


class DeviceStatePacket(NamedTuple):
    """A piece of a device's state; pieces come in any order, over any channel.

    It may be long, so it is not copied: read from a stream, ``data`` is a view, which can't be hashed or pickled.
    """

    header: DeviceStateHeader
    data: bytes | memoryview


ChannelRecord: TypeAlias = InitialPacket | PagePacket | DeviceStatePacket


def encode_packet(record: ChannelRecord, data: bytes | memoryview = b"") -> bytes:
    """The bytes of a packet from its values; ``data`` are the contents of its pages, as they are or compressed.

    Raises ``StreamError`` where a value has no room, or where ``data`` is not as long as the header says.
    """
    match record:
        case InitialPacket():
            return record.build()
        case DeviceStatePacket(header=header, data=state):
            return _joined(header.build(), header.next_packet_size, state)
        case PagePacket(header=header, page_size=page_size):
            return _joined(header.build(page_size=page_size), header.data_length, data)


def _joined(head: bytes, expected: int, data: bytes | memoryview) -> bytes:
    if len(data) != expected:
        raise StreamError(f"the packet says {expected} bytes of data, {len(data)} are given")
    return b"".join((head, data))
