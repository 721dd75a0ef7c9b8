"""What a PCI device has in its state: configuration space, interrupt pins, the MSI-X table.

The JSON description calls these ``pci config``, ``pci irq state`` and ``msix state`` and gives their length
alone.  Configuration space is in the guest's layout, so little-endian; the rest of a stream is not.

hw/pci/pci.c: vmstate_pci_device; hw/pci/msix.c: msix_save(); include/standard-headers/linux/pci_regs.h
"""

import struct
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import IO, Any, Final, NamedTuple

import construct
from construct import Bytes, Int8ul, Int16ul, Int32ul, Switch, Tell

from qmigrate.errors import StreamError
from qmigrate.format._record import AnyConstruct, IfMore, Nested, Record, Rows, When, refuse, wire

__all__ = [
    "AdvancedErrorReporting",
    "BridgeHeader",
    "Capability",
    "CapabilityId",
    "DeviceHeader",
    "ExtendedCapability",
    "Msi",
    "Msix",
    "MsixEntry",
    "MsixState",
    "OtherHeader",
    "PciConfig",
    "PciExpress",
    "PciExpressV1",
    "PciIrqState",
    "PowerManagement",
    "SubsystemVendor",
    "Unclaimed",
    "VendorSpecific",
    "VirtioCapability",
    "decode_msix_state",
    "decode_pci_config",
    "decode_pci_irq_state",
    "encode",
]

CONVENTIONAL: Final = 0x100  # PCI_CONFIG_SPACE_SIZE
EXPRESS: Final = 0x1000  # PCIE_CONFIG_SPACE_SIZE
_HEADER: Final = 0x40
_REDHAT_VIRTIO: Final = 0x1AF4  # PCI_VENDOR_ID_REDHAT_QUMRANET: all virtio devices are from it
_STATUS_CAP_LIST: Final = 0x10
_AER: Final = 0x0001  # PCI_EXT_CAP_ID_ERR


class DeviceHeader(Record):
    """Header type 0: what follows the first 16 bytes of an ordinary function."""

    bars: tuple[int, ...] = wire(Rows("<I", 6))
    cardbus_cis_pointer: int = wire(Int32ul)
    subsystem_vendor_id: int = wire(Int16ul)
    subsystem_id: int = wire(Int16ul)
    expansion_rom: int = wire(Int32ul)
    capabilities_pointer: int = wire(Int8ul)
    reserved: bytes = wire(Bytes(7))
    interrupt_line: int = wire(Int8ul)
    interrupt_pin: int = wire(Int8ul)
    min_gnt: int = wire(Int8ul)
    max_lat: int = wire(Int8ul)


class BridgeHeader(Record):
    """Header type 1: a PCI-to-PCI bridge or a PCI Express port."""

    bars: tuple[int, ...] = wire(Rows("<I", 2))
    primary_bus: int = wire(Int8ul)
    secondary_bus: int = wire(Int8ul)
    subordinate_bus: int = wire(Int8ul)
    secondary_latency_timer: int = wire(Int8ul)
    io_base: int = wire(Int8ul)
    io_limit: int = wire(Int8ul)
    secondary_status: int = wire(Int16ul)
    memory_base: int = wire(Int16ul)
    memory_limit: int = wire(Int16ul)
    prefetchable_base: int = wire(Int16ul)
    prefetchable_limit: int = wire(Int16ul)
    prefetchable_base_upper: int = wire(Int32ul)
    prefetchable_limit_upper: int = wire(Int32ul)
    io_base_upper: int = wire(Int16ul)
    io_limit_upper: int = wire(Int16ul)
    capabilities_pointer: int = wire(Int8ul)
    reserved: bytes = wire(Bytes(3))
    expansion_rom: int = wire(Int32ul)
    interrupt_line: int = wire(Int8ul)
    interrupt_pin: int = wire(Int8ul)
    bridge_control: int = wire(Int16ul)


class OtherHeader(Record):
    """A header type that no device of QEMU has."""

    data: bytes = wire(Bytes(48))


# -- above the header: capabilities and what lies between them


class CapabilityId(IntEnum):
    """PCI_CAP_ID_*: those that are told apart here."""

    PM = 0x01
    MSI = 0x05
    VENDOR = 0x09
    SSVID = 0x0D
    EXPRESS = 0x10
    MSIX = 0x11


class Unclaimed(Record):
    """Bytes that no capability says it owns: ``offset`` is in configuration space."""

    offset: int = wire(Tell)
    data: bytes = wire(construct.GreedyBytes)


