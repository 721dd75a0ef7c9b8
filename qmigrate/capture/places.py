"""Where the bytes of a stream stand, as they are, in a file: one behind the other, or in pieces between other things.

A page that stands there whole can be left there, whichever channel it came over.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from qmigrate.value import Value

if TYPE_CHECKING:
    from qmigrate.capture.recording import Pieces

__all__ = ["Channels", "Input", "Places"]

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


class Places(Value):
    """Of one stream: it begins at ``base`` of its file, and goes on to the end, or it is in ``pieces``."""

    descriptor: int
    base: int = 0
    pieces: "Pieces | None" = None

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
