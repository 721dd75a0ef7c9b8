"""The ``ram`` section, declared: the block list, and each kind of record.

A guest has a page for every 4 KiB of memory, so ``pages.py`` reads the common records fast; what stands here
is what it is held to, and reads all the others.

migration/ram.c
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import construct
from construct import Bytes, Int8ub, Int16ub, Int32ub, Int64ub

from qmigrate.errors import StreamError
from qmigrate.format._record import Adapter, AnyConstruct, CountedString, Record, When, refuse, wire
from qmigrate.format.ram_flag import RamFlag
from qmigrate.value import Value

__all__ = [
    "RAM_VERSION",
    "BlockList",
    "PageRun",
    "Pages",
    "RamBlock",
    "RamFlag",
    "RamRecord",
    "RamWord",
    "read_pages",
]

RAM_VERSION: Final = 4
PAGE_KINDS: Final = frozenset({RamFlag.ZERO, RamFlag.PAGE, RamFlag.XBZRLE, RamFlag.COMPRESS_PAGE})
MARKERS: Final = frozenset({RamFlag.EOS, RamFlag.HOOK, RamFlag.MULTIFD_FLUSH})
ALL_FLAGS: Final = 0x3FF
_LOWEST_BITS: Final = 0xFF  # no target's page is shorter


class RamWord(NamedTuple):
    """The u64 that opens each record: a byte offset in the block, and flags as a plain int."""

    start: int
    flags: int

    @property
    def kind(self) -> int:
        """The flags without CONTINUE: one known flag, where the record is good."""
        return self.flags & ~int(RamFlag.CONTINUE)


class _Word(Adapter):
    """Splits the word at the target's page size and refuses flags that no release knows."""

    def _decode(self, obj: int, context: Any, path: str) -> RamWord:
        mask = context._params.page_size - 1
        word = RamWord(obj & ~mask, obj & mask)
        unknown = word.flags & ~ALL_FLAGS
        if unknown:
            raise refuse(f"page header has unknown flags {unknown:#x}")
        if word.kind not in PAGE_KINDS and word.flags not in MARKERS:
            raise refuse(f"page header has the unknown combination of flags {word.flags:#x}")
        if word.flags in MARKERS and word.start:
            raise refuse(f"{RamFlag(word.flags).name} comes with the offset {word.start:#x}, expected 0")
        return word

    def _encode(self, obj: RamWord, context: Any, path: str) -> int:
        if obj.start & (context._params.page_size - 1):
            raise refuse(f"the offset {obj.start:#x} is not a multiple of the page's size")
        return obj.start | obj.flags


class ZeroPage(Record):
    """A page of one repeated byte.  QEMU sends 0 and nothing else; 10.2 accepts nothing else."""

    fill: int = wire(Int8ub)


class NormalPage(Record):
    """A page as it is."""

    contents: bytes = wire(Bytes(lambda this: this._params.page_size))


XBZRLE_ENCODING: Final = 0x01


class _XbzrleEncoding(Adapter):
    """The one encoding there is."""

    def _decode(self, obj: int, context: Any, path: str) -> int:
        if obj != XBZRLE_ENCODING:
            raise refuse(f"xbzrle encoding is {obj:#x}, expected {XBZRLE_ENCODING:#x}")
        return obj

    def _encode(self, obj: int, context: Any, path: str) -> int:
        return obj


class _DataLength(Adapter):
    """How much stands for a page: refused before memory is taken for it where it is more than that can be."""

    def __init__(self, subcon: AnyConstruct, kind: str, longest: Callable[[int], int]) -> None:
        super().__init__(subcon)
        self.kind = kind
        self.longest = longest

    def _decode(self, obj: int, context: Any, path: str) -> int:
        longest = self.longest(context._params.page_size)
        if obj > longest:
            raise refuse(f"{self.kind} data is {obj} bytes long, expected at most {longest}")
        return obj

    def _encode(self, obj: int, context: Any, path: str) -> int:
        return obj


def _zlib_bound(length: int) -> int:
    """zlib's compressBound()."""
    return length + (length >> 12) + (length >> 14) + (length >> 25) + 13


class XbzrlePage(Record):
    """A page as its difference from the one before.  migration/xbzrle.c"""

    encoding: int = wire(_XbzrleEncoding(Int8ub))
    length: int = wire(_DataLength(Int16ub, "xbzrle", lambda page_size: page_size))
    data: bytes = wire(Bytes(lambda this: this.length))


class CompressedPage(Record):
    """A page as a zlib stream of its own.  2.4 to 9.0."""

    length: int = wire(_DataLength(Int32ub, "compressed", _zlib_bound))
    data: bytes = wire(Bytes(lambda this: this.length))