class Capability(Record):
    """One whose layout is not known here, and how each begins: ``next`` is where the following one stands.

    What belongs to an unknown one is in the ``Unclaimed`` behind it.
    """

    offset: int = wire(Tell)
    id: int = wire(Int8ul)
    next: int = wire(Int8ul)


class PowerManagement(Capability):
    """PCI_CAP_ID_PM"""

    capabilities: int = wire(Int16ul)
    control_status: int = wire(Int16ul)
    bridge_extensions: int = wire(Int8ul)
    data: int = wire(Int8ul)


def _is_64bit(this: Any) -> bool:
    return bool(this.message_control & 0x80)


def _is_maskable(this: Any) -> bool:
    return bool(this.message_control & 0x100)


class Msi(Capability):
    """PCI_CAP_ID_MSI: 10 to 24 bytes, as the message control word says."""

    message_control: int = wire(Int16ul)
    address_lo: int = wire(Int32ul)
    address_hi: int | None = wire(When(_is_64bit, Int32ul))
    data: int = wire(Int16ul)
    reserved: int | None = wire(When(_is_maskable, Int16ul))
    mask_bits: int | None = wire(When(_is_maskable, Int32ul))
    pending_bits: int | None = wire(When(_is_maskable, Int32ul))


class Msix(Capability):
    """PCI_CAP_ID_MSIX: where the table and the pending bits stand, not their content."""

    message_control: int = wire(Int16ul)
    table: int = wire(Int32ul)
    pending: int = wire(Int32ul)

    @property
    def entry_count(self) -> int:
        """Of the table, and so of the ``msix state`` of the device."""
        return (self.message_control & 0x7FF) + 1


class VendorSpecific(Capability):
    """PCI_CAP_ID_VNDR: ``length`` counts from the id."""

    length: int = wire(Int8ul)
    data: bytes = wire(Bytes(lambda this: this.length - 3))


class VirtioCapability(Capability):
    """Where virtio keeps one of its register blocks.  ``virtio_pci.h``: struct virtio_pci_cap

    ``cfg_type``: 1 common, 2 notify (``more``: its multiplier), 3 isr, 4 device, 5 pci (``more``: its data).
    """

    length: int = wire(Int8ul)
    cfg_type: int = wire(Int8ul)
    bar: int = wire(Int8ul)
    region_id: int = wire(Int8ul)
    padding: bytes = wire(Bytes(2))
    region_offset: int = wire(Int32ul)
    region_length: int = wire(Int32ul)
    more: bytes = wire(Bytes(lambda this: this.length - 16))


class SubsystemVendor(Capability):
    """PCI_CAP_ID_SSVID, of bridges."""

    reserved: int = wire(Int16ul)
    subsystem_vendor_id: int = wire(Int16ul)
    subsystem_id: int = wire(Int16ul)


class PciExpressV1(Capability):
    """PCI_CAP_ID_EXP version 1, as far as every kind of port has it."""

    flags: int = wire(Int16ul)
    device_capabilities: int = wire(Int32ul)
    device_control: int = wire(Int16ul)
    device_status: int = wire(Int16ul)
    link_capabilities: int = wire(Int32ul)
    link_control: int = wire(Int16ul)
    link_status: int = wire(Int16ul)


class PciExpress(PciExpressV1):
    """PCI_CAP_ID_EXP version 2: all registers are there, whatever the port."""

    slot_capabilities: int = wire(Int32ul)
    slot_control: int = wire(Int16ul)
    slot_status: int = wire(Int16ul)
    root_control: int = wire(Int16ul)
    root_capabilities: int = wire(Int16ul)
    root_status: int = wire(Int32ul)
    device_capabilities_2: int = wire(Int32ul)
    device_control_2: int = wire(Int16ul)
    device_status_2: int = wire(Int16ul)
    link_capabilities_2: int = wire(Int32ul)
    link_control_2: int = wire(Int16ul)
    link_status_2: int = wire(Int16ul)
    slot_capabilities_2: int = wire(Int32ul)
    slot_control_2: int = wire(Int16ul)
    slot_status_2: int = wire(Int16ul)


class ExtendedCapability(Record):
    """One above 0x100, and how each begins.  ``version_and_next``: 4 bits, then 12 of where the next is."""

    offset: int = wire(Tell)
    id: int = wire(Int16ul)
    version_and_next: int = wire(Int16ul)


