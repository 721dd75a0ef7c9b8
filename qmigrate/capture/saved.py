"""What a saved migration is restored from: the index of its pages, and all the rest as bytes that go out verbatim.

Only CONFIGURATION and RAM's own framing are made anew: what belongs to the file and not to the guest is dropped
(mapped-ram and its headers, commands, parts of RAM), so that what is left can be sent over any connection, to any QEMU
that has the machine.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any, Final

from qmigrate.capture.index import PageIndex
from qmigrate.capture.kind import MOST_FILES
from qmigrate.capture.migration import Migration
from qmigrate.capture.places import Channels, Input
from qmigrate.capture.readable import took_hole
from qmigrate.capture.readers import FileReader
from qmigrate.capture.saved_guest import SavedGuest
from qmigrate.errors import NoStreamError, RefusedError, StreamError, UnsupportedError, counted
from qmigrate.format.command import Command
from qmigrate.format.entry import Configuration, DeviceState, Entry, Trailing, Undecoded, VmDescription
from qmigrate.format.feed import Feed
from qmigrate.format.mapped_ram import MappedBlock
from qmigrate.format.ram import BlockList, BlockListHeader, Pages, RamRecord
from qmigrate.format.stream import (
    CapabilityName,
    ConfigurationCapabilities,
    EndOfFile,
    FileHeader,
    Footer,
    SectionHeader,
    SectionPart,
    SectionType,
    VmDescriptionHeader,
)
from qmigrate.format.tail import Chooser
from qmigrate.format.vm_state import VmState
from qmigrate.format.vmdesc import Description
from qmigrate.format.walk import Walker
from qmigrate.format.write import encode

__all__ = ["read_saved"]

_OF_FILE: Final = "mapped-ram"
_CANT_BE: Final = "x-ignore-shared"
_MOST_ABSENT: Final = 1 << 28  # pages: those of a TiB that virtio-mem could plug in
_MOST_ABSENT_EACH: Final = 1 << 12  # for each page that came, where these are more
_BLOCK: Final = "block"  # disks' contents, until 9.0


def read_saved(migration: Migration, *, spill: IO[bytes] | None = None) -> SavedGuest:
    """All of it, in one pass.  Raises ``StreamError`` where the stream is damaged or ends early, ``RefusedError`` where
    it is none that a guest can be restored from.  ``spill`` is the index's.
    """
    place = None if migration.parts else migration.source.in_place
    if place is None:
        index = PageIndex(None, channels=_channels(migration), spill=spill)
    else:
        index = PageIndex(place[0], base=place[1], spill=spill, by_bitmaps=True)
    saved = SavedGuest(index)
    try:
        known = migration.known_description
        entries = migration.entries() if place is None else _without_contents(*place, known)
        _Reading(saved, index).take_all(entries)
        _check(saved)
    except BaseException:
        saved.index.close()
        raise
    return saved


def _channels(migration: Migration) -> Channels:
    """In which input each stands, and where."""
    sources = migration.sources[:MOST_FILES]  # what is in more of them is spilled
    inputs: list[Input | None] = [None] * len(sources)
    places = {}
    for channel, part in enumerate(migration.parts):
        found = part.readable.places
        # Of a recording all parts are in the first.
        number = next((number for number, source in enumerate(migration.sources) if source is part.readable), 0)
        if found is not None and number < len(inputs):
            inputs[number] = inputs[number] or Input.of(found.descriptor)
            places[channel] = (number, found)
    return Channels(inputs, places)


class _Sparing(FileReader):
    """A file from a position on, whose ``spared`` part is not read: what is in the buffer stands for it."""

    _spared = (0, 0)

    def spare(self, start: int, end: int) -> None:
        """As far as the file goes: what is cut off is missing, whether it would be read or not."""
        self._spared = (start, min(end, os.fstat(self._descriptor).st_size))

    def readinto(self, buffer: Any, /) -> int:
        start, end = self._spared
        if not start <= self.position < end:
            return super().readinto(buffer)
        count = min(len(buffer), end - self.position)
        self.position += count
        return count


def _without_contents(descriptor: int, start: int, known: Description | Chooser | None) -> Iterator[Entry]:
    """The walk of a file, the pages of mapped-ram unread: where they are is known from their bitmap.

    So ``MappedPages`` have no runs, and of their views nothing is true but their length.  Raises ``StreamError``.
    """
    feed, reader = Feed(), _Sparing(descriptor, start)
    walker = Walker(feed, description=known)
    walker.reads_mapped = False
    try:
        for entry in walker.run():
            if entry is None:
                _fill(feed, reader)
                continue
            if isinstance(entry.record, MappedBlock) and not entry.record.is_left_out:
                header, end = entry.record.header, entry.offset + entry.length
                pages = start + header.pages_offset - (header.bitmap_offset - end)
                reader.spare(pages, pages + entry.record.block.used_length)
            yield entry
    except NoStreamError as exc:
        from qmigrate.capture.other import no_stream  # most inputs are streams

        better = no_stream(feed)
        if better is None:
            raise
        raise better from exc


def _fill(feed: Feed, reader: _Sparing) -> None:
    if took_hole(feed, reader):
        return
    try:
        count = reader.readinto(feed.space())
    except OSError as exc:
        raise StreamError(f"the input can't be read on: {exc.strerror}", offset=feed.offset) from exc
    feed.received(count)
    if not count:
        feed.end()


def _check(saved: SavedGuest) -> None:
    """Raises ``RefusedError`` where a guest restored from it would not be the one that was saved."""
    if not saved.blocks:
        raise RefusedError("there is no RAM in it")
    if not saved.devices:
        raise RefusedError("there is no device state in it")
    for block in saved.blocks:
        page_count = block.used_length // saved.page_size
        absent = saved.index.absent(block.name)
        if not absent:
            continue
        # A guest with a balloon may tell which pages it does not use (free-page-hint), and what virtio-mem has not
        # plugged in is no memory: these alone are never sent.
        is_unplugged = block.name.rpartition("/")[0] in saved.virtio_mems
        if not is_unplugged and (absent == page_count or not saved.has_balloon):
            raise RefusedError(
                f"{absent} of {page_count} pages of {block.name} are not in it: are there further channels "
                "(multifd, preempt), or was it begun as postcopy elsewhere?"
            )
        saved.absent += absent
    there = sum(block.used_length // saved.page_size for block in saved.blocks) - saved.absent
    if saved.absent > max(_MOST_ABSENT, _MOST_ABSENT_EACH * there):
        raise RefusedError(
            f"its blocks have {counted(saved.absent, 'pages')} that are not in it, and {there} that are: to serve so "
            "many takes memory for each"
        )


class _Reading:
    """What one pass has found."""

    def __init__(self, saved: SavedGuest, index: PageIndex) -> None:
        self._saved = saved
        self._index = index
        self._parts: dict[str, list[bytes | bytearray]] = {"before": [], "behind": [], "devices": []}
        self._names: dict[int, str] = {}
        self._open = ""  # the section that the next records belong to
        self._is_device = False
        self._after_ram = False
        self._ended = False

    def take_all(self, entries: Iterator[Entry]) -> None:
        for entry in entries:
            self._index.take(entry)
            self._ended |= isinstance(entry.record, EndOfFile)  # of a resumed postcopy on a later channel
            if not entry.channel:
                self._take(entry)
        for name, parts in self._parts.items():
            setattr(self._saved, name, b"".join(parts))
        self._saved.blocks = [replace(block, page_size=None) for block in self._saved.index.blocks.values()]
        if not self._ended:
            raise StreamError("it has no end: the guest was not saved whole")

    def _take(self, entry: Entry) -> None:
        saved, record = self._saved, entry.record
        match record:
            case FileHeader():
                saved.opening += bytes(entry.view)
            case Configuration():
                saved.machine_type = record.machine_type
                saved.opening += bytes(encode(_configuration(record, entry.offset)))
            case Command() | RamRecord() | Pages() | BlockList() | BlockListHeader() | EndOfFile() | Trailing():
                pass
            case SectionHeader():
                self._header(record, entry)
            case SectionPart():
                self._open = self._names[record.section_id]
                self._keep(entry)
            case Footer(section_id=section_id) if self._names.get(section_id) == "ram":
                saved.footers = True
            case VmDescriptionHeader() | VmDescription():
                saved.description += bytes(entry.view)
            case Undecoded() if self._open == "ram":
                # Sections that could not be told apart, right behind RAM: no header of theirs came.
                self._open, self._is_device = "", True
                self._keep(entry)
            case DeviceState(state=state):
                self._keep(entry)
                if self._open == "globalstate":
                    saved.was_running = _was_running(state)
            case _:
                self._keep(entry)

    def _header(self, header: SectionHeader, entry: Entry) -> None:
        self._names[header.section_id] = self._open = header.idstr
        if header.idstr == _BLOCK:
            raise RefusedError("it carries disks (the capability block of QEMU until 9.0), which can't be restored so")
        if header.idstr == "ram":
            self._saved.section_id, self._after_ram = header.section_id, True
        self._is_device = header.kind == SectionType.FULL
        device, _, kind = header.idstr.rpartition("/")
        self._saved.has_balloon |= kind == "virtio-balloon"
        if kind in ("virtio-mem", "virtio-mem-early"):
            self._saved.virtio_mems.add(device)
        self._keep(entry)

    def _keep(self, entry: Entry) -> None:
        if self._open == "ram":
            return  # its records are the index's
        where = "devices" if self._is_device else "behind"
        self._parts[where if self._after_ram else "before"].append(bytes(entry.view))


def _configuration(record: Configuration, offset: int) -> Configuration:
    """Without what is so only of a file; a subsection that then says nothing is left out."""
    kept = []
    for subsection in record.subsections:
        body = subsection.body
        if isinstance(body, ConfigurationCapabilities):
            names = [name.name for name in body.names if name.name != _OF_FILE]
            if _CANT_BE in names:
                raise UnsupportedError(
                    f"saved with {_CANT_BE}: RAM that was shared is not in it", offset=offset, trail=("configuration",)
                )
            if not names:
                continue
            listed = tuple(CapabilityName(name=name) for name in names)
            body = ConfigurationCapabilities(count=len(listed), names=listed)
        kept.append(replace(subsection, body=body))
    return replace(record, subsections=tuple(kept))


def _was_running(state: VmState) -> bool | None:
    """By the run state's name that the device globalstate carries.  migration/global_state.c"""
    for each in state.fields:
        if each.name == "runstate" and isinstance(each.value, bytes):
            return each.value.split(b"\0")[0] == b"running"
    return None
