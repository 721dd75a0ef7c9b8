"""The two ends of a plain stream in a file, read by offsets: what stands before RAM's pages, and what behind them.

To restore a saved guest at once they must be had without reading all that is between, and without the declarations of
``format``, which take longer to import than to read a gigabyte.  So here is read what a QEMU writes into a file that
holds nothing out of the ordinary, by ``struct`` alone; whatever else there may be is ``NotPlainError``, and then
``saved.read_saved`` reads it, or says what is wrong.  Both are proven equal by tests/capture/test_plain.py.

The sections behind RAM are found from the description at the end, which names them in their order: each ends with the
footer of its id, before which its own header stands; RAM's footer is before the first.

migration/savevm.c: qemu_savevm_state_header(), qemu_savevm_state_complete_precopy_non_iterable()
"""

import json
import os
import re
import struct
from dataclasses import dataclass
from typing import Final

from qmigrate.errors import QmigrateError
from qmigrate.format.ram_flag import RamFlag

__all__ = ["Head", "NotPlainError", "Tail", "read_head", "read_tail"]

_OPENING: Final = b"QEVM\0\0\0\3"
_CONFIGURATION, _SUBSECTION, _FOOTER = b"\x07", b"\x05", b"\x7e"
_START, _FULL = b"\x01", b"\x04"
_WORD: Final = struct.Struct(">Q")
_LENGTH: Final = struct.Struct(">I")
_RAM_HEADER: Final = struct.Struct(">B3sII")  # behind the section's id
_RAM_VERSION: Final = 4
_PAGE_BYTES: Final = 4096
_END_OF_RECORDS: Final = _WORD.pack(int(RamFlag.EOS))
_SHORTEST_RECORD: Final = 9
_FOOTER_BYTES: Final = 5
_LONGEST_HEAD: Final = 1 << 16
_FIRST_LOOK: Final = 1 << 20  # bytes of the tail: most guests' devices are no longer
_LONGEST_TAIL: Final = 1 << 26
_LONGEST_DESCRIPTION: Final = 1 << 22
_MORE_LOOKS: Final = 64  # for headers, than there are devices: only a hostile tail needs as many
_DESCRIPTION: Final = re.compile(rb"\x7e(?s:.{4})\x00\x06((?s:.{4}))\{")
_BALLOON: Final = b"virtio-balloon"
_UNPLUGGED: Final = (b"virtio-mem", b"virtio-mem-early")
_STATE_AT: Final = 4  # where globalstate has the name of the run state, behind its length
_STATE_BYTES: Final = 100


class NotPlainError(QmigrateError):
    """It is not what can be read in this way; maybe it is in order."""


@dataclass(frozen=True)
class Head:
    """What stands before the pages.  ``opening``: FileHeader and CONFIGURATION; ``blocks``: lengths in bytes, in their
    order; ``pages_at``: where RAM's first PART begins.
    """

    opening: bytes
    machine_type: str | None
    section_id: int
    blocks: dict[str, int]
    pages_at: int

    @property
    def closing(self) -> bytes:
        """What ends each of RAM's sections: EOS and a footer."""
        return _END_OF_RECORDS + _FOOTER + _LENGTH.pack(self.section_id)


@dataclass(frozen=True)
class Tail:
    """What stands behind them; the fields are those of ``SavedGuest``.  ``devices_at``: where sections begin."""

    devices_at: int
    devices: bytes
    description: bytes
    was_running: bool | None
    has_balloon: bool
    virtio_mems: frozenset[str]


def read_head(descriptor: int) -> Head:
    """Raises ``NotPlainError``, ``OSError``."""
    data = os.pread(descriptor, _LONGEST_HEAD, 0)
    try:
        return _head(data)
    except (struct.error, IndexError) as exc:
        raise NotPlainError("it ends, or goes on for long, before the first page") from exc


def _head(data: bytes) -> Head:
    at = len(_OPENING)
    _expect(data[:at] == _OPENING, "the header of a stream")
    machine_type = None
    if data[at : at + 1] == _CONFIGURATION:
        (length,) = _LENGTH.unpack_from(data, at + 1)
        at += 5 + length
        machine_type = data[at - length : at].decode("utf-8", "surrogateescape")
        # What a subsection says may have to be rewritten.
        _expect(data[at : at + 1] != _SUBSECTION, "a configuration that is a machine's name")
    opening = data[:at]
    _expect(data[at : at + 1] == _START, "RAM's START")
    (section_id,) = _LENGTH.unpack_from(data, at + 1)
    _expect(_RAM_HEADER.unpack_from(data, at + 5) == (3, b"ram", 0, _RAM_VERSION), "RAM's START")
    blocks, at = _blocks(data, at + 5 + _RAM_HEADER.size)
    head = Head(opening, machine_type, section_id, blocks, at + len(_END_OF_RECORDS) + _FOOTER_BYTES)
    _expect(data[at : head.pages_at] == head.closing, "the end of RAM's START")
    return head


