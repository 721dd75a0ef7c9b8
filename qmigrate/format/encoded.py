"""Pages that travel encoded on the main channel: what becomes of the page that was there.

``RamPage`` keeps such a record as it is; whoever wants the page's contents, in the stream's order, asks here.

migration/ram.c: load_xbzrle(); migration/ram-compress.c (until 9.0)
"""

import zlib
from collections.abc import Sequence
from typing import Final

from qmigrate.errors import StreamError, UnsupportedError, counted
from qmigrate.format import xbzrle
from qmigrate.format.entry import RamPage
from qmigrate.format.ram import CompressedPage, NormalPage, RamRecord, XbzrlePage, ZeroPage

__all__ = ["apply_page", "compress_page", "decompress_page", "page_after"]

_LEVEL: Final = 1  # QEMU's default of compress-level


def page_after(page: RamPage, before: bytes | memoryview, *, offset: int = 0) -> bytes:
    """The contents of the page once this record is loaded; ``before`` is what it held, ``offset`` the record's.

    Before the first record of a page that is zeros.  Raises ``StreamError`` where the data is damaged.
    """
    trail = ("ram", page.block)
    record, body = page.record, page.record.body
    at = offset + _data_at(record)
    match body:
        case XbzrlePage():
            return xbzrle.decode(before, body.data, offset=at, trail=trail)
        case CompressedPage():
            return decompress_page(body.data, page.page_size, offset=at, trail=trail)
        case NormalPage():
            return body.contents
        case ZeroPage():
            return bytes([body.fill]) * page.page_size
    raise UnsupportedError(f"flags {record.word.flags:#x} are no page", offset=offset, trail=trail)


def apply_page(page: RamPage, block: bytearray | memoryview, *, offset: int = 0) -> None:
    """Load this record into ``block``, the contents of its RAM block.  Raises ``StreamError``."""
    start, end = page.record.word.start, page.record.word.start + page.page_size
    view = memoryview(block)
    if end > len(view):
        raise StreamError(
            f"page at {start:#x}, the block ends at {len(view):#x}", offset=offset, trail=("ram", page.block)
        )
    view[start:end] = page_after(page, bytes(view[start:end]), offset=offset)


def _data_at(record: RamRecord) -> int:
    """Where a record's data begins: behind its word, the block's name, and the data's own head."""
    name = 0 if record.block is None else 1 + len(record.block.encode("utf-8", "surrogateescape"))
    heads: dict[type, int] = {XbzrlePage: 3, CompressedPage: 4}
    return 8 + name + heads.get(type(record.body), 0)


def decompress_page(data: bytes | memoryview, page_size: int, *, offset: int = 0, trail: Sequence[str] = ()) -> bytes:
    """The page in a zlib stream of its own; ``offset`` is where ``data`` stands.  Raises ``StreamError``.

    Never more memory than a page, whatever the data would grow to.  QEMU lets a stream pass that ends before its
    page does, or before its data does; no source writes either, so both are refused here.
    """
    trail = (*trail, "compressed")
    inflater = zlib.decompressobj()
    try:
        page = inflater.decompress(data, page_size + 1)
    except zlib.error as exc:
        raise StreamError(str(exc), offset=offset, trail=trail) from exc
    if len(page) > page_size:
        raise StreamError(f"more than a page of {page_size} bytes comes out", offset=offset, trail=trail)
    if not inflater.eof:
        raise StreamError("the zlib stream does not end with its data", offset=offset, trail=trail)
    if len(page) < page_size:
        raise StreamError(
            f"{counted(len(page), 'bytes', 'come')} out, a page has {page_size}", offset=offset, trail=trail
        )
    if inflater.unused_data:
        behind = len(inflater.unused_data)
        raise StreamError(
            f"{counted(behind, 'bytes')} behind the zlib stream", offset=offset + len(data) - behind, trail=trail
        )
    return page


def compress_page(contents: bytes | memoryview, *, level: int = _LEVEL) -> bytes:
    """A page as the data of COMPRESS_PAGE."""
    return zlib.compress(contents, level)
