"""Live sections other than ``ram``, and the two of s390 that no description divides.

A reader consumes the data of exactly one section: from behind the section header up to the footer, or to
whatever follows where there are no footers.  It yields None while bytes are missing.  Long payloads come as
pieces behind the record that announces them, so that memory grows with what was read; all records of a
section, encoded one after the other, are its bytes again.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import IO, Any, Final, NamedTuple, TypeVar

import construct
from construct import GreedyBytes, Int8ub, Int16ub, Int32ub, Int64ub

from qmigrate.errors import StreamError, TruncatedError
from qmigrate.format._record import (
    Adapter,
    AnyConstruct,
    CountedString,
    Known,
    Nested,
    Only,
    Record,
    When,
    refuse,
    wire,
)
from qmigrate.format.feed import Feed
from qmigrate.format.stream import Footer, SectionType

__all__ = [
    "READERS",
    "BitmapBits",
    "BitmapFlag",
    "BitmapStart",
    "BitmapStartFlag",
    "BlockFlag",
    "BlockRecord",
    "DirtyBitmapRecord",
    "Entries",
    "HtabChunk",
    "HtabHeader",
    "LiveEntry",
    "LiveState",
    "Opaque",
    "Payload",
    "Reader",
    "StorageAttributes",
    "StorageAttributesFlag",
    "StorageAttributesMark",
    "StorageKeys",
    "StorageKeysFlag",
    "StorageKeysMark",
    "TodClock",
    "TodPresence",
    "TodValue",
    "VfioData",
    "VfioEnd",
    "VfioMark",
    "VfioTag",
    "encode",
    "reader_of",
]


class LiveEntry(NamedTuple):
    """A record of a live section, where it begins in the stream, and how many bytes it takes."""

    offset: int
    length: int
    record: Record


@dataclass
class LiveState:
    """What one section remembers from part to part; each section of a stream has its own.

    ``section_id`` and ``footers`` (None: not known yet) are the caller's to set: they help to find the end
    of what has no length.  The names are those of the record that was read last, whether it repeated them or
    not; ``htab_shift`` is None before START, and for a guest with a radix tree.
    """

    section_id: int | None = None
    footers: bool | None = None
    node_alias: str | None = None
    bitmap_alias: str | None = None
    htab_shift: int | None = None


Entries = Generator[LiveEntry | None]
Reader = Callable[[Feed, SectionType, LiveState, Sequence[str]], Entries]
R = TypeVar("R", bound=Record)


# -- what all of them share

PIECE: Final = 1 << 20
_OPAQUE_PIECE: Final = 1 << 16  # stays in the feed's window until its end is known


class Payload(Record):
    """Bytes that the record before announced, in pieces of at most 1 MiB."""

    data: bytes = wire(GreedyBytes)


class Opaque(Payload):
    """Bytes that have no length of their own: their end was searched for."""


class _Checked(Adapter):
    """A value that stays as it is, once ``check`` has not refused it."""

    def __init__(self, check: Callable[[Any], object], subcon: AnyConstruct) -> None:
        super().__init__(subcon)
        self.check = check

    def _decode(self, obj: Any, context: Any, path: str) -> Any:
        self.check(obj)
        return obj

    def _encode(self, obj: Any, context: Any, path: str) -> Any:
        return obj


def encode(record: Record) -> bytes:
    """The bytes of any record of this module."""
    return record.build()


def _one(feed: Feed, cls: type[R], trail: Sequence[str]) -> Generator[LiveEntry | None, None, R]:
    """Consume one record, yield it as an entry, and give it to the reader."""
    record, length = yield from feed.record(cls, trail)
    at = feed.offset
    feed.skip(length)
    yield LiveEntry(at, length, record)
    return record


def _payload(feed: Feed, count: int, trail: Sequence[str]) -> Entries:
    while count:
        at = feed.offset
        data = yield from feed.take(min(count, PIECE), trail)
        yield LiveEntry(at, len(data), Payload(data=data))
        count -= len(data)


# -- dirty-bitmap


class BitmapFlag(IntFlag):
    """Opens each record.  migration/block-dirty-bitmap.c: DIRTY_BITMAP_MIG_FLAG_*"""

    EOS = 0x01
    ZEROES = 0x02
    BITMAP_NAME = 0x04
    DEVICE_NAME = 0x08
    START = 0x10
    COMPLETE = 0x20
    BITS = 0x40
    EXTRA = 0x80  # would announce wider flags; no release sends it


class BitmapStartFlag(IntFlag):
    """migration/block-dirty-bitmap.c: DIRTY_BITMAP_MIG_START_FLAG_*"""

    ENABLED = 0x01
    PERSISTENT = 0x02
    AUTOLOAD = 0x04  # of old, ignored


_LONGEST_BITS: Final = 10240  # ten times what a writer puts into one record


def _check_bitmap_flags(flags: int) -> None:
    if flags & BitmapFlag.EXTRA:
        raise refuse(f"found {flags:#x}, with EXTRA {BitmapFlag.EXTRA:#x}, which no QEMU sends")


def _check_start_flags(flags: int) -> None:
    unknown = flags & ~0x07
    if unknown:
        raise refuse(f"unknown flags {unknown:#x}, expected ENABLED 0x1, PERSISTENT 0x2, AUTOLOAD 0x4")


def _check_alias(name: str) -> None:
    if not name:  # to QEMU that is a name it could not read
        raise refuse("the name is empty")


class _Bits(AnyConstruct):
    """A u64 that counts bytes, then these bytes; a size that QEMU refuses is not read."""

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> bytes:
        size = int.from_bytes(construct.stream_read(stream, 8, path))
        if size > _LONGEST_BITS:
            raise refuse(f"size is {size}, expected at most {_LONGEST_BITS}")
        return bytes(construct.stream_read(stream, size, path))

    def _build(self, obj: bytes, stream: IO[bytes], context: Any, path: str) -> Any:
        if len(obj) > _LONGEST_BITS:
            raise refuse(f"size is {len(obj)}, at most {_LONGEST_BITS} can be sent")
        stream.write(len(obj).to_bytes(8) + obj)
        return obj

    def _sizeof(self, context: Any, path: str) -> int:
        raise construct.SizeofError


class BitmapStart(Record):
    """A bitmap is announced.  ``granularity`` in bytes: 32 bits wide, whatever QEMU's comment says."""

    granularity: int = wire(Int32ub)
    flags: int = wire(_Checked(_check_start_flags, Int8ub))


