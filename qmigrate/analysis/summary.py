"""What is in a stream, as one plain value: what ``dissect --json`` prints, and what is odd about it."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from qmigrate.analysis.devices import plain
from qmigrate.analysis.file import answer_file
from qmigrate.analysis.records import payload
from qmigrate.capture.migration import Block, ChannelContents, CommandPlace, Contents, Migration, Section
from qmigrate.errors import StreamError, TruncatedError
from qmigrate.format.command import Packaged, PostcopyAdvise, SwitchoverStart
from qmigrate.format.stream import MAGIC, VERSION, FileHeader, SectionType
from qmigrate.format.tail import Chooser
from qmigrate.format.vmdesc import Description
from qmigrate.format.walk import Limits

__all__ = [
    "FORMAT_VERSION",
    "describe_command",
    "describe_error",
    "describe_section",
    "missing_pages",
    "oddities",
    "summarize",
    "summarize_file",
]

FORMAT_VERSION = 1
_USUAL_PAGE: Final = 4096
_MIB: Final = 1 << 20
_STREAM_HEAD: Final = FileHeader(magic=MAGIC, version=VERSION).build()


def summarize(contents: Contents) -> dict[str, Any]:
    """The summary under the names of ``report/dissect.schema.json``."""
    return {
        "format_version": FORMAT_VERSION,
        "machine_type": contents.machine_type,
        "capabilities": list(contents.capabilities),
        "target_page_bits": target_page_bits(contents),
        "length": contents.length,
        "passes": contents.passes,
        "ram_blocks": [describe_block(block, contents.page_size) for block in contents.blocks.values()],
        "sections": [describe_section(section) for section in contents.sections],
        "commands": [describe_command(place) for place in contents.commands],
        "devices": {name: plain(state) for name, state in contents.devices.items()},
        "undecoded": [
            {"offset": offset, "length": length, "reason": reason} for offset, length, reason in contents.undecoded
        ],
        "oddities": oddities(contents),
        "complete": contents.complete,
        "errors": [describe_error(error) for error in contents.errors],
    } | ({"joined": [_describe_channel(channel) for channel in contents.channels]} if contents.channels else {})


def _describe_channel(channel: ChannelContents) -> dict[str, Any]:
    """One of several channels: what it is and how that is known, its bytes, its pages by how they were sent."""
    described: dict[str, Any] = {
        "name": channel.name,
        "kind": channel.kind,
        "known_by": channel.known_by,
        "reason": channel.reason,
        "input": channel.input,
        "length": channel.length,
        "pages": {name: count for name, count in channel.pages.items() if count},
    }
    if channel.messages:
        described["messages"] = dict(channel.messages)
    return described


def summarize_file(
    path: str | os.PathLike[str],
    *,
    description: Description | Chooser | None = None,
    page_size: int | None = None,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """What ``summarize`` says of the stream in a file, or its ``error``, after the ``file``'s name.

    A pure function of the file that can be pickled: for pools and clusters.
    """
    return answer_file(path, _answer, description=description, page_size=page_size, limits=limits)


def _answer(migration: Migration) -> dict[str, Any]:
    if migration.source.recording is None:
        return summarize(migration.contents)
    from qmigrate.analysis.described import describe_recording, read_story  # few inputs are recordings

    return summarize(migration.contents) | describe_recording(read_story(migration.source.recording))


def target_page_bits(contents: Contents) -> int:
    """Announced or, on most targets, known: 12 is 4 KiB."""
    if contents.target_page_bits is not None:
        return contents.target_page_bits
    return contents.page_size.bit_length() - 1


def describe_block(block: Block, page_size: int) -> dict[str, Any]:
    """``page_size`` is the block's host page size where the block list says it, else the target's."""
    pages = {name: count for name, count in block.counts.items() if count or name in ("normal", "zero")}
    described: dict[str, Any] = {
        "name": block.name,
        "length": block.length,
        "page_size": block.page_size or page_size,
        "pages": {**pages, "sent_again": block.again, "seen": block.seen.count},
    }
    if block.address is not None:
        described["address"] = block.address
    return described


def describe_section(section: Section) -> dict[str, Any]:
    """``decoded`` is True for live sections, whose inside needs no description."""
    described: dict[str, Any] = {
        "offset": section.offset,
        "length": section.length,
        "type": section.kind.name,
        "name": section.name,
        "instance_id": section.instance_id,
        "version_id": section.version_id,
        "section_id": section.section_id,
        "decoded": section.state is not None or section.kind != SectionType.FULL,
        "reason": section.reason,
    }
    if section.package is not None:
        described["package"] = section.package
    return described


def describe_command(place: CommandPlace) -> dict[str, Any]:
    """Offset, name, the payload's fields; of PACKAGED, what it holds."""
    described: dict[str, Any] = {"offset": place.offset, "length": place.length, "name": place.command.name}
    described.update(payload(place.command))
    if isinstance(place.command, Packaged):
        described["contents"] = [
            describe_command(item) if isinstance(item, CommandPlace) else describe_section(item)
            for item in place.contents
        ]
    return described


