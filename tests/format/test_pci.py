"""PCI configuration space, interrupt pins and the MSI-X table."""

import dataclasses
import random
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import StreamError, TruncatedError
from qmigrate.format.pci import (
    AdvancedErrorReporting,
    BridgeHeader,
    Capability,
    DeviceHeader,
    ExtendedCapability,
    Msi,
    Msix,
    MsixEntry,
    MsixState,
    OtherHeader,
    PciConfig,
    PciExpress,
    PciExpressV1,
    PowerManagement,
    SubsystemVendor,
    Unclaimed,
    VendorSpecific,
    VirtioCapability,
    decode_msix_state,
    decode_pci_config,
    decode_pci_irq_state,
    encode,
)
from qmigrate.format.virtio import PciTransport, decode_virtio
from tests.format.fields import recorded

CONFIGS = (
    "pci-config-ahci-10.0",
    "pci-config-bridge-7.2",
    "pci-config-e1000e-10.0",
    "pci-config-nvme-11.1",
    "pci-config-root-port-5.2",
    "pci-config-vmxnet3-7.2",
)


def config_space(first: int, parts: dict[int, bytes], *, vendor_id: int = 0x1234, size: int = 256) -> bytes:
    """A configuration space of zeros with a list of capabilities that begins at ``first``."""
    data = bytearray(size)
    struct.pack_into("<H", data, 0, vendor_id)
    struct.pack_into("<H", data, 6, 0x10)
    data[0x34] = first
    for offset, part in parts.items():
        data[offset : offset + len(part)] = part
    return bytes(data)


def layout(config: PciConfig) -> list[tuple[int, type]]:
    """Where each capability stands, and what it is."""
    pieces = (*config.space, *(config.extended or ()))
    return [(piece.offset, type(piece)) for piece in pieces if not isinstance(piece, Unclaimed)]


def length(piece: Capability | ExtendedCapability | Unclaimed) -> int:
    return len(piece.build())


@st.composite
def walkable_configs(draw: st.DrawFn) -> bytes:
    """Random bytes whose lists of capabilities lead somewhere: known ids, pointers that mostly fit."""
    size = draw(st.sampled_from((256, 4096)))
    data = bytearray(draw(st.randoms(use_true_random=False)).randbytes(size))
    offsets = draw(st.lists(st.integers(15, 64).map(lambda slot: slot * 4), min_size=1, max_size=12))
    data[6] |= 0x10
    data[0x0E] = draw(st.sampled_from((0, 1, 2, 0x80)))
    data[0x34] = offsets[0] & 0xFF
    struct.pack_into("<H", data, 0, draw(st.sampled_from((0x1AF4, 0x8086))))
    for offset, following in zip(offsets, [*offsets[1:], 0], strict=True):
        if offset < 0xFE:
            data[offset] = draw(st.sampled_from((0x01, 0x05, 0x09, 0x0D, 0x10, 0x11, 0x77)))
            data[offset + 1] = following & 0xFF
            data[offset + 2] = draw(st.sampled_from((0, 1, 2, 3, 16, 20, 255)))
    if size == 4096:
        struct.pack_into("<HH", data, 0x100, 1, 1 | draw(st.sampled_from((0, 0x100, 0x148, 0xFFC))) << 4)
    return bytes(data)


@given(st.sampled_from((256, 4096)), st.randoms(use_true_random=False))
def test_any_configuration_space_comes_back_as_it_was(size: int, source: random.Random) -> None:
    data = source.randbytes(size)
    assert encode(decode_pci_config(data)) == data


@given(walkable_configs())
def test_a_configuration_space_with_any_list_of_capabilities_comes_back_as_it_was(data: bytes) -> None:
    assert encode(decode_pci_config(data)) == data


@given(walkable_configs())
def test_each_byte_above_the_header_is_in_one_piece(data: bytes) -> None:
    config = decode_pci_config(data)
    at = 0x40
    for piece in (*config.space, *(config.extended or ())):
        assert piece.offset == at
        at += length(piece)
    assert at == len(data) == config.length_bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_space_of_a_real_device_comes_back_as_it_was(name: str) -> None:
    data = recorded(name)
    assert encode(decode_pci_config(data)) == data


def test_the_header_of_an_ordinary_device_is_named() -> None:
    config = decode_pci_config(recorded("pci-config-ahci-10.0"))
    assert (config.vendor_id, config.device_id) == (0x8086, 0x2922)
    assert (config.base_class, config.subclass, config.programming_interface) == (1, 6, 1)
    assert isinstance(config.header, DeviceHeader)
    assert config.header.bars == (0, 0, 0, 0, 1, 0)
    assert (config.header.subsystem_vendor_id, config.header.subsystem_id) == (0x1AF4, 0x1100)
    assert config.header.interrupt_pin == 1
    assert config.extended is None