class BitmapBits(Record):
    """Which part of the bitmap's disk, in sectors of 512 bytes."""

    first_sector: int = wire(Int64ub)
    sector_count: int = wire(Int32ub)


def _bits_act(this: Any) -> bool:
    """Of START, COMPLETE and BITS the first acts, and has its payload."""
    acting = this.flags & (BitmapFlag.START | BitmapFlag.COMPLETE | BitmapFlag.BITS)
    return bool(acting == BitmapFlag.BITS)


class DirtyBitmapRecord(Record):
    """One record: names where they change, then what the flags say.

    ``words`` are little-endian u64 words, bit k for the k-th granule from ``bits.first_sector`` on; None with
    ZEROES, where all are clear.
    migration/block-dirty-bitmap.c: send_bitmap_header(), dirty_bitmap_load_header()
    """

    flags: int = wire(_Checked(_check_bitmap_flags, Int8ub))
    node_alias: str | None = wire(
        When(lambda this: this.flags & BitmapFlag.DEVICE_NAME, _Checked(_check_alias, CountedString)),
        default=None,
    )
    bitmap_alias: str | None = wire(
        When(lambda this: this.flags & BitmapFlag.BITMAP_NAME, _Checked(_check_alias, CountedString)),
        default=None,
    )
    start: BitmapStart | None = wire(
        When(lambda this: this.flags & BitmapFlag.START, Nested(BitmapStart)), default=None
    )
    bits: BitmapBits | None = wire(When(_bits_act, Nested(BitmapBits)), default=None)
    words: bytes | None = wire(
        When(lambda this: _bits_act(this) and not this.flags & BitmapFlag.ZEROES, _Bits()), default=None
    )


