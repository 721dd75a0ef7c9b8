"""The frame of a migration stream: header, configuration, sections, footers, the description.

migration/savevm.c, migration/savevm.h
"""

from enum import IntEnum
from typing import Final

from construct import Bytes, Int8ub, Int32ub

from qmigrate.format._record import CountedString, Known, Nested, Only, Record, Several, wire

__all__ = [
    "FOOTER_BYTES",
    "LONGEST_HEADER",
    "MAGIC",
    "VERSION",
    "CapabilityName",
    "ConfigurationCapabilities",
    "ConfigurationHeader",
    "ConfigurationTargetPageBits",
    "ConfigurationUuid",
    "EndOfFile",
    "FileHeader",
    "Footer",
    "SectionHeader",
    "SectionPart",
    "SectionType",
    "SubsectionHeader",
    "VmDescriptionHeader",
]

MAGIC: Final = 0x5145564D  # "QEVM"
VERSION: Final = 3
FOOTER_BYTES: Final = 5
LONGEST_HEADER: Final = 6 + 255 + 8  # bytes of a ``SectionHeader``


class SectionType(IntEnum):
    """The byte that opens each thing at the top of a stream.  migration/savevm.h: QEMU_VM_*"""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05  # only inside device state
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


class FileHeader(Record):
    """The first 8 bytes of a main channel; not repeated when a paused postcopy is resumed.

    migration/savevm.c: qemu_savevm_state_header()
    """

    magic: int = wire(Int32ub)
    version: int = wire(Int32ub)


class ConfigurationHeader(Record):
    """Opens CONFIGURATION: the machine type's name follows, then subsections.

    migration/savevm.c: vmstate_configuration
    """

    kind: SectionType = wire(Only(SectionType.CONFIGURATION, Int8ub), default=SectionType.CONFIGURATION)
    length: int = wire(Int32ub)


class SubsectionHeader(Record):
    """Opens a subsection, in device state and in CONFIGURATION.

    migration/vmstate.c: vmstate_subsection_save()
    """

    kind: SectionType = wire(Only(SectionType.SUBSECTION, Int8ub), default=SectionType.SUBSECTION)
    name: str = wire(CountedString)
    version: int = wire(Int32ub)


class ConfigurationTargetPageBits(Record):
    """``configuration/target-page-bits``: only targets whose page size varies (Arm) send it."""

    target_page_bits: int = wire(Int32ub)


class CapabilityName(Record):
    """One name in the list below, as QAPI spells it."""

    name: str = wire(CountedString)


class ConfigurationCapabilities(Record):
    """``configuration/capabilities``: the enabled ones of those that both sides must agree on.

    Only x-ignore-shared and mapped-ram are ever announced.  migration/savevm.c: vmstate_capabilites
    """

    count: int = wire(Int32ub)
    names: tuple[CapabilityName, ...] = wire(Several(lambda this: this.count, Nested(CapabilityName)))


class ConfigurationUuid(Record):
    """``configuration/uuid``: with the capability validate-uuid."""

    uuid: bytes = wire(Bytes(16))


class SectionHeader(Record):
    """Opens a device's section.  START and FULL carry all of it, PART and END the id alone.

    migration/savevm.c: save_section_header()
    """

    kind: SectionType = wire(Known(SectionType, Int8ub))
    section_id: int = wire(Int32ub)
    idstr: str = wire(CountedString)
    instance_id: int = wire(Int32ub)
    version_id: int = wire(Int32ub)


class SectionPart(Record):
    """Opens the next part, or the last, of a section that a START announced."""

    kind: SectionType = wire(Known(SectionType, Int8ub))
    section_id: int = wire(Int32ub)


class Footer(Record):
    """Closes START, PART, END and FULL, on machine types above 2.3.

    migration/savevm.c: save_section_footer()
    """

    kind: SectionType = wire(Only(SectionType.FOOTER, Int8ub), default=SectionType.FOOTER)
    section_id: int = wire(Int32ub)


class EndOfFile(Record):
    """Ends the sections.  Of a postcopy stream it is the last byte."""

    kind: SectionType = wire(Only(SectionType.EOF, Int8ub), default=SectionType.EOF)


class VmDescriptionHeader(Record):
    """Opens the JSON description of all FULL sections: its length in bytes follows.

    migration/savevm.c: qemu_savevm_state_complete_precopy_non_iterable()
    """

    kind: SectionType = wire(Only(SectionType.VMDESCRIPTION, Int8ub), default=SectionType.VMDESCRIPTION)
    length: int = wire(Int32ub)
