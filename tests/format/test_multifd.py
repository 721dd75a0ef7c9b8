"""Multifd channels: each record both ways, the grammar over any split of the bytes, what is refused, and the pages."""

import gzip
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import StreamError, TruncatedError, UnsupportedError
from qmigrate.format.feed import Feed
from qmigrate.format.multifd import (
    LONGEST_DATA,
    Compression,
    DeviceStateHeader,
    DeviceStatePacket,
    InitialPacket,
    MultifdFlag,
    PageHeader,
    PagePacket,
    encode_packet,
    header_length,
    pack_offsets,
    page_capacity,
)
from qmigrate.format.multifd_channel import ChannelEntry, read_channel, read_header
from qmigrate.format.multifd_pages import PageDecoder
from qmigrate.format.ram import PageRun, RamFlag
from tests.joining import channel_entries

try:
    from backports import zstd
except ImportError:  # it is in Python itself since 3.14
    from compression import zstd  # type: ignore[import-not-found, no-redef]

PAGE = 4096
PAGE_SIZES = [1024, 4096, 8192, 65536]
U32 = st.integers(0, 0xFFFFFFFF)
U64 = st.integers(0, 0xFFFFFFFFFFFFFFFF)
INITIAL = InitialPacket(channel_id=3)
SYNC = MultifdFlag.SYNC
NOISE = random.Random(3).randbytes(4 * PAGE)


def packet(
    normal: Sequence[int] = (),
    zero: Sequence[int] = (),
    *,
    flags: int = 0,
    size: int | None = None,
    block: bytes = b"pc.ram",
    page_size: int = PAGE,
    **more: int,
) -> PagePacket:
    """Pages at these offsets; ``size`` of their data, where it is not that of plain pages."""
    values: dict[str, Any] = {
        "pages_alloc": page_capacity(page_size),
        "normal_pages": len(normal),
        "next_packet_size": len(normal) * page_size if size is None else size,
        "packet_num": 7,
        "zero_pages": len(zero),
        **more,
    }
    offsets = pack_offsets([*normal, *zero], page_size=page_size)
    return PagePacket(
        PageHeader(flags=flags, name=block.ljust(256, b"\0"), offsets=offsets, **values),
        page_size,
    )


def device_state(data: bytes, *, size: int | None = None, flags: int = MultifdFlag.DEVICE_STATE) -> DeviceStatePacket:
    header = DeviceStateHeader(
        flags=flags,
        name=b"0000:00:05.0/vfio".ljust(256, b"\0"),
        instance_id=1,
        next_packet_size=len(data) if size is None else size,
    )
    return DeviceStatePacket(header, data)


def channel(*packets: bytes) -> bytes:
    return b"".join([INITIAL.build(), *packets])


def fault(data: bytes, step: int | None = None, **options: Any) -> StreamError:
    with pytest.raises(StreamError) as caught:
        list(channel_entries(data, step, **options))
    return caught.value


@st.composite
def headers(draw: st.DrawFn, page_size: int) -> PageHeader:
    """Any values whatsoever."""
    return PageHeader(
        flags=draw(U32),
        pages_alloc=draw(U32),
        normal_pages=draw(U32),
        next_packet_size=draw(U32),
        packet_num=draw(U64),
        zero_pages=draw(U32),
        unused=draw(st.binary(min_size=28, max_size=28)),
        name=draw(st.binary(max_size=256)).ljust(256, b"\0"),
        offsets=pack_offsets(draw(st.lists(U64, max_size=8)), page_size=page_size),
    )


@st.composite
def packets(draw: st.DrawFn, page_size: int) -> tuple[PagePacket | DeviceStatePacket, bytes]:
    """One that a source of some version may send, and its data."""
    if draw(st.integers(0, 5)) == 0:
        state = draw(st.binary(min_size=1, max_size=200))
        return device_state(state), b""
    starts = draw(st.lists(st.integers(0, 200).map(lambda page: page * page_size), max_size=5))
    normal = draw(st.integers(0, min(len(starts), 2)))
    method = draw(st.sampled_from([Compression.NOCOMP, Compression.ZLIB]))
    data = bytes(normal * page_size) if method == 0 else draw(st.binary(min_size=1, max_size=90))
    left_over = draw(st.sampled_from([0, 0x1000])) if not normal else len(data)
    flags = int(method) | draw(st.sampled_from([0, int(SYNC)]))
    # What is left over of the packet before stays in the table.
    made = packet([*starts, 0x7777], flags=flags, size=left_over, page_size=page_size, normal_pages=normal)
    header = replace(made.header, zero_pages=len(starts) - normal)
    return PagePacket(header, page_size), data if normal else b""


