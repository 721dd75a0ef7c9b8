"""What ``qmigrate tap`` writes: every connection of a migration, both directions, in one file.

All integers are big-endian.  A header of 36 bytes, then frames, one behind the other, to the end::

    header  8 magic 89 'QTAP' 0D 0A 1A | u32 version 1 | u64 monotonic_ns | u64 time_ns | u32 0 | u32 checksum
    frame   u32 mark 'FRAM' | u8 kind | u8 direction | u16 0 | u32 connection | u64 monotonic_ns | u64 time_ns
            | u32 length | u32 checksum, then ``length`` bytes

    kind       length       what
    1 OPENED   1 or more    a connection; they are numbered from 0 in the order in which they came
    2 DATA     1 to 1 MiB   bytes of one direction: 1 forward (source to destination), 2 return; else it is 0
    3 CLOSED   17 or more   how much was passed on, and why it ended where that was an error
    4 STOPPED  1 or more    the recording stopped, the migration went on; nothing follows but END
    5 END      0            the tap ended in good order

``monotonic_ns`` counts from an arbitrary moment and never jumps, ``time_ns`` from 1970.  The checksum is the CRC-32
of all that stands before it in the header or frame, and of what a frame other than DATA holds.  What DATA holds
has none: it goes from socket to file inside the kernel, where nobody could sum it up.

What is passed on is written before.  So however the tap ends, all that was passed on is here; the last frame may be
cut, and what it holds was not passed on.  A file may be longer than what is written, with zeros behind: where a mark
is zero there is no frame yet, and a mark is written after all else of its frame there.  (That holds for a process
that is killed; after a power failure the file has what the system had written by then.)
"""

import struct
import zlib
from enum import IntEnum
from typing import Final, NamedTuple

from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub

from qmigrate.format._record import CountedString, Known, Record, wire

__all__ = [
    "BODIES",
    "HEADER",
    "LONGEST_BODY",
    "LONGEST_PIECE",
    "MAGIC",
    "MOST_CONNECTIONS",
    "VERSION",
    "Closed",
    "Direction",
    "End",
    "Frame",
    "FrameHeader",
    "FrameKind",
    "FrameMark",
    "Opened",
    "RecordingHeader",
    "Stopped",
    "build_frame",
    "build_header",
    "checksum",
    "data_header",
]

MAGIC: Final = b"\x89QTAP\r\n\x1a"
VERSION: Final = 1
LONGEST_PIECE: Final = 1 << 20
LONGEST_BODY: Final = 1 << 12  # of what is no data
MOST_CONNECTIONS: Final = 1 << 16


class FrameMark(IntEnum):
    MARK = 0x4652414D  # "FRAM"


class FrameKind(IntEnum):
    OPENED = 1
    DATA = 2
    CLOSED = 3
    STOPPED = 4
    END = 5


class Direction(IntEnum):
    NEITHER = 0
    FORWARD = 1
    RETURN = 2


class RecordingHeader(Record):
    """The front of the file: when the tap began."""

    magic: bytes = wire(Bytes(8), default=MAGIC)
    version: int = wire(Int32ub, default=VERSION)
    monotonic_ns: int = wire(Int64ub)
    time_ns: int = wire(Int64ub)
    unused: int = wire(Int32ub, default=0)
    checksum: int = wire(Int32ub, default=0)


class FrameHeader(Record):
    """What stands before each frame's bytes."""

    mark: FrameMark = wire(Known(FrameMark, Int32ub), default=FrameMark.MARK)
    kind: FrameKind = wire(Known(FrameKind, Int8ub))
    direction: Direction = wire(Known(Direction, Int8ub), default=Direction.NEITHER)
    unused: int = wire(Int16ub, default=0)
    connection: int = wire(Int32ub, default=0)
    monotonic_ns: int = wire(Int64ub)
    time_ns: int = wire(Int64ub)
    length: int = wire(Int32ub)
    checksum: int = wire(Int32ub, default=0)


class Opened(Record):
    """``peer`` is who connected, ``listen`` where, ``forward`` where to; as URIs, ``peer`` empty where it has none."""

    peer: str = wire(CountedString)
    listen: str = wire(CountedString)
    forward: str = wire(CountedString)


class Closed(Record):
    """Both sides are closed.  How many bytes were passed on; ``error`` is empty where all went well."""

    forward_bytes: int = wire(Int64ub)
    return_bytes: int = wire(Int64ub)
    error: str = wire(CountedString)


class Stopped(Record):
    """No more is recorded, and why: a full disk."""

    reason: str = wire(CountedString)


class End(Record):
    """The tap ended, and closed the file."""


BODIES: Final[dict[FrameKind, type[Record]]] = {
    FrameKind.OPENED: Opened,
    FrameKind.CLOSED: Closed,
    FrameKind.STOPPED: Stopped,
    FrameKind.END: End,
}
_KINDS: Final = {body: kind for kind, body in BODIES.items()}
HEADER: Final = struct.Struct(">IBBHIQQII")  # FrameHeader, read fast: a test holds the two equal
_CHECKED: Final = HEADER.size - 4
assert FrameHeader.size == HEADER.size == RecordingHeader.size


def checksum(header: bytes, held: bytes = b"") -> int:
    """What must stand at the end of ``header`` (of 36 bytes) that is followed by ``held``."""
    return zlib.crc32(held, zlib.crc32(header[:_CHECKED]))


def data_header(connection: int, direction: int, length: int, monotonic_ns: int, time_ns: int) -> bytes:
    """The header of a DATA frame; its ``length`` bytes follow."""
    front = HEADER.pack(
        FrameMark.MARK, FrameKind.DATA, direction, 0, connection, monotonic_ns, time_ns, length, 0
    )[:_CHECKED]  # fmt: skip
    return front + zlib.crc32(front).to_bytes(4)


def build_frame(body: Record, *, connection: int, monotonic_ns: int, time_ns: int) -> bytes:
    """A frame that holds one of our own records, whole."""
    data = body.build()
    header = FrameHeader(
        kind=_KINDS[type(body)],
        connection=connection,
        monotonic_ns=monotonic_ns,
        time_ns=time_ns,
        length=len(data),
    ).build()[:_CHECKED]
    return header + zlib.crc32(data, zlib.crc32(header)).to_bytes(4) + data


def build_header(*, monotonic_ns: int, time_ns: int) -> bytes:
    """The front of a new file."""
    front = RecordingHeader(monotonic_ns=monotonic_ns, time_ns=time_ns).build()[:-4]
    return front + zlib.crc32(front).to_bytes(4)


class Frame(NamedTuple):
    """A frame and its place.  ``body`` is None for DATA, whose bytes stand at ``offset`` in the file."""

    kind: FrameKind
    direction: Direction
    connection: int
    monotonic_ns: int
    time_ns: int
    offset: int
    length: int
    body: Record | None
