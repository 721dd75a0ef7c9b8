"""Where the tail is over: at EOF, and what proves it is the description behind it, where there is one.

QEMU, which decodes every device, need not ask.  Device state may hold any bytes, such as look like an end too; so an
end is only ever a candidate, until every section in front of it decodes or chains up to it.
"""

import heapq
import re
import struct
from collections.abc import Iterator
from itertools import islice
from typing import Final

from qmigrate.errors import StreamError
from qmigrate.format.stream import FOOTER_BYTES, SectionType
from qmigrate.format.tail import Tail, read_tail
from qmigrate.format.vmdesc import Description, parse_description

__all__ = ["ClosingFinder", "find_description", "find_ends"]

_CLOSING: Final = re.compile(rb"\x00\x06(?=(?s:....)\{)")
_CLOSING_BYTES: Final = 7
# EOF with something behind it that is no description: an empty one, or another stream.
_ENDING: Final = re.compile(rb"\x00(?=\x06\x00{4}|QEVM\x00\x00\x00\x03)")
# What is tried of a hostile tail.
_MOST_LOOKS: Final = 200_000
_MOST_DESCRIPTIONS: Final = 16
_MOST_WAITED_FOR: Final = 1000  # descriptions whose end has not come
_MOST_ENDS: Final = 4


def find_description(data: bytes, base: int) -> Iterator[tuple[int, Description]]:
    """Each place where an EOF byte may stand with a description behind it: those that end the data first.

    The claimed length must fit the data; what does not parse is passed over.
    """
    candidates = []
    for found in _CLOSING.finditer(data):
        at = found.start()
        end = at + 6 + struct.unpack_from(">I", data, at + 2)[0]
        if end <= len(data) and data[end - 1] == ord("}"):
            candidates.append((end != len(data), at, end))
    for _, at, end in heapq.nsmallest(_MOST_DESCRIPTIONS, candidates):
        try:
            yield at, parse_description(data[at + 6 : end], offset=base + at + 6)
        except StreamError:
            continue


def find_ends(data: bytes, *, footers: bool | None) -> Iterator[int]:
    """Each place where an EOF byte may stand with no description that says anything, and more behind it."""
    found = (match.start() for match in islice(_ENDING.finditer(data), _MOST_LOOKS))
    # Bytes that look like an empty description are frequent in device state: only behind a footer are they one.
    likely = (at for at in found if data[at + 1] != SectionType.VMDESCRIPTION or _is_behind_footer(data, at, footers))
    yield from islice(likely, _MOST_ENDS)


def _is_behind_footer(data: bytes, at: int, footers: bool | None) -> bool:
    return footers is not False and data[at - FOOTER_BYTES : at - FOOTER_BYTES + 1] == b"\x7e"


class ClosingFinder:
    """Where the tail is over, while it comes: for those who may not wait for the input's end.

    EOF and a description close it for certain where every section decodes under that description.
    """

    def __init__(self, *, base: int, footers: bool | None) -> None:
        self.base = base
        self.footers = footers
        self.searched = 0
        self.waiting: list[tuple[int, int]] = []
        self.tries = 0

    def closes(self, data: bytearray) -> tuple[Tail, Description, int] | None:
        """The tail in front of ``data``, its description, and where that ends; None while it is not all there."""
        if self.tries > _MOST_DESCRIPTIONS or len(self.waiting) > _MOST_WAITED_FOR:
            return None
        for found in islice(_CLOSING.finditer(data, self.searched), _MOST_WAITED_FOR + 1):
            at = found.start()
            heapq.heappush(self.waiting, (at + 6 + struct.unpack_from(">I", data, at + 2)[0], at))
        self.searched = max(len(data) - _CLOSING_BYTES + 1, 0)
        while self.waiting and self.waiting[0][0] <= len(data):
            end, at = heapq.heappop(self.waiting)
            if data[end - 1] == ord("}"):
                self.tries += 1
                closed = self._closed_at(data, at, end)
                if closed is not None:
                    return closed
        return None

    def _closed_at(self, data: bytearray, at: int, end: int) -> tuple[Tail, Description, int] | None:
        try:
            description = parse_description(bytes(memoryview(data)[at + 6 : end]), offset=self.base + at + 6)
        except StreamError:
            return None
        tail = read_tail(
            bytes(memoryview(data)[: at + 1]),
            base=self.base,
            footers=self.footers,
            description=description,
            package=False,
        )
        is_sure = tail.error is None and tail.end == at and all(item.state is not None for item in tail.items)
        return (tail, description, end) if is_sure else None