class AdvancedErrorReporting(ExtendedCapability):
    """PCI_EXT_CAP_ID_ERR: 0x48 bytes, PCI_ERR_SIZEOF."""

    uncorrectable_status: int = wire(Int32ul)
    uncorrectable_mask: int = wire(Int32ul)
    uncorrectable_severity: int = wire(Int32ul)
    correctable_status: int = wire(Int32ul)
    correctable_mask: int = wire(Int32ul)
    control: int = wire(Int32ul)
    header_log: tuple[int, ...] = wire(Rows("<I", 4))
    root_command: int = wire(Int32ul)
    root_status: int = wire(Int32ul)
    source_ids: int = wire(Int32ul)
    tlp_prefix_log: tuple[int, ...] = wire(Rows("<I", 4))


_LAYOUTS: Final[dict[int, type[Capability]]] = {
    CapabilityId.PM: PowerManagement,
    CapabilityId.MSI: Msi,
    CapabilityId.SSVID: SubsystemVendor,
    CapabilityId.MSIX: Msix,
}


def _layout(this: Any, data: bytes, offset: int) -> type[Capability]:
    """Which record the capability at ``offset`` is; the two bytes behind its head may have to say."""
    kind, third = data[offset], data[offset + 2]
    if kind == CapabilityId.VENDOR:
        is_virtio = this.vendor_id == _REDHAT_VIRTIO and third >= 16
        return VirtioCapability if is_virtio else VendorSpecific
    if kind == CapabilityId.EXPRESS:
        return PciExpress if third & 0xF >= 2 else PciExpressV1
    return _LAYOUTS.get(kind, Capability)


Piece = tuple[int, int, Record]
"""Where it begins, where it ends, what it is."""


def _read_at(record: type[Record], stream: IO[bytes], offset: int, context: Any, path: str) -> Piece:
    stream.seek(offset)
    value = Nested(record)._parsereport(stream, context, path)
    return offset, stream.tell(), value


def _capabilities(stream: IO[bytes], this: Any, path: str) -> Iterator[Piece]:
    """Walk the list below 0x100, up to the first entry that can't be right."""
    data = _whole(stream)
    offset = getattr(this.header, "capabilities_pointer", 0) if this.status & _STATUS_CAP_LIST else 0
    while _HEADER <= offset < CONVENTIONAL and offset % 4 == 0:
        yield _read_at(_layout(this, data, offset), stream, offset, this, path)
        offset = data[offset + 1]


def _extended_capabilities(stream: IO[bytes], this: Any, path: str) -> Iterator[Piece]:
    """Walk the list that begins at 0x100; there is no pointer to it, and an empty one is a word of 0."""
    data = _whole(stream)
    offset = CONVENTIONAL
    while CONVENTIONAL <= offset < EXPRESS and offset % 4 == 0 and any(data[offset : offset + 4]):
        kind, version_and_next = struct.unpack_from("<HH", data, offset)
        layout = AdvancedErrorReporting if kind == _AER else ExtendedCapability
        yield _read_at(layout, stream, offset, this, path)
        offset = version_and_next >> 4


def _whole(stream: IO[bytes]) -> bytes:
    stream.seek(0)
    return stream.read()


def _well_formed(pieces: Iterator[Piece], end: int) -> Iterator[Piece]:
    """Those before the first one that overlaps another (a loop does), leaves the space or is cut off."""
    taken: list[tuple[int, int]] = []
    while True:
        try:
            piece = next(pieces, None)
        except construct.ConstructError:
            return
        if piece is None or piece[1] > end:
            return
        if any(piece[0] < other_end and begin < piece[1] for begin, other_end in taken):
            return
        taken.append(piece[:2])
        yield piece


class _Space(AnyConstruct):
    """From ``begin`` to ``end`` of configuration space: capabilities and gaps in order."""

    def __init__(self, begin: int, end: int, walk: Callable[[IO[bytes], Any, str], Iterator[Piece]]) -> None:
        super().__init__()
        self.begin = begin
        self.end = end
        self.walk = walk

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> tuple[Record, ...]:
        data = construct.stream_read(stream, self.end - self.begin, path)
        found: list[Record] = []
        at = self.begin
        for begin, end, piece in sorted(
            _well_formed(self.walk(stream, context, path), self.end), key=lambda piece: piece[0]
        ):
            if at < begin:
                found.append(Unclaimed(offset=at, data=data[at - self.begin : begin - self.begin]))
            found.append(piece)
            at = end
        if at < self.end:
            found.append(Unclaimed(offset=at, data=data[at - self.begin :]))
        stream.seek(self.end)
        return tuple(found)

    def _build(self, obj: tuple[Record, ...], stream: IO[bytes], context: Any, path: str) -> Any:
        at = self.begin
        for piece in obj:
            if (said := getattr(piece, "offset", None)) != at:
                raise refuse(f"{type(piece).__name__} says it stands at {said}, its place is {at:#x}")
            data = piece.build()
            stream.write(data)
            at += len(data)
        if at != self.end:
            raise refuse(f"configuration space ends at {at:#x}, expected {self.end:#x}")
        return obj

    def _sizeof(self, context: Any, path: str) -> int:
        return self.end - self.begin


