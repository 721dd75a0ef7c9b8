"""CONFIGURATION, with each of its subsections: what both ends must agree on.

migration/savevm.c: vmstate_configuration
"""

from collections.abc import Generator, Sequence
from typing import Final

from qmigrate.errors import StreamError, UnsupportedError
from qmigrate.format._record import Record
from qmigrate.format.entry import Configuration, ConfigurationSubsection
from qmigrate.format.feed import Feed
from qmigrate.format.stream import (
    ConfigurationCapabilities,
    ConfigurationHeader,
    ConfigurationTargetPageBits,
    ConfigurationUuid,
    SectionType,
    SubsectionHeader,
)

__all__ = ["announced_capabilities", "announced_page_bits", "read_configuration"]

_BODIES: Final[dict[str, type[Record]]] = {
    "configuration/target-page-bits": ConfigurationTargetPageBits,
    "configuration/capabilities": ConfigurationCapabilities,
    "configuration/uuid": ConfigurationUuid,
}
_LONGEST_MACHINE_TYPE: Final = 4096
_TRAIL: Final = ("configuration",)


def read_configuration(feed: Feed) -> Generator[None, None, tuple[Configuration, int]]:
    """The section at hand and its length, not consumed.  Raises ``StreamError``, ``UnsupportedError``."""
    header, length = yield from feed.record(ConfigurationHeader, _TRAIL)
    if header.length > _LONGEST_MACHINE_TYPE:
        raise StreamError(
            f"the machine type's name has {header.length} bytes, expected at most {_LONGEST_MACHINE_TYPE}",
            offset=feed.offset + 1,
            trail=_TRAIL,
        )
    length += header.length
    yield from feed.need(length, _TRAIL)
    name = bytes(feed.view(length)[5:]).decode("utf-8", "surrogateescape")
    subsections: list[ConfigurationSubsection] = []
    while (yield from feed.byte(length)) == SectionType.SUBSECTION:
        subsection, length = yield from _subsection(feed, length, _TRAIL)
        subsections.append(subsection)
    return Configuration(machine_type=name, subsections=tuple(subsections)), length


def _subsection(
    feed: Feed, at: int, trail: Sequence[str]
) -> Generator[None, None, tuple[ConfigurationSubsection, int]]:
    start = feed.offset + at
    header, at = yield from feed.ahead(SubsectionHeader, at, trail)
    body_class = _BODIES.get(header.name)
    if body_class is None:
        raise UnsupportedError(
            f"unknown subsection {header.name!r}, expected one of {', '.join(_BODIES)}", offset=start, trail=trail
        )
    body, at = yield from feed.ahead(body_class, at, (*trail, header.name))
    return ConfigurationSubsection(header=header, body=body), at


def announced_page_bits(configuration: Configuration) -> int | None:
    """The target's page size as a power of two, where it is announced and can be one."""
    bits: int | None = None
    for subsection in configuration.subsections:
        if isinstance(subsection.body, ConfigurationTargetPageBits):
            bits = subsection.body.target_page_bits
    return bits if bits is not None and 8 <= bits <= 16 else None


def announced_capabilities(configuration: Configuration) -> frozenset[str]:
    """Of those that QEMU announces at all: x-ignore-shared and mapped-ram."""
    names: frozenset[str] = frozenset()
    for subsection in configuration.subsections:
        if isinstance(subsection.body, ConfigurationCapabilities):
            names = frozenset(capability.name for capability in subsection.body.names)
    return names