# -- records


@given(st.sampled_from(PAGE_SIZES), st.data())
def test_the_fast_header_is_the_declared_one_and_comes_back_as_its_bytes(page_size: int, data: st.DataObject) -> None:
    header = data.draw(headers(page_size))
    raw = header.build(page_size=page_size)
    assert len(raw) == header_length(page_size)
    assert PageHeader.read(raw, page_size=page_size) == read_header(memoryview(raw), page_size=page_size) == header


@given(st.binary(min_size=16, max_size=16), st.integers(0, 255), st.binary(min_size=39, max_size=39))
def test_an_initial_packet_comes_back_from_its_bytes(uuid: bytes, channel_id: int, unused: bytes) -> None:
    initial = InitialPacket(uuid=uuid, channel_id=channel_id, unused=unused)
    raw = initial.build()
    assert len(raw) == 64
    (entry,) = channel_entries(raw, 1)
    assert (entry.record, entry.offset, entry.length) == (initial, 0, 64)
    assert encode_packet(initial) == raw


@given(st.binary(max_size=256), U32, U32)
def test_a_header_of_device_state_comes_back_from_its_bytes(name: bytes, instance_id: int, size: int) -> None:
    header = DeviceStateHeader(name=name.ljust(256, b"\0"), instance_id=instance_id, next_packet_size=size)
    assert DeviceStateHeader.size == 276
    assert DeviceStateHeader.read(header.build()) == header


def test_a_packet_has_the_bytes_that_qemu_10_sends() -> None:
    sent = packet([0x5000, 0x6000], [0x9000], flags=0, packet_num=0x1122334455)
    head = "11223344 00000001 00000000 00000080 00000002 00002000 0000001122334455 00000001" + 28 * "00"
    table = "0000000000005000 0000000000006000 0000000000009000" + 125 * 8 * "00"
    raw = bytes.fromhex(head) + b"pc.ram".ljust(256, b"\0") + bytes.fromhex(table) + NOISE[: 2 * PAGE]
    assert encode_packet(sent, NOISE[: 2 * PAGE]) == raw
    (_, entry) = channel_entries(channel(raw))
    assert entry.record == sent
    assert isinstance(entry.record, PagePacket)
    assert (entry.record.header.block, entry.record.header.compression) == ("pc.ram", Compression.NOCOMP)
    assert (list(entry.record.header.normal), list(entry.record.header.zero)) == ([0x5000, 0x6000], [0x9000])
    assert entry.record.runs == [
        PageRun(0, int(RamFlag.PAGE), 0x5000, 2),
        PageRun(0, int(RamFlag.ZERO), 0x9000, 1),
    ]


@given(st.sampled_from(PAGE_SIZES), st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4)), max_size=4), st.data())
def test_runs_are_the_pages_in_their_order(page_size: int, drawn: list[tuple[int, int]], data: st.DataObject) -> None:
    starts = [(first + index) * page_size for first, count in drawn for index in range(count)][
        : 512 * 1024 // page_size
    ]
    normal = data.draw(st.integers(0, len(starts)))
    found = packet(starts[:normal], starts[normal:], page_size=page_size).runs
    pages = [
        (run.flag, run.start + index * page_size, run.offset + index * page_size if run.flag == RamFlag.PAGE else 0)
        for run in found
        for index in range(run.page_count)
    ]
    assert pages == [
        *((int(RamFlag.PAGE), start, index * page_size) for index, start in enumerate(starts[:normal])),
        *((int(RamFlag.ZERO), start, 0) for start in starts[normal:]),
    ]
    assert all(
        one.flag != two.flag or one.start + one.page_count * page_size != two.start for one, two in pairwise(found)
    )


