"""Bytes at hand, and where in the stream they stand.

Who parses asks for bytes with ``yield from``; the generator yields while they are missing, and whoever drives
it calls ``space()`` and ``received()`` (or ``receive()``), or ``end()``, and goes on.
"""

from collections.abc import Generator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final, TypeVar

from qmigrate.errors import StreamError, TruncatedError, UnsupportedError, counted
from qmigrate.format._record import Record

__all__ = ["Feed"]

WINDOW: Final = 1 << 20  # fits a core's second-level cache: RAM streams through it once
_FIRST_WINDOW: Final = 512
_SMALL: Final = 8  # bytes of a record that is kept, for when it comes again
_LONGEST_RECORD: Final = 1 << 18  # a page is at most 64 KiB
_LONGEST_AHEAD: Final = 1 << 16  # of a record inside CONFIGURATION or the block list
R = TypeVar("R", bound=Record)


@lru_cache(maxsize=1024)
def _small(cls: type[R], data: bytes) -> R:
    """Records are values: the same bytes are the same record.  A stream can have 100,000 empty parts."""
    return cls.read(data)


class Feed:
    """A reused window over a stream.

    ``offset`` counts the bytes consumed, from the start of the stream.  A view that was given out holds until
    the parser is next resumed.  No claim in the stream makes the window grow: long things are collected by
    ``take()``, as they come.  With ``grows`` it is small at first, and as long as ``window`` says once it was filled:
    for where there may be thousands, on which next to nothing comes.
    """

    def __init__(self, *, offset: int = 0, window: int = WINDOW, grows: bool = False) -> None:
        self.offset = offset
        self.ended = False
        self.takes_holes = False
        """Who parses says so: zeros may come as their number, by ``received_hole()``."""
        self._hole = 0
        self._window = window
        self._buffer = bytearray(min(window, _FIRST_WINDOW) if grows else window)
        self._view = memoryview(self._buffer)
        self._begin = 0
        self._end = 0

    def __len__(self) -> int:
        """How many bytes are at hand."""
        return self._end - self._begin

    # -- for whoever drives

    def space(self) -> memoryview:
        """Where the next bytes go; never empty.  Moves what is at hand to the front when room runs out."""
        if self._end == len(self._buffer) < self._window:  # it was filled: more is to come
            self._grow(min(8 * len(self._buffer), self._window))
        elif self._begin == self._end:
            self._begin = self._end = 0
        elif self._begin and len(self._buffer) - self._end < len(self._buffer) // 2:
            kept = self._end - self._begin
            self._buffer[:kept] = self._buffer[self._begin : self._end]
            self._begin, self._end = 0, kept
        if self._end == len(self._buffer):
            self._grow(2 * len(self._buffer))
        return self._view[self._end :]

    def received(self, count: int) -> None:
        """``count`` bytes were written to the front of ``space()``."""
        self._end += count

    def received_hole(self, count: int) -> None:
        """In place of ``count`` zeros, where ``takes_holes``, and nothing is at hand."""
        self._hole = count

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take in ``data``, all of it."""
        while len(data):
            space = self.space()
            count = min(len(space), len(data))
            space[:count] = data[:count]
            self.received(count)
            data = data[count:]

    def end(self) -> None:
        """No more bytes will come."""
        self.ended = True

    def _grow(self, length: int) -> None:
        buffer = bytearray(length)
        buffer[: self._end - self._begin] = self._view[self._begin : self._end]
        self._buffer, self._view = buffer, memoryview(buffer)
        self._begin, self._end = 0, self._end - self._begin

    # -- for the parser

    def view(self, length: int | None = None) -> memoryview:
        """What is at hand, or the first ``length`` bytes of it."""
        return self._view[self._begin : self._end if length is None else min(self._end, self._begin + length)]

    @property
    def buffer(self) -> tuple[bytearray, int, int]:
        """The window itself and the bounds of what is at hand: a scanner needs no copy."""
        return self._buffer, self._begin, self._end

    def skip(self, count: int) -> None:
        """Consume ``count`` bytes, which are at hand."""
        self._begin += count
        self.offset += count

    def skip_hole(self) -> int:
        """Consume the zeros that came as their number; how many."""
        count, self._hole = self._hole, 0
        self.offset += count
        return count

    def more(self) -> Generator[None, None, bool]:
        """Wait for at least one more byte than has come; False where the stream has ended.

        Whoever drives may consume meanwhile: it is bytes that came that count, not those at hand.
        """
        had = self.offset + len(self)
        while self.offset + len(self) + self._hole == had:
            if self.ended:
                return False
            yield
        return True

    def need(self, count: int, trail: Sequence[str] = ()) -> Generator[None]:
        """Wait until ``count`` bytes are at hand.  Raises ``TruncatedError``."""
        while len(self) < count:
            if not (yield from self.more()):
                raise TruncatedError(
                    f"the stream ends here, {counted(count - len(self), 'bytes')} too soon",
                    offset=self.offset + len(self),
                    trail=trail,
                )

    def peek(self, trail: Sequence[str] = ()) -> Generator[None, None, int]:
        """The next byte, not consumed.  Raises ``TruncatedError``."""
        yield from self.need(1, trail)
        return self._buffer[self._begin]

    def byte(self, at: int) -> Generator[None, None, int | None]:
        """The byte so far ahead, not consumed; None where the stream ends before it."""
        while len(self) <= at:
            if not (yield from self.more()):
                return None
        return self._buffer[self._begin + at]

    def record(self, cls: type[R], trail: Sequence[str] = (), **context: Any) -> Generator[None, None, tuple[R, int]]:
        """The next record, not consumed, and its length.  Raises ``StreamError``."""
        if cls.size is not None:
            yield from self.need(cls.size, trail)
            if cls.size <= _SMALL and not context:
                with suppress(StreamError):  # it is told below, with its place
                    return _small(cls, bytes(self.view(cls.size))), cls.size  # type: ignore[arg-type]  # a class is
        while True:
            try:
                return cls.read_prefix(self.view(1024), offset=self.offset, trail=trail, **context)
            except TruncatedError:
                # Few records are longer than that; none is as long as the next view.
                if len(self) > 1024:
                    try:
                        return cls.read_prefix(self.view(_LONGEST_RECORD), offset=self.offset, trail=trail, **context)
                    except TruncatedError as exc:
                        if len(self) >= _LONGEST_RECORD:
                            raise self._too_long(exc, _LONGEST_RECORD, self.offset) from exc
                if not (yield from self.more()):
                    raise

    def ahead(self, cls: type[R], at: int, trail: Sequence[str] = ()) -> Generator[None, None, tuple[R, int]]:
        """The record that begins ``at`` bytes ahead, not consumed, and where it ends.  Raises ``StreamError``."""
        while True:
            view = self.view()[at : at + _LONGEST_AHEAD]
            try:
                record, length = cls.read_prefix(view, offset=self.offset + at, trail=trail)
            except TruncatedError as exc:
                if len(view) == _LONGEST_AHEAD:
                    raise self._too_long(exc, _LONGEST_AHEAD, self.offset + at) from exc
                if not (yield from self.more()):
                    raise
            else:
                return record, at + length

    @staticmethod
    def _too_long(exc: TruncatedError, longest: int, offset: int) -> UnsupportedError:
        return UnsupportedError(f"this is longer than {longest} bytes", offset=offset, trail=exc.trail)

    def behind(self, length: int) -> memoryview:
        """The last ``length`` bytes that were consumed, as long as the parser was not resumed since."""
        return self._view[self._begin - length : self._begin]

    def take(self, count: int, trail: Sequence[str] = ()) -> Generator[None, None, bytes]:
        """Consume ``count`` bytes, collected as they come.  Raises ``TruncatedError``."""
        return bytes((yield from self.collect(count, trail)))

    def collect(self, count: int, trail: Sequence[str] = ()) -> Generator[None, None, bytearray]:
        """``take()``, of what may be long: without a copy."""
        parts = bytearray()
        while len(parts) < count:
            if not len(self) and not (yield from self.more()):
                raise TruncatedError(
                    f"the stream ends here, {count - len(parts)} of {counted(count, 'bytes')} too soon",
                    offset=self.offset,
                    trail=trail,
                )
            step = min(len(self), count - len(parts))
            parts += self.view(step)
            self.skip(step)
        return parts
