"""XBZRLE: a page as its difference from the copy that was there before.

The encoded bytes are pairs, until they end: how many bytes stay, how many come new, and these.  Both counts are
ULEB128 of one byte or two, so at most 0x3fff.  What follows the last pair stays.

Two versions of each direction: the plain one, a byte at a time, says what the format is; the fast one works by
runs, and tests hold the two equal.

migration/xbzrle.c, util/cutils.c: uleb128_encode_small()
"""

import re
from collections.abc import Sequence
from typing import Final

from qmigrate.errors import StreamError

__all__ = ["LONGEST_RUN", "decode", "decode_plainly", "encode", "encode_plainly"]

LONGEST_RUN: Final = 0x3FFF
_CONTINUES: Final = 0x80  # set in the first byte of a count that has two
_TRAIL: Final = ("xbzrle",)
_ROOM: Final = 2  # bytes that must be left for a count, though one may do: QEMU's rule, on both sides
# A pair on XOR of old and new: what stays is zero there.
_PAIR: Final = re.compile(rb"(\x00*)([^\x00]+)")


def decode(old: bytes | memoryview, data: bytes | memoryview, *, offset: int = 0, trail: Sequence[str] = ()) -> bytes:
    """The page that ``data`` makes of ``old``; its length is that of ``old``.

    Empty ``data`` changes nothing.  ``offset`` is where ``data`` stands in the stream.  Raises ``StreamError`` for
    what QEMU refuses too: a count that is cut, that is zero (the first number of bytes that stay may be) or not
    ended by its second byte, and runs that leave the page or the data.
    """
    page, data = bytearray(old), bytes(data)
    page_size, length = len(page), len(data)
    at = position = 0
    try:
        while at < length:
            stays, comes = data[at], data[at + 1]
            at += 2
            if stays & _CONTINUES:
                if comes & _CONTINUES:
                    break
                stays += (comes << 7) - _CONTINUES
                comes = data[at]
                at += 1
            elif not stays and position:
                break
            position += stays
            if comes == 1:  # in scattered changes the most frequent run, and twice as fast without slices
                page[position] = data[at]
                at += 1
                position += 1
                continue
            if comes & _CONTINUES:
                if data[at] & _CONTINUES:
                    break
                comes += (data[at] << 7) - _CONTINUES
                at += 1
            elif not comes:
                break
            end = at + comes
            page[position : position + comes] = data[at:end]
            at = end
            position += comes
        else:
            # A run that left the page made it longer, one that left the data shorter: one look shows both.
            if at == length and position <= page_size == len(page):
                return bytes(page)
    except IndexError:
        pass
    return decode_plainly(old, data, offset=offset, trail=trail)  # which says what is wrong


def decode_plainly(
    old: bytes | memoryview, data: bytes | memoryview, *, offset: int = 0, trail: Sequence[str] = ()
) -> bytes:
    """``decode``, a byte at a time; it says what is wrong."""
    reader = _Reader(data, offset, (*trail, *_TRAIL))
    page: list[int] = []
    while reader.left:
        start = reader.at
        stays = reader.count("bytes that stay")
        if not stays and page:
            raise reader.wrong("no byte stays between two runs of new ones", start)
        if len(page) + stays > len(old):
            raise reader.wrong(f"{stays} bytes stay, {len(old) - len(page)} are left of the page", start)
        for _ in range(stays):
            page.append(old[len(page)])
        start = reader.at
        comes = reader.count("new bytes")
        if not comes:
            raise reader.wrong("a run of no new bytes", start)
        if len(page) + comes > len(old):
            raise reader.wrong(f"{comes} new bytes, {len(old) - len(page)} are left of the page", start)
        if comes > reader.left:
            raise reader.wrong(f"{comes} new bytes, {reader.left} are left of the data", start)
        for _ in range(comes):
            page.append(reader.byte())
    while len(page) < len(old):
        page.append(old[len(page)])
    return bytes(page)


class _Reader:
    """Encoded bytes, and how far they are read."""

    def __init__(self, data: bytes | memoryview, offset: int, trail: Sequence[str]) -> None:
        self.data = data
        self.offset = offset
        self.trail = trail
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def count(self, of: str) -> int:
        """A ULEB128 of one byte or two.  A run follows or its last bytes do, so two are always there."""
        start = self.at
        if self.left < _ROOM:
            raise self.wrong(f"the data ends inside the number of {of}", start)
        low = self.byte()
        if not low & _CONTINUES:
            return low
        high = self.byte()
        if high & _CONTINUES:
            raise self.wrong(f"the number of {of} has more than two bytes", start)
        return (low & ~_CONTINUES) | high << 7

    def wrong(self, message: str, at: int) -> StreamError:
        return StreamError(message, offset=self.offset + at, trail=self.trail)


def encode(old: bytes | memoryview, new: bytes | memoryview) -> bytes | None:
    """What makes ``new`` of ``old``, which are of one length; no bytes where they are equal (QEMU sends nothing then).

    None where it would take more room than the page has: then the page is sent as it is.  The bytes are those
    that QEMU writes.
    """
    page_size = len(new)
    _same_length(old, new)
    difference = (int.from_bytes(old) ^ int.from_bytes(new)).to_bytes(page_size)
    out = bytearray()
    # Without the zeros at its end, at each of which the pattern would look for a pair in vain.
    for pair in _PAIR.finditer(difference.rstrip(b"\0")):
        begin, end = pair.span(2)
        stays, comes = begin - pair.start(), end - begin
        if stays > LONGEST_RUN or comes > LONGEST_RUN or len(out) + _ROOM > page_size:
            return None
        out += _count(stays)
        if len(out) + _ROOM > page_size:
            return None
        out += _count(comes)
        if len(out) + comes > page_size:
            return None
        out += new[begin:end]
    return bytes(out)


def encode_plainly(old: bytes | memoryview, new: bytes | memoryview) -> bytes | None:
    """``encode``, a byte at a time."""
    _same_length(old, new)
    page_size = len(new)
    out, at = bytearray(), 0
    while at < page_size:
        begin = at
        while at < page_size and old[at] == new[at]:
            at += 1
        if at == page_size:
            break  # the last bytes that stay are not told
        middle = at
        while at < page_size and old[at] != new[at]:
            at += 1
        for count, data in ((middle - begin, b""), (at - middle, new[middle:at])):
            if count > LONGEST_RUN or len(out) + _ROOM > page_size:
                return None
            out += _count(count)
            if len(out) + len(data) > page_size:
                return None
            out += data
    return bytes(out)


def _same_length(old: bytes | memoryview, new: bytes | memoryview) -> None:
    if len(old) != len(new):
        raise ValueError(f"pages of {len(old)} and {len(new)} bytes")


def _count(value: int) -> bytes:
    if value < _CONTINUES:
        return bytes((value,))
    return bytes(((value & ~_CONTINUES & 0xFF) | _CONTINUES, value >> 7))
