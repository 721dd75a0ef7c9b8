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
from qmigrate.format.ram import BlockList, Pages, RamFlag, RamRecord
from qmigrate.format.stream import ConfigurationHeader, Footer, SectionPart
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


def encode(
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
        case Record() | BlockList() | MappedBlock() | MappedBitmap() | Gap():
            return record.build()
        case Configuration():
            return _encode_configuration(record)
        case DeviceState():
            return encode_state(record.state)
        case Undecoded() | Trailing():
            return record.data
        case VmDescription():
            return record.text


@lru_cache(maxsize=1024)
def _built(record: SectionPart | Footer) -> bytes:
    """The same record is the same bytes.  A stream can have 100,000 empty parts."""
    return record.build()


@lru_cache(maxsize=16)
def _built_marker(record: RamRecord) -> bytes:
    return record.build(page_size=1 << 12)  # a marker's word is but its flag, whatever the page's size


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
    length = sum(count * pages.record_bytes(flag) for _, flag, _, count in pages.runs)
    length += 1 + len(name) if pages.named else 0
    if contents is None and not any(flag == RamFlag.PAGE for _, flag, _, _ in pages.runs):
        contents = bytes(length)
    if contents is None or len(contents) != length:
        given = 0 if contents is None else len(contents)
        raise StreamError(f"the runs take {length} bytes, {given} bytes of contents are given")
    out = bytearray(contents)
    try:
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
