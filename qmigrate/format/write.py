"""Records to bytes: the mirror of ``walk``.

Everything is encoded from typed values.  What stays as it is are page contents, which ``contents`` hands in,
and the bytes that ``walk`` could not decode.
"""

import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Final

from qmigrate.errors import StreamError
from qmigrate.format._record import Record
from qmigrate.format.command import Command, encode_command
from qmigrate.format.device import encode_state
from qmigrate.format.mapped_ram import Gap, MappedBitmap, MappedBlock, MappedPages, encode_mapped
from qmigrate.format.multifd import DeviceStatePacket, PagePacket, encode_packet, header_length
from qmigrate.format.ram import BlockList, Pages, RamFlag, RamRecord
from qmigrate.format.return_path import Message, encode_message
from qmigrate.format.stream import ConfigurationHeader, Footer, SectionPart
from qmigrate.format.stretch import Stretch, count_pages
from qmigrate.format.walk import (
    Configuration,
    DeviceState,
    Entry,
    RamPage,
    StreamRecord,
    Trailing,
    Undecoded,
    VmDescription,
)

__all__ = ["encode", "write"]


_PAGE: Final = int(RamFlag.PAGE)
_ZERO: Final = int(RamFlag.ZERO)
_CONTINUE: Final = int(RamFlag.CONTINUE)
_HEAD: Final = struct.Struct(">Q")
_ZERO_RECORD: Final = struct.Struct(">QB")


def write(entries: Iterable[Entry]) -> Iterator[bytes | bytearray]:
    """The bytes of each entry in turn: joined, they are the stream again.

    Page contents are taken from each entry's view.  Raises ``StreamError`` where a value has no room.
    """
    for entry in entries:
        yield encode(entry.record, contents=entry.view)


def encode(  # noqa: PLR0912 - one row a record
    record: StreamRecord, *, contents: bytes | memoryview | None = None, page_size: int = 4096
) -> bytes | bytearray:
    """The bytes of one record, from its values.

    ``contents`` is needed for ``Pages`` that are not all ZERO: bytes of such records, out of which the pages alone
    are taken.
    ``page_size`` is that of a ``RamRecord``'s page, in bytes.  Raises ``StreamError`` where a value has no room.
    """
    match record:
        case Pages():
            return _encode_pages(record, contents)
        case Command():
            return encode_command(record)
        case RamRecord():
            return _built_marker(record) if record.is_marker else record.build(page_size=page_size)
        case RamPage():
            return record.record.build(page_size=record.page_size)
        case SectionPart() | Footer():
            return _built(record)
        case MappedPages():
            return encode_mapped(record, contents)
        case PagePacket() | DeviceStatePacket():
            return _encode_packet(record, contents)
        case Message():
            return encode_message(record)
        case Record() | BlockList() | MappedBlock() | MappedBitmap() | Gap():
            return record.build()
        case Configuration():
            return _encode_configuration(record)
        case DeviceState():
            return encode_state(record.state)
        case Undecoded():
            return record.data
        case Trailing(data=data, zeros=zeros):
            return data + bytes(zeros)
        case VmDescription():
            return record.text


@lru_cache(maxsize=1024)
def _built(record: SectionPart | Footer) -> bytes:
    """The same record is the same bytes.  A stream can have 100,000 empty parts."""
    return record.build()


@lru_cache(maxsize=16)
def _built_marker(record: RamRecord) -> bytes:
    return record.build(page_size=1 << 12)  # a marker's word is but its flag, whatever the page's size


def _encode_packet(record: PagePacket | DeviceStatePacket, contents: bytes | memoryview | None) -> bytes:
    """Of pages the data out of ``contents``, which begin with a header as long as theirs."""
    if isinstance(record, DeviceStatePacket) or contents is None:
        return encode_packet(record)
    return encode_packet(record, contents[header_length(record.page_size) :])


def _encode_configuration(record: Configuration) -> bytes:
    name = record.machine_type.encode("utf-8", "surrogateescape")
    parts = [ConfigurationHeader(length=len(name)).build(), name]
    for subsection in record.subsections:
        parts += [subsection.header.build(), subsection.body.build()]
    return b"".join(parts)


def _encode_pages(pages: Pages, contents: bytes | memoryview | None) -> bytearray:
    """Each record's head from its run; the page itself out of ``contents``."""
    name = pages.block.encode("utf-8", "surrogateescape")
    if len(name) > 0xFF:
        raise StreamError(f"a block's name holds at most 255 bytes, {pages.block!r} has {len(name)}")
    normal, zero = count_pages(pages.runs)
    length = normal * pages.record_bytes(_PAGE) + zero * pages.record_bytes(_ZERO)
    length += 1 + len(name) if pages.named else 0
    if contents is None and not normal:
        contents = bytes(length)
    if contents is None or len(contents) != length:
        given = 0 if contents is None else len(contents)
        raise StreamError(f"the runs take {length} bytes, {given} bytes of contents are given")
    out = bytearray(contents)
    try:
        if isinstance(pages.runs, Stretch) and not pages.named and not pages.fill:
            _encode_stretch(out, pages.runs)
        else:
            _encode_runs(out, pages, name)
    except (struct.error, ValueError) as exc:  # ValueError: a fill that is no byte
        raise StreamError(f"the runs can't be written: {exc}") from exc
    return out


def _encode_runs(out: bytearray, pages: Pages, name: bytes) -> None:
    at = 0
    for index, (_, flag, start, count) in enumerate(pages.runs):
        if start % pages.page_size:
            raise StreamError(f"the offset {start:#x} is not a multiple of the page's size")
        if not pages.named or index:
            at = _encode_run(out, at, start, flag, count, pages)
            continue
        head = struct.pack(">QB", start | flag, len(name)) + name
        out[at : at + len(head)] = head
        at += len(head)
        if flag == _ZERO:
            out[at] = pages.fill
        at += pages.record_bytes(flag) - 8
        at = _encode_run(out, at, start + pages.page_size, flag, count - 1, pages)


def _encode_stretch(out: bytearray, stretch: Stretch) -> None:
    pack, at = _HEAD.pack_into, 0
    normal, mask, stride = _PAGE | _CONTINUE, stretch.page_size - 1, _HEAD.size + stretch.page_size
    for number in stretch.numbers:
        pack(out, at, number)
        if number & mask == normal:
            at += stride
        else:
            out[at + 8] = 0
            at += 9


def _encode_run(out: bytearray, at: int, start: int, flag: int, count: int, pages: Pages) -> int:
    page_size, word = pages.page_size, start | flag | _CONTINUE
    end = word + count * page_size
    if flag == _ZERO:
        pack, fill = _ZERO_RECORD.pack_into, pages.fill
        for head in range(word, end, page_size):
            pack(out, at, head, fill)
            at += _ZERO_RECORD.size
        return at
    pack, stride = _HEAD.pack_into, _HEAD.size + page_size
    for head in range(word, end, page_size):
        pack(out, at, head)
        at += stride
    return at
