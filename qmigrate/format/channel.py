"""What a connection is, from its first bytes.

Only the main channel and multifd's begin with a magic.  The others show themselves by what they carry:

==============  ===============================================================================================
main            ``QEVM``
multifd         0x11223344, and in its initial packet which channel it is
main, resumed   0x08 and a command of the recovery: RECV_BITMAP, or POSTCOPY_RESUME where no block was listed
preempt         a page record with the name of a block that main has announced; a bare EOS (7.2 ends it so)
return path     a message 1 to 7 with the length that it has
TLS             a handshake: what is inside, nobody outside can tell
==============  ===============================================================================================

No two of these begin alike: a page record's u64 is an offset inside a block, so its first two bytes are zero,
where a message's are its type.  Where nothing was sent the order of connections is all there is to go by:
``by_order`` then says what it must have been, and that nobody saw it.

migration/channel.c, migration/migration.c: migration_ioc_process_incoming()
"""

from collections.abc import Collection, Generator, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from qmigrate.errors import StreamError, counted
from qmigrate.format.command import CommandHeader, CommandNumber, RecvBitmap
from qmigrate.format.feed import Feed
from qmigrate.format.multifd import InitialPacket, MultifdMagic
from qmigrate.format.ram import RamFlag
from qmigrate.format.return_path import LONGEST_MESSAGE, MESSAGES, SHORTEST, MessageType
from qmigrate.format.stream import MAGIC, SectionType

__all__ = ["Channel", "ChannelKind", "How", "by_order", "classify"]


class ChannelKind(StrEnum):
    """What a connection, or one direction of it, is for."""

    MAIN = "main"
    RESUMED = "main, resumed"
    MULTIFD = "multifd"
    PREEMPT = "preempt"
    RETURN_PATH = "return path"
    TLS = "TLS"
    UNKNOWN = "unknown"


class How(StrEnum):
    """By what a channel's kind is known."""

    BYTES = "bytes"
    ORDER = "order"
    NOTHING = "nothing"


@dataclass(frozen=True, kw_only=True)
class Channel:
    """What a connection is.  ``reason`` says in words by what it is known, or why it is not.

    ``channel_id`` and ``uuid`` (the source's, 16 bytes) are multifd's, where its initial packet is all there.
    """

    kind: ChannelKind
    known_by: How
    reason: str
    channel_id: int | None = None
    uuid: bytes | None = None

    @property
    def name(self) -> str:
        """``multifd 3``, ``preempt``."""
        return self.kind.value if self.channel_id is None else f"{self.kind.value} {self.channel_id}"

    @property
    def is_silent(self) -> bool:
        """Was nothing sent on it at all?"""
        return self.known_by is How.NOTHING and self.reason == _SILENT

    @property
    def doubt(self) -> str:
        """Why something was sent on it of which nobody knows what it is: pages may be among it.  Else empty."""
        unknown = self.kind in (ChannelKind.UNKNOWN, ChannelKind.TLS) and not self.is_silent
        return f"what was sent can't be told: {self.reason}" if unknown else ""


Answer = Generator[None, None, Channel]
"""None while bytes are missing that could tell."""

_SILENT: Final = "nothing was sent"
_HANDSHAKE: Final = b"\x16\x03"  # TLS's record type 22, and the major version of all of them
_FEWEST: Final = 4
_FLAGS: Final = 0x3FF  # below any target's page size
_LONGEST_NAME: Final = 255


def classify(feed: Feed, *, blocks: Collection[str] | None = None) -> Answer:
    """What begins at the front of ``feed``.  Nothing is consumed, and no more waited for than tells it.

    ``blocks``: the names that main has announced; without them any name that can be printed will do.
    Raises nothing: what is no channel is UNKNOWN.
    """
    if not (yield from _at_hand(feed, _FEWEST)):
        had = len(feed)
        return _unknown(f"{counted(had, 'bytes', 'are')} too few to tell" if had else _SILENT)
    head = bytes(feed.view(_FEWEST))
    if int.from_bytes(head) == MAGIC:
        return _found(ChannelKind.MAIN, "it begins with QEVM")
    if int.from_bytes(head) == MultifdMagic.MAGIC:
        return (yield from _multifd(feed))
    if head[:2] == _HANDSHAKE:
        return _found(ChannelKind.TLS, "it begins with a TLS handshake: what is inside can't be seen")
    if head[0] == SectionType.COMMAND:
        return (yield from _resumed(feed, blocks))
    if int.from_bytes(head[:2]) in MESSAGES:
        return (yield from _return_path(feed))
    return (yield from _preempt(feed, blocks))


def by_order(channel: Channel, *, is_forward: bool, others: Iterable[Channel]) -> Channel:
    """What ``channel``, on which nothing was sent, must be: by its direction and the connections before it.

    ``others`` are, of a connection, those that came before it; of a way back, the one whose way back it is.
    A channel that is known by its bytes is given back as it is, and so is one that began with something else.
    """
    if not channel.is_silent:
        return channel
    if not {other.kind for other in others} & {ChannelKind.MAIN, ChannelKind.RESUMED}:
        return channel
    if is_forward:
        return _ordered(ChannelKind.PREEMPT, "nothing was sent on it: beside main, preempt may stay silent")
    return _ordered(ChannelKind.RETURN_PATH, "it is main's way back, and nothing was sent on it")


