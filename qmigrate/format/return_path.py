"""The way back: what the destination tells the source, on the reverse direction of the main channel.

migration/migration.c: source_return_path_thread(), migrate_send_rp_*()
"""

from collections.abc import Generator, Mapping
from enum import IntEnum
from typing import ClassVar, Final, NamedTuple

from construct import Bytes, Int16ub, Int32ub, Int64ub

from qmigrate.errors import StreamError, counted
from qmigrate.format._record import CountedString, Known, Only, Record, wire
from qmigrate.format.feed import Feed

__all__ = [
    "BITMAP_END_MARK",
    "LONGEST_MESSAGE",
    "MESSAGES",
    "SHORTEST",
    "BitmapEnd",
    "Message",
    "MessageHeader",
    "MessageType",
    "Pong",
    "ReceivedBitmap",
    "RequestPages",
    "RequestPagesId",
    "ResumeAck",
    "ResumeAckValue",
    "ReturnPathEntry",
    "Shut",
    "SwitchoverAck",
    "encode_message",
    "read_return_path",
]

LONGEST_MESSAGE: Final = 512  # bytes of data that the source has a buffer for
BITMAP_END_MARK: Final = 0x0123456789ABCDEF


class MessageType(IntEnum):
    """migration/migration.h: MIG_RP_MSG_*.  5 and 6 came with 3.0, 7 with 8.1."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


class ResumeAckValue(IntEnum):
    """migration/migration.h: MIGRATION_RESUME_ACK_VALUE"""

    RESUME_ACK_VALUE = 1


class BitmapEnd(IntEnum):
    """migration/ram.c: RAMBLOCK_RECV_BITMAP_ENDING"""

    END_MARK = BITMAP_END_MARK


class MessageHeader(Record):
    """Opens a message.  ``length`` counts the data; of RECV_BITMAP the name alone, not the bitmap.

    migration/migration.c: migrate_send_rp_message()
    """

    kind: MessageType = wire(Known(MessageType, Int16ub))
    length: int = wire(Int16ub)


class Message(Record):
    """A message's data; ``TYPE`` says which message it is."""

    TYPE: ClassVar[MessageType]

    @property
    def name(self) -> str:
        """As QEMU's messages spell it."""
        return self.TYPE.name


class Shut(Message):
    """The last message of a connection; ``value`` is 0 where all went well, else an error (QEMU sends 1)."""

    TYPE = MessageType.SHUT
    value: int = wire(Int32ub)


class Pong(Message):
    """Answers PING with its token, at once."""

    TYPE = MessageType.PONG
    token: int = wire(Int32ub)


class RequestPagesId(Message):
    """Send this range of ``block`` now: a fault waits for it.  ``start`` and ``length`` in bytes.

    migration/migration.c: migrate_send_rp_message_req_pages()
    """

    TYPE = MessageType.REQ_PAGES_ID
    start: int = wire(Int64ub)
    length: int = wire(Int32ub)
    block: str = wire(CountedString)


class RequestPages(Message):
    """As above, in the block of the request before; a recovery forgets which that was."""

    TYPE = MessageType.REQ_PAGES
    start: int = wire(Int64ub)
    length: int = wire(Int32ub)


class ReceivedBitmap(Message):
    """Which target pages of ``block`` have arrived: bit k % 8 of byte k // 8 is page k.

    Only ever the answer to the command RECV_BITMAP.
    migration/ram.c: ramblock_recv_bitmap_send()
    """

    TYPE = MessageType.RECV_BITMAP
    block: str = wire(CountedString)
    bitmap_size: int = wire(Int64ub)
    bitmap: bytes = wire(Bytes(lambda this: this.bitmap_size))
    end_mark: BitmapEnd = wire(Only(BitmapEnd.END_MARK, Int64ub), default=BitmapEnd.END_MARK)


class ResumeAck(Message):
    """Answers POSTCOPY_RESUME: the paused postcopy goes on."""

    TYPE = MessageType.RESUME_ACK
    value: ResumeAckValue = wire(
        Only(ResumeAckValue.RESUME_ACK_VALUE, Int32ub), default=ResumeAckValue.RESUME_ACK_VALUE
    )


class SwitchoverAck(Message):
    """All devices that asked for it are ready: the source may stop the guest.  Since 8.1."""

    TYPE = MessageType.SWITCHOVER_ACK