def describe_error(error: StreamError) -> dict[str, Any]:
    """Where, inside what, and what."""
    return {"offset": error.offset, "trail": list(error.trail), "message": error.message}


def oddities(contents: Contents) -> list[str]:
    """What an engineer would want to know beforehand, a sentence each."""
    return list(_oddities(contents))


def _oddities(contents: Contents) -> Iterator[str]:
    if contents.configuration is None and contents.length:
        yield "There is no CONFIGURATION section (machine types up to 2.3, or send-configuration=off)."
    if contents.complete and contents.sections and contents.footers is None:
        yield "Sections have no footers (machine types up to 2.3, or send-section-footer=off)."
    yield from _description(contents)
    yield from _devices(contents)
    yield from _undecoded(contents)
    yield from _blocks(contents)
    yield from _mapped(contents)
    yield from missing_pages(contents)
    yield from _course(contents)
    yield from _end(contents)


def _is_switched(contents: Contents) -> bool:
    """Did postcopy begin?"""
    return any(isinstance(place.command, Packaged) for place in contents.commands)


def _full(contents: Contents) -> list[Section]:
    return [section for section in contents.sections if section.kind == SectionType.FULL]


def _ram(contents: Contents) -> list[Section]:
    return [section for section in contents.sections if section.name == "ram"]


def _description(contents: Contents) -> Iterator[str]:
    if contents.description_fault is not None:
        yield f"The description of the devices can't be read: {contents.description_fault}."
        return
    full = _full(contents)
    if contents.description is not None or not full or not contents.complete:
        return
    if contents.description_length is not None:
        found = "The description of the devices is empty"
    else:
        why = "postcopy sends none" if _is_switched(contents) else "suppress-vmdesc=on, or it was cut off"
        found = f"There is no description of the devices ({why})"
    schemas = list(dict.fromkeys(section.schema for section in full if section.schema is not None))
    if schemas:
        yield f"{found}: they are decoded by {'; '.join(schemas)}."
    elif any(section.state is not None for section in full):
        yield f"{found}: another stream's was used."
    else:
        yield f"{found}: they can't be decoded."


def _devices(contents: Contents) -> Iterator[str]:
    full = _full(contents)
    live = [section.offset for section in _ram(contents) if section.kind != SectionType.START]
    for section in full:
        if section.package is None and live and section.offset < live[-1]:
            yield (
                f"{section.key} at {section.offset:#x} comes before the contents of RAM: an early section "
                "(virtio-mem, 8.0 and later)."
            )
    for key, count in Counter(section.key for section in full).items():
        if count > 1:
            yield f"{count} sections are called {key}: they are told apart by their order alone."
    if contents.description is not None:
        old = [device for device in contents.description.devices if device.vmsd_name is None]
        for name in dict.fromkeys(f"{device.name}/{device.instance_id}" for device in old):
            yield f"{name} is an old-style section: the description knows its length, and nothing of its inside."


def _undecoded(contents: Contents) -> Iterator[str]:
    if contents.description is not None:
        lost = [section for section in _full(contents) if section.state is None and section.reason]
        for section in lost:
            yield f"{section.key} at {section.offset:#x} was not decoded: {section.reason}."
    for offset, length, reason in contents.undecoded:
        yield f"{length} bytes at {offset:#x} were not decoded: {reason}."