def test_the_header_of_a_bridge_is_named() -> None:
    config = decode_pci_config(recorded("pci-config-bridge-7.2"))
    assert isinstance(config.header, BridgeHeader)
    assert config.header.bars == (4, 0)
    assert config.header.secondary_status == 0xA0
    assert config.header.capabilities_pointer == 0x4C


def test_a_header_of_another_type_is_kept_as_bytes() -> None:
    data = bytearray(range(256))
    data[0x0E] = 2
    config = decode_pci_config(bytes(data))
    assert config.header == OtherHeader(data=bytes(range(0x10, 0x40)))
    assert config.space == (Unclaimed(offset=0x40, data=bytes(range(0x40, 0x100))),)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pci-config-ahci-10.0", [(0x80, Msi), (0xA8, Capability)]),
        ("pci-config-bridge-7.2", [(0x40, Capability), (0x48, Capability), (0x4C, Msi)]),
        (
            "pci-config-e1000e-10.0",
            [
                (0xA0, Msix),
                (0xC8, PowerManagement),
                (0xD0, Msi),
                (0xE0, PciExpressV1),
                (0x100, AdvancedErrorReporting),
            ],
        ),
        ("pci-config-nvme-11.1", [(0x40, Msix), (0x60, PowerManagement), (0x80, PciExpress)]),
        (
            "pci-config-root-port-5.2",
            [
                (0x40, SubsystemVendor),
                (0x48, Msix),
                (0x54, PciExpress),
                (0x100, AdvancedErrorReporting),
                (0x148, ExtendedCapability),
            ],
        ),
        ("pci-config-vmxnet3-7.2", [(0x84, Msi), (0x9C, Msix), (0x100, ExtendedCapability)]),
    ],
)
def test_the_capabilities_of_a_real_device_are_found(name: str, expected: list[Any]) -> None:
    assert layout(decode_pci_config(recorded(name))) == expected


def test_the_registers_of_virtio_are_found_in_its_vendor_specific_capabilities() -> None:
    transport = decode_virtio(recorded("virtio-net-11.1")).transport
    assert isinstance(transport, PciTransport)
    found = [piece for piece in transport.config.space if isinstance(piece, VirtioCapability)]
    assert sorted(piece.cfg_type for piece in found) == [1, 2, 3, 4, 5]
    assert {piece.length for piece in found} == {16, 20}
    notify = next(piece for piece in found if piece.cfg_type == 2)
    assert (notify.bar, notify.region_offset, notify.region_length) == (4, 0x3000, 0x1000)
    assert notify.more == bytes([4, 0, 0, 0])


def test_a_device_of_4096_bytes_is_not_for_that_alone_an_express_device() -> None:
    assert not decode_pci_config(recorded("pci-config-vmxnet3-7.2")).is_express
    assert decode_pci_config(recorded("pci-config-e1000e-10.0")).is_express


@pytest.mark.parametrize(("control", "size"), [(0, 10), (0x80, 14), (0x100, 20), (0x180, 24)])
def test_the_control_word_of_msi_says_how_long_it_is(control: int, size: int) -> None:
    data = config_space(0x40, {0x40: bytes([5, 0]) + struct.pack("<H", control) + bytes(range(1, 21))})
    msi, rest = decode_pci_config(data).space
    assert isinstance(msi, Msi)
    assert (rest.offset, length(msi)) == (0x40 + size, size)
    assert (msi.address_hi is not None, msi.mask_bits is not None) == (
        bool(control & 0x80),
        bool(control & 0x100),
    )


def test_a_list_of_capabilities_that_runs_in_a_circle_ends() -> None:
    data = config_space(0x40, {0x40: bytes([0x01, 0x48]), 0x48: bytes([0x0D, 0x40])})
    assert layout(decode_pci_config(data)) == [(0x40, PowerManagement), (0x48, SubsystemVendor)]


def test_what_follows_a_capability_inside_another_stays_bytes() -> None:
    data = config_space(0x40, {0x40: bytes([0x01, 0x44]), 0x44: bytes([0x0D, 0x60]), 0x60: bytes([0x11, 0])})
    assert layout(decode_pci_config(data)) == [(0x40, PowerManagement)]


