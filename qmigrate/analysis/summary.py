"""What is in a stream, as one plain value: what ``dissect --json`` prints, and what is odd about it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from qmigrate.analysis.devices import Plain, plain
from qmigrate.capture.migration import Block, CommandPlace, Contents, Section
from qmigrate.errors import StreamError
from qmigrate.format.command import Command, Packaged, PostcopyAdvise
from qmigrate.format.stream import SectionType

__all__ = ["FORMAT_VERSION", "describe_command", "describe_error", "describe_section", "oddities", "summarize"]

FORMAT_VERSION = 1


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
    }


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


def payload(command: Command) -> dict[str, Plain]:
    """The payload's fields under QEMU's names; ADVISE's two, where it has them, without a nesting."""
    if isinstance(command, PostcopyAdvise):
        return {} if command.sizes is None else dataclasses.asdict(command.sizes)
    if isinstance(command, Packaged):
        return {"package_length": command.length}
    fields = plain(command)
    assert isinstance(fields, dict)
    return fields


def describe_error(error: StreamError) -> dict[str, Any]:
    """Where, inside what, and what."""
    return {"offset": error.offset, "trail": list(error.trail), "message": error.message}


def oddities(contents: Contents) -> list[str]:
    """What an engineer would want to know beforehand, a sentence each."""
    return list(_oddities(contents))


def _oddities(contents: Contents) -> Iterator[str]:
    if contents.configuration is None and contents.length:
        yield "There is no CONFIGURATION section (machine types up to 2.3, or send-configuration=off)."
    switched = any(isinstance(place.command, Packaged) for place in contents.commands)
    full = [section for section in contents.sections if section.kind == SectionType.FULL]
    if contents.complete and contents.sections and contents.footers is None:
        yield "Sections have no footers (machine types up to 2.3, or send-section-footer=off)."
    if contents.complete and full and contents.description is None:
        why = "postcopy sends none" if switched else "suppress-vmdesc=on, or it was cut off"
        yield f"There is no description of the devices ({why}): they can't be decoded."
    yield from _undecoded(contents, full)
    yield from _ram_oddities(contents, switched)
    if contents.trailing:
        yield f"{contents.trailing} bytes follow the end of the stream."


def _undecoded(contents: Contents, full: list[Section]) -> Iterator[str]:
    if contents.description is not None:
        lost = [section for section in full if section.state is None and section.reason]
        for section in lost:
            yield f"{section.key} at {section.offset:#x} was not decoded: {section.reason}."
    for offset, length, reason in contents.undecoded:
        yield f"{length} bytes at {offset:#x} were not decoded: {reason}."


def _ram_oddities(contents: Contents, switched: bool) -> Iterator[str]:
    ram = [section for section in contents.sections if section.name == "ram"]
    if not ram:
        return
    if contents.complete and not any(section.kind == SectionType.END for section in ram):
        yield "The ram section has no END: a background snapshot."
    empty = sum(1 for section in ram if section.kind == SectionType.PART and not section.page_count)
    if empty > 1:
        yield f"{empty} PART sections of ram are empty: the source waited for its downtime limit."
    advised = any(isinstance(place.command, PostcopyAdvise) for place in contents.commands)
    if advised and not switched and contents.complete:
        yield "Postcopy was advised, but the migration completed as precopy."