def _blocks(data: bytes, at: int) -> tuple[dict[str, int], int]:
    (word,) = _WORD.unpack_from(data, at)
    _expect(word % _PAGE_BYTES == RamFlag.MEM_SIZE, "a block list of pages of 4096 bytes")
    left, at, blocks = word - RamFlag.MEM_SIZE, at + 8, dict[str, int]()
    while left:
        end = at + 1 + data[at]
        name = data[at + 1 : end].decode("utf-8", "surrogateescape")
        (length,) = _WORD.unpack_from(data, end)
        _expect(bool(name) and name not in blocks and 0 < length <= left, "another block")
        _expect(length % _PAGE_BYTES == 0, "a block of whole pages")
        blocks[name], left, at = length, left - length, end + 8
    return blocks, at


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise NotPlainError(f"it is not {what}")


# -- the other end


def read_tail(descriptor: int, head: Head) -> Tail:
    """Raises ``NotPlainError``, ``OSError``; also where the blocks have more pages than there is room for records."""
    size = os.fstat(descriptor).st_size
    _expect(sum(head.blocks.values()) // _PAGE_BYTES * _SHORTEST_RECORD <= size, "a guest of which every page was sent")
    look = _FIRST_LOOK
    while True:
        begin = max(size - look, head.pages_at)
        data = os.pread(descriptor, size - begin, begin)
        _expect(len(data) == size - begin, "as long as it was")
        found = _tail(data, begin, head)
        if found is not None:
            return found
        _expect(begin > head.pages_at and look < _LONGEST_TAIL, "device state as its description has it")
        look *= 4


def _tail(data: bytes, begin: int, head: Head) -> Tail | None:
    """None where more of it may help."""
    at = _description_at(data)
    if at is None:
        return None
    try:
        said = json.loads(data[at + 5 :])
        devices = said["devices"]
        names = [str(each["name"]).encode("utf-8", "surrogateescape") for each in devices]
        instances = [_LENGTH.pack(each["instance_id"]) for each in devices]
        headers = [bytes([len(name)]) + name + instance for name, instance in zip(names, instances, strict=True)]
        page_size = said.get("page_size")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as exc:
        raise NotPlainError("its description is no list of devices") from exc
    _expect(page_size in (None, _PAGE_BYTES), "a target whose pages have 4096 bytes")
    _expect(bool(headers), "a guest with devices")
    sections = _sections(data, at - 1, headers, head.closing)
    if sections is None:
        return None
    kinds = [name.rpartition(b"/") for name in names]
    first = sections[0][0]
    return Tail(
        devices_at=begin + first,
        devices=data[first : at - 1],
        description=data[at:],
        was_running=_was_running(data, names, sections),
        has_balloon=any(kind == _BALLOON for _, _, kind in kinds),
        virtio_mems=frozenset(
            device.decode("utf-8", "surrogateescape") for device, _, kind in kinds if kind in _UNPLUGGED
        ),
    )


def _description_at(data: bytes) -> int | None:
    """Where the description's own header stands, whose length takes it to the end."""
    last = data.rfind(b"\0", max(len(data) - _LONGEST_DESCRIPTION, 0))  # the last one there is, in its length
    for found in _DESCRIPTION.finditer(data, max(last - 16, 0), last + 8):
        if _LENGTH.unpack(found[1])[0] == len(data) - found.end(1):
            return found.start(1) - 1
    return None


def _sections(data: bytes, end: int, headers: list[bytes], before: bytes) -> list[tuple[int, int]] | None:
    """Where each section begins, and where its footer does.  ``headers`` have names and instances.

    From the last one on, as each one's footer tells its id.  A header of that id and name that is none, as no section
    ends before it, is passed by; where the first one's is preceded by ``before``, all are right.
    """
    found: list[tuple[int, int]] = []
    stop = limit = end  # where the section ends that is looked for; where its header has to end, at last
    for _ in range(len(headers) + _MORE_LOOKS):
        begin = -1
        if stop >= 5 and data[stop - 5 : stop - 4] == _FOOTER:
            header = _FULL + data[stop - 4 : stop] + headers[-1 - len(found)]
            begin = data.rfind(header, 0, min(limit, stop - 5))
        if begin >= 0:
            found.append((begin, stop - 5))
            stop = limit = begin
            if len(found) < len(headers):
                continue
            if data[max(begin - len(before), 0) : begin] == before:
                return found[::-1]
        if not found:
            return None
        # So that behind it begins at an earlier place, if it does at all.
        wrong, footer = found.pop()
        stop, limit = footer + 5, wrong + len(headers[-1 - len(found)])
    return None


def _was_running(data: bytes, names: list[bytes], sections: list[tuple[int, int]]) -> bool | None:
    """By the run state's name that the device globalstate carries.  migration/global_state.c"""
    for name, (begin, end) in zip(names, sections, strict=True):
        at = begin + 6 + len(name) + 8 + _STATE_AT
        if name == b"globalstate" and at + _STATE_BYTES <= end:
            return data[at : at + _STATE_BYTES].split(b"\0")[0] == b"running"
    return None
