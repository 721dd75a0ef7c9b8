"""Reads what ``qmigrate tap`` wrote: each direction of each connection as a stream of its own, with times.

The file's layout is declared in ``frames``.  It is read by offsets, and may still be growing.
"""

import fcntl
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Self

from qmigrate.capture.frames import (
    BODIES,
    HEADER,
    LONGEST_BODY,
    LONGEST_PIECE,
    MAGIC,
    MOST_CONNECTIONS,
    VERSION,
    Closed,
    Direction,
    End,
    Frame,
    FrameHeader,
    FrameKind,
    FrameMark,
    Opened,
    RecordingHeader,
    Stopped,
    checksum,
)
from qmigrate.capture.owner import Owner
from qmigrate.capture.places import Pieces, Places
from qmigrate.capture.readable import Readable
from qmigrate.capture.readers import Reader
from qmigrate.errors import NoStreamError, StreamError, TruncatedError, about_file, counted
from qmigrate.format.channel import Channel, ChannelKind, by_order
from qmigrate.format.feed import Feed
from qmigrate.format.ram import BlockList
from qmigrate.format.walk import walk

__all__ = ["Connection", "RecordedChannel", "RecordedStream", "Recording"]

_STOPPED: Final = "the recording stopped before the migration ended"
_WINDOW: Final = 1 << 14
_PIECE: Final = 1 << 16
_MOST_KINDS: Final = 5  # that are named
_MOST_BEFORE_BLOCKS: Final = 1 << 26  # bytes of main in which its block list is looked for


@dataclass(slots=True)
class Connection:
    """One connection, as far as it is recorded.  Times are the recording's monotonic ones.

    ``closed`` is None where its end is not in the file.
    """

    number: int
    opened: Opened
    opened_ns: int
    closed: Closed | None = None
    closed_ns: int | None = None
    forward: Pieces = field(default_factory=Pieces, repr=False)
    back: Pieces = field(default_factory=Pieces, repr=False)

    def pieces(self, direction: Direction) -> Pieces:
        return self.back if direction is Direction.RETURN else self.forward