def test_runs_of_hostile_offsets_do_not_wrap() -> None:
    last = (1 << 64) - PAGE
    assert [run.start for run in packet([last, 0]).runs] == [last, 0]
    assert packet([last - PAGE, last]).runs == [PageRun(0, int(RamFlag.PAGE), last - PAGE, 2)]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        (b"pc.ram\0left over of a longer one", "pc.ram"),
        (b"\xff\xfe", "\udcff\udcfe"),
        (b"x" * 256, "x" * 255),
        (b"", ""),
    ],
)
def test_a_name_ends_at_its_nul_or_at_its_255th_byte(name: bytes, block: str) -> None:
    sent = packet([0], block=name)
    assert sent.header.block == block
    assert encode_packet(PagePacket(read_header(encode_packet(sent, bytes(PAGE)), page_size=PAGE), PAGE), bytes(PAGE))[
        64:320
    ] == name.ljust(256, b"\0")


def test_a_packet_with_other_data_than_it_says_is_not_written() -> None:
    with pytest.raises(StreamError, match="the packet says 4096 bytes of data, 1 are given"):
        encode_packet(packet([0]), b"x")
    with pytest.raises(StreamError, match="the packet says 0 bytes of data, 4096 are given"):
        encode_packet(packet([], [0], size=PAGE), bytes(PAGE))
    with pytest.raises(StreamError, match="the packet says 3 bytes of data, 1 are given"):
        encode_packet(device_state(b"x", size=3))


# -- the grammar


@given(st.sampled_from(PAGE_SIZES), st.data(), st.integers(1, 5000))
def test_any_split_of_the_bytes_gives_the_same_packets_and_they_the_same_bytes(
    page_size: int, data: st.DataObject, step: int
) -> None:
    sent = data.draw(st.lists(packets(page_size), max_size=4))
    methods = {p.header.compression for p, d in sent if isinstance(p, PagePacket) and d}
    if len(methods) > 1:
        sent = sent[:1]
    raw = channel(*(encode_packet(*each) for each in sent))
    found = [
        (entry.record, entry.offset, entry.length, entry.epoch, bytes(entry.view))
        for entry in channel_entries(raw, step, page_size=page_size)
    ]
    assert [record for record, *_ in found[1:]] == [record for record, _ in sent]
    assert b"".join(view for *_, view in found) == raw
    again = [encode_packet(entry.record, entry.data) for entry in channel_entries(raw, page_size=page_size)]
    assert b"".join(again) == raw
    offset = epoch = 0
    for record, at, length, found_epoch, _ in found:
        assert (at, found_epoch) == (offset, epoch)
        offset += length
        epoch += isinstance(record, PagePacket) and record.header.is_sync
    assert offset == len(raw)


@given(st.data())
def test_a_channel_cut_anywhere_gives_its_whole_packets_and_is_reported_as_cut(data: st.DataObject) -> None:
    sent = [encode_packet(packet([0], flags=1), bytes(PAGE)), encode_packet(device_state(b"abc"))]
    raw, ends = channel(*sent), [64, 64 + len(sent[0]), 64 + len(sent[0]) + len(sent[1])]
    cut = data.draw(st.integers(0, len(raw) - 1).filter(lambda cut: cut not in ends))
    entries: list[ChannelEntry] = []
    with pytest.raises(TruncatedError) as caught:
        entries.extend(channel_entries(raw[:cut]))
    assert caught.value.offset == cut
    assert len(list(zip(channel_entries(raw), range(sum(end <= cut for end in ends)), strict=False))) == sum(
        end <= cut for end in ends
    )


def test_a_channel_may_end_between_any_two_packets() -> None:
    assert len(list(channel_entries(channel()))) == 1
    assert len(list(channel_entries(channel(encode_packet(packet(flags=1)))))) == 2


def test_an_epoch_ends_with_its_sync_which_may_carry_pages_until_8_2() -> None:
    raw = channel(
        encode_packet(packet([0]), bytes(PAGE)),
        encode_packet(packet([0], flags=1), bytes(PAGE)),
        encode_packet(packet(flags=0, size=PAGE)),  # was meant to carry the SYNC; its length is left over
        encode_packet(device_state(b"x")),
        encode_packet(packet(flags=1)),
        encode_packet(packet(flags=0)),
    )
    assert [entry.epoch for entry in channel_entries(raw)] == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("normal", [128, 0])
def test_a_full_packet_of_normal_or_zero_pages_is_read(normal: int) -> None:
    starts = range(0, 128 * PAGE, PAGE)
    sent = packet(starts[:normal], starts[normal:])
    (_, entry) = channel_entries(channel(encode_packet(sent, bytes(normal * PAGE))), 70_000)
    assert isinstance(entry.record, PagePacket)
    assert [run.page_count for run in entry.record.runs] == [128]


