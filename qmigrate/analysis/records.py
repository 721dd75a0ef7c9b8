"""Each record of a stream as a plain value, for NDJSON; page runs as long as they are in the stream."""

from collections.abc import Iterable, Iterator
from typing import Any

from qmigrate.analysis.devices import plain
from qmigrate.analysis.summary import payload
from qmigrate.format.command import Command
from qmigrate.format.ram import BlockList, PageRun, Pages, RamFlag, RamRecord
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

__all__ = ["coalesce", "describe_record"]

_NO_VIEW = memoryview(b"")


def coalesce(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The same records with each run of pages whole, one an entry, however the bytes arrived.

    Entries of pages come without their bytes.
    """
    held: Entry | None = None
    for entry in entries:
        if not isinstance(entry.record, Pages):
            if held is not None:
                yield held
                held = None
            yield entry
            continue
        for single in _single_runs(entry, entry.record):
            joined = None if held is None else _join(held, single)
            if joined is None and held is not None:
                yield held
            held = joined or single
    if held is not None:
        yield held


def _single_runs(entry: Entry, pages: Pages) -> Iterator[Entry]:
    end = entry.offset + entry.length
    for index, run in enumerate(pages.runs):
        after = pages.runs[index + 1].offset if index + 1 < len(pages.runs) else end
        single = pages._replace(named=pages.named and index == 0, runs=(run,))
        yield Entry(run.offset, after - run.offset, single, _NO_VIEW, entry.depth)


def _join(held: Entry, single: Entry) -> Entry | None:
    """Both as one run, where the second goes on where the first ends."""
    before, after = held.record, single.record
    assert isinstance(before, Pages)
    assert isinstance(after, Pages)
    run, following = before.runs[0], after.runs[0]
    if (
        after.named
        or (before.block, before.fill, run.flag) != (after.block, after.fill, following.flag)
        or run.start + run.page_count * before.page_size != following.start
        or held.offset + held.length != single.offset
    ):
        return None
    longer = PageRun(run.offset, run.flag, run.start, run.page_count + following.page_count)
    return held._replace(length=held.length + single.length, record=before._replace(runs=(longer,)))


def describe_record(entry: Entry) -> dict[str, Any]:
    """``offset``, ``length``, ``record`` (its kind) and its values; ``depth`` inside a package."""
    kind, values = _described(entry.record)
    described = {"offset": entry.offset, "length": entry.length, "record": kind, **values}
    if entry.depth:
        described["depth"] = entry.depth
    return described


def _described(record: StreamRecord) -> tuple[str, dict[str, Any]]:  # noqa: PLR0912 - one row a record
    match record:
        case Pages(runs=runs):
            return "PAGES", _pages(record, runs[0])
        case FileHeader():
            return "HEADER", {"version": record.version}
        case Configuration():
            subsections = [
                {"name": item.header.name, "version": item.header.version, "body": plain(item.body)}
                for item in record.subsections
            ]
            return "CONFIGURATION", {"machine_type": record.machine_type, "subsections": subsections}
        case SectionHeader() | SectionPart():
            fields = plain(record)
            assert isinstance(fields, dict)
            return record.kind.name, {name: value for name, value in fields.items() if name != "kind"}
        case Footer():
            return "FOOTER", {"section_id": record.section_id}
        case Command():
            return record.name, payload(record)
        case BlockList():
            return "MEM_SIZE", {"total": record.total, "blocks": plain(record.blocks)}
        case RamRecord():
            return RamFlag(record.word.flags).name or "RAM", {}
        case RamPage(block=block, record=page):
            kind = RamFlag(page.word.kind).name or "PAGE"
            return kind, {"block": block, "start": page.word.start, "named": page.block is not None}
        case DeviceState(state=state):
            return "STATE", {"vmsd_name": state.vmsd_name, "fields": plain(state)}
        case Undecoded(reason=reason):
            return "UNDECODED", {"reason": reason}
        case EndOfFile():
            return "EOF", {}
        case VmDescriptionHeader():
            return "VMDESCRIPTION", {"text_length": record.length}
        case VmDescription():
            return "DESCRIPTION", {}
        case Trailing():
            return "TRAILING", {}
        case _:
            fields = plain(record)
            return type(record).__name__, fields if isinstance(fields, dict) else {}


def _pages(pages: Pages, run: PageRun) -> dict[str, Any]:
    described: dict[str, Any] = {
        "block": pages.block,
        "kind": "normal" if run.flag == RamFlag.PAGE else "zero",
        "start": run.start,
        "page_count": run.page_count,
        "named": pages.named,
    }
    if pages.fill:
        described["fill"] = pages.fill
    return described
