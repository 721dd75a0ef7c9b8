"""The insides of the field ``virtio``: one blob to the JSON description, a whole device to QEMU.

Its parts follow one another without a length: what the transport keeps, what all devices have, what this
class of device keeps (bytes here), then subsections.  Which transport it is, and how long its configuration
space, shows only in that everything adds up.

hw/virtio/virtio.c: virtio_save(); hw/virtio/virtio-pci.c; hw/virtio/virtio-mmio.c
"""

from typing import Final

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