def head(*words: int, flags: int = 0) -> bytes:
    """The front of a packet's header, by hand."""
    return struct.pack(f">III{len(words)}I", 0x11223344, 1, flags, *words).ljust(header_length(PAGE), b"\0")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (struct.pack(">III", 0x11223345, 1, 0), "0x40: multifd 3: magic: found 0x11223345, expected MAGIC 0x11223344"),
        (struct.pack(">III", 0x11223344, 2, 0), "0x44: multifd 3: version: found 0x2, expected VERSION 0x1"),
        (head(flags=0x80), "0x48: multifd 3: packet has unknown flags 0x80"),
        (head(flags=0x80000001), "0x48: multifd 3: packet has unknown flags 0x80000000"),
        (
            head(flags=0x06),
            "0x48: multifd 3: packet has the unknown compression 0x6, expected one of NOCOMP 0x0, ZLIB 0x2, "
            "ZSTD 0x4, QPL 0x8, UADK 0x10, QATZIP 0x20",
        ),
        (head(flags=0x41), "0x48: multifd 3: DEVICE_STATE comes with the flags 0x1"),
        (head(flags=0x42), "0x48: multifd 3: DEVICE_STATE comes with the flags 0x2"),
        (head(129), "0x4c: multifd 3: pages_alloc is 129, a packet holds 128 pages"),
        (head(0xFFFFFFFF), "0x4c: multifd 3: pages_alloc is 4294967295, a packet holds 128 pages"),
        (head(128, 129), "0x50: multifd 3: 129 normal pages, pages_alloc is 128"),
        (head(0, 1), "0x50: multifd 3: 1 normal pages, pages_alloc is 0"),
        (head(128, 100, 0, 0, 0, 29), "0x60: multifd 3: 29 zero pages, 28 are left of pages_alloc"),
        (head(128, 2, 4096), "0x54: multifd 3: next_packet_size is 4096 for 2 pages (NOCOMP), expected 8192"),
        (
            head(128, 2, 0xFFFFFFFF),
            "0x54: multifd 3: next_packet_size is 4294967295 for 2 pages (NOCOMP), expected 8192",
        ),
        (
            head(128, 2, LONGEST_DATA + 1, flags=2),
            "0x54: multifd 3: next_packet_size is 1048577 for 2 pages (ZLIB), expected 1 to 1048576",
        ),
        (head(128, 2, 0, flags=4), "0x54: multifd 3: next_packet_size is 0 for 2 pages (ZSTD), expected 1 to 1048576"),
        (
            encode_packet(device_state(b"")),
            "0x150: multifd 3: 0000:00:05.0/vfio: a device-state packet without data",
        ),
    ],
)
@pytest.mark.parametrize("step", [None, 1])
def test_a_wrong_packet_is_refused_with_what_was_expected(raw: bytes, text: str, step: int | None) -> None:
    assert str(fault(channel(raw), step)) == text


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"QEVM" + bytes(60), "0x0: multifd: magic: found 0x5145564d, expected MAGIC 0x11223344"),
        (struct.pack(">II", 0x11223344, 3) + bytes(56), "0x4: multifd: version: found 0x3, expected VERSION 0x1"),
        (b"\x11\x22", "0x2: multifd: the stream ends here, 62 bytes too soon"),
        (b"", "0x0: multifd: the stream ends here, 64 bytes too soon"),
    ],
)
def test_what_is_no_multifd_channel_is_refused(raw: bytes, text: str) -> None:
    assert str(fault(raw)) == text


