"""The types that a description names: one element's bytes to its value, and back.

migration/vmstate-types.c, and the devices that have encoders of their own
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from qmigrate.errors import StreamError
from qmigrate.format.vm_state import Value

__all__ = ["INTEGER_SIZES", "NATURAL_SIZES", "OPAQUE", "PLAIN_BYTES", "SIGNED", "TYPES", "UNSIGNED", "Codec"]


@dataclass(frozen=True, slots=True)
class Codec:
    """Both ways of one type.  ``decode`` may raise StreamError: the field then stays bytes."""

    decode: Callable[[bytes], Value]
    encode: Callable[[Any], bytes]


def _decode_bool(data: bytes) -> Value:
    # Any byte but 0 loads as true: one that is not 1 is kept as the number it is.
    if len(data) != 1:
        raise StreamError(f"a bool has {len(data)} bytes, expected 1")
    return bool(data[0]) if data[0] < 2 else data[0]


def _decode_bitmap(data: bytes) -> Value:
    if len(data) % 8:
        raise StreamError(f"a bitmap has {len(data)} bytes, expected whole u64 words")
    return struct.unpack(f">{len(data) // 8}Q", data)


_BOOL: Final = Codec(_decode_bool, lambda value: bytes([value]))
_BITMAP: Final = Codec(_decode_bitmap, lambda words: struct.pack(f">{len(words)}Q", *words))
_BUFFER: Final = Codec(bytes, bytes)

SIGNED: Final = frozenset({"int8", "int16", "int32", "int64", "int32 equal", "int64 equal", "int32 le"})
UNSIGNED: Final = frozenset(
    {
        *("uint8", "uint16", "uint32", "uint64"),
        *("uint8 equal", "uint16 equal", "uint32 equal", "uint64 equal"),
        *("uint16_from_uint8", "int32_as_uint16", "CPU_Double_U"),
        *("cpsr", "fpscr", "powered_off"),  # Arm
        *("fpr", "vsr", "cpu/altivec/vscr"),  # ppc64
        "timer",  # expiry in ns of its clock; all ones: not armed
    }
)
INTEGER_SIZES: Final[Mapping[int, str]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
NATURAL_SIZES: Final[Mapping[str, int]] = {
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "timer": 8,
}


def _decode_packet_ids(data: bytes) -> Value:
    """u32 count, then as many u64.  hw/usb/redirect.c: packet_id_queue_vmstate_info"""
    if len(data) < 4 or len(data) != 4 + 8 * int.from_bytes(data[:4]):
        raise StreamError(f"a queue of packet ids has {len(data)} bytes, its count says otherwise")
    return struct.unpack(f">{len(data) // 8}Q", data[4:])


def _encode_packet_ids(ids: Sequence[int]) -> bytes:
    return struct.pack(f">I{len(ids)}Q", len(ids), *ids)


# A vector register is a pair of u64.  target/ppc/machine.c: vmstate_info_avr, vmstate_info_slbe
_PAIR: Final = Codec(lambda data: struct.unpack(">2Q", _exactly(16, data)), lambda pair: struct.pack(">2Q", *pair))


def _exactly(size: int, data: bytes) -> bytes:
    if len(data) != size:
        raise StreamError(f"has {len(data)} bytes, expected {size}")
    return data


def _declared(module: str, decode: str) -> Codec:
    """A layout that a module of its own declares, imported when a stream has one: start-up is a feature."""

    def late_decode(data: bytes) -> Value:
        value: Value = getattr(import_module(f"qmigrate.format.{module}"), decode)(data)
        return value

    return Codec(late_decode, lambda value: value.build())


TYPES: Final[Mapping[str, Codec]] = {
    "bool": _BOOL,
    "bitmap": _BITMAP,
    "buffer": _BUFFER,
    "unused_buffer": _BUFFER,
    "pci config": _declared("pci", "decode_pci_config"),
    "pci irq state": _declared("pci", "decode_pci_irq_state"),
    "msix state": _declared("pci", "decode_msix_state"),
    "virtio": _declared("virtio", "decode_virtio"),
    "usb-redir-packet-id-q": Codec(_decode_packet_ids, _encode_packet_ids),
    "avr": _PAIR,
    "slbe": _PAIR,
}
"""Types whose elements are decoded one by one.  Integers are read in bulk, structs by recursion."""

OPAQUE: Final[Mapping[str, str]] = {
    "scsi-requests": "each request's layout is its device's own",
    "shpc": "raw registers of the hot-plug controller",
    "usb-redir-parser": "the layout is that of another library, libusbredirparser",
    "usb-redir-bufpq": "the layout is that of another library, libusbredirparser",
    "virtio-gpu": "resources with their pixels, then scanouts: only the device knows the lengths",
    "unknown": "QEMU names no type",
}
"""Types that stay bytes, and why."""

PLAIN_BYTES: Final = frozenset({"buffer", "unused_buffer"})
