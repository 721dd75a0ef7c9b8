"""FULL sections before the contents of RAM: where each ends, which nothing announces.

Devices with early setup (8.0 and later: virtio-mem) come before RAM's START, in 10.0 between START and END, and
the description that knows their length comes at the stream's end.  With footers such a section ends at the first
footer of its own behind which the stream plausibly goes on; without, where the next header stands.
"""

import re
from collections.abc import Generator
from typing import Final

from qmigrate.errors import TruncatedError, UnsupportedError
from qmigrate.format.candidates import plausible_header
from qmigrate.format.ram import MARKERS, PAGE_KINDS, RamFlag
from qmigrate.format.stream import FOOTER_BYTES, LONGEST_HEADER, Footer, SectionHeader, SectionType
from qmigrate.format.walk_state import WalkState

__all__ = ["end_of_early", "is_before_tail"]

_MOST_EARLY: Final = 256  # FULL sections before RAM's contents, at which is looked
_MOST_LOOKS: Final = 1_000_000  # at what may be the next header
# How the next section may open, and RAM's START: its name, instance 0, version 4.
_OPENING: Final = re.compile(rb"[\x01\x04](?=(?s:.{5})[\x21-\x7e]|(?s:.{0,5})\Z)|[\x02\x03]")
_RAM_START: Final = re.compile(rb"\x01(?s:.{4})\x03ram\x00{7}\x04")
_RAM_START_BYTES: Final = 17


def is_before_tail(state: WalkState, header: SectionHeader, length: int) -> Generator[None, None, bool]:
    """Is this no device of the tail: a START, or an early FULL between RAM's START and END?

    10.0 sends virtio-mem's there.  A background snapshot has its devices there too: those are the tail, as no
    part of RAM follows them.
    """
    if header.kind == SectionType.START:
        return True
    if state.ram_ended:
        return False
    for _ in range(_MOST_EARLY):
        end = yield from _early_end(state, header, length)
        if end is None:
            return False
        after = end if state.footers is False else end + FOOTER_BYTES
        data = bytes(state.feed.view(after + LONGEST_HEADER)[after:])
        if _opens_part(state, data):
            return True
        following = plausible_header(data)
        if following is None or following.kind != SectionType.FULL:
            return False
        header, length = following, after + len(following.build())
    return False


def end_of_early(state: WalkState, header: SectionHeader) -> Generator[None, None, int]:
    """How far ahead the section's data ends.  Raises ``UnsupportedError``, ``TruncatedError``."""
    end = yield from _early_end(state, header, 0)
    if end is not None:
        return end
    if not state.feed.ended:
        raise UnsupportedError(
            f"given up after {_MOST_LOOKS} places where a section of unknown length might end",
            offset=state.feed.offset,
            trail=(header.idstr,),
        )
    raise TruncatedError(
        "the stream ends here, in a section whose footer has not come",
        offset=state.feed.offset + len(state.feed),
        trail=(header.idstr,),
    )


def _early_end(state: WalkState, header: SectionHeader, begin: int) -> Generator[None, None, int | None]:
    """How far ahead the section's footer stands, looking from ``begin`` bytes ahead; None without one.

    Without footers: where the next header stands.  RAM's header before any footer shows that there are none.
    """
    if state.footers is False:
        return (yield from _next_header(state, header, begin))
    mark = Footer(section_id=header.section_id).build()
    searched = begin
    while True:
        buffer, first, last = state.feed.buffer
        found = buffer.find(mark, first + searched, last)
        if state.footers is None and _RAM_START.search(
            buffer, first + max(begin, searched - _RAM_START_BYTES), last if found < 0 else found
        ):
            state.footers = False
            return (yield from _next_header(state, header, begin))
        if found >= 0:
            searched = found - first
            after = searched + len(mark)
            if len(state.feed) < after + LONGEST_HEADER and (yield from state.feed.more()):
                continue
            if _plausibly_opens(state, bytes(state.feed.view(after + LONGEST_HEADER)[after:])):
                return searched
            searched += 1
            continue
        searched = max(searched, len(state.feed) - len(mark) + 1)
        _check_early_length(state, header)
        if not (yield from state.feed.more()):
            return None


def _next_header(state: WalkState, header: SectionHeader, begin: int) -> Generator[None, None, int | None]:
    """How far ahead the next thing opens that is no part of a device's data, by its looks; None without one."""
    searched, looks = begin, 0
    while looks <= _MOST_LOOKS:
        buffer, first, last = state.feed.buffer
        found = _OPENING.search(buffer, first + searched, last)
        if found is not None:
            looks += 1
            searched = found.start() - first
            if len(state.feed) < searched + LONGEST_HEADER and (yield from state.feed.more()):
                continue
            view = state.feed.view()
            if plausible_header(view, searched) is not None or _goes_on(state, view, searched):
                return searched
            searched += 1
            continue
        searched = max(begin, len(state.feed))
        _check_early_length(state, header)
        if not (yield from state.feed.more()):
            break
    return None


def _goes_on(state: WalkState, view: memoryview, at: int) -> bool:
    """Do PART or END stand here, and if they are RAM's, a record of RAM behind them?"""
    data = bytes(view[at : at + LONGEST_HEADER]) if view[at] in (2, 3) else b""
    if not _opens_part(state, data):
        return False
    if state.sections[int.from_bytes(data[1:5])].idstr != "ram" or state.ram is None:
        return True
    word = int.from_bytes(data[5:13])
    flags = word & (state.ram.page_size - 1)
    if flags in MARKERS:
        return word == flags
    if flags & ~RamFlag.CONTINUE not in PAGE_KINDS:
        return False
    name = data[14 : 14 + data[13]].decode("utf-8", "surrogateescape") if len(data) > 13 else ""
    return name in state.ram.blocks if not flags & RamFlag.CONTINUE else state.ram.block is not None


def _check_early_length(state: WalkState, header: SectionHeader) -> None:
    if len(state.feed) > state.limits.device_state:
        raise UnsupportedError(
            f"a section of more than {state.limits.device_state} bytes (--max-device-state)",
            offset=state.feed.offset,
            trail=(header.idstr,),
        )


def _plausibly_opens(state: WalkState, data: bytes) -> bool:
    """Is this how the next thing at the top of the stream may begin?  Fewer bytes than a header: its end."""
    match data[:1]:
        case b"\x08":
            return True
        case b"\x00":  # alone it proves nothing: a stream of devices alone ends so, and with a description
            return len(data) == 1 or data[1:2] == b"\x06"
    return _opens_part(state, data) or plausible_header(data) is not None


def _opens_part(state: WalkState, data: bytes) -> bool:
    """PART or END of a section that a START has opened."""
    if data[:1] not in (b"\x02", b"\x03"):
        return False
    header = state.sections.get(int.from_bytes(data[1:5]))
    return header is not None and header.kind == SectionType.START
