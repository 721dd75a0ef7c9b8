"""An index that is kept: a saved guest as ``read_saved`` found it, in a file of its own.

It is for its input files as they were, in their order: the device, inode, size and times of each.  It is no more than a
hint, for what is served is compared with the inputs (``placed``).  A file that is not what was written here, whole, of
this user, is as if there were none.

In the file: a header, the inputs, the pieces that go out verbatim, the blocks, the spans of these in which pages may
have come (first page and end), eight bytes for each page there, and where spilled pages are kept with it four for each
of these: its CRC-32, which is compared when it is served.  All that follows the header is under its checksum, as is the
header itself.
"""

import os
import sys
import zlib
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Final, NamedTuple, Self

from construct import Bytes, Int8ub, Int32ub, Int64sb, Int64ub

from qmigrate.capture.kind import ENTRY_BYTES
from qmigrate.capture.placed import PlacedPages, lazy_entries
from qmigrate.capture.places import Input
from qmigrate.capture.saved_guest import SavedGuest
from qmigrate.errors import QmigrateError, StreamError
from qmigrate.format._record import CountedString, Record, wire
from qmigrate.format.ram import RamBlock

__all__ = ["KeptError", "KeptHeader", "Stamp", "read_header", "read_kept", "write_kept"]

_MAGIC: Final = b"\x89QIDX\r\n\x1a"
_VERSION: Final = 4  # 3 has an entry for each page that a block claims; 2 lacks sections that could not be told apart
_SPAN_BYTES: Final = 16
_CHECK_BYTES: Final = 4
_AT_ONCE: Final = 1 << 30
_ORDERS: Final = {"little": 1, "big": 2}
_RAN: Final[dict[bool | None, int]] = {None: 0, False: 1, True: 2}
_PARTS: Final = ("opening", "before", "behind", "devices", "description")


class KeptError(QmigrateError):
    """This is no index of that file."""


class KeptHeader(Record):
    """What follows; lengths in bytes, ``inputs`` and ``blocks`` are counts.

    ``order`` is that of the entries' bytes, 1: the lowest first.  ``was_running``: 0 unknown, 1 no, 2 yes.
    ``spilled``: how much of the pages stands in the spill file that goes with it, 0 where there is none.
    ``checks``: of how many of these pages there is a checksum, of all or of none; ``checks_checksum`` is that of all.
    """

    magic: bytes = wire(Bytes(len(_MAGIC)), default=_MAGIC)
    version: int = wire(Int32ub, default=_VERSION)
    order: int = wire(Int8ub)
    inputs: int = wire(Int32ub)
    page_size: int = wire(Int32ub)
    section_id: int = wire(Int32ub)
    footers: int = wire(Int8ub)
    was_running: int = wire(Int8ub)
    has_balloon: int = wire(Int8ub)
    has_machine_type: int = wire(Int8ub)
    absent: int = wire(Int64ub)
    spilled: int = wire(Int64ub)
    machine_type: bytes = wire(Bytes(256))
    opening: int = wire(Int64ub)
    before: int = wire(Int64ub)
    behind: int = wire(Int64ub)
    devices: int = wire(Int64ub)
    description: int = wire(Int64ub)
    blocks: int = wire(Int32ub)
    checks: int = wire(Int64ub)
    checks_checksum: int = wire(Int32ub)
    body: int = wire(Int64ub)
    body_checksum: int = wire(Int32ub)


class KeptChecksum(Record):
    """Of the header before it."""

    checksum: int = wire(Int32ub)


class KeptInput(Record):
    """A file as it was.  ``has_pages``: in which some stand as they are."""

    device: int = wire(Int64ub)
    inode: int = wire(Int64ub)
    length: int = wire(Int64ub)
    mtime_ns: int = wire(Int64sb)
    ctime_ns: int = wire(Int64sb)
    has_pages: int = wire(Int8ub)


class KeptBlock(Record):
    """A block.  Behind all of them follow their spans, then their entries, in their order; elsewhere all is absent."""

    name: str = wire(CountedString)
    used_length: int = wire(Int64ub)
    page_count: int = wire(Int64ub)
    spans: int = wire(Int64ub)


class Stamp(NamedTuple):
    """A file as it was; times in nanoseconds."""

    device: int
    inode: int
    length: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> Self:
        """Of an open file.  Raises ``OSError``."""
        return cls.of_status(os.fstat(descriptor))

    @classmethod
    def of_status(cls, status: os.stat_result) -> Self:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


# -- one of them