class PciConfig(Record):
    """Configuration space: 256 bytes, or 4096 where the device is PCI Express.

    Where the list of capabilities is damaged, what it has not reached is ``Unclaimed``.
    hw/pci/pci.c: get_pci_config_device()
    """

    vendor_id: int = wire(Int16ul)
    device_id: int = wire(Int16ul)
    command: int = wire(Int16ul)
    status: int = wire(Int16ul)
    revision_id: int = wire(Int8ul)
    programming_interface: int = wire(Int8ul)
    subclass: int = wire(Int8ul)
    base_class: int = wire(Int8ul)
    cache_line_size: int = wire(Int8ul)
    latency_timer: int = wire(Int8ul)
    header_type: int = wire(Int8ul)
    bist: int = wire(Int8ul)
    header: DeviceHeader | BridgeHeader | OtherHeader = wire(
        Switch(
            lambda this: this.header_type & 0x7F,
            {0: Nested(DeviceHeader), 1: Nested(BridgeHeader)},
            default=Nested(OtherHeader),
        )
    )
    space: tuple[Capability | Unclaimed, ...] = wire(_Space(_HEADER, CONVENTIONAL, _capabilities))
    extended: tuple[ExtendedCapability | Unclaimed, ...] | None = wire(
        IfMore(_Space(CONVENTIONAL, EXPRESS, _extended_capabilities)), default=None
    )

    @property
    def length_bytes(self) -> int:
        """256 or 4096."""
        return CONVENTIONAL if self.extended is None else EXPRESS

    @property
    def is_express(self) -> bool:
        """Has the PCI Express capability.  A few conventional devices have 4096 bytes without it."""
        return any(isinstance(piece, PciExpressV1) for piece in self.space)

    @property
    def msix_entry_count(self) -> int | None:
        """Of the MSI-X table, or None where the device has none."""
        return next((piece.entry_count for piece in self.space if isinstance(piece, Msix)), None)


class PciIrqState(Record):
    """The level of INTA to INTD, 0 or 1.  hw/pci/pci.c: put_pci_irq_state()"""

    levels: tuple[int, ...] = wire(Rows(">I", 4))


class MsixEntry(NamedTuple):
    """A vector: where it writes, what, and bit 0 of the control word: masked."""

    address_lo: int
    address_hi: int
    data: int
    vector_control: int


def _entry_count(this: Any) -> int:
    return int(this._params.entry_count) if this._parsing else len(this.table)


class MsixState(Record):
    """The vectors, then a bit for each that is pending.  hw/pci/msix.c: msix_save()"""

    table: tuple[MsixEntry, ...] = wire(Rows("<4I", _entry_count, MsixEntry))
    pending: bytes = wire(Bytes(lambda this: (len(this.table) + 7) // 8))


def msix_length(entry_count: int) -> int:
    """In bytes, of the state of a device with so many vectors."""
    return 16 * entry_count + (entry_count + 7) // 8


def decode_pci_config(data: bytes) -> PciConfig:
    """The field ``pci config``.  Raises ``StreamError`` for a length that no configuration space has."""
    if len(data) not in (CONVENTIONAL, EXPRESS):
        raise StreamError(f"configuration space of {len(data)} bytes, expected {CONVENTIONAL} or {EXPRESS}")
    return PciConfig.read(data)


def decode_pci_irq_state(data: bytes) -> PciIrqState:
    """The field ``pci irq state``.  Raises ``StreamError``."""
    return PciIrqState.read(data)


def decode_msix_state(data: bytes) -> MsixState:
    """The field ``msix state``: its length gives the number of vectors.  Raises ``StreamError``."""
    entry_count = len(data) * 8 // 129  # 16 bytes and a bit each
    if msix_length(entry_count) != len(data):
        raise StreamError(f"no number of MSI-X vectors takes {len(data)} bytes")
    return MsixState.read(data, entry_count=entry_count)


def encode(value: Record) -> bytes:
    """The bytes of any value that a ``decode_*`` of this module or of ``virtio`` gave."""
    return value.build()
