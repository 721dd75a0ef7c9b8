"""A postcopy's package, loaded by another process than reads the stream that it came in.

migration/savevm.c: loadvm_handle_cmd_packaged()
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from qmigrate.errors import SequenceError, TruncatedError
from qmigrate.format.command import Command, Ping
from qmigrate.format.device_sections import read_packaged
from qmigrate.format.entry import Entry
from qmigrate.format.feed import Feed
from qmigrate.format.stream import SectionHeader
from qmigrate.format.walk_state import WalkState
from qmigrate.protocol.destination_events import SectionBegan
from qmigrate.protocol.phases import Phase, after
from qmigrate.protocol.without_ram import WithoutRam

__all__ = ["Package", "PackageEvent", "devices_of", "package_events"]


@dataclass(frozen=True)
class Package:
    """What a package needs to be loaded: the bytes, where they stand, and what is known of the stream."""

    data: bytes
    offset: int = 0
    footers: bool | None = None


PackageEvent: TypeAlias = SectionBegan | Ping | Phase


def devices_of(package: Package) -> bytes:
    """The package's device sections, without its commands.  Raises ``StreamError``."""
    kept = WithoutRam(ram_ended=True)
    for entry in _entries_of(package):
        kept.take(entry)
    return bytes(kept.devices)


def _entries_of(package: Package) -> Iterator[Entry]:
    state = WalkState(Feed(offset=package.offset))
    state.footers = package.footers
    return (entry for entry in read_packaged(state, package.data, package.offset, 1) if entry is not None)


def package_events(package: Package, phase: Phase) -> Iterator[PackageEvent]:
    """What a package says, in order: a section, a PING to be answered, the phase that LISTEN or RUN leads to.

    Nothing behind RUN is looked at.  Raises ``StreamError``; ``phase`` is the main channel's.
    """
    for entry in _entries_of(package):
        if isinstance(entry.record, SectionHeader):
            yield SectionBegan(entry.record)
        if not isinstance(entry.record, Command):
            continue
        try:
            following = after(phase, entry.record.NUMBER, inside=True)
        except SequenceError as exc:
            raise SequenceError(exc.message, offset=entry.offset) from None
        if isinstance(entry.record, Ping):
            yield entry.record
        if following is not phase:
            phase = following
            yield phase
        if phase is Phase.RUNNING:
            return
    raise TruncatedError(f"the package ends while {phase.name}, before POSTCOPY_RUN", offset=package.offset)