MESSAGES: Final[Mapping[MessageType, type[Message]]] = {
    message.TYPE: message
    for message in (Shut, Pong, RequestPagesId, RequestPages, ReceivedBitmap, ResumeAck, SwitchoverAck)
}


class ReturnPathEntry(NamedTuple):
    """A message, where its header begins in the stream, how many bytes it takes in all, and those bytes."""

    offset: int
    length: int
    message: Message
    raw: bytes


_TRAIL: Final = ("return path",)
_HEADER_BYTES: Final = 4
SHORTEST: Final = {MessageType.REQ_PAGES_ID: 13, MessageType.RECV_BITMAP: 1}  # with an empty name
_BITMAP_UNIT: Final = 8  # QEMU rounds the bitmap up to whole u64 words, on hosts of any word size


def read_return_path(feed: Feed, *, longest_bitmap: int | None = None) -> Generator[ReturnPathEntry | None]:
    """Each message in turn, None while bytes are missing; ends where the feed ends between messages.

    ``longest_bitmap``: in bytes; one that claims to be longer is refused before it is collected.
    Nothing may follow SHUT: a recovery has a new connection, and so a new feed.
    Raises ``StreamError``.
    """
    while len(feed) or (yield from feed.more()):
        entry = yield from _message(feed, longest_bitmap)
        yield entry
        if isinstance(entry.message, Shut):
            break
    if len(feed) or (yield from feed.more()):
        raise StreamError("SHUT was the last message, and bytes follow it", offset=feed.offset, trail=_TRAIL)


def encode_message(message: Message) -> bytes:
    """Header and data; of RECV_BITMAP with the bitmap, which the header does not count."""
    data = message.build()
    length = 1 + data[0] if isinstance(message, ReceivedBitmap) else len(data)
    return MessageHeader(kind=message.TYPE, length=length).build() + data


def _message(feed: Feed, longest_bitmap: int | None) -> Generator[None, None, ReturnPathEntry]:
    start = feed.offset
    header, size = yield from feed.record(MessageHeader, _TRAIL)
    head = bytes(feed.view(size))
    trail = (*_TRAIL, header.kind.name)
    _check_length(header, start, trail)
    feed.skip(size)
    data = yield from feed.take(header.length, trail)
    _check_name(header, data, start, trail)
    if header.kind is MessageType.RECV_BITMAP:
        data += yield from _bitmap(feed, trail, longest_bitmap)
    message = MESSAGES[header.kind].read(data, offset=start + size, trail=trail)
    return ReturnPathEntry(start, feed.offset - start, message, head + data)


def _bitmap(feed: Feed, trail: tuple[str, ...], longest: int | None) -> Generator[None, None, bytes]:
    """What follows the name: size, bitmap and end mark, collected as they come."""
    at = feed.offset
    head = yield from feed.take(8, (*trail, "bitmap_size"))
    size = int.from_bytes(head)
    if size % _BITMAP_UNIT:
        raise StreamError(
            f"found {size:#x}, expected a multiple of {_BITMAP_UNIT}",
            offset=at,
            trail=(*trail, "bitmap_size"),
        )
    if longest is not None and size > longest:
        raise StreamError(f"found {size:#x}, expected at most {longest:#x}", offset=at, trail=(*trail, "bitmap_size"))
    bitmap = yield from feed.take(size, (*trail, "bitmap"))
    return head + bitmap + (yield from feed.take(8, (*trail, "end_mark")))


def _check_length(header: MessageHeader, start: int, trail: tuple[str, ...]) -> None:
    fixed = MESSAGES[header.kind].size
    if fixed is not None:
        good, expected = header.length == fixed, str(fixed)
    else:
        shortest = SHORTEST[header.kind]
        good, expected = shortest <= header.length <= LONGEST_MESSAGE, f"{shortest} to {LONGEST_MESSAGE}"
    if not good:
        raise StreamError(f"length is {header.length}, expected {expected}", offset=start + 2, trail=trail)


def _check_name(header: MessageHeader, data: bytes, start: int, trail: tuple[str, ...]) -> None:
    """The name has a length of its own, which must agree; QEMU checks that of REQ_PAGES_ID alone."""
    shortest = SHORTEST.get(header.kind)
    if shortest is None:
        return
    name = data[shortest - 1]
    if header.length != shortest + name:
        raise StreamError(
            f"length is {header.length}, expected {shortest + name}: {shortest} and a name of {counted(name, 'bytes')}",
            offset=start + 2,
            trail=trail,
        )