def _found(kind: ChannelKind, reason: str) -> Channel:
    return Channel(kind=kind, known_by=How.BYTES, reason=reason)


def _ordered(kind: ChannelKind, reason: str) -> Channel:
    return Channel(kind=kind, known_by=How.ORDER, reason=reason)


def _unknown(reason: str) -> Channel:
    return Channel(kind=ChannelKind.UNKNOWN, known_by=How.NOTHING, reason=reason)


def _at_hand(feed: Feed, count: int) -> Generator[None, None, bool]:
    """Wait until so many bytes are there; False where the stream ends before."""
    while len(feed) < count:
        if not (yield from feed.more()):
            return False
    return True


def _multifd(feed: Feed) -> Answer:
    assert InitialPacket.size is not None
    size = InitialPacket.size
    magic = "it begins with 0x11223344"
    if not (yield from _at_hand(feed, size)):
        return _found(ChannelKind.MULTIFD, f"{magic}, and ends inside its initial packet")
    try:
        packet = InitialPacket.read(feed.view(size))
    except StreamError as exc:
        return _found(ChannelKind.MULTIFD, f"{magic}, but its initial packet is wrong: {exc.message}")
    return Channel(
        kind=ChannelKind.MULTIFD,
        known_by=How.BYTES,
        reason=f"{magic}, and its initial packet names channel {packet.channel_id}",
        channel_id=packet.channel_id,
        uuid=packet.uuid,
    )


def _resumed(feed: Feed, blocks: Collection[str] | None) -> Answer:
    """A recovery asks for the bitmap of each block, then resumes."""
    assert CommandHeader.size is not None
    size = CommandHeader.size
    if not (yield from _at_hand(feed, size)):
        return _unknown("it begins with a command, and ends inside it")
    try:
        header = CommandHeader.read(feed.view(size))
    except StreamError as exc:
        return _unknown(f"it begins with 0x08, and with no command: {exc.message}")
    if header.command is CommandNumber.POSTCOPY_RESUME and not header.length:
        return _found(ChannelKind.RESUMED, "it begins with POSTCOPY_RESUME, without a header")
    if header.command is not CommandNumber.RECV_BITMAP or not 1 <= header.length <= 1 + _LONGEST_NAME:
        return _unknown(
            f"it begins with {header.command.name} of {counted(header.length, 'bytes')}, which opens no recovery"
        )
    if not (yield from _at_hand(feed, size + header.length)):
        return _unknown("it begins with RECV_BITMAP, and ends inside it")
    try:
        block = RecvBitmap.read(feed.view(size + header.length)[size:]).block
    except StreamError as exc:
        return _unknown(f"it begins with a RECV_BITMAP that is wrong: {exc.message}")
    if not _is_block(block, blocks):
        return _unknown(f"it asks for the bitmap of {block!r}, which no block is called")
    return _found(ChannelKind.RESUMED, f"it begins with RECV_BITMAP of {block}, without a header")


def _return_path(feed: Feed) -> Answer:
    head = bytes(feed.view(4))
    kind, length = MessageType(int.from_bytes(head[:2])), int.from_bytes(head[2:])
    shortest = SHORTEST.get(kind)
    good = length == MESSAGES[kind].size if shortest is None else shortest <= length <= LONGEST_MESSAGE
    if good and shortest is not None:
        if not (yield from _at_hand(feed, 4 + shortest)):
            return _unknown(f"it begins like {kind.name}, and ends inside it")
        good = length == shortest + feed.view(4 + shortest)[-1]
    if not good:
        return _unknown(f"it begins like {kind.name}, whose length is not {length}")
    return _found(ChannelKind.RETURN_PATH, f"it begins with {kind.name}, of the length that it has")


def _preempt(feed: Feed, blocks: Collection[str] | None) -> Answer:
    """The first record names its block, and is a page, plain or zero; only 7.2 sends an EOS, as the last."""
    if not (yield from _at_hand(feed, 8)):
        return _unknown(f"it begins with {bytes(feed.view(8)).hex(' ')}, as no channel does")
    word = int.from_bytes(feed.view(8))
    if word == RamFlag.EOS:
        return _found(ChannelKind.PREEMPT, "it begins with the EOS record of RAM, and no section is open")
    if word & _FLAGS not in (RamFlag.PAGE, RamFlag.ZERO):
        return _unknown(f"it begins with {bytes(feed.view(8)).hex(' ')}, as no channel does")
    if not ((yield from _at_hand(feed, 9)) and (yield from _at_hand(feed, 9 + feed.view(9)[8]))):
        return _unknown("it begins like a page record, and ends inside it")
    name = bytes(feed.view(9 + feed.view(9)[8])[9:]).decode("utf-8", "surrogateescape")
    if not _is_block(name, blocks):
        return _unknown(f"it begins like a page record of {name!r}, which no block is called")
    return _found(ChannelKind.PREEMPT, f"it begins with a page of {name}, and no section is open")


def _is_block(name: str, blocks: Collection[str] | None) -> bool:
    return bool(name) and name.isprintable() if blocks is None else name in blocks
