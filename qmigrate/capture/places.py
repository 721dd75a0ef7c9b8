"""Where the bytes of a stream stand, as they are, in a file: one behind the other, or in pieces between other things.

A page that stands there whole can be left there, whichever channel it came over.
"""

import os
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self

from qmigrate.value import Value

__all__ = ["Channels", "Input", "Pieces", "Places"]

_NO_END: Final = 1 << 62


class Input(NamedTuple):
    """A file in which pages stand, open, and how it was when they were found there: bytes, nanoseconds."""

    descriptor: int
    length: int
    mtime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> Self:
        """As it is now.  Raises ``OSError``."""
        status = os.fstat(descriptor)
        return cls(descriptor, status.st_size, status.st_mtime_ns)


@dataclass(slots=True)
class Pieces:
    """Where the bytes of one direction are: 16 bytes for each piece, whatever it holds."""

    offsets: "array[int]" = field(default_factory=lambda: array("Q"))  # in the file
    ends: "array[int]" = field(default_factory=lambda: array("Q"))  # in the stream

    @property
    def length(self) -> int:
        """Of the stream, in bytes, as far as it is known."""
        return self.ends[-1] if self.ends else 0

    def add(self, offset: int, length: int) -> None:
        self.offsets.append(offset)
        self.ends.append(self.length + length)

    def find(self, position: int) -> tuple[int, int, int] | None:
        """The piece that holds the byte at ``position``: its index, the place in the file, and the bytes left there."""
        index = bisect_right(self.ends, position)
        if index == len(self.ends):
            return None
        begin = self.ends[index - 1] if index else 0
        return index, self.offsets[index] + position - begin, self.ends[index] - position


class Places(Value):
    """Of one stream: it begins at ``base`` of its file, and goes on to the end, or it is in ``pieces``."""

    descriptor: int
    base: int = 0
    pieces: Pieces | None = None

    def find(self, offset: int) -> tuple[int, int]:
        """Where in the file the byte at ``offset`` of the stream stands, and how many follow one another from there."""
        if self.pieces is None:
            return self.base + offset, _NO_END
        found = self.pieces.find(offset)
        return (0, 0) if found is None else found[1:]


class Channels(Value):
    """The channels of a migration: by their numbers, which input each stands in, and where.

    One that stands in none as it is is missing.  ``inputs`` are None where nothing does.
    """

    inputs: Sequence[Input | None] = (None,)
    places: Mapping[int, tuple[int, Places]] = field(default_factory=dict)