def write_kept(
    saved: SavedGuest, stamps: Sequence[Stamp], descriptor: int, *, spilled: int = 0, checks: "array[int] | None" = None
) -> None:
    """Into this file, from its start; ``stamps`` are of the inputs, ``checks`` the CRC-32 of each spilled page.

    Raises ``OSError``, ``StreamError`` where a value has no room.
    """
    inputs = [
        KeptInput(**stamp._asdict(), has_pages=each is not None).build()
        for stamp, each in zip(stamps, saved.index.inputs, strict=True)
    ]
    blocks: list[bytes] = []
    spans = array("Q")
    entries: list[memoryview] = []
    for block in saved.blocks:
        places, noted = saved.index.entries(block.name), saved.index.noted(block.name)
        kept = KeptBlock(name=block.name, used_length=block.used_length, page_count=len(places), spans=len(noted))
        blocks.append(kept.build())
        spans.extend(chain.from_iterable(noted))
        entries += (places[first:end].cast("B") for first, end in noted)
    parts = [getattr(saved, part) for part in _PARTS]
    body: list[bytes | memoryview] = [*inputs, *parts, *blocks, spans.tobytes(), *entries]
    checked = b"" if checks is None else checks.tobytes()
    body.append(checked)
    checksum = 0
    for each in body:
        checksum = zlib.crc32(each, checksum)
    machine_type = (saved.machine_type or "").encode("utf-8", "surrogateescape")
    header = KeptHeader(
        inputs=len(inputs),
        opening=len(saved.opening),
        before=len(saved.before),
        behind=len(saved.behind),
        devices=len(saved.devices),
        description=len(saved.description),
        order=_ORDERS[sys.byteorder],
        page_size=saved.page_size,
        section_id=saved.section_id,
        footers=saved.footers,
        was_running=_RAN[saved.was_running],
        has_balloon=saved.has_balloon,
        has_machine_type=saved.machine_type is not None,
        absent=saved.absent,
        spilled=spilled,
        machine_type=machine_type.ljust(256, b"\0"),
        blocks=len(blocks),
        checks=len(checked) // _CHECK_BYTES,
        checks_checksum=zlib.crc32(checked),
        body=sum(map(len, body)),
        body_checksum=checksum,
    ).build()
    at = 0
    for piece in (header, KeptChecksum(checksum=zlib.crc32(header)).build(), *body):
        at = _write_all(descriptor, memoryview(piece), at)


def read_kept(
    descriptor: int,
    stamps: Sequence[Stamp],
    files: Sequence[int],
    *,
    spill: int | None = None,
    forget: Callable[[], bool] | None = None,
) -> SavedGuest:
    """The saved guest in ``files``, of which this is the index; ``files`` and ``spill`` stay open.  ``forget``: see
    ``PlacedPages``.

    Raises ``KeptError`` where it is none of those files as these ``stamps`` have them, ``OSError``.
    """
    header = read_header(descriptor)
    length, prefix = os.fstat(descriptor).st_size, _prefix_bytes()
    if header.body != length - prefix:
        raise KeptError(f"it has {length} bytes, expected {header.body + prefix}")
    if header.spilled and spill is None:
        raise KeptError("what it needs besides is not there")
    body = memoryview(bytearray(header.body))
    at = 0
    while at < len(body):
        count = os.preadv(descriptor, [body[at : at + _AT_ONCE]], prefix + at)
        if not count:
            raise KeptError("it was cut while it was read")
        at += count
    if zlib.crc32(body) != header.body_checksum:
        raise KeptError("its checksum is another")
    inputs, used = _inputs(header, body, stamps, files)
    return _saved(header, body[used:], inputs, spill, forget)


def _prefix_bytes() -> int:
    assert KeptHeader.size is not None
    assert KeptChecksum.size is not None
    return KeptHeader.size + KeptChecksum.size


def read_header(descriptor: int) -> KeptHeader:
    """Of this file.  Raises ``KeptError`` where it has none that was written here, ``OSError``."""
    head = os.pread(descriptor, _prefix_bytes(), 0)
    if len(head) != _prefix_bytes() or not head.startswith(_MAGIC):
        raise KeptError("it is no index")
    try:
        header, used = KeptHeader.read_prefix(head)
        checksum = KeptChecksum.read(head[used:])
    except StreamError as exc:
        raise KeptError(str(exc)) from exc
    if checksum.checksum != zlib.crc32(head[:used]):
        raise KeptError("the checksum of its header is another")
    if header.version != _VERSION or header.order != _ORDERS[sys.byteorder]:
        raise KeptError(f"it has version {header.version}.{header.order}, expected {_VERSION}.{_ORDERS[sys.byteorder]}")
    return header