def _blocks(contents: Contents) -> Iterator[str]:
    blocks = contents.blocks.values()
    if contents.page_size != _USUAL_PAGE:
        announced = contents.target_page_bits is not None or any(
            isinstance(place.command, PostcopyAdvise) for place in contents.commands
        )
        how = "" if announced else ", which the stream does not announce: its records are whole only so"
        yield f"The target's pages have {_size(contents.page_size)}{how}."
    huge = [block for block in blocks if block.page_size is not None]
    if huge:
        named = ", ".join(f"{block.name} ({_size(block.page_size or 0)})" for block in huge)
        yield f"Some RAM lies on larger pages of the host: {named}."
    if any(block.address is not None for block in blocks):
        missing = [block.name for block in blocks if not block.seen.count] if contents.complete else []
        sent = f", and none of {', '.join(missing)} is in the stream" if missing else ""
        yield f"The block list has addresses: x-ignore-shared leaves shared RAM out{sent}."
    lengths: dict[int, list[str]] = {}
    for block in blocks:
        if block.length >= _MIB:
            lengths.setdefault(block.length, []).append(block.name)
    for length, names in lengths.items():
        if len(names) > 1:
            yield f"{len(names)} RAM blocks have the same length, {_size(length)}: {', '.join(names)}."


def _mapped(contents: Contents) -> Iterator[str]:
    if contents.base is None:
        return
    yield "Each page has its place in the file (mapped-ram): only what the last pass left there is to be seen."
    if contents.base:
        yield f"The stream's offsets count from {contents.base:#x} before it: it began there in its file."
    if contents.stale:
        yield f"{contents.stale} bytes of pages that were zero in the end are left in their places."


def missing_pages(contents: Contents) -> Iterator[str]:
    """Pages that came over connections that are not here, a sentence each: RAM is not what it was."""
    if not contents.complete or not contents.blocks or contents.base is not None:
        return
    blocks = contents.blocks.values()
    missing = any(block.seen.count * contents.page_size < block.length for block in blocks)
    if missing and not _has_contents(contents) and not any(block.address is not None for block in blocks):
        yield (
            "No page with contents is in the stream: with multifd they travel over connections of their own "
            "(--channel)."
        )
    elif lost := [f"{block.lost} of {block.name}" for block in blocks if block.lost]:
        yield (
            f"Pages that were discarded at the switch to postcopy did not come after it, {', '.join(lost)}: those that "
            "are asked for may travel over a connection of their own (--channel)."
        )


def _has_contents(contents: Contents) -> bool:
    """Is there any page that is not zero?"""
    return any(sum(block.counts.values()) - block.counts["zero"] for block in contents.blocks.values())


def _is_multifd(contents: Contents) -> bool:
    return any(channel.kind == "multifd" for channel in contents.channels)


def _course(contents: Contents) -> Iterator[str]:
    ram = _ram(contents)
    if not ram:
        return
    has_end = any(section.kind == SectionType.END for section in ram)
    if contents.complete and not has_end:
        yield "The ram section has no END: a background snapshot."
    empty = sum(1 for section in ram if section.kind == SectionType.PART and not section.page_count)
    if empty > 1 and contents.base is None and not _is_multifd(contents) and _has_contents(contents):
        yield f"{empty} PART sections of ram are empty: the source waited for its downtime limit."
    advised = any(isinstance(place.command, PostcopyAdvise) for place in contents.commands)
    if advised and not _is_switched(contents) and contents.complete:
        yield "Postcopy was advised, but the migration completed as precopy."
    if any(isinstance(place.command, SwitchoverStart) for place in contents.commands):
        yield "SWITCHOVER_START was sent: QEMUs before 10.0 refuse it."
    if contents.complete and has_end and not advised and contents.passes == 1 and _was_running(contents):
        yield "The guest was running, and no page was sent twice: an internal snapshot (savevm), or it wrote nothing."


def _was_running(contents: Contents) -> bool:
    """Says the section of the run state so?  savevm tells what the guest did before it was stopped for it."""
    state = contents.devices.get("globalstate/0")
    if state is None:
        return False
    runstate = next((field.value for field in state.fields if field.name == "runstate"), None)
    return isinstance(runstate, bytes) and runstate.partition(b"\0")[0] == b"running"


def _end(contents: Contents) -> Iterator[str]:
    ended = any(section.kind == SectionType.END and section.whole for section in _ram(contents))
    is_cut = any(isinstance(error, TruncatedError) for error in contents.errors)
    if is_cut and _ram(contents) and not ended and not _full(contents):
        yield "The stream ends while RAM is sent: the migration was cancelled, or it failed."
    if contents.trailing:
        where = contents.length - contents.trailing
        what = f": another stream begins at {where:#x}" if contents.trailing_head == _STREAM_HEAD else ""
        yield f"{contents.trailing} bytes follow the end of the stream{what}."


def _size(length: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (_MIB, "MiB"), (1 << 10, "KiB")):
        if length >= unit and not length % unit:
            return f"{length // unit} {name}"
    return f"{length} bytes"
