"""The insides of the field ``virtio``: one blob to the JSON description, a whole device to QEMU.

Its parts follow one another without a length: what the transport keeps, what all devices have, what this
class of device keeps (bytes here), then subsections.  What was taken for what is right when all adds up to
the length of the field.

hw/virtio/virtio.c: virtio_save(); hw/virtio/virtio-pci.c; hw/virtio/virtio-mmio.c
"""

import re
from collections.abc import Callable
from typing import IO, Any, Final, NamedTuple

from construct import Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub

from qmigrate.errors import UnsupportedError
from qmigrate.format._record import Adapter, AnyConstruct, Nested, Record, Rows, Several, When, refuse, wire
from qmigrate.format.pci import (
    CONVENTIONAL,
    EXPRESS,
    MsixState,
    PciConfig,
    PciIrqState,
    decode_msix_state,
    decode_pci_config,
    msix_length,
)
from qmigrate.format.stream import SubsectionHeader

__all__ = [
    "MmioQueue",
    "MmioState",
    "MmioTransport",
    "ModernQueue",
    "ModernState",
    "PackedQueue",
    "PciTransport",
    "RingAddresses",
    "Virtio",
    "VirtioSubsection",
    "Virtqueue",
    "decode_virtio",
]

_QUEUE_MAX: Final = 1024  # VIRTIO_QUEUE_MAX
_PCI_DEVICE_VERSION: Final = 2  # vmstate_pci_device
_FIRST_SUBSECTION: Final = re.compile(rb"\x05[\x08-\xff]virtio/", re.DOTALL)


class _AtMost(Adapter):
    """An integer that has a ceiling: what is above it shows that the reading is wrong."""

    def __init__(self, ceiling: int, subcon: AnyConstruct) -> None:
        super().__init__(subcon)
        self.ceiling = ceiling

    def _decode(self, obj: int, context: Any, path: str) -> int:
        if obj > self.ceiling:
            raise refuse(f"found {obj:#x}, expected at most {self.ceiling:#x}")
        return obj

    def _encode(self, obj: int, context: Any, path: str) -> int:
        return self._decode(obj, context, path)


class _InBytes(Adapter):
    """A record that is read from exactly so many bytes as ``length(context)`` says."""

    def __init__(self, length: Callable[[Any], int], decode: Callable[[bytes], Record]) -> None:
        super().__init__(Bytes(length))
        self.decode = decode

    def _decode(self, obj: bytes, context: Any, path: str) -> Record:
        return self.decode(bytes(obj))

    def _encode(self, obj: Record, context: Any, path: str) -> bytes:
        return obj.build()


# -- subsections: the optional parts at the end


class RingAddresses(NamedTuple):
    """A row of ``virtio/virtqueues``.  hw/virtio/virtio.c: vmstate_virtqueue"""

    avail: int
    used: int


class PackedQueue(NamedTuple):
    """A row of ``virtio/packed_virtqueues``.  hw/virtio/virtio.c: vmstate_packed_virtqueue"""

    last_avail_idx: int
    last_avail_wrap_counter: int
    used_idx: int
    used_wrap_counter: int
    inuse: int


class ModernQueue(NamedTuple):
    """A row of ``virtio_pci/modern_state``.  hw/virtio/virtio-pci.c: vmstate_virtio_pci_modern_queue_state"""

    num: int
    unused: int
    enabled: int
    desc_lo: int
    desc_hi: int
    avail_lo: int
    avail_hi: int
    used_lo: int
    used_hi: int


class MmioQueue(NamedTuple):
    """A row of ``virtio_mmio/state``.  hw/virtio/virtio-mmio.c: vmstate_virtio_mmio_queue_state"""

    num: int
    enabled: int
    desc_lo: int
    desc_hi: int
    avail_lo: int
    avail_hi: int
    used_lo: int
    used_hi: int


class _Value(AnyConstruct):
    """What the subsection holds, by its name in ``_VALUES``; any other is refused."""

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> Any:
        return self._layout(context)._parsereport(stream, context, path)

    def _build(self, obj: Any, stream: IO[bytes], context: Any, path: str) -> Any:
        return self._layout(context)._build(obj, stream, context, path)

    def _layout(self, context: Any) -> AnyConstruct:
        layout = _VALUES.get(context.name)
        if layout is None or context.version != 1:
            known = ", ".join(_VALUES)
            raise refuse(f"found {context.name} version {context.version}, expected version 1 of {known}")
        return layout