_BODIES: Final[dict[int, type[Record]]] = {
    RamFlag.ZERO: ZeroPage,
    RamFlag.PAGE: NormalPage,
    RamFlag.XBZRLE: XbzrlePage,
    RamFlag.COMPRESS_PAGE: CompressedPage,
}


class _Body(construct.Construct):  # type: ignore[type-arg]
    """What the kind says follows."""

    def _parse(self, stream: Any, context: Any, path: str) -> Record | None:
        body = _BODIES.get(context.word.kind)
        if body is None:
            return None
        values = body._struct._parsereport(stream, context, path)
        return body(**{name: values[name] for name in body._names})

    def _build(self, obj: Record | None, stream: Any, context: Any, path: str) -> Any:
        expected = _BODIES.get(context.word.kind, type(None))
        if not isinstance(obj, expected):
            raise refuse(f"flags {context.word.flags:#x} want {expected.__name__}, found {type(obj).__name__}")
        if obj is not None:
            values = construct.Container({name: getattr(obj, name) for name in obj._names})
            obj._struct._build(values, stream, context, path)
        return obj


def _names_its_block(this: Any) -> bool:
    return this.word.kind in PAGE_KINDS and not this.word.flags & RamFlag.CONTINUE


class RamRecord(Record):
    """One record of START, PART or END after the block list; the context has ``page_size``.

    migration/ram.c: save_page_header(), ram_load_precopy()
    """

    word: RamWord = wire(_Word(Int64ub))
    block: str | None = wire(When(_names_its_block, CountedString))
    body: Record | None = wire(_Body())

    @property
    def is_marker(self) -> bool:
        """EOS, HOOK or MULTIFD_FLUSH: no page."""
        return self.word.flags in MARKERS


class RamBlockHead(Record):
    """The part of a block's entry that is always there."""

    name: str = wire(CountedString)
    used_length: int = wire(Int64ub)


class RamBlockWord(Record):
    """Its page size or address, where they are there."""

    word: int = wire(Int64ub)


class RamBlock(Value):
    """One block of the list; lengths in bytes.

    ``page_size`` stands only after an ADVISE, where a block's host page size differs from the host's;
    ``address`` only with the capability x-ignore-shared.  Nothing announces either: ``walk`` finds out.
    migration/ram.c: ram_save_setup()
    """

    name: str
    used_length: int
    page_size: int | None = None
    address: int | None = None

    def build(self) -> bytes:
        """The bytes of this entry: what is None is not there."""
        words = [word for word in (self.page_size, self.address) if word is not None]
        head = RamBlockHead(name=self.name, used_length=self.used_length).build()
        return head + b"".join(RamBlockWord(word=word).build() for word in words)


class BlockListHeader(Record):
    """Opens START: the sum of all lengths, with the flag MEM_SIZE in it."""

    word: int = wire(Int64ub)


class BlockList(Value):
    """All blocks that can migrate, largest first.  ``total`` is the sum of their lengths, in bytes."""

    total: int
    blocks: tuple[RamBlock, ...]

    def build(self) -> bytes:
        if self.total & _LOWEST_BITS:
            raise StreamError(f"BlockList can't be written: the total {self.total:#x} is not a multiple of 0x100")
        head = BlockListHeader(word=self.total | RamFlag.MEM_SIZE).build()
        return head + b"".join(block.build() for block in self.blocks)


class PageRun(NamedTuple):
    """Pages of one kind, one after the other in the block and in the stream.

    ``offset`` is where the first one's record begins in the stream, ``start`` its byte offset in the block.
    """

    offset: int
    flag: int  # RamFlag.PAGE or RamFlag.ZERO
    start: int
    page_count: int


class Pages(NamedTuple):
    """Page records of one block, one after the other in the stream, as runs.

    ``named`` says that the first record carries the block's name, all others continue; ``fill`` is the byte
    of its ZERO pages.
    """

    block: str
    named: bool
    page_size: int
    fill: int
    runs: Sequence[PageRun]

    def record_bytes(self, flag: int) -> int:
        """How long a record without a name is."""
        return 8 + (self.page_size if flag == RamFlag.PAGE else 1)


def read_pages(
    data: bytes, *, page_size: int, offset: int = 0, block: str | None = None
) -> Iterator[tuple[int, str, RamRecord]]:
    """Each page record of ``data`` in turn, by the declaration alone: (offset, block, record).

    The plain reader that ``pages.py`` is held to.  Raises ``StreamError``.
    """
    at = 0
    while at < len(data):
        record, used = RamRecord.read_prefix(data[at:], offset=offset + at, page_size=page_size)
        if not record.is_marker:
            block = record.block if record.block is not None else block
            if block is None:
                raise StreamError("the first page continues a block, and none was named", offset=offset + at)
            yield offset + at, block, record
        at += used