def test_a_channel_does_not_change_its_compression() -> None:
    first, second = packet([0], flags=2, size=1), packet([0], flags=4, size=1)
    raw = channel(encode_packet(first, b"x"), encode_packet(packet(flags=1)), encode_packet(second, b"x"))
    error = fault(raw)
    assert error.message == "packet is ZSTD, those before were ZLIB"
    assert error.offset == 64 + 2 * 1344 + 1 + 8


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (
            packet([0], block=b"pc.rom"),
            "0x80: multifd 3: pages of the block 'pc.rom', which the block list does not have",
        ),
        (packet([0, 0x3000]), "0x188: multifd 3: pc.ram: page at 0x3000, the block ends at 0x3000"),
        (packet([0], [0x2001]), "0x188: multifd 3: pc.ram: page at 0x2001, the block ends at 0x3000"),
        (packet([], [(1 << 64) - 1]), "0x180: multifd 3: pc.ram: page at 0xffffffffffffffff, the block ends at 0x3000"),
        (packet([0x1000, 0x2000, 0x3000]), "0x190: multifd 3: pc.ram: page at 0x3000, the block ends at 0x3000"),
        (packet([0, 0x1800]), "0x188: multifd 3: pc.ram: page at 0x1800, expected a multiple of 0x1000"),
        (packet([0], [0x2000, 1]), "0x190: multifd 3: pc.ram: page at 0x1, expected a multiple of 0x1000"),
    ],
)
def test_a_page_that_is_none_of_its_block_is_refused_where_blocks_are_known(sent: PagePacket, text: str) -> None:
    raw = channel(encode_packet(sent, bytes(sent.header.data_length)))
    assert str(fault(raw, blocks={"pc.ram": 0x3000})) == text
    assert len(list(channel_entries(raw))) == 2


def test_a_sync_packet_may_name_a_block_that_is_not_there() -> None:
    raw = channel(encode_packet(packet(flags=1, block=b"left over")))
    assert len(list(channel_entries(raw, blocks={}))) == 2


def test_device_state_beyond_the_limit_is_refused_before_it_comes() -> None:
    error = fault(channel(encode_packet(device_state(b"x" * 101))), most_device_state=100)
    assert isinstance(error, UnsupportedError)
    assert str(error) == ("0x150: multifd 3: 0000:00:05.0/vfio: a device-state packet of 101 bytes, the limit is 100")
    header = device_state(b"", size=1 << 30).header.build()
    tracemalloc.start()
    error = fault(channel(header))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(error).endswith("the stream ends here, 1073741824 of 1073742100 bytes too soon")
    assert peak < 8 << 20