def read_dirty_bitmap(feed: Feed, _kind: SectionType, state: LiveState, trail: Sequence[str]) -> Entries:
    """Records until one says EOS.  A name that never came cancels the bitmaps in QEMU, not the migration.

    migration/block-dirty-bitmap.c: dirty_bitmap_load()
    """
    while True:
        record, length = yield from feed.record(DirtyBitmapRecord, trail)
        at = feed.offset
        feed.skip(length)
        state.node_alias = record.node_alias or state.node_alias
        state.bitmap_alias = record.bitmap_alias or state.bitmap_alias
        yield LiveEntry(at, length, record)
        if record.flags & BitmapFlag.EOS:
            return


# -- vfio

_VFIO: Final = 0xFFFFFFFFEF100000
# What may stand behind a section where there are no footers.
_NOT_AT_TOP: Final = {SectionType.SUBSECTION, SectionType.VMDESCRIPTION, SectionType.CONFIGURATION}
_AFTER_SECTION: Final = frozenset(SectionType) - _NOT_AT_TOP - {SectionType.FOOTER}
_FOOTER_BYTES: Final = 5


class VfioTag(IntEnum):
    """hw/vfio/migration.c: VFIO_MIG_FLAG_*.  5 came with 8.1, 6 with 10.1."""

    END_OF_STATE = _VFIO + 1
    DEV_CONFIG_STATE = _VFIO + 2
    DEV_SETUP_STATE = _VFIO + 3
    DEV_DATA_STATE = _VFIO + 4
    DEV_INIT_DATA_SENT = _VFIO + 5
    DEV_CONFIG_LOAD_READY = _VFIO + 6


_END_OF_STATE: Final = VfioTag.END_OF_STATE.to_bytes(8)


class VfioMark(Record):
    """A tag alone."""

    tag: VfioTag = wire(Known(VfioTag, Int64ub))


class VfioEnd(Record):
    """The one tag that may stand here."""

    tag: VfioTag = wire(Only(VfioTag.END_OF_STATE, Int64ub), default=VfioTag.END_OF_STATE)


class VfioData(Record):
    """``length`` bytes of the device's own follow."""

    tag: VfioTag = wire(Only(VfioTag.DEV_DATA_STATE, Int64ub), default=VfioTag.DEV_DATA_STATE)
    length: int = wire(Int64ub)


def read_vfio(feed: Feed, kind: SectionType, state: LiveState, trail: Sequence[str]) -> Entries:
    """Tags, with data or an opaque configuration behind some.

    hw/vfio/migration.c: vfio_load_state()
    """
    while True:
        mark, _ = yield from feed.record(VfioMark, trail)
        inside = (*trail, mark.tag.name)
        match mark.tag:
            case VfioTag.DEV_DATA_STATE:
                data = yield from _one(feed, VfioData, inside)
                yield from _payload(feed, data.length, inside)
            case VfioTag.DEV_SETUP_STATE:
                yield from _one(feed, VfioMark, trail)
                yield from _one(feed, VfioEnd, inside)
                return
            case VfioTag.DEV_CONFIG_STATE:
                yield from _one(feed, VfioMark, trail)
                yield from _vfio_configuration(feed, kind, state, inside)
                yield from _one(feed, VfioEnd, inside)
                if kind is not SectionType.END:  # 5.2 put it into END, with the device's data behind it
                    return
            case VfioTag.END_OF_STATE | VfioTag.DEV_INIT_DATA_SENT | VfioTag.DEV_CONFIG_LOAD_READY:
                yield from _one(feed, VfioMark, trail)
                return


