"""The field ``virtio``: transport, common part, device class, subsections."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import StreamError, TruncatedError, UnsupportedError
from qmigrate.format.pci import MsixEntry, MsixState, PciConfig, PciIrqState, decode_pci_config, encode
from qmigrate.format.virtio import (
    MmioQueue,
    MmioState,
    MmioTransport,
    ModernQueue,
    ModernState,
    PackedQueue,
    PciTransport,
    RingAddresses,
    Virtio,
    VirtioSubsection,
    Virtqueue,
    decode_virtio,
)
from tests.format.fields import recorded

DECODED = (
    "virtio-balloon-5.2",
    "virtio-blk-mmio-7.2",
    "virtio-blk-mmio-legacy-5.2",
    "virtio-blk-packed-7.2",
    "virtio-blk-pc-2.6-7.2",
    "virtio-console-legacy-5.2",
    "virtio-net-11.1",
    "virtio-rng-pcie-10.0",
)
SMALL = "virtio-blk-pc-2.6-7.2"

u8, u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))


def subsection(name: str, value: object) -> VirtioSubsection:
    return VirtioSubsection(name=name, version=1, value=value)


def pad(rows: Sequence[Any], empty: Any) -> tuple[Any, ...]:
    """A table of 1024 rows that begins with these."""
    return (*rows, *[empty] * (1024 - len(rows)))


def tables(row: Any, *columns: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[Any, ...]]:
    """Tables of 1024 rows of which the first few are not 0."""
    empty = row(*[0] * len(columns))
    return st.lists(st.builds(row, *columns), max_size=3).map(lambda rows: pad(rows, empty))


pci_configs = st.sampled_from(
    (
        decode_pci_config(recorded("pci-config-ahci-10.0")),  # no MSI-X
        decode_pci_config(recorded("pci-config-nvme-11.1")),  # 65 vectors, PCI Express
        decode_pci_config(recorded(SMALL)[4:260]),  # 2 vectors
    )
)


@st.composite
def pci_transports(draw: st.DrawFn) -> PciTransport:
    config: PciConfig = draw(pci_configs)
    count = config.msix_entry_count
    return PciTransport(
        config=config,
        irq_state=PciIrqState(levels=draw(st.tuples(u32, u32, u32, u32))),
        msix=None
        if count is None
        else MsixState(
            table=(draw(st.builds(MsixEntry, u32, u32, u32, u32)),) * count,
            pending=bytes([draw(u8)]) * ((count + 7) // 8),
        ),
        config_vector=None if count is None else draw(u16),
    )


mmio_transports = st.builds(
    MmioTransport,
    host_features_sel=st.integers(0, 1),
    guest_features_sel=st.integers(0, 1),
    guest_page_shift=st.integers(0, 31),
)
modern_states = st.builds(
    ModernState,
    device_feature_select=u32,
    guest_feature_select=u32,
    guest_features=st.tuples(u32, u32),
    queues=tables(ModernQueue, u16, u8, u8, *[u32] * 6),
    subsections=st.one_of(
        st.just(()),
        st.tuples(u32, u32).map(lambda words: (subsection("virtio_pci/modern_state/features128", words),)),
    ),
)
mmio_states = st.builds(MmioState, guest_features=st.tuples(u32, u32), queues=tables(MmioQueue, u16, u8, *[u32] * 6))
VALUES = {
    "virtio/device_endian": u8,
    "virtio/128bit_features": u64,
    "virtio/64bit_features": u64,
    "virtio/virtqueues": tables(RingAddresses, u64, u64),
    "virtio/ringsize": st.lists(u32, max_size=3).map(lambda rows: pad(rows, 0)),
    "virtio/broken": u8,
    "virtio/extra_state": st.one_of(
        st.just(()),
        modern_states.map(lambda state: (subsection("virtio_pci/modern_state", state),)),
        mmio_states.map(lambda state: (subsection("virtio_mmio/state", state),)),
    ),
    "virtio/started": u8,
    "virtio/packed_virtqueues": tables(PackedQueue, u16, u8, u16, u8, u32),
    "virtio/disabled": u8,
}


@st.composite
def devices(draw: st.DrawFn) -> Virtio:
    transport = draw(st.one_of(pci_transports(), mmio_transports))
    has_vectors = isinstance(transport, PciTransport) and transport.msix is not None
    is_mmio = isinstance(transport, MmioTransport)
    queue = st.builds(
        Virtqueue,
        num=u32,
        align=u32 if is_mmio else st.none(),
        descriptor_address=u64,
        last_avail_idx=u16,
        vector=u16 if has_vectors else st.none(),
    )
    config = draw(st.binary(max_size=60))
    queues = tuple(draw(st.lists(queue, max_size=4)))
    names = draw(st.lists(st.sampled_from(sorted(VALUES)), unique=True, max_size=5))
    return Virtio(
        transport=transport,
        status=draw(u8),
        isr=draw(u8),
        queue_sel=draw(u16),
        guest_features=draw(u32),
        config_length=len(config),
        config=config,
        queue_count=len(queues),
        queues=queues,
        device_class=draw(st.binary(max_size=40)),
        subsections=tuple(subsection(name, draw(VALUES[name])) for name in names),
    )


@given(devices())
def test_a_device_of_any_values_comes_back_as_it_was(device: Virtio) -> None:
    assert decode_virtio(encode(device)) == device


@pytest.mark.parametrize("name", DECODED)
def test_the_state_of_a_real_device_comes_back_as_it_was(name: str) -> None:
    data = recorded(name)
    assert encode(decode_virtio(data)) == data


@given(st.sampled_from(DECODED), st.data())
def test_a_damaged_state_is_refused_or_comes_back_as_it_was(name: str, data: st.DataObject) -> None:
    damaged = bytearray(recorded(name))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(u8)
    try:
        device = decode_virtio(bytes(damaged))
    except StreamError:
        return
    assert encode(device) == damaged


@given(st.sampled_from((b"", bytes(3), bytes(4), bytes([0, 0, 0, 2]))), st.binary(max_size=600))
def test_any_bytes_are_refused_or_come_back_as_they_were(begin: bytes, rest: bytes) -> None:
    try:
        device = decode_virtio(begin + rest)
    except StreamError:
        return
    assert encode(device) == begin + rest


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("virtio-balloon-5.2", ["64bit_features", "virtqueues", "extra_state"]),
        ("virtio-blk-mmio-7.2", ["64bit_features", "virtqueues", "extra_state", "started"]),
        ("virtio-blk-mmio-legacy-5.2", []),
        (
            "virtio-blk-packed-7.2",
            ["64bit_features", "virtqueues", "extra_state", "started", "packed_virtqueues"],
        ),
        ("virtio-blk-pc-2.6-7.2", ["extra_state"]),
        ("virtio-console-legacy-5.2", ["extra_state"]),
    ],
)
def test_the_subsections_of_a_real_device_are_found(name: str, expected: list[Any]) -> None:
    names = [item.name for item in decode_virtio(recorded(name)).subsections]
    assert names == [f"virtio/{name}" for name in expected]


def test_a_disk_that_firmware_has_used_shows_its_queue() -> None:
    device = decode_virtio(recorded("virtio-blk-packed-7.2"))
    assert (device.status, device.guest_features, device.config_length) == (15, 0x44, 57)
    assert device.device_class == b"\0"  # no request in flight
    (queue,) = device.queues
    assert (queue.num, queue.align, queue.vector) == (256, None, 0xFFFF)
    by_name = {item.name: item.value for item in device.subsections}
    rings = by_name["virtio/virtqueues"]
    assert queue.descriptor_address < rings[0].avail < rings[0].used
    assert set(rings[1:]) == {RingAddresses(0, 0)}
    (modern,) = by_name["virtio/extra_state"]
    assert modern.value.queues[0].enabled == 1
    assert modern.value.queues[0].desc_lo == queue.descriptor_address
    assert by_name["virtio/started"] == 1


def test_the_transport_is_told_by_what_adds_up() -> None:
    express, mmio, bare, small = (
        decode_virtio(recorded(name)).transport
        for name in ("virtio-rng-pcie-10.0", "virtio-blk-mmio-7.2", "virtio-balloon-5.2", SMALL)
    )
    assert isinstance(express, PciTransport)
    assert express.config.length_bytes == 4096
    assert mmio == MmioTransport(host_features_sel=1, guest_features_sel=1, guest_page_shift=0)
    assert isinstance(bare, PciTransport)
    assert (bare.msix, bare.config_vector) == (None, None)
    assert isinstance(small, PciTransport)
    assert (small.config.length_bytes, small.config_vector) == (256, 0xFFFF)


def test_only_transports_with_msix_keep_a_vector_for_each_queue() -> None:
    assert {queue.vector for queue in decode_virtio(recorded("virtio-balloon-5.2")).queues} == {None}
    assert {queue.vector for queue in decode_virtio(recorded("virtio-net-11.1")).queues} == {0xFFFF}


def test_only_mmio_keeps_an_alignment_for_each_queue() -> None:
    assert [queue.align for queue in decode_virtio(recorded("virtio-blk-mmio-legacy-5.2")).queues] == [4096]


def test_what_a_device_class_keeps_reaches_to_the_first_subsection() -> None:
    device = decode_virtio(recorded("virtio-net-11.1"))
    assert len(device.device_class) == 545
    assert device.device_class.startswith(bytes.fromhex("525400123456"))  # the MAC address
    assert device.subsections[0].name == "virtio/64bit_features"


@pytest.mark.parametrize(
    ("cut", "trail"), [(3, "version_id"), (100, "config"), (300, "msix"), (370, "descriptor_address")]
)
def test_a_state_that_ends_too_soon_is_refused_with_its_place(cut: int, trail: str) -> None:
    with pytest.raises(TruncatedError) as caught:
        decode_virtio(recorded(SMALL)[:cut] if cut > 3 else b"\0\0\0\2"[:cut])
    assert caught.value.offset == cut
    assert caught.value.trail[-1] in (trail, "host_features_sel")


def test_bytes_behind_the_last_subsection_are_refused() -> None:
    with pytest.raises(StreamError, match="0xc0d6: Virtio takes 49366 bytes, 49368 are there"):
        decode_virtio(recorded("virtio-rng-pcie-10.0") + bytes(2))


def test_an_unknown_subsection_is_refused_by_name() -> None:
    data = recorded(SMALL) + b"\x05\x0dvirtio/novelty"[:15] + bytes([0, 0, 0, 1])
    with pytest.raises(StreamError, match="found virtio/novelt version 1, expected version 1 of virtio/dev"):
        decode_virtio(data)


def test_a_subsection_of_another_version_is_refused() -> None:
    device = decode_virtio(recorded("virtio-blk-packed-7.2"))
    data = encode(device).replace(b"virtio/started" + (1).to_bytes(4), b"virtio/started" + (2).to_bytes(4))
    with pytest.raises(StreamError, match="found virtio/started version 2"):
        decode_virtio(data)


def test_a_subsection_that_comes_twice_is_refused() -> None:
    device = decode_virtio(recorded(SMALL))
    twice = dataclasses.replace(device, subsections=(subsection("virtio/started", 1),) * 2)
    with pytest.raises(StreamError, match="subsection virtio/started comes twice"):
        decode_virtio(encode(twice))


def test_more_queues_than_a_device_can_have_are_refused() -> None:
    device = decode_virtio(recorded(SMALL))
    data = bytearray(encode(device))
    at = len(encode(device.transport)) + 12 + device.config_length
    data[at : at + 4] = (1025).to_bytes(4)
    with pytest.raises(StreamError, match=f"{at:#x}: queue_count: found 0x401, expected at most 0x400"):
        decode_virtio(bytes(data))


def test_a_channel_transport_is_said_to_be_undecoded() -> None:
    with pytest.raises(UnsupportedError, match=r"transport: found 0xfe000000, .* ccw is not decoded"):
        decode_virtio(recorded("virtio-rng-ccw-11.1"))


def test_a_device_class_that_looks_like_subsections_is_refused() -> None:
    false = b"\x05\x15virtio/64bit_features\0\0\0\1" + bytes(8)
    with pytest.raises(StreamError, match="comes twice"):
        decode_virtio(recorded("virtio-blk-mmio-legacy-5.2") + false * 2)


def test_a_table_with_a_row_too_few_cannot_be_written() -> None:
    device = decode_virtio(recorded("virtio-blk-packed-7.2"))
    rings = next(item for item in device.subsections if item.name == "virtio/virtqueues")
    shorter = subsection(rings.name, rings.value[1:])
    with pytest.raises(StreamError, match="a table of 1024 rows can't hold 1023"):
        encode(dataclasses.replace(device, subsections=(shorter,)))


def test_a_changed_value_is_written_where_it_stands() -> None:
    data = recorded(SMALL)
    device = decode_virtio(data)
    at = len(encode(device.transport))
    assert encode(dataclasses.replace(device, status=7)) == data[:at] + b"\7" + data[at + 1 :]