def test_device_state_is_kept_once() -> None:
    size = 16 << 20
    raw = channel(*[encode_packet(device_state(bytes(size)))] * 3)
    tracemalloc.start()
    lengths = [len(entry.data) for entry in channel_entries(raw, 1 << 20)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == [0, size, size, size]
    assert peak < 2.5 * size  # this packet, and the one before it


@given(st.binary(max_size=3000), st.integers(1, 700))
def test_any_bytes_are_packets_or_a_typed_error(data: bytes, step: int) -> None:
    for raw in (data, channel(data), channel(struct.pack(">II", 0x11223344, 1) + data)):
        try:
            found = b"".join(encode_packet(entry.record, entry.data) for entry in channel_entries(raw, step))
        except StreamError as exc:
            reached = exc.offset
        else:
            assert found == raw
            reached = len(raw)
        assert reached in range(len(raw) + 1)


def test_a_packet_is_all_that_is_kept_in_memory() -> None:
    """Whatever comes, the window holds one packet and what was read with it."""
    sent = encode_packet(packet(range(0, 128 * PAGE, PAGE)), bytes(128 * PAGE))
    feed, fed = Feed(), 0
    reading = read_channel(feed)
    feed.receive(INITIAL.build())
    most = 0
    for entry in reading:
        if entry is None:
            if fed == 40:
                feed.end()
                continue
            feed.receive(sent)
            fed += 1
            most = max(most, len(feed.buffer[0]))
    assert (fed, most) == (40, 1 << 20)


# -- the pages


def as_one_zlib_stream(parts: Sequence[bytes]) -> list[bytes]:
    deflater = zlib.compressobj(1)
    return [deflater.compress(part) + deflater.flush(zlib.Z_SYNC_FLUSH) for part in parts]


def as_one_zstd_stream(parts: Sequence[bytes]) -> list[bytes]:
    compressor = zstd.ZstdCompressor(level=1)
    return [compressor.compress(part, mode=compressor.FLUSH_BLOCK) for part in parts]


def page_by_page(parts: Sequence[bytes], wbits: int) -> list[bytes]:
    packed = []
    for part in parts:
        pages = []
        for at in range(0, len(part), PAGE):
            deflater = zlib.compressobj(1, zlib.DEFLATED, wbits)
            small = deflater.compress(part[at : at + PAGE]) + deflater.flush()
            pages.append(small if len(small) < PAGE else part[at : at + PAGE])
        packed.append(struct.pack(f">{len(pages)}I", *map(len, pages)) + b"".join(pages))
    return packed


def as_gzip_members(parts: Sequence[bytes]) -> list[bytes]:
    return [
        b"".join(gzip.compress(part[at : at + 5000], mtime=0) for at in range(0, len(part), 5000)) for part in parts
    ]


COMPRESSORS: dict[Compression, Callable[[Sequence[bytes]], list[bytes]]] = {
    Compression.NOCOMP: list,
    Compression.ZLIB: as_one_zlib_stream,
    Compression.ZSTD: as_one_zstd_stream,
    Compression.QPL: partial(page_by_page, wbits=-15),
    Compression.UADK: partial(page_by_page, wbits=15),
    Compression.QATZIP: as_gzip_members,
}


def compressed(method: Compression, parts: Sequence[bytes]) -> bytes:
    """A channel whose packets hold these pages."""
    made = []
    for part, data in zip(parts, COMPRESSORS[method](parts), strict=True):
        starts = range(0, len(part), PAGE)
        made.append(encode_packet(packet(starts, flags=method, size=len(data)), data))
        made.append(encode_packet(packet([], [0], flags=method)))
        made.append(encode_packet(packet(flags=1, pages_alloc=0)))
    return channel(*made)


@pytest.mark.parametrize("method", Compression)
@given(
    parts=st.lists(
        st.lists(st.sampled_from([NOISE[:PAGE], NOISE[PAGE : 2 * PAGE], bytes(PAGE), b"abc4" * 1024]), min_size=1).map(
            lambda pages: b"".join(pages[:128])
        ),
        min_size=1,
        max_size=4,
    )
)
def test_pages_come_back_however_they_were_compressed(method: Compression, parts: list[bytes]) -> None:
    decoder = PageDecoder()
    found = [bytes(decoder.contents(entry)) for entry in channel_entries(compressed(method, parts), 50_000)]
    assert [each for each in found if each] == parts


@pytest.mark.parametrize("method", [method for method in Compression if method])
@given(at=st.integers(0, 10_000), byte=st.integers(1, 255))
def test_damaged_data_makes_pages_or_is_refused(method: Compression, at: int, byte: int) -> None:
    parts = [NOISE[: 2 * PAGE], b"abcd" * 1024, NOISE[PAGE : 3 * PAGE]]
    raw = bytearray(compressed(method, parts))
    entries = list(channel_entries(bytes(raw)))
    data_at = entries[1].offset + entries[1].data_at
    raw[data_at + at % (entries[1].length - entries[1].data_at)] ^= byte
    decoder = PageDecoder()
    for entry in channel_entries(bytes(raw)):
        try:
            contents = decoder.contents(entry)
        except StreamError as exc:
            fault_at, fault_trail = exc.offset, exc.trail
        else:
            header = getattr(entry.record, "header", None)
            assert len(contents) == (PAGE * header.normal_pages if header else 0)
            continue
        assert fault_at in range(len(raw) + 1)
        assert fault_trail == (f"multifd {method.name.lower()}",)


def refused(method: Compression, data: bytes, pages: int = 1) -> str:
    raw = channel(encode_packet(packet(range(0, pages * PAGE, PAGE), flags=method, size=len(data)), data))
    *_, entry = channel_entries(raw)
    with pytest.raises(StreamError) as caught:
        PageDecoder().contents(entry)
    assert caught.value.offset == 64 + 1344
    return caught.value.message


@pytest.mark.parametrize(
    ("method", "data", "text"),
    [
        (Compression.ZLIB, b"no", "Error -3 while decompressing data: incorrect header check"),
        (
            Compression.ZLIB,
            as_one_zlib_stream([bytes(PAGE - 1)])[0],
            "4095 bytes of 4096 bytes come out, those of 1 page",
        ),
        (Compression.ZLIB, as_one_zlib_stream([bytes(PAGE + 1)])[0], "more than 4096 bytes come out, those of 1 page"),
        (Compression.ZLIB, zlib.compress(bytes(PAGE)), "the channel's zlib stream ends, which it never does"),
        (
            Compression.ZSTD,
            as_one_zstd_stream([bytes(PAGE - 1)])[0],
            "4095 bytes of 4096 bytes come out, those of 1 page",
        ),
        (Compression.ZSTD, as_one_zstd_stream([bytes(PAGE + 1)])[0], "more than 4096 bytes come out, those of 1 page"),
        (Compression.ZSTD, zstd.compress(bytes(PAGE)), "the channel's zstd frame ends, which it never does"),
        (Compression.QPL, b"\0\0", "2 bytes, the lengths of 1 page alone take 4"),
        (Compression.QPL, struct.pack(">I", PAGE + 1), "a page takes 4097 bytes, expected at most 4096"),
        (Compression.UADK, struct.pack(">I", 5) + b"1234", "the pages take 5 bytes, 4 are there"),
        (Compression.QPL, page_by_page([bytes(PAGE - 1)], -15)[0], "a page's data does not make a page of 4096 bytes"),
        (Compression.UADK, page_by_page([bytes(10)], 15)[0], "a page's data does not make a page of 4096 bytes"),
        (Compression.QATZIP, gzip.compress(bytes(PAGE), mtime=0)[:-1], "a gzip member does not end"),
        (
            Compression.QATZIP,
            gzip.compress(bytes(PAGE + 1), mtime=0),
            "more than 4096 bytes come out, those of 1 page",
        ),
        (Compression.QATZIP, gzip.compress(b"", mtime=0) * 3, "more than 2 gzip members for 1 page"),
    ],
)
def test_data_that_does_not_make_its_pages_is_refused(method: Compression, data: bytes, text: str) -> None:
    assert refused(method, data) == text


def test_damaged_zstd_is_refused_in_the_librarys_words() -> None:
    assert refused(Compression.ZSTD, b"\x28\xb5\x2f\xfd" + b"\xff" * 20).startswith(
        "Unable to decompress Zstandard data"
    )


def test_the_longest_window_that_a_level_of_qemu_asks_for_is_read() -> None:
    compressor = zstd.ZstdCompressor(level=20)
    data = compressor.compress(NOISE, mode=compressor.FLUSH_BLOCK)
    *_, entry = channel_entries(channel(encode_packet(packet([0, 1, 2, 3], flags=4, size=len(data)), data)))
    assert PageDecoder().contents(entry) == NOISE


def test_a_window_that_no_level_of_qemu_asks_for_is_refused() -> None:
    frame = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    data = frame.compress(bytes(PAGE), mode=frame.FLUSH_BLOCK)
    assert "Frame requires too much memory" in refused(Compression.ZSTD, data)


@pytest.mark.parametrize("method", [method for method in Compression if method])
def test_a_bomb_takes_no_more_memory_than_its_packets_pages(method: Compression) -> None:
    size = 1 << 27
    bombs = {
        Compression.ZLIB: lambda: as_one_zlib_stream([bytes(size)])[0],
        Compression.ZSTD: lambda: zstd.compress(bytes(size)),
        Compression.QATZIP: lambda: gzip.compress(bytes(size), mtime=0),
    }
    small = zlib.compress(bytes(1 << 20))
    small = small[2:-4] if method is Compression.QPL else small
    alone = struct.pack(">I", len(small)) + small
    data = bombs.get(method, lambda: alone)()
    assert len(data) <= LONGEST_DATA
    tracemalloc.start()
    message = refused(method, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "more than 4096 bytes" in message or "does not make a page" in message
    assert peak < 3 * len(data) + (3 << 20)


@pytest.mark.parametrize("method", [Compression.ZLIB, Compression.ZSTD])
def test_behind_damage_a_stream_of_the_channel_can_not_be_read_on(method: Compression) -> None:
    good = COMPRESSORS[method]([bytes(PAGE)] * 2)
    raw = channel(*(encode_packet(packet([0], flags=method, size=len(data)), data) for data in (b"no", *good)))
    _, first, second, _ = channel_entries(raw)
    decoder = PageDecoder()
    with pytest.raises(StreamError):
        decoder.contents(first)
    with pytest.raises(StreamError) as caught:
        decoder.contents(second)
    assert str(caught.value) == (
        f"{second.offset:#x}: multifd {method.name.lower()}: a packet before it was damaged, at 0x580"
    )


def test_without_a_library_zstd_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("backports", "backports.zstd", "compression", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    *_, entry = channel_entries(channel(encode_packet(packet([0], flags=4, size=1), b"x")))
    with pytest.raises(UnsupportedError, match=r"pip install backports\.zstd"):
        PageDecoder().contents(entry)
