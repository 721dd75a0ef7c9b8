"""What the pages of a multifd channel hold: its packets' data, decompressed.

Packets of zlib and zstd are pieces of one stream over the whole channel, which is never finished: each ends with a
flush, so that its pages are all there.  Of the others each packet, or each page, stands alone.

migration/multifd-zlib.c, multifd-zstd.c, multifd-qpl.c, multifd-uadk.c, multifd-qatzip.c
"""

import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from qmigrate.errors import StreamError, UnsupportedError, counted
from qmigrate.format.multifd import Compression, PagePacket
from qmigrate.format.multifd_channel import ChannelEntry

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["PageDecoder"]

# zlib's wbits: which container is around the deflate data.
_DEFLATE: Final = -15
_ZLIB: Final = 15
_GZIP: Final = 31
# 32 MiB of history, what level 20 asks for, the highest that QEMU takes.  The library's own limit is four times that.
_LONGEST_WINDOW_LOG: Final = 25
_MOST_MEMBERS: Final = 2  # of gzip for a page: QATzip begins one each 64 KiB, or as it is told to, at least 2 KiB


class PageDecoder:
    """Decompresses the packets of one channel, in their order, each once: what was before is needed for what comes.

    No packet takes more memory than its pages, whatever its data would grow to.
    """

    def __init__(self) -> None:
        self._zlib: Any = None
        self._zstd: Any = None
        self._fault: StreamError | None = None

    def contents(self, entry: ChannelEntry) -> bytes | memoryview:
        """The normal pages of this packet, one behind the other, in the order of ``header.normal``.

        Of pages that are not compressed the entry's own view, which holds as long as that does.  Raises
        ``StreamError``: then this channel's later packets of zlib and zstd can't be had either.
        """
        if not isinstance(entry.record, PagePacket) or not entry.record.header.normal_pages:
            return b""
        method = entry.record.header.compression
        if method is Compression.NOCOMP:
            return entry.data
        pages = entry.record.header.normal_pages
        length, trail = pages * entry.record.page_size, (f"multifd {method.name.lower()}",)
        if self._fault is not None:
            raise StreamError(
                f"a packet before it was damaged, at {self._fault.offset:#x}", offset=entry.offset, trail=trail
            )
        try:
            found = _METHODS[method](self, entry.data, pages, entry.record.page_size)
            if len(found) != length:
                more = "more than " if len(found) > length else f"{counted(len(found), 'bytes')} of "
                raise _Damaged(f"{more}{counted(length, 'bytes', 'come')} out, those of {counted(pages, 'pages')}")
        except (_Damaged, zlib.error) as exc:
            fault = StreamError(str(exc), offset=entry.offset + entry.data_at, trail=trail)
            if method in (Compression.ZLIB, Compression.ZSTD):
                self._fault = fault
            raise fault from exc
        return found

    def _inflate(self, data: memoryview, pages: int, page_size: int) -> bytes:
        if self._zlib is None:
            self._zlib = zlib.decompressobj()
        # One byte more than there may be: then all the data is used, the flush's last bytes too.
        found: bytes = self._zlib.decompress(data, pages * page_size + 1)
        if self._zlib.eof:
            raise _Damaged("the channel's zlib stream ends, which it never does")
        return found

    def _decompress_zstd(self, data: memoryview, pages: int, page_size: int) -> bytes:
        zstd = _zstd()
        if self._zstd is None:
            self._zstd = zstd.ZstdDecompressor(
                options={zstd.DecompressionParameter.window_log_max: _LONGEST_WINDOW_LOG}
            )
        try:
            found: bytes = self._zstd.decompress(data, pages * page_size + 1)
        except (zstd.ZstdError, EOFError) as exc:
            raise _Damaged(str(exc)) from exc
        if self._zstd.eof:
            raise _Damaged("the channel's zstd frame ends, which it never does")
        return found

    def _inflate_each(self, data: memoryview, pages: int, page_size: int) -> bytes:
        """QPL: deflate data without a container, page by page."""
        return b"".join(_pages_alone(data, pages, page_size, _DEFLATE))

    def _inflate_each_zlib(self, data: memoryview, pages: int, page_size: int) -> bytes:
        """UADK: zlib streams, page by page."""
        return b"".join(_pages_alone(data, pages, page_size, _ZLIB))

    def _inflate_members(self, data: memoryview, pages: int, page_size: int) -> bytes:
        """QATzip: the packet's pages together, as gzip members one behind the other."""
        longest = pages * page_size
        found, left = bytearray(), bytes(data)
        for _ in range(_MOST_MEMBERS * pages):
            inflater = zlib.decompressobj(_GZIP)
            found += inflater.decompress(left, longest + 1 - len(found))
            if len(found) > longest:
                break
            if not inflater.eof:
                raise _Damaged("a gzip member does not end")
            left = inflater.unused_data
            if not left:
                break
        else:
            raise _Damaged(f"more than {_MOST_MEMBERS * pages} gzip members for {counted(pages, 'pages')}")
        return bytes(found)


class _Damaged(Exception):
    """The data is not what a source writes."""


_METHODS: Final[dict[Compression, Callable[[PageDecoder, memoryview, int, int], bytes]]] = {
    Compression.ZLIB: PageDecoder._inflate,
    Compression.ZSTD: PageDecoder._decompress_zstd,
    Compression.QPL: PageDecoder._inflate_each,
    Compression.UADK: PageDecoder._inflate_each_zlib,
    Compression.QATZIP: PageDecoder._inflate_members,
}


def _pages_alone(data: memoryview, pages: int, page_size: int, wbits: int) -> Iterator[bytes | memoryview]:
    """Each page: a table of their lengths comes first; a page that got no shorter stands as it is."""
    at = 4 * pages
    if len(data) < at:
        raise _Damaged(f"{counted(len(data), 'bytes')}, the lengths of {counted(pages, 'pages')} alone take {at}")
    lengths = struct.unpack_from(f">{pages}I", data)
    if max(lengths) > page_size:
        raise _Damaged(f"a page takes {counted(max(lengths), 'bytes')}, expected at most {page_size}")
    if at + sum(lengths) != len(data):
        raise _Damaged(f"the pages take {counted(sum(lengths), 'bytes')}, {len(data) - at} are there")
    for length in lengths:
        piece = data[at : at + length]
        at += length
        yield piece if length == page_size else _page_alone(piece, page_size, wbits)


def _page_alone(data: memoryview, page_size: int, wbits: int) -> bytes:
    inflater = zlib.decompressobj(wbits)
    page = inflater.decompress(data, page_size + 1)
    if len(page) != page_size or not inflater.eof or inflater.unused_data:
        raise _Damaged(f"a page's data does not make a page of {page_size} bytes")
    return page


def _zstd() -> "ModuleType":
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise UnsupportedError(
            "pages compressed with zstd, which this Python can't read: pip install backports.zstd"
        ) from None
    return zstd