class VirtioSubsection(SubsectionHeader):
    """One of the optional parts: ``value`` is a number, a table, or what is inside."""

    value: Any = wire(_Value())


class _Subsections(AnyConstruct):
    """Those that follow whose name has the prefix.  migration/vmstate.c: vmstate_subsection_load()"""

    def __init__(self, *prefixes: str) -> None:
        super().__init__()
        self.prefixes = tuple(prefix.encode() for prefix in prefixes)

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> tuple[VirtioSubsection, ...]:
        found: list[VirtioSubsection] = []
        names: set[bytes] = set()
        while (name := _next_name(stream)).startswith(self.prefixes):
            if name in names:
                raise refuse(f"subsection {name.decode(errors='replace')} comes twice")
            names.add(name)
            found.append(Nested(VirtioSubsection)._parsereport(stream, context, path))
        return tuple(found)

    def _build(self, obj: tuple[VirtioSubsection, ...], stream: IO[bytes], context: Any, path: str) -> Any:
        for subsection in obj:
            Nested(VirtioSubsection)._build(subsection, stream, context, path)
        return obj


def _next_name(stream: IO[bytes]) -> bytes:
    """The name of the subsection that stands next, without moving; empty where none does."""
    at = stream.tell()
    head = stream.read(2 + 0xFF)
    stream.seek(at)
    return head[2 : 2 + head[1]] if head[:1] == b"\x05" and len(head) >= 2 + head[1] else b""


class ModernState(Record):
    """``virtio_pci/modern_state``: the registers of virtio 1.  hw/virtio/virtio-pci.c"""

    device_feature_select: int = wire(Int32ub)
    guest_feature_select: int = wire(Int32ub)
    guest_features: tuple[int, ...] = wire(Rows(">I", 2))
    queues: tuple[ModernQueue, ...] = wire(Rows(">HBB6I", _QUEUE_MAX, ModernQueue))
    subsections: tuple[VirtioSubsection, ...] = wire(_Subsections("virtio_pci/modern_state/"))


class MmioState(Record):
    """``virtio_mmio/state``: the registers of virtio 1.  hw/virtio/virtio-mmio.c"""

    guest_features: tuple[int, ...] = wire(Rows(">I", 2))
    queues: tuple[MmioQueue, ...] = wire(Rows(">HB6I", _QUEUE_MAX, MmioQueue))


# hw/virtio/virtio.c: vmstate_virtio, in its order
# fmt: off
_VALUES: Final[dict[str, AnyConstruct]] = {
    "virtio/device_endian":     Int8ub,
    "virtio/128bit_features":   Int64ub,   # the high half; 10.2
    "virtio/64bit_features":    Int64ub,
    "virtio/virtqueues":        Rows(">QQ", _QUEUE_MAX, RingAddresses),
    "virtio/ringsize":          Rows(">I", _QUEUE_MAX),
    "virtio/broken":            Int8ub,
    "virtio/extra_state":       _Subsections("virtio_pci/", "virtio_mmio/"),
    "virtio/started":           Int8ub,
    "virtio/packed_virtqueues": Rows(">HBHBI", _QUEUE_MAX, PackedQueue),
    "virtio/disabled":          Int8ub,
    "virtio_pci/modern_state":  Nested(ModernState),
    "virtio_pci/modern_state/features128": Rows(">I", 2),   # 10.2
    "virtio_mmio/state":        Nested(MmioState),
}
# fmt: on


# -- what the transport keeps


def _has_msix(this: Any) -> bool:
    return this.config.msix_entry_count is not None


def _config_length(this: Any) -> int:
    return int(this._params.config_length) if this._parsing else this.config.length_bytes


class PciTransport(Record):
    """hw/virtio/virtio-pci.c: virtio_pci_save_config()"""

    version_id: int = wire(Const(_PCI_DEVICE_VERSION, Int32ub), default=_PCI_DEVICE_VERSION)
    config: PciConfig = wire(_InBytes(_config_length, decode_pci_config))
    irq_state: PciIrqState = wire(Nested(PciIrqState))
    msix: MsixState | None = wire(
        When(_has_msix, _InBytes(lambda this: msix_length(this.config.msix_entry_count), decode_msix_state))
    )
    config_vector: int | None = wire(When(_has_msix, Int16ub))


