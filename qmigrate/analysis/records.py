"""Each record of a stream as a plain value, for NDJSON; page runs as long as they are in the stream."""

from collections.abc import Iterable, Iterator
from typing import Any

from qmigrate.analysis.devices import plain
from qmigrate.analysis.payload import payload
from qmigrate.errors import StreamError
from qmigrate.format.command import Command
from qmigrate.format.mapped_ram import Gap, MappedBitmap, MappedBlock, MappedPages
from qmigrate.format.ram import BlockList, BlockListHeader, PageRun, Pages, RamBlock, RamFlag, RamRecord
from qmigrate.format.return_path import Message
from qmigrate.format.stream import EndOfFile, FileHeader, Footer, SectionHeader, SectionPart, VmDescriptionHeader
from qmigrate.format.walk import (
    Configuration,
    DeviceState,
    Entry,
    RamPage,
    StreamRecord,
    Trailing,
    Undecoded,
    VmDescription,
)

__all__ = ["coalesce", "describe_record", "record_name"]

_NO_VIEW = memoryview(b"")
_CHANNEL_NAMES = {"InitialPacket": "INITIAL", "PagePacket": "PAGES", "DeviceStatePacket": "DEVICE_STATE"}
_JOINED = (Pages, MappedPages, Gap, Trailing)