def _vfio_configuration(feed: Feed, kind: SectionType, state: LiveState, trail: Sequence[str]) -> Entries:
    """Opaque bytes up to the nearest END_OF_STATE that something plausible follows.

    They are the vmstate VFIOPCIDevice without a header: nothing says how long it is.
    hw/vfio/pci.c: vfio_pci_save_config()
    """
    searched = 0
    while True:
        searched, closes = _find_end(feed, searched, kind, state)
        if closes:
            yield from _opaque(feed, searched)
            return
        if searched > _OPAQUE_PIECE:
            yield from _opaque(feed, _OPAQUE_PIECE)
            searched -= _OPAQUE_PIECE
        elif feed.ended:
            raise TruncatedError(
                "the stream ends here, before END_OF_STATE", offset=feed.offset + len(feed), trail=trail
            )
        else:
            yield from feed.more()


def _find_end(feed: Feed, searched: int, kind: SectionType, state: LiveState) -> tuple[int, bool]:
    """Where the end stands, and True; or before which position it can't stand, and False."""
    buffer, begin, end = feed.buffer
    at = buffer.find(_END_OF_STATE, begin + searched, end)
    while at >= 0:
        found = at - begin
        if found > _OPAQUE_PIECE:  # a whole piece comes first, however the bytes came in
            return found, False
        closes = _may_follow_vfio(bytes(buffer[at + 8 : min(at + 16, end)]), kind, state)
        if closes is not False:
            # None: the bytes still missing decide; where no more come, those that are there must do.
            return found, closes is True or feed.ended
        at = buffer.find(_END_OF_STATE, at + 1, end)
    return max(searched, end - begin - len(_END_OF_STATE) + 1), False


def _may_follow_vfio(behind: bytes, kind: SectionType, state: LiveState) -> bool | None:
    """Whether this can stand behind a configuration; None where it is too short to tell."""
    if kind is SectionType.END:
        tags = [tag.to_bytes(8) for tag in VfioTag]
        return behind in tags or (None if any(tag.startswith(behind) for tag in tags) else False)
    if not behind:
        return None
    if behind[0] != SectionType.FOOTER:
        return state.footers is not True and behind[0] in _AFTER_SECTION
    if state.footers is False:
        return False
    if len(behind) < _FOOTER_BYTES:
        return None
    return state.section_id in (None, Footer.read_prefix(behind)[0].section_id)


def _opaque(feed: Feed, length: int) -> Entries:
    if length:
        at = feed.offset
        data = bytes(feed.view(length))
        feed.skip(length)
        yield LiveEntry(at, length, Opaque(data=data))


# -- spapr/htab

_NO_TABLE: Final = 0xFFFFFFFF
_ENTRY_BYTES: Final = 16
_SHIFTS: Final = range(18, 47)  # hw/ppc/spapr.c: spapr_hpt_shift_for_ramsize() gives no other


class HtabHeader(Record):
    """Opens each part.  START: the table has 2**word bytes; PART, END: 0.  All: 0xffffffff, no table."""

    word: int = wire(Int32ub)


class HtabChunk(Record):
    """``valid`` entries of 16 bytes follow, then, unsent, ``invalid`` ones; all 0: the part ends.

    hw/ppc/spapr.c: htab_save_chunk()
    """

    index: int = wire(Int32ub)
    valid: int = wire(Int16ub)
    invalid: int = wire(Int16ub)


def read_htab(feed: Feed, kind: SectionType, state: LiveState, trail: Sequence[str]) -> Entries:
    """The size of a pseries guest's hash page table, then chunks of it.

    hw/ppc/spapr.c: htab_load()
    """
    header, _ = yield from feed.record(HtabHeader, trail)
    _check_htab_header(header.word, kind, state, feed.offset, trail)
    if kind is SectionType.START:
        state.htab_shift = None if header.word == _NO_TABLE else header.word
    yield from _one(feed, HtabHeader, trail)
    if kind is SectionType.START or header.word == _NO_TABLE:
        return
    while True:
        chunk, _ = yield from feed.record(HtabChunk, trail)
        _check_htab_chunk(chunk, state, feed.offset, trail)
        yield from _one(feed, HtabChunk, trail)
        if not (chunk.index or chunk.valid or chunk.invalid):
            return
        yield from _payload(feed, chunk.valid * _ENTRY_BYTES, trail)


