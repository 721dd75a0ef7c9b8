"""Small migration streams, put together piece by piece.

Each function gives the bytes of one piece; joined, they are a stream: ``header() + configuration() + ...``.
``minimal()`` and ``postcopy()`` are whole ones.
"""

import json
import struct
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

from qmigrate.format.command import (
    Command,
    DiscardRange,
    OpenReturnPath,
    Packaged,
    PageSizes,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRamDiscard,
    PostcopyRun,
    encode_command,
)
from qmigrate.format.mapped_ram import MappedRamHeader
from qmigrate.format.ram import (
    BlockList,
    BlockListHeader,
    CompressedPage,
    NormalPage,
    RamBlock,
    RamFlag,
    RamRecord,
    RamWord,
    ZeroPage,
)
from qmigrate.format.ram import XbzrlePage as XbzrleBody
from qmigrate.format.stream import (
    MAGIC,
    VERSION,
    CapabilityName,
    ConfigurationCapabilities,
    ConfigurationHeader,
    ConfigurationTargetPageBits,
    EndOfFile,
    FileHeader,
    Footer,
    SectionHeader,
    SectionPart,
    SectionType,
    SubsectionHeader,
    VmDescriptionHeader,
)

PAGE = 4096
RAM_ID = 2
BLOCKS = {"pc.ram": 16 * PAGE, "pc.rom": 2 * PAGE}

# -- the frame


def header(*, magic: int = MAGIC, version: int = VERSION) -> bytes:
    return FileHeader(magic=magic, version=version).build()


def configuration(
    machine_type: str = "pc-q35-10.0", *, page_bits: int | None = None, capabilities: Sequence[str] = ()
) -> bytes:
    name = machine_type.encode("utf-8", "surrogateescape")
    parts = [ConfigurationHeader(length=len(name)).build(), name]
    if page_bits is not None:
        parts.append(SubsectionHeader(name="configuration/target-page-bits", version=1).build())
        parts.append(ConfigurationTargetPageBits(target_page_bits=page_bits).build())
    if capabilities:
        parts.append(SubsectionHeader(name="configuration/capabilities", version=1).build())
        names = tuple(CapabilityName(name=capability) for capability in capabilities)
        parts.append(ConfigurationCapabilities(count=len(names), names=names).build())
    return b"".join(parts)


def command(payload: Command) -> bytes:
    return encode_command(payload)


def package(*parts: bytes) -> bytes:
    """PACKAGED, and what it holds."""
    contents = b"".join(parts)
    return command(Packaged(length=len(contents))) + contents


def section(kind: SectionType, name: str, *, section_id: int, instance_id: int = 0, version_id: int = 1) -> bytes:
    """The header of START or FULL."""
    return SectionHeader(
        kind=kind, section_id=section_id, idstr=name, instance_id=instance_id, version_id=version_id
    ).build()


def footer(section_id: int) -> bytes:
    return Footer(section_id=section_id).build()


def eof() -> bytes:
    return EndOfFile().build()


# -- RAM


def ram_start(
    blocks: Mapping[str, int] | Sequence[RamBlock] = BLOCKS, *, section_id: int = RAM_ID, footers: bool = True
) -> bytes:
    """START with its block list and EOS; ``blocks`` are names and lengths in bytes."""
    if isinstance(blocks, Mapping):
        blocks = [RamBlock(name=name, used_length=length) for name, length in blocks.items()]
    listed = BlockList(total=sum(block.used_length for block in blocks), blocks=tuple(blocks))
    return (
        section(SectionType.START, "ram", section_id=section_id, version_id=4)
        + listed.build()
        + eos()
        + (footer(section_id) if footers else b"")
    )


