"""The bytes of one stream, wherever they are, given to who parses them."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Final, TypeVar

from qmigrate.capture.owner import Owner
from qmigrate.capture.places import Places
from qmigrate.capture.readers import FileReader, Reader
from qmigrate.errors import NoStreamError, StreamError, StreamErrors, TruncatedError
from qmigrate.format.feed import Feed
from qmigrate.format.tail import Chooser
from qmigrate.format.vmdesc import Description
from qmigrate.format.walk import Entry, Limits, walk

if TYPE_CHECKING:
    from qmigrate.format.channel import Channel

__all__ = ["READ_ERRORS", "Readable", "took_hole", "unreadable"]

T = TypeVar("T")

READ_ERRORS: Final = (EOFError, OSError, ValueError)
"""What reading raises, apart from what is of the compression."""
_HEAD: Final = 1 << 16  # bytes that are read to tell what a channel is; few are needed
_HEAD_PACKED: Final = 1 << 20  # bytes: more than a block of bzip2, whose damage shows at its end


class Readable(Owner, ABC):
    """The bytes of one stream, wherever they are."""

    name: str
    compression: str | None = None
    """What is read is packed so, once it is read."""
    read_errors: tuple[type[Exception], ...] = READ_ERRORS
    can_rewind: bool

    @abstractmethod
    def open_reader(self) -> Reader:
        """Read from the start."""

    def _open_to_look(self) -> Reader:
        """Read from the start, as often as one likes, before any of it is read."""
        return self.open_reader()

    @property
    @abstractmethod
    def places(self) -> Places | None:
        """Where its bytes stand in a file; None where they don't, as they are."""

    def entries(
        self,
        *,
        description: Description | Chooser | None = None,
        page_size: int | None = None,
        limits: Limits | None = None,
    ) -> Iterator[Entry]:
        """Walk the input from its start; a pipe only once.

        Raises what ``walk`` does, and what ``fed`` does.
        """
        feed = Feed()
        try:
            yield from self.fed(walk(feed, description=description, page_size=page_size, limits=limits), feed)
        except NoStreamError as exc:
            from qmigrate.capture.other import no_stream  # most inputs are streams

            better = no_stream(feed)
            if better is None:
                raise
            raise better from exc

    def fed(self, steps: Iterable[T | None], feed: Feed) -> Iterator[T]:
        """What ``steps`` yield, which parse what is in ``feed``; it is filled from the start of the input.

        Where reading fails midway, what was read before is parsed as if it ended there.  Then raises ``StreamError``,
        ``StreamErrors`` where the stream has a fault of its own besides, as mostly that it ends too soon.  And where a
        compressed file has a fault, it is read to its end to see whether it was damaged as it was packed.
        """
        reader = self.open_reader()
        unread: StreamError | None = None
        try:
            for item in steps:
                if item is not None:
                    yield item
                    continue
                try:
                    self.fill(feed, reader)
                except StreamError as exc:
                    unread = exc
                    feed.end()
        except NoStreamError:
            unread = unread or self._fault_behind(feed, reader, most=_HEAD_PACKED)
            if unread is None:
                raise
        except StreamError as exc:
            unread = unread or self._fault_behind(feed, reader)
            if unread is None:
                raise
            both = [unread, exc] if isinstance(exc, TruncatedError) else [exc, unread]
            raise StreamErrors(both) from exc
        if unread is not None:
            raise unread

    def classify(self, blocks: Collection[str] | None = None) -> "Channel":
        """Which channel of a migration it is, by its bytes alone; ``blocks``: the names that main has announced.

        Raises ``StreamError`` where not a byte can be read.
        """
        from qmigrate.format.channel import classify  # most inputs are the only one of their migration

        feed = Feed(window=_HEAD)
        answer, reader = classify(feed, blocks=blocks), self._open_to_look()
        while True:
            try:
                next(answer)
            except StopIteration as end:
                channel: Channel = end.value
                return channel
            try:
                self.fill(feed, reader)
            except StreamError:
                if not len(feed):
                    raise
                feed.end()  # what came before may tell, and the fault is met again when it is read

    def _fault_behind(self, feed: Feed, reader: Reader, *, most: int | None = None) -> StreamError | None:
        """What is wrong with a compressed file behind what is in ``feed``; in as many bytes as are unpacked at most."""
        if self.compression is None or not self.can_rewind:
            return None
        scratch = Feed(offset=feed.offset + len(feed))
        try:
            while not scratch.ended and (most is None or most > 0):
                self.fill(scratch, reader)
                most = None if most is None else most - len(scratch)
                scratch.skip(len(scratch))
        except StreamError as exc:
            return exc
        return None

    def fill(self, feed: Feed, reader: Reader) -> None:
        """Give the feed what comes next, or end it.  Raises ``StreamError`` where reading fails."""
        if isinstance(reader, FileReader) and took_hole(feed, reader):
            return
        try:
            count = reader.readinto(feed.space())
        except self.read_errors as exc:
            raise unreadable(exc, feed.offset + len(feed), self.compression) from exc
        if count:
            feed.received(count)
        else:
            feed.end()


def took_hole(feed: Feed, reader: FileReader) -> bool:
    """Was there a hole next, and was it given as its length?  Where nothing is at hand, and the feed takes that."""
    if not feed.takes_holes or len(feed):
        return False
    hole = reader.skip_hole()
    feed.received_hole(hole)
    return hole > 0


def unreadable(exc: Exception, offset: int, compression: str | None = None) -> StreamError:
    if isinstance(exc, OSError) and exc.strerror:  # the system's
        reason = exc.strerror
    else:
        reason = f"{compression}: {exc}" if compression else str(exc)
    return StreamError(f"the input can't be read on: {reason}", offset=offset)