def coalesce(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The same records with each run of pages whole, one an entry, and so all that follows the stream's end,
    however the bytes arrived.

    Both come without their bytes.  Raises what ``entries`` raises, once all before it is given.
    """
    held: Entry | None = None
    try:
        for entry in entries:
            for single in _singles(entry):
                joined = None if held is None else _join(held, single)
                if joined is None and held is not None:
                    yield held
                held = joined or single
            if held is not None and not isinstance(held.record, _JOINED):
                yield held
                held = None
    except StreamError:
        if held is not None:
            yield held
        raise
    if held is not None:
        yield held


def _singles(entry: Entry) -> Iterable[Entry]:
    if isinstance(entry.record, Pages | MappedPages):
        return _single_runs(entry, entry.record)
    if isinstance(entry.record, Gap):
        return (entry._replace(view=_NO_VIEW),)
    if isinstance(entry.record, Trailing):
        return (entry._replace(record=Trailing(), view=_NO_VIEW),)
    return (entry,)


def _single_runs(entry: Entry, pages: Pages | MappedPages) -> Iterator[Entry]:
    end = entry.offset + entry.length
    for index, run in enumerate(pages.runs):
        after = pages.runs[index + 1].offset if index + 1 < len(pages.runs) else end
        single: Pages | MappedPages
        if isinstance(pages, MappedPages):
            single = pages._replace(runs=(run,), stale=0)
        else:
            single = pages._replace(named=pages.named and index == 0, runs=(run,))
        yield Entry(run.offset, after - run.offset, single, _NO_VIEW, entry.depth, entry.channel)


def _join(held: Entry, single: Entry) -> Entry | None:
    """Both as one run, where the second goes on where the first ends."""
    before, after = held.record, single.record
    if isinstance(before, Trailing) and isinstance(after, Trailing):
        return held._replace(length=held.length + single.length)
    if isinstance(before, Gap) and isinstance(after, Gap) and before.data is None and after.data is None:
        return held._replace(length=held.length + single.length, record=Gap(length=before.length + after.length))
    if isinstance(before, MappedPages) and isinstance(after, MappedPages):
        if not _goes_on(before, after):
            return None
    elif not (isinstance(before, Pages) and isinstance(after, Pages)) or (
        after.named
        or before.fill != after.fill
        or not _goes_on(before, after)
        or held.offset + held.length != single.offset
    ):
        return None
    if held.channel != single.channel:
        return None
    run, following = before.runs[0], after.runs[0]
    longer = PageRun(run.offset, run.flag, run.start, run.page_count + following.page_count)
    return held._replace(length=held.length + single.length, record=before._replace(runs=(longer,)))


def _goes_on(before: Pages | MappedPages, after: Pages | MappedPages) -> bool:
    """Is the second's first page the one behind the first's last, in the same block and of the same kind?"""
    run, following = before.runs[0], after.runs[0]
    return (before.block, run.flag, run.start + run.page_count * before.page_size) == (
        after.block,
        following.flag,
        following.start,
    )


def describe_record(entry: Entry) -> dict[str, Any]:
    """``offset``, ``length``, ``record`` (its kind) and its values; ``depth`` inside a package."""
    named = {"offset": entry.offset, "length": entry.length, "record": record_name(entry.record)}
    described: dict[str, Any] = named | _values(entry.record)
    if entry.depth:
        described["depth"] = entry.depth
    if entry.channel:
        described["channel"] = entry.channel
    return described


def record_name(record: StreamRecord) -> str:  # noqa: PLR0912 - one row a record
    """What kind of record it is, in QEMU's words: of a coalesced run of pages, PAGE or ZERO."""
    match record:
        case Pages(runs=(run, *_)) | MappedPages(runs=(run, *_)):
            return _flag_name(run.flag)
        case BlockListHeader():
            return "MEM_SIZE"
        case MappedBlock():
            return "BLOCK"
        case MappedBitmap():
            return "BITMAP"
        case Gap():
            return "GAP"
        case RamPage(record=page):
            return _flag_name(page.word.kind)
        case RamRecord(word=word):
            return _flag_name(word.flags)
        case SectionHeader() | SectionPart():
            return record.kind.name
        case Command():
            return record.name
        case FileHeader():
            return "HEADER"
        case Configuration():
            return "CONFIGURATION"
        case BlockList():
            return "MEM_SIZE"
        case Footer():
            return "FOOTER"
        case DeviceState():
            return "STATE"
        case Undecoded():
            return "UNDECODED"
        case EndOfFile():
            return "EOF"
        case VmDescriptionHeader():
            return "VMDESCRIPTION"
        case VmDescription():
            return "DESCRIPTION"
        case Trailing():
            return "TRAILING"
        case Message():
            return record.name
        case _:
            return _CHANNEL_NAMES.get(type(record).__name__, type(record).__name__)


def _flag_name(flags: int) -> str:
    return RamFlag(flags).name or "RAM"


def _values(record: StreamRecord) -> dict[str, Any]:  # noqa: PLR0912 - one row a record
    match record:
        case Pages(runs=runs):
            return _pages(record, runs[0])
        case MappedPages(block=block, runs=(run, *_)):
            return {"block": block, "start": run.start, "page_count": run.page_count}
        case BlockListHeader():
            return {"total": record.word & ~0xFF}
        case MappedBlock(block=listed, header=header):
            return {**_fields(listed), **_fields(header), "page_size": header.page_size}
        case MappedBitmap(block=block):
            return {"block": block, "first_page": record.first_page, "page_count": record.bits.bit_count()}
        case Gap():
            return {"zero": record.data is None}
        case FileHeader():
            return {"version": record.version}
        case Configuration():
            subsections = [
                {"name": item.header.name, "version": item.header.version, "body": plain(item.body)}
                for item in record.subsections
            ]
            return {"machine_type": record.machine_type, "subsections": subsections}
        case SectionHeader() | SectionPart():
            return {name: value for name, value in _fields(record).items() if name != "kind"}
        case Footer():
            return {"section_id": record.section_id}
        case Command():
            return payload(record)
        case BlockList():
            return {"total": record.total, "blocks": plain(record.blocks)}
        case RamPage(block=block, record=page):
            return {"block": block, "start": page.word.start, "named": page.block is not None}
        case DeviceState(state=state):
            return {"vmsd_name": state.vmsd_name, "fields": plain(state)}
        case Undecoded(reason=reason):
            return {"reason": reason}
        case VmDescriptionHeader():
            return {"text_length": record.length}
        case Message():
            return {name: value for name, value in _fields(record).items() if name not in ("bitmap", "end_mark")}
        case RamRecord() | EndOfFile() | VmDescription() | Trailing():
            return {}
        case _ if type(record).__name__ in _CHANNEL_NAMES:
            return _packet(record)
        case _:
            return _fields(record)


def _packet(record: StreamRecord) -> dict[str, Any]:
    """A packet of a multifd channel: its header, without the table of offsets and what is left over in it."""
    from qmigrate.format.multifd import DeviceStatePacket, InitialPacket, PagePacket

    match record:
        case InitialPacket(channel_id=channel_id, uuid=uuid):
            return {"channel_id": channel_id, "uuid": uuid.hex()}
        case DeviceStatePacket(header=header):
            return {"name": header.idstr, "instance_id": header.instance_id, "data_length": header.next_packet_size}
        case PagePacket(header=header):
            said: dict[str, Any] = {"packet_num": header.packet_num, "sync": header.is_sync}
            if header.normal_pages or header.zero_pages:
                said |= {
                    "block": header.block,
                    "normal": header.normal_pages,
                    "zero": header.zero_pages,
                    "compression": header.compression.name.lower(),
                    "data_length": header.data_length,
                }
            return said
        case _:
            return {}


def _fields(record: "StreamRecord | RamBlock") -> dict[str, Any]:
    fields = plain(record)
    return fields if isinstance(fields, dict) else {}


def _pages(pages: Pages, run: PageRun) -> dict[str, Any]:
    described: dict[str, Any] = {
        "block": pages.block,
        "start": run.start,
        "page_count": run.page_count,
        "named": pages.named,
    }
    if pages.fill:
        described["fill"] = pages.fill
    return described