@pytest.mark.parametrize(
    ("first", "part"),
    [
        (0x3C, b""),  # inside the header
        (0x42, b"\x01\x00"),  # not aligned
        (0xFC, b"\x01\x00"),  # 8 bytes at the last 4
        (0x40, b"\x09\x00\x02"),  # shorter than its own head
        (0x40, b"\x09\x00\xff"),  # longer than what is left
    ],
)
def test_a_capability_that_cannot_be_right_stays_bytes(first: int, part: bytes) -> None:
    data = config_space(first, {first: part})
    config = decode_pci_config(data)
    assert config.space == (Unclaimed(offset=0x40, data=data[0x40:]),)


def test_a_capability_may_not_reach_beyond_256_bytes_where_there_are_more() -> None:
    config = decode_pci_config(config_space(0xFC, {0xFC: bytes([0x01, 0])}, size=4096))
    assert layout(config) == []


def test_a_list_that_the_status_register_does_not_announce_is_not_read() -> None:
    data = bytearray(config_space(0x40, {0x40: bytes([0x01, 0])}))
    data[6] = 0
    assert layout(decode_pci_config(bytes(data))) == []


def test_a_vendor_specific_capability_of_another_vendor_keeps_its_bytes() -> None:
    data = config_space(0x40, {0x40: bytes([0x09, 0, 16, 1, 2, 3])}, vendor_id=0x8086)
    capability = decode_pci_config(data).space[0]
    assert capability == VendorSpecific(offset=0x40, id=9, next=0, length=16, data=bytes([1, 2, 3]) + bytes(10))


@pytest.mark.parametrize("size", [0, 255, 257, 4095, 4097])
def test_a_configuration_space_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(StreamError, match=f"^configuration space of {size} bytes, expected 256 or 4096$"):
        decode_pci_config(bytes(size))


def test_a_changed_register_is_written_where_it_stands() -> None:
    data = recorded("pci-config-ahci-10.0")
    changed = encode(dataclasses.replace(decode_pci_config(data), command=0x0506))
    assert changed == data[:4] + b"\x06\x05" + data[6:]


def test_a_capability_that_was_moved_cannot_be_written() -> None:
    config = decode_pci_config(recorded("pci-config-ahci-10.0"))
    with pytest.raises(StreamError, match="Msi says it stands at 128, its place is 0x40"):
        encode(dataclasses.replace(config, space=config.space[1:]))


def test_a_configuration_space_that_became_too_short_cannot_be_written() -> None:
    config = decode_pci_config(recorded("pci-config-ahci-10.0"))
    with pytest.raises(StreamError, match="configuration space ends at 0xaa, expected 0x100"):
        encode(dataclasses.replace(config, space=config.space[:-1]))


@given(st.binary(min_size=16, max_size=16))
def test_any_state_of_the_interrupt_pins_comes_back_as_it_was(data: bytes) -> None:
    state = decode_pci_irq_state(data)
    assert len(state.levels) == 4
    assert encode(state) == data


def test_interrupt_pins_that_are_cut_off_are_refused() -> None:
    with pytest.raises(TruncatedError):
        decode_pci_irq_state(bytes(15))


@given(st.integers(0, 2048), st.randoms(use_true_random=False))
def test_an_msix_table_of_any_number_of_vectors_comes_back_as_it_was(count: int, source: random.Random) -> None:
    data = source.randbytes(16 * count + (count + 7) // 8)
    state = decode_msix_state(data)
    assert len(state.table) == count
    assert encode(state) == data


@given(st.integers(0, 40_000))
def test_a_length_either_is_that_of_a_number_of_vectors_or_is_refused(size: int) -> None:
    fits = any(16 * count + (count + 7) // 8 == size for count in range(size // 16 + 1))
    if fits:
        assert len(encode(decode_msix_state(bytes(size)))) == size
    else:
        with pytest.raises(StreamError, match=f"^no number of MSI-X vectors takes {size} bytes$"):
            decode_msix_state(bytes(size))


@pytest.mark.parametrize(("name", "count"), [("nvme-11.1", 65), ("vmxnet3-7.2", 25)])
def test_the_msix_table_has_as_many_vectors_as_the_capability_of_its_device_says(name: str, count: int) -> None:
    state = decode_msix_state(recorded(f"msix-state-{name}"))
    config = decode_pci_config(recorded(f"pci-config-{name}"))
    assert len(state.table) == config.msix_entry_count == count
    assert state.table[0] == MsixEntry(address_lo=0, address_hi=0, data=0, vector_control=1)


def test_a_table_with_a_vector_more_has_no_room_for_its_pending_bits() -> None:
    state = decode_msix_state(bytes(129))
    longer = MsixState(table=(*state.table, MsixEntry(0, 0, 0, 0)), pending=state.pending)
    with pytest.raises(StreamError, match="MsixState can't be written"):
        encode(longer)
