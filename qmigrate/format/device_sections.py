"""FULL sections behind RAM, and inside a package: device state, none of which has a length.

It is kept until its end, where the description is that decodes it: a package's end is announced, that of the tail
behind RAM is found (``closing``).  Which section stands where is ``tail``'s to say; here that becomes entries.

migration/savevm.c: qemu_loadvm_section_start_full(), loadvm_handle_cmd_packaged()
"""

from collections.abc import Sequence
from typing import Final

from qmigrate.errors import TruncatedError, UnsupportedError
from qmigrate.format.candidates import Item
from qmigrate.format.closing import ClosingFinder, find_description, find_ends
from qmigrate.format.command import Packaged, read_command
from qmigrate.format.entry import DeviceState, Entry, Step, StreamRecord, Trailing, Undecoded, VmDescription
from qmigrate.format.feed import Feed
from qmigrate.format.stream import FOOTER_BYTES, EndOfFile, Footer, VmDescriptionHeader
from qmigrate.format.tail import Tail, read_tail
from qmigrate.format.vmdesc import Description
from qmigrate.format.walk_state import WalkState

__all__ = ["best_tail", "check_package_length", "read_behind_ram", "read_package", "read_packaged"]

_DEEPEST_PACKAGE: Final = 16


# -- behind RAM


def read_behind_ram(state: WalkState) -> Step:
    """Up to the stream's end, with the description where there is one.  Raises ``StreamError``."""
    base = state.feed.offset
    kept = bytearray()
    finder = ClosingFinder(base=base, footers=state.footers)
    limit = state.limits.device_state
    while True:
        kept += state.feed.view()
        state.feed.skip(len(state.feed))
        closed = finder.closes(kept)
        if (len(kept) if closed is None else closed[2]) > limit:
            raise UnsupportedError(f"more than {limit} bytes of device state (--max-device-state)", offset=base)
        if closed is not None or not (yield from state.feed.more()):
            break
    data = bytes(kept)
    tail, description = best_tail(state, data, base) if closed is None else closed[:2]
    yield from _items(state, tail.items, data, base, 0)
    if tail.error is not None:
        raise tail.error
    yield from _closing(data, base, tail.end, description)


def best_tail(state: WalkState, data: bytes, base: int) -> tuple[Tail, Description | None]:
    """What ``data``, which stands at ``base`` and ends there, is made of; and its own description, if it has one."""
    footers = state.footers
    for at, description in find_description(data, base):
        tail = read_tail(data[: at + 1], base=base, footers=footers, description=description, package=False)
        if tail.error is None and tail.end == at:
            return tail, description
    for at in find_ends(data, footers=footers):
        tail = _undescribed(state, data[: at + 1], base, package=False)
        if tail.error is None and tail.end == at:
            return tail, None
    return _undescribed(state, data, base, package=False), None


def _undescribed(state: WalkState, data: bytes, base: int, *, package: bool) -> Tail:
    """Where the stream has no description of its own."""

    def read(description: Description | None) -> Tail:
        footers = state.footers
        return read_tail(data, base=base, footers=footers, description=description, package=package, foreign=True)

    if state.schema is None or isinstance(state.schema, Description):
        return read(state.schema)
    return state.schema.choose(read, state.machine_type)


def _closing(data: bytes, base: int, at: int, description: Description | None) -> Step:
    """EOF, the description, and what stands behind it."""
    view = memoryview(data)
    yield Entry(base + at, 1, EndOfFile(), view[at : at + 1])
    at += 1
    if data[at : at + 1] == b"\x06":
        length = int.from_bytes(data[at + 1 : at + 5])
        end = at + 5 + length
        yield Entry(base + at, 5, VmDescriptionHeader(length=length), view[at : at + 5])
        text = data[at + 5 : end]
        described = VmDescription(text, description) if description else VmDescription.parse(text, offset=base + at + 5)
        yield Entry(base + at + 5, length, described, view[at + 5 : end])
        at = end
    if at < len(data):
        yield Entry(base + at, len(data) - at, Trailing(data[at:]), view[at:])


# -- in a package


def check_package_length(state: WalkState, command: Packaged) -> None:
    """Raises ``UnsupportedError`` where it claims more than is kept at once; it was read up to its length."""
    if command.length > state.limits.package:
        raise UnsupportedError(
            f"a package of {command.length} bytes, the limit is {state.limits.package} (--max-package)",
            offset=state.feed.offset - 4,
            trail=(command.name,),
        )


def read_package(state: WalkState, command: Packaged) -> Step:
    """What stands in the package that ``command`` announces.  Raises ``StreamError`` behind all that is good."""
    check_package_length(state, command)
    base = state.feed.offset
    data = bytearray()
    while len(data) < command.length and (len(state.feed) or (yield from state.feed.more())):
        part = state.feed.view(command.length - len(data))
        data += part
        state.feed.skip(len(part))
    missing = command.length - len(data)
    if not missing:
        yield from read_packaged(state, bytes(data), base, 1)
        return
    tail = _undescribed(state, bytes(data), base, package=True)
    yield from _items(state, tail.items, bytes(data), base, 1)
    raise TruncatedError(
        f"the stream ends here, {missing} of {command.length} bytes too soon",
        offset=state.feed.offset,
        trail=(command.name,),
    )


def read_packaged(state: WalkState, data: bytes, base: int, depth: int) -> Step:
    """All of a package, which stands at ``base``: its sections and commands.  Raises ``StreamError``."""
    if depth > _DEEPEST_PACKAGE:
        raise UnsupportedError(f"packages nested deeper than {_DEEPEST_PACKAGE}", offset=base)
    tail = _undescribed(state, data, base, package=True)
    yield from _items(state, tail.items, data, base, depth)
    if tail.error is not None:
        raise tail.error


# -- as entries


def _items(state: WalkState, items: Sequence[Item], data: bytes, base: int, depth: int) -> Step:
    """Entries for the pieces of a tail, or of a package."""
    view = memoryview(data)
    for item in items:
        if item.command is not None:
            yield from _packaged_command(state, item, view, base, depth)
            continue
        if item.header is None:
            undecoded = Undecoded(data[item.begin : item.end], item.reason or "")
            yield Entry(base + item.begin, item.end - item.begin, undecoded, view[item.begin : item.end], depth)
            continue
        state.sections[item.header.section_id] = item.header
        yield Entry(base + item.begin, item.body - item.begin, item.header, view[item.begin : item.body], depth)
        body: StreamRecord = (
            DeviceState(item.state, item.schema)
            if item.state is not None
            else Undecoded(data[item.body : item.body_end], item.reason or "")
        )
        yield Entry(base + item.body, item.body_end - item.body, body, view[item.body : item.body_end], depth)
        if item.body_end < item.end:
            footer = Footer(section_id=item.header.section_id)
            yield Entry(base + item.body_end, FOOTER_BYTES, footer, view[item.body_end : item.end], depth)


def _packaged_command(state: WalkState, item: Item, view: memoryview, base: int, depth: int) -> Step:
    feed = Feed(offset=base + item.begin, window=max(item.end - item.begin, 64))
    feed.receive(view[item.begin : item.end])
    feed.end()
    command, length = yield from read_command(feed)
    yield Entry(feed.offset, length, command, view[item.begin : item.begin + length], depth)
    if isinstance(command, Packaged):
        inner = bytes(view[item.begin + length : item.end])
        yield from read_packaged(state, inner, feed.offset + length, depth + 1)