def _inputs(
    header: KeptHeader, body: memoryview, stamps: Sequence[Stamp], files: Sequence[int]
) -> tuple[list[Input | None], int]:
    """Those that pages stand in, and where what follows begins."""
    if header.inputs != len(stamps):
        raise KeptError(f"it is of {header.inputs} files, expected {len(stamps)}")
    inputs: list[Input | None] = []
    at = 0
    for stamp, file in zip(stamps, files, strict=True):
        try:
            kept, used = KeptInput.read_prefix(body[at : at + 64])
        except StreamError as exc:
            raise KeptError(str(exc)) from exc
        at += used
        if Stamp(*(getattr(kept, name) for name in Stamp._fields)) != stamp:
            raise KeptError("the file was changed since")
        inputs.append(Input(file, stamp.length, stamp.mtime_ns) if kept.has_pages else None)
    return inputs, at


def _saved(
    header: KeptHeader,
    body: memoryview,
    inputs: list[Input | None],
    spill: int | None,
    forget: Callable[[], bool] | None,
) -> SavedGuest:
    parts, at = [], 0
    for name in _PARTS:
        length = getattr(header, name)
        parts.append(bytes(body[at : at + length]))
        at += length
    opening, before, behind, devices, description = parts
    listed = []
    for _ in range(header.blocks):
        try:
            # A name has 255 bytes at most: what is behind is not copied for each.
            block, used = KeptBlock.read_prefix(body[at : at + 300])
        except StreamError as exc:
            raise KeptError(str(exc)) from exc
        listed.append(block)
        at += used
    spans, used = _spans(listed, body[at:])
    at += used
    entries_bytes = sum(end - first for each in spans for first, end in each) * ENTRY_BYTES
    if at + entries_bytes + header.checks * _CHECK_BYTES != len(body):
        raise KeptError("its parts are not as long as it is")
    if any(block.page_count * header.page_size < block.used_length for block in listed):
        raise KeptError("it lacks pages")
    if header.checks and header.checks * header.page_size != header.spilled:
        raise KeptError("it lacks checksums")
    entries = {}
    for block, noted in zip(listed, spans, strict=True):
        after = at + sum(end - first for first, end in noted) * ENTRY_BYTES
        entries[block.name] = _entries(block, noted, body[at:after])
        at = after
    blocks = {block.name: RamBlock(name=block.name, used_length=block.used_length) for block in listed}
    index = PlacedPages(
        inputs,
        page_size=header.page_size,
        blocks=blocks,
        entries=entries,
        spill=None if spill is None else os.fdopen(os.dup(spill), "rb"),
        checks=body[at:].cast("I") if header.checks else None,
        forget=forget,
    )
    machine_type = header.machine_type.rstrip(b"\0").decode("utf-8", "surrogateescape")
    return SavedGuest(
        index,
        opening=opening,
        before=before,
        behind=behind,
        devices=devices,
        description=description,
        machine_type=machine_type if header.has_machine_type else None,
        section_id=header.section_id,
        footers=bool(header.footers),
        was_running=next((ran for ran, number in _RAN.items() if number == header.was_running), None),
        has_balloon=bool(header.has_balloon),
        absent=header.absent,
        blocks=list(blocks.values()),
    )


def _spans(blocks: Sequence[KeptBlock], body: memoryview) -> tuple[list[list[tuple[int, int]]], int]:
    """Those of each block, and how much of ``body`` they take, which it begins with.  Raises ``KeptError``."""
    used = sum(block.spans for block in blocks) * _SPAN_BYTES
    if used > len(body):
        raise KeptError("its parts are not as long as it is")
    numbers, found = iter(array("Q", bytes(body[:used]))), []
    for block in blocks:
        found.append([(next(numbers), next(numbers)) for _ in range(block.spans)])
        if any(not first <= end <= block.page_count for first, end in found[-1]):
            raise KeptError("it has pages beyond the end of a block")
    return found, used


def _entries(block: KeptBlock, spans: Sequence[tuple[int, int]], kept: memoryview) -> memoryview:
    """All of a block's entries.  Raises ``OSError`` where there is no room for so many."""
    if spans == [(0, block.page_count)]:
        return kept.cast("Q")
    entries, begin = memoryview(lazy_entries(block.page_count)).cast("Q"), 0
    for first, end in spans:
        after = begin + (end - first) * ENTRY_BYTES
        entries[first:end] = kept[begin:after].cast("Q")
        begin = after
    return entries


def _write_all(descriptor: int, data: memoryview, offset: int) -> int:
    """At this offset; where it ends.  Raises ``OSError``."""
    while len(data):
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
    return offset