def _check_htab_header(word: int, kind: SectionType, state: LiveState, offset: int, trail: Sequence[str]) -> None:
    if word == _NO_TABLE:
        return
    if kind is SectionType.START:
        good, expected = word in _SHIFTS, f"a shift from {_SHIFTS[0]} to {_SHIFTS[-1]}"
    else:
        good, expected = word == 0, "0x0"
    if not good:
        raise StreamError(f"found {word:#x}, expected {expected}, or {_NO_TABLE:#x}", offset=offset, trail=trail)
    if kind is not SectionType.START and state.htab_shift is None:
        raise StreamError("chunks come, and no START gave the table's size", offset=offset, trail=trail)


def _check_htab_chunk(chunk: HtabChunk, state: LiveState, offset: int, trail: Sequence[str]) -> None:
    entries = (1 << (state.htab_shift or 0)) // _ENTRY_BYTES
    end = chunk.index + chunk.valid + chunk.invalid
    if end > entries:
        raise StreamError(f"a chunk ends at entry {end:#x} of {entries:#x}", offset=offset, trail=trail)


# -- block

_BLOCK_BYTES: Final = 1 << 20
_SECTOR_BITS: Final = 9


class BlockFlag(IntFlag):
    """In the low bits of each word.  migration/block.c: BLK_MIG_FLAG_*"""

    DEVICE_BLOCK = 0x01
    EOS = 0x02
    PROGRESS = 0x04
    ZERO_BLOCK = 0x08


def _check_block_word(word: int) -> None:
    flags = word & ((1 << _SECTOR_BITS) - 1)
    unknown = flags & ~0x0F
    if unknown:
        raise refuse(f"unknown flags {unknown:#x}")
    if not flags & 0x07:
        raise refuse(f"found the flags {flags:#x}, expected one of DEVICE_BLOCK 0x1, EOS 0x2, PROGRESS 0x4")


class BlockRecord(Record):
    """A chunk of a disk, or a mark.  A chunk has 1 MiB, also where it ends behind the disk's end.

    ``block`` migration was deprecated in 8.2 and left in 9.1.
    migration/block.c: blk_send(), block_load()
    """

    word: int = wire(_Checked(_check_block_word, Int64ub))
    device: str | None = wire(When(lambda this: this.word & BlockFlag.DEVICE_BLOCK, CountedString), default=None)

    @property
    def flags(self) -> int:
        return self.word & ((1 << _SECTOR_BITS) - 1)

    @property
    def sector(self) -> int:
        """Of 512 bytes; with PROGRESS it is the percentage."""
        return self.word >> _SECTOR_BITS


def read_block(feed: Feed, _kind: SectionType, _state: LiveState, trail: Sequence[str]) -> Entries:
    """Chunks and progress until a word says EOS.

    migration/block.c: block_load()
    """
    while True:
        record = yield from _one(feed, BlockRecord, trail)
        if record.flags & BlockFlag.DEVICE_BLOCK and not record.flags & BlockFlag.ZERO_BLOCK:
            yield from _payload(feed, _BLOCK_BYTES, trail)
        if record.flags & BlockFlag.EOS:
            return


# -- s390

_FRAME_FLAGS: Final = 0xFFF  # below a guest frame's address


class StorageAttributesFlag(IntEnum):
    """hw/s390x/s390-stattrib.c: STATTR_FLAG_*"""

    EOS = 1
    MORE = 2
    ERROR = 4
    DONE = 8


class StorageKeysFlag(IntEnum):
    """hw/s390x/s390-skeys.c: S390_SKEYS_SAVE_FLAG_*"""

    EOS = 1
    SKEYS = 2
    ERROR = 4