def mapped_ram_start(
    pages: Mapping[str, Sequence[bytes | None]],
    *,
    gap: int = 2 * PAGE,
    base: int = 0,
    begin: int = 0,
    addresses: bool = False,
    left_out: Collection[str] = (),
) -> bytes:
    """START of a mapped-ram stream: of each block its pages, None where one has no contents.

    ``begin`` is where START stands in the stream, ``base`` where the stream stands in its file; the pages stand at
    a multiple of ``gap`` (QEMU: 1 MiB).  With x-ignore-shared there are ``addresses``, and blocks are ``left_out``.
    """
    out = bytearray(section(SectionType.START, "ram", section_id=RAM_ID, version_id=4))
    total = sum(len(each) for each in pages.values()) * PAGE
    out += BlockListHeader(word=total | RamFlag.MEM_SIZE).build()
    for name, contents in pages.items():
        out += RamBlock(name=name, used_length=len(contents) * PAGE, address=0 if addresses else None).build()
        if name in left_out:
            out += MappedRamHeader(version=1, page_size=PAGE, bitmap_offset=0, pages_offset=0).build()
            continue
        bits = sum(1 << index for index, page in enumerate(contents) if page is not None)
        at = base + begin + len(out) + 28
        bitmap = bits.to_bytes(-(-len(contents) // 64) * 8, "little")
        place = -(-(at + len(bitmap)) // gap) * gap
        out += MappedRamHeader(version=1, page_size=PAGE, bitmap_offset=at, pages_offset=place).build()
        out += bitmap + bytes(place - at - len(bitmap))
        out += b"".join(bytes(PAGE) if page is None else page for page in contents)
    return bytes(out) + eos() + footer(RAM_ID)


def ram_part(
    *records: bytes, kind: SectionType = SectionType.PART, section_id: int = RAM_ID, footers: bool = True
) -> bytes:
    """PART with these records and EOS."""
    opening = SectionPart(kind=kind, section_id=section_id).build()
    return b"".join([opening, *records, eos(), footer(section_id) if footers else b""])


def ram_end(*records: bytes, section_id: int = RAM_ID, footers: bool = True) -> bytes:
    return ram_part(*records, kind=SectionType.END, section_id=section_id, footers=footers)


def _record(start: int, flag: int, block: str | None, body: Any = None, *, page_size: int = PAGE) -> bytes:
    flags = flag if block is not None or body is None else flag | RamFlag.CONTINUE
    return RamRecord(word=RamWord(start, flags), block=block, body=body).build(page_size=page_size)


def page(start: int, contents: bytes | None = None, *, block: str | None = None, page_size: int = PAGE) -> bytes:
    """A normal page at ``start`` bytes in its block, which it names where ``block`` is given."""
    contents = struct.pack(">Q", start) * (page_size // 8) if contents is None else contents
    return _record(start, RamFlag.PAGE, block, NormalPage(contents=contents), page_size=page_size)


def zero(start: int, count: int = 1, *, block: str | None = None, fill: int = 0, page_size: int = PAGE) -> bytes:
    """``count`` zero pages, the first of which may name its block."""
    starts = range(start, start + count * page_size, page_size)
    records = [
        _record(at, RamFlag.ZERO, block if at == start else None, ZeroPage(fill=fill), page_size=page_size)
        for at in starts[:2]
    ]
    if len(starts) > 2:  # like the second but for where they are; a hundred times as fast
        word, rest = int.from_bytes(records[1][:8]) - starts[1], records[1][8:]
        records += [(word + at).to_bytes(8) + rest for at in starts[2:]]
    return b"".join(records)


def xbzrle(start: int, data: bytes, *, block: str | None = None, page_size: int = PAGE) -> bytes:
    body = XbzrleBody(encoding=1, length=len(data), data=data)
    return _record(start, RamFlag.XBZRLE, block, body, page_size=page_size)


def compressed(start: int, data: bytes, *, block: str | None = None, page_size: int = PAGE) -> bytes:
    body = CompressedPage(length=len(data), data=data)
    return _record(start, RamFlag.COMPRESS_PAGE, block, body, page_size=page_size)


@cache
def eos() -> bytes:
    return _record(0, RamFlag.EOS, None)


# -- devices


def device(
    name: str,
    data: bytes = b"",
    *,
    section_id: int,
    instance_id: int = 0,
    version_id: int = 1,
    footer_id: int | None = None,
    footers: bool = True,
) -> bytes:
    """A FULL section; its footer names ``footer_id`` where that is given."""
    opening = section(SectionType.FULL, name, section_id=section_id, instance_id=instance_id, version_id=version_id)
    return opening + data + (footer(section_id if footer_id is None else footer_id) if footers else b"")


def field(name: str, kind: str, size: int, **more: Any) -> dict[str, Any]:
    """An entry of the description; ``more`` is ``array_len``, ``index`` or ``struct``."""
    return {"name": name, **more, "type": kind, "size": size}


def struct_of(vmsd_name: str, *fields: dict[str, Any], subsections: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    described: dict[str, Any] = {"vmsd_name": vmsd_name, "version": 1, "fields": list(fields)}
    return described | ({"subsections": list(subsections)} if subsections else {})


def described(name: str, *fields: dict[str, Any], instance_id: int = 0, **more: Any) -> dict[str, Any]:
    """A device's entry of the description."""
    return {"name": name, "instance_id": instance_id, **struct_of(name.rpartition("/")[2], *fields, **more)}


def description(*devices: dict[str, Any], page_size: int = PAGE) -> bytes:
    """VMDESCRIPTION with its JSON."""
    text = json.dumps({"configuration": struct_of("configuration"), "page_size": page_size, "devices": devices})
    return VmDescriptionHeader(length=len(text)).build() + text.encode()


# -- whole streams

TIMER_FIELDS = (field("cpu_ticks_offset", "int64", 8), field("unused", "unused_buffer", 8), field("flag", "bool", 1))
TIMER_STATE = struct.pack(">q8s?", -5, bytes(8), True)
LINE = struct_of("line", field("level", "uint8", 1), field("irq", "uint8", 1))
SERIAL_FIELDS = (
    field("divider", "uint16", 2),
    field("fifo", "uint8", 1, array_len=16),
    field("id", "buffer", 12),
    field("lines", "struct", 2, array_len=3, struct=LINE),
)
SERIAL_STATE = struct.pack(">H16s12s6B", 0x1234, bytes(16), b"serial\0\1\2\3\4\5", 1, 4, 0, 3, 0, 3)


def devices() -> bytes:
    """Two devices, one of them on a bus."""
    return device("timer", TIMER_STATE, section_id=0, version_id=2) + device(
        "0000:00:04.0/serial", SERIAL_STATE, section_id=7, instance_id=1, version_id=3
    )


def devices_described() -> bytes:
    return description(
        described("timer", *TIMER_FIELDS), described("0000:00:04.0/serial", *SERIAL_FIELDS, instance_id=1)
    )


def ram(*, passes: int = 2) -> bytes:
    """All pages of ``BLOCKS`` in the first pass, two again in each that follows, the last of them in END."""
    first = ram_part(
        zero(0, 4, block="pc.ram"),
        page(4 * PAGE),
        page(5 * PAGE),
        zero(6 * PAGE, 10),
        page(0, block="pc.rom"),
        zero(PAGE),
    )
    again = (page(4 * PAGE, block="pc.ram"), page(5 * PAGE))
    return first + ram_part(*again) * max(passes - 2, 0) + ram_end(*(again if passes > 1 else ()))


def minimal() -> bytes:
    """A whole precopy stream: two RAM blocks, two passes, two devices, all decoded."""
    return header() + configuration() + ram_start() + ram() + devices() + eof() + devices_described()


def postcopy() -> bytes:
    """A whole postcopy stream: what is in the package has no description."""
    return b"".join(
        (
            header(),
            configuration(),
            command(OpenReturnPath()),
            command(Ping(token=1)),
            command(PostcopyAdvise(sizes=PageSizes(summary=PAGE, target_page_size=PAGE))),
            ram_start(),
            ram_part(zero(0, 16, block="pc.ram")),
            command(PostcopyRamDiscard(block="pc.ram", ranges=(DiscardRange(start=PAGE, length=2 * PAGE),))),
            command(PostcopyRamDiscard(block="pc.rom", ranges=(DiscardRange(start=0, length=2 * PAGE),))),
            command(Ping(token=2)),
            package(
                command(PostcopyListen()),
                devices(),
                command(Ping(token=3)),
                command(Ping(token=0x42)),
                command(PostcopyRun()),
            ),
            command(Ping(token=4)),
            ram_part(page(PAGE, block="pc.ram"), page(2 * PAGE), zero(0, 2, block="pc.rom")),
            ram_end(),
            eof(),
        )
    )