class Recording(Owner):
    """A tap's file, complete or not, or still being written.  Closes the file that it opened.

    ``advance()`` reads on as far as whole frames go, and can be called again when there may be more; all else here
    is what was read so far.  Memory: 16 bytes a frame, and what the connections are.  Raises ``OSError`` where it
    can't be opened, ``NoStreamError`` where it is no recording.
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str | None = None) -> None:
        self.path = os.fspath(path)
        self.name = self.path if name is None else name
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # of a pipe, nobody is waited for
        self.connections: list[Connection] = []
        self.stopped: Stopped | None = None
        """Why the recording stopped before the tap did."""
        self.ended = False
        """Was it closed in good order?"""
        self.fault: StreamError | None = None
        """What is wrong with the file: nothing behind it was read."""
        self.position = RecordingHeader.size or 0
        """How far it was read."""
        self._lost: list[StreamError] = []
        self._known_size = 0
        self._window = b""
        self._window_at = 0
        try:
            self.header = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def descriptor(self) -> int:
        """Of the file, as long as it is open."""
        return self._descriptor

    @property
    def size(self) -> int:
        """Of the file, now."""
        return os.fstat(self._descriptor).st_size

    @property
    def is_written(self) -> bool:
        """Is a tap still at it?  It holds a lock as long as it lives."""
        try:
            with about_file(self.name):
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return False

    def _read_header(self) -> RecordingHeader:
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise NoStreamError("no recording of qmigrate tap: it is no regular file, which is read by offsets")
        with about_file(self.name):
            data = os.pread(self._descriptor, HEADER.size, 0)
        if data[:8] != MAGIC:
            raise NoStreamError("no recording of qmigrate tap: it does not begin with its magic")
        if len(data) < HEADER.size:
            raise NoStreamError(f"a recording whose header has {counted(len(data), 'bytes')}, expected {HEADER.size}")
        header = RecordingHeader.read(data)
        if header.version != VERSION:
            raise NoStreamError(f"a recording of version {header.version}, expected {VERSION}")
        if header.unused or checksum(data) != header.checksum:
            raise NoStreamError("a recording whose header is damaged: its checksum is wrong")
        return header

    # -- frames

    def advance(self) -> Iterator[Frame]:
        """The frames behind those that were read before, as long as they are whole."""
        if self.fault is None and self.size < self.position:
            self.fault = StreamError(
                f"the recording became shorter while it was read: it has {self.size} bytes", offset=self.position
            )
        while self.fault is None and not self.ended:
            try:
                frame = self._next()
                if frame is not None:
                    self._take(frame)
            except StreamError as exc:
                self.fault = exc
                return
            if frame is None:
                return
            self.position = frame.offset + frame.length
            yield frame

    def read(self) -> Self:
        """All there is: ``fault`` says where a file that is not growing ends too soon.  Reads it once."""
        for _ in self.advance():
            pass
        return self.finish()

    def finish(self) -> Self:
        """No more will be written: what stands behind the last whole frame is cut."""
        left = self.size - self.position
        if not self.ended and not any(self._bytes(self.position, 4)):
            left = 0  # what was set aside, or the rest of a frame without its mark: as good as nothing
        if self.fault is None and left > 0:
            cut = f"{counted(left, 'bytes')} of a frame that was not whole when the tap was killed"
            if self.ended:
                self.fault = StreamError(f"{counted(left, 'bytes', 'follow')} END", offset=self.position)
            else:
                self.fault = TruncatedError(f"{cut}; they were not passed on", offset=self.position)
        elif self.fault is None and not self.ended:
            self.fault = TruncatedError(
                "the recording has no end: the tap was killed, or still runs", offset=self.position
            )
        return self

    @property
    def faults(self) -> list[StreamError]:
        """Why it may lack something: it stopped, it is damaged, it lacks what was passed on, or it has no end."""
        stopped = [] if self.stopped is None else [StreamError(f"{_STOPPED}: {self.stopped.reason}")]
        return [*stopped, *self._lost, *([] if self.fault is None else [self.fault])]

    def _bytes(self, offset: int, count: int) -> bytes:
        """So many bytes at ``offset`` of the file, or as many as there are."""
        at = offset - self._window_at
        if at < 0 or at + count > len(self._window):
            with about_file(self.name):
                self._window = os.pread(self._descriptor, max(count, _WINDOW), offset)
            self._window_at, at = offset, 0
        return self._window[at : at + count]

    def _next(self) -> Frame | None:
        """The frame at hand; None where it is not all there.  Raises ``StreamError``."""
        at = self.position
        data = self._bytes(at, HEADER.size)
        if len(data) < HEADER.size:
            return None
        if not int.from_bytes(data[:4]):  # set aside, and not written yet
            self._window = b""
            return None
        mark, kind, direction, unused, connection, monotonic_ns, time_ns, length, found = HEADER.unpack(data)
        is_data = mark == FrameMark.MARK and kind == FrameKind.DATA and direction in (1, 2) and not unused
        if is_data and 0 < length <= LONGEST_PIECE and checksum(data) == found:
            if at + HEADER.size + length > self._known_size:
                self._known_size = self.size
                if at + HEADER.size + length > self._known_size:
                    return None
            return Frame(
                FrameKind.DATA, Direction(direction), connection, monotonic_ns, time_ns, at + HEADER.size, length, None
            )
        return self._own_frame(FrameHeader.read(data, offset=at, trail=("frame",)), data, at)

    def _own_frame(self, header: FrameHeader, data: bytes, at: int) -> Frame | None:
        trail = ("frame", header.kind.name)
        longest = LONGEST_PIECE if header.kind is FrameKind.DATA else LONGEST_BODY
        if header.length > longest or (header.kind is FrameKind.DATA and not header.length):
            raise StreamError(f"length is {header.length}, expected at most {longest}", offset=at + 28, trail=trail)
        held = b"" if header.kind is FrameKind.DATA else self._bytes(at + HEADER.size, header.length)
        if header.kind is not FrameKind.DATA and len(held) < header.length:
            return None
        expected = checksum(data, held)
        if expected != header.checksum:
            raise StreamError(
                f"the checksum is {header.checksum:#010x}, expected {expected:#010x}", offset=at + 32, trail=trail
            )
        if header.unused or (header.direction is Direction.NEITHER) == (header.kind is FrameKind.DATA):
            raise StreamError(
                f"direction is {header.direction.name}, unused {header.unused:#x}", offset=at + 5, trail=trail
            )
        body = BODIES[header.kind].read(held, offset=at + HEADER.size, trail=trail)
        return Frame(
            header.kind,
            header.direction,
            header.connection,
            header.monotonic_ns,
            header.time_ns,
            at + HEADER.size,
            header.length,
            body,
        )

    def _take(self, frame: Frame) -> None:
        """Note what it says.  Raises ``StreamError`` where it may not stand here."""
        if self.stopped is not None and frame.kind is not FrameKind.END:
            raise self._out_of_place(frame, "the recording had stopped")
        match frame.body:
            case Stopped() as stopped:
                self.stopped = stopped
                return
            case End():
                self.ended = True
                return
            case Opened() as opened:
                if frame.connection != len(self.connections) or frame.connection >= MOST_CONNECTIONS:
                    raise self._out_of_place(frame, f"expected {min(len(self.connections), MOST_CONNECTIONS - 1)}")
                self.connections.append(Connection(frame.connection, opened, frame.monotonic_ns))
                return
        if frame.connection >= len(self.connections) or self.connections[frame.connection].closed is not None:
            raise self._out_of_place(frame, "it is not open")
        connection = self.connections[frame.connection]
        if isinstance(frame.body, Closed):
            connection.closed, connection.closed_ns = frame.body, frame.monotonic_ns
            self._lost += self._lost_of(connection, frame.body, frame.offset - HEADER.size)
        else:
            connection.pieces(frame.direction).add(frame.offset, frame.length)

    @staticmethod
    def _lost_of(connection: Connection, closed: Closed, offset: int) -> Iterator[StreamError]:
        """Nothing is passed on that is not recorded before; the other way round a peer may have been gone."""
        for way, passed, pieces in (
            ("forward", closed.forward_bytes, connection.forward),
            ("back", closed.return_bytes, connection.back),
        ):
            if passed > pieces.length:
                message = (
                    f"of connection {connection.number}: {passed} bytes were passed on {way}, {pieces.length} are here"
                )
                yield StreamError(message, offset=offset, trail=("frame", FrameKind.CLOSED.name))

    @staticmethod
    def _out_of_place(frame: Frame, why: str) -> StreamError:
        return StreamError(
            f"of connection {frame.connection}: {why}",
            offset=frame.offset - HEADER.size,
            trail=("frame", frame.kind.name),
        )

    # -- what is in it

    def read_into(self, buffer: Any, offset: int) -> int:
        """Bytes of the file at ``offset``, into a buffer that wants at least one.  Raises ``StreamError`` where
        they are gone.
        """
        with about_file(self.name):
            count = os.preadv(self._descriptor, [buffer], offset)
        if not count:
            raise StreamError("the recording became shorter while it was read", offset=offset)
        return count

    def time_at(self, offset: int) -> int:
        """When the piece whose bytes begin at ``offset`` of the file came, by the monotonic clock."""
        return int(HEADER.unpack(self._bytes(offset - HEADER.size, HEADER.size))[5])

    def stream(self, connection: int, direction: Direction) -> "RecordedStream":
        """One direction of a connection, from its start, as one stream of bytes."""
        return RecordedStream(self, self.connections[connection], direction)

    def channels(self) -> "list[RecordedChannel]":
        """What each direction of each connection is, connections in their order, forward before return.

        A way back on which nothing came is left out.
        """
        found: list[RecordedChannel] = []
        forward: dict[ChannelKind, Channel] = {}  # one of each: there may be thousands of connections
        blocks: set[str] | None = None
        for connection in self.connections:
            stream = self.stream(connection.number, Direction.FORWARD)
            channel = by_order(stream.classify(blocks), is_forward=True, others=forward.values())
            if channel.kind is ChannelKind.MAIN:
                blocks = stream.announced_blocks()
            forward.setdefault(channel.kind, channel)
            found.append(RecordedChannel(channel, Direction.FORWARD, stream))
            back = self.stream(connection.number, Direction.RETURN)
            if back.size:
                found.append(RecordedChannel(back.classify(blocks), Direction.RETURN, back))
        return found

    def main(self) -> "RecordedStream":
        """The first main channel, forward.  Raises ``NoStreamError`` where there is none."""
        for connection in self.connections:
            stream = self.stream(connection.number, Direction.FORWARD)
            if stream.classify(None).kind is ChannelKind.MAIN:
                return stream
        if not self.connections:
            raise NoStreamError("no migration stream: the recording has no connections")
        kinds = Counter(
            channel.channel.name for channel in self.channels() if channel.direction is Direction.FORWARD
        ).most_common(_MOST_KINDS)
        found = ", ".join(f"{count} {name}" for name, count in kinds)
        raise NoStreamError(f"no migration stream: no recorded connection is a main channel; there are {found}")


@dataclass(frozen=True)
class RecordedChannel:
    """One direction of a connection: what it is, and its bytes.  ``stream.time_at`` says when each came."""

    channel: Channel
    direction: Direction
    stream: "RecordedStream"

    @property
    def connection(self) -> Connection:
        return self.stream.connection


class RecordedStream(Readable):
    """One direction of a connection as an input of its own.  The recording's file is not closed by it."""

    can_rewind = True

    def __init__(self, recording: Recording, connection: Connection, direction: Direction) -> None:
        way = "return" if direction is Direction.RETURN else "forward"
        self.name = f"{recording.name}: connection {connection.number}, {way}"
        self.recording = recording
        self.connection = connection
        self.direction = direction
        self.pieces = connection.pieces(direction)
        self._latest: _PieceReader | None = None

    @property
    def size(self) -> int:
        """Of the stream, in bytes."""
        return self.pieces.length

    @property
    def position(self) -> int:
        """How many bytes of the stream the latest walk has read."""
        return 0 if self._latest is None else self._latest.position

    def close(self) -> None:
        """The recording stays open: it is its owner's."""

    @property
    def places(self) -> Places:
        """Pieces of the recording's file, as many as it has by now."""
        return Places(self.recording.descriptor, pieces=self.pieces)

    def time_at(self, offset: int) -> int | None:
        """When the byte at ``offset`` of the stream came, by the recording's monotonic clock, in nanoseconds."""
        found = self.pieces.find(offset)
        return None if found is None else self.recording.time_at(self.pieces.offsets[found[0]])

    def read_at(self, offset: int, count: int) -> bytes:
        """So many bytes of the stream, or as many as there are."""
        parts = bytearray()
        while len(parts) < count and (found := self.pieces.find(offset + len(parts))) is not None:
            part = bytearray(min(found[2], count - len(parts), _PIECE))
            parts += part[: self.recording.read_into(part, found[1])]
        return bytes(parts)

    def announced_blocks(self) -> set[str] | None:
        """The names in the block list of a main channel; None where it can't be read."""
        feed = Feed()
        try:
            for entry in self.fed(walk(feed), feed):
                if isinstance(entry.record, BlockList):
                    return {block.name for block in entry.record.blocks}
                if feed.offset > _MOST_BEFORE_BLOCKS:
                    break
        except (StreamError, NoStreamError):
            pass
        return None

    def open_reader(self) -> Reader:
        self._latest = _PieceReader(self)
        return self._latest


class _PieceReader:
    """Reads a stream from its start.  Each has a place of its own."""

    def __init__(self, stream: RecordedStream) -> None:
        self._stream = stream
        self.position = 0

    def readinto(self, buffer: memoryview, /) -> int:
        found = self._stream.pieces.find(self.position)
        if found is None:
            return 0
        _, offset, left = found
        count = self._stream.recording.read_into(buffer[:left], offset)
        self.position += count
        return count

    def close(self) -> None:
        pass