def _frame_word(enum: type[IntEnum]) -> AnyConstruct:
    """A guest frame's address with a flag below: one of ``enum``, alone."""
    flag = Known(enum, Int64ub)
    return _Checked(lambda word: flag._decode(word & _FRAME_FLAGS, None, ""), Int64ub)


class StorageAttributesMark(Record):
    """Where attributes begin, or a mark.  DONE: the destination applies what came."""

    word: int = wire(_frame_word(StorageAttributesFlag))


class StorageAttributes(StorageAttributesMark):
    """``count`` bytes follow, one for each guest frame."""

    count: int = wire(Int64ub)


class StorageKeysMark(Record):
    """Where keys begin, or the end: EOS, or ERROR where the source could not read them all."""

    word: int = wire(_frame_word(StorageKeysFlag))


class StorageKeys(StorageKeysMark):
    """``count`` keys follow, one byte for each guest frame."""

    count: int = wire(Int64ub)


def read_storage_attributes(feed: Feed, _kind: SectionType, _state: LiveState, trail: Sequence[str]) -> Entries:
    """hw/s390x/s390-stattrib.c: cmma_load()"""
    while True:
        mark, _ = yield from feed.record(StorageAttributesMark, trail)
        match mark.word & _FRAME_FLAGS:
            case StorageAttributesFlag.MORE:
                attributes = yield from _one(feed, StorageAttributes, trail)
                yield from _payload(feed, attributes.count, trail)
            case StorageAttributesFlag.ERROR:
                raise StreamError("ERROR: the source could not read all attributes", offset=feed.offset, trail=trail)
            case flag:
                yield from _one(feed, StorageAttributesMark, trail)
                if flag == StorageAttributesFlag.EOS:
                    return


def read_storage_keys(feed: Feed, _kind: SectionType, _state: LiveState, trail: Sequence[str]) -> Entries:
    """ERROR ends it as EOS does: the bytes are good, though a destination fails.

    hw/s390x/s390-skeys.c: s390_storage_keys_load()
    """
    while True:
        mark, _ = yield from feed.record(StorageKeysMark, trail)
        if mark.word & _FRAME_FLAGS != StorageKeysFlag.SKEYS:
            yield from _one(feed, StorageKeysMark, trail)
            return
        keys = yield from _one(feed, StorageKeys, trail)
        yield from _payload(feed, keys.count, trail)


class TodPresence(IntEnum):
    """hw/s390x/tod.c: S390_TOD_CLOCK_VALUE_*"""

    MISSING = 0
    PRESENT = 1


class TodValue(Record):
    """The guest's clock: 72 bits."""

    high: int = wire(Int8ub)
    low: int = wire(Int64ub)


class TodClock(Record):
    """The time of day, unless the source could not read it.  hw/s390x/tod.c: s390_tod_save()"""

    presence: TodPresence = wire(Known(TodPresence, Int8ub))
    value: TodValue | None = wire(When(lambda this: this.presence, Nested(TodValue)), default=None)


def read_tod_clock(feed: Feed, _kind: SectionType, _state: LiveState, trail: Sequence[str]) -> Entries:
    """hw/s390x/tod.c: s390_tod_load()"""
    yield from _one(feed, TodClock, trail)


# -- which section is whose

READERS: Final[Mapping[str, Reader]] = {
    "block": read_block,
    "dirty-bitmap": read_dirty_bitmap,
    "s390-skeys": read_storage_keys,
    "s390-storage_attributes": read_storage_attributes,
    "spapr/htab": read_htab,
    "todclock": read_tod_clock,
    "vfio": read_vfio,
}


def reader_of(idstr: str) -> Reader | None:
    """Who reads the section of this name; vfio's carries the path of its device: ``0000:00:02.0/vfio``."""
    return READERS.get("vfio" if idstr.endswith("/vfio") else idstr)