class MmioTransport(Record):
    """hw/virtio/virtio-mmio.c: virtio_mmio_save_config().  The ceilings are those of its registers."""

    host_features_sel: int = wire(_AtMost(1, Int32ub))
    guest_features_sel: int = wire(_AtMost(1, Int32ub))
    guest_page_shift: int = wire(_AtMost(31, Int32ub))


class _Transport(AnyConstruct):
    """The record that ``transport`` in the parameters names."""

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> Any:
        return Nested(context._params.transport)._parsereport(stream, context, path)

    def _build(self, obj: Record, stream: IO[bytes], context: Any, path: str) -> Any:
        return Nested(type(obj))._build(obj, stream, context, path)


# -- all of it


class _UpToSubsections(AnyConstruct):
    """Bytes, up to where the first subsection of a virtio device seems to begin, or to the end.

    A guest can set a MAC filter of virtio-net that looks like one: that field is refused, not misread.
    """

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> bytes:
        start = stream.tell()
        rest = stream.read()
        found = _FIRST_SUBSECTION.search(rest)
        end = found.start() if found else len(rest)
        stream.seek(start + end)
        return rest[:end]

    def _build(self, obj: bytes, stream: IO[bytes], context: Any, path: str) -> Any:
        stream.write(obj)
        return obj


def _is_mmio(this: Any) -> bool:
    return isinstance(this._.transport, MmioTransport)


def _has_vectors(this: Any) -> bool:
    transport = this._.transport
    return isinstance(transport, PciTransport) and transport.msix is not None


class Virtqueue(Record):
    """One queue, as far as all versions of virtio have it; addresses of virtio 1 are in subsections."""

    num: int = wire(Int32ub)
    align: int | None = wire(When(_is_mmio, Int32ub))
    descriptor_address: int = wire(Int64ub)
    last_avail_idx: int = wire(Int16ub)
    vector: int | None = wire(When(_has_vectors, Int16ub))


class Virtio(Record):
    """A virtio device.  ``config`` is its configuration in the guest's layout, not the transport's.

    hw/virtio/virtio.c: virtio_save()
    """

    transport: PciTransport | MmioTransport = wire(_Transport())
    status: int = wire(Int8ub)
    isr: int = wire(Int8ub)
    queue_sel: int = wire(Int16ub)
    guest_features: int = wire(Int32ub)
    config_length: int = wire(Int32ub)
    config: bytes = wire(Bytes(lambda this: this.config_length))
    queue_count: int = wire(_AtMost(_QUEUE_MAX, Int32ub))
    queues: tuple[Virtqueue, ...] = wire(Several(lambda this: this.queue_count, Nested(Virtqueue)))
    device_class: bytes = wire(_UpToSubsections())
    subsections: tuple[VirtioSubsection, ...] = wire(_Subsections("virtio/"))


def decode_virtio(data: bytes) -> Virtio:
    """The field ``virtio``.  Raises ``StreamError`` where its parts don't add up to its length.

    PCI begins with the version of a PCIDevice, MMIO with a selector that is 0 or 1.
    """
    first = int.from_bytes(data[:4])
    if first < _PCI_DEVICE_VERSION:
        return Virtio.read(data, transport=MmioTransport)
    if first == _PCI_DEVICE_VERSION:
        return Virtio.read(data, transport=PciTransport, config_length=_config_length_of(data[4:]))
    raise UnsupportedError(
        f"found {first:#x}, expected a PCI transport (2) or an MMIO one (0, 1); ccw is not decoded",
        offset=0,
        trail=("transport",),
    )


def _config_length_of(data: bytes) -> int:
    """Of the configuration space at the front of ``data``: virtio has 4096 bytes only as an express device.

    hw/virtio/virtio-pci.c: virtio_pci_realize()
    """
    begin = data[:CONVENTIONAL].ljust(CONVENTIONAL, b"\0")
    return EXPRESS if decode_pci_config(begin).is_express else CONVENTIONAL
