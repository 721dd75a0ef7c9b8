"""Live sections other than ram: each reader over whole sections, however their bytes come in."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import StreamError, TruncatedError
from qmigrate.format._record import Record
from qmigrate.format.block import BlockRecord
from qmigrate.format.dirty_bitmap import BitmapBits, BitmapStart, DirtyBitmapRecord
from qmigrate.format.feed import Feed
from qmigrate.format.htab import HtabChunk, HtabHeader
from qmigrate.format.live import READERS, reader_of
from qmigrate.format.live_section import LiveEntry, LiveState, Opaque, Payload, encode
from qmigrate.format.s390 import (
    StorageAttributes,
    StorageAttributesMark,
    StorageKeys,
    StorageKeysMark,
    TodClock,
    TodPresence,
    TodValue,
)
from qmigrate.format.stream import Footer, SectionType
from qmigrate.format.vfio import VfioData, VfioEnd, VfioMark, VfioTag

START, PART, END, FULL = SectionType.START, SectionType.PART, SectionType.END, SectionType.FULL
FOOTER = Footer(section_id=7).build()
U8, U16 = st.integers(0, 0xFF), st.integers(0, 0xFFFF)
U32, U64 = st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFFFFFFFFFF)
NAMES = st.binary(max_size=255).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
ALIASES = NAMES.filter(bool)
END_OF_STATE = VfioMark(tag=VfioTag.END_OF_STATE)


def collect(
    idstr: str,
    data: bytes,
    kind: SectionType = PART,
    *,
    step: int | None = None,
    state: LiveState | None = None,
    behind: bytes = b"",
    offset: int = 0x100,
) -> list[LiveEntry]:
    """All entries of one section, whose bytes come ``step`` at a time; what is behind it stays there."""
    reader = reader_of(idstr)
    assert reader is not None
    feed, stream = Feed(offset=offset), data + behind
    step = step or max(len(stream), 1)
    pieces = iter([stream[at : at + step] for at in range(0, len(stream), step)])
    entries = []
    for entry in reader(feed, kind, state or LiveState(section_id=7), (idstr,)):
        if entry is not None:
            entries.append(entry)
            continue
        piece = next(pieces, None)
        if piece is None:
            feed.end()
        else:
            feed.receive(piece)
    assert feed.offset == offset + len(data)
    return entries


def records(entries: Iterable[LiveEntry]) -> list[Record]:
    return [entry.record for entry in entries]


def check(
    idstr: str,
    expected: Iterable[Record],
    kind: SectionType = PART,
    *,
    steps: Iterable[int] = (1, 7),
    state: LiveState | None = None,
    behind: bytes = FOOTER,
) -> None:
    """The section of these records is read as them: whole, in pieces, and with bytes behind it."""
    expected = list(expected)
    state = state or LiveState(section_id=7)
    data = b"".join(map(encode, expected))
    entries = collect(idstr, data, kind, state=state)
    assert records(entries) == expected
    at = 0x100
    for entry in entries:
        assert entry[:2] == (at, len(encode(entry.record)))
        at += entry.length
    assert collect(idstr, data, kind, state=state, behind=behind) == entries
    for step in steps:
        assert collect(idstr, data, kind, state=state, step=step, behind=behind) == entries


def refusal(
    idstr: str,
    data: str,
    kind: SectionType = PART,
    *,
    state: LiveState | None = None,
    step: int | None = None,
) -> str:
    """What is said of these bytes, which are no such section."""
    with pytest.raises(StreamError) as caught:
        collect(idstr, bytes.fromhex(data), kind, state=state, step=step)
    assert caught.value.trail[0] == idstr
    return str(caught.value)


# -- which section is whose


@pytest.mark.parametrize(
    ("idstr", "name"),
    [
        ("dirty-bitmap", "dirty-bitmap"),
        ("spapr/htab", "spapr/htab"),
        ("vfio", "vfio"),
        ("0000:00:02.0/vfio", "vfio"),
        ("0000:00:1c.0:00.0/vfio", "vfio"),
    ],
)
def test_a_section_is_known_by_its_name(idstr: str, name: str) -> None:
    assert reader_of(idstr) is READERS[name]


@pytest.mark.parametrize("idstr", ["ram", "timer", "htab", "0000:00:02.0/block", "0000:00:02.0/vfio-display"])
def test_another_section_has_no_reader_here(idstr: str) -> None:
    assert reader_of(idstr) is None


# -- dirty-bitmap

BITMAP_START = bytes.fromhex("1c 02 6e30 03 626d31 00010000 01 14 03 626d30 00010000 01 01")
BITMAP_START_RECORDS = [
    DirtyBitmapRecord(flags=0x1C, node_alias="n0", bitmap_alias="bm1", start=BitmapStart(granularity=0x10000, flags=1)),
    DirtyBitmapRecord(flags=0x14, bitmap_alias="bm0", start=BitmapStart(granularity=0x10000, flags=1)),
    DirtyBitmapRecord(flags=1),
]
BITMAP_END = bytes.fromhex(
    "46 03 626d31 0000000000000000 00005000"
    "44 03 626d31 0000000000000000 00005000 0000000000000020"
    "0300000000000000 0000000000000000 0000000000000000 0000000000000000"
    "24 03 626d31 24 03 626d30 01"
)
ALL_SECTORS = BitmapBits(first_sector=0, sector_count=0x5000)
BITMAP_END_RECORDS = [
    DirtyBitmapRecord(flags=0x46, bitmap_alias="bm1", bits=ALL_SECTORS),
    DirtyBitmapRecord(flags=0x44, bitmap_alias="bm1", bits=ALL_SECTORS, words=b"\x03" + bytes(31)),
    DirtyBitmapRecord(flags=0x24, bitmap_alias="bm1"),
    DirtyBitmapRecord(flags=0x24, bitmap_alias="bm0"),
    DirtyBitmapRecord(flags=1),
]


@st.composite
def bitmap_records(draw: st.DrawFn) -> DirtyBitmapRecord:
    """Any record but the last: all flags but EOS and EXTRA, in any combination."""
    flags = draw(st.integers(0, 0x3F).map(lambda bits: bits << 1))
    start = BitmapStart(granularity=draw(U32), flags=draw(st.integers(0, 7)))
    bits = BitmapBits(first_sector=draw(U64), sector_count=draw(U32))
    acts = flags & 0x70 == 0x40
    return DirtyBitmapRecord(
        flags=flags,
        node_alias=draw(ALIASES) if flags & 0x08 else None,
        bitmap_alias=draw(ALIASES) if flags & 0x04 else None,
        start=start if flags & 0x10 else None,
        bits=bits if acts else None,
        words=draw(st.binary(max_size=40)) if acts and not flags & 0x02 else None,
    )


@given(st.lists(bitmap_records(), max_size=5))
def test_dirty_bitmap_records_come_back_from_their_bytes(sent: list[DirtyBitmapRecord]) -> None:
    check("dirty-bitmap", [*sent, DirtyBitmapRecord(flags=1)])


@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [
        (START, BITMAP_START, BITMAP_START_RECORDS),
        (PART, b"\x01", [DirtyBitmapRecord(flags=1)]),
        (END, BITMAP_END, BITMAP_END_RECORDS),
    ],
    ids=["START", "PART", "END"],
)
def test_captured_dirty_bitmaps_are_read(kind: SectionType, data: bytes, expected: list[Record]) -> None:
    assert b"".join(map(encode, expected)) == data
    check("dirty-bitmap", expected, kind)


def test_names_of_bitmaps_are_remembered_from_section_to_section() -> None:
    state = LiveState()
    collect("dirty-bitmap", BITMAP_START, START, state=state)
    assert (state.node_alias, state.bitmap_alias) == ("n0", "bm0")
    reader, feed, names = READERS["dirty-bitmap"], Feed(), []
    feed.receive(BITMAP_END)
    for entry in reader(feed, END, state, ()):
        assert entry is not None
        names.append((state.node_alias, state.bitmap_alias))
    assert names == [("n0", name) for name in ("bm1", "bm1", "bm1", "bm0", "bm0")]


def test_a_bitmap_record_may_also_end_the_section() -> None:
    check("dirty-bitmap", [DirtyBitmapRecord(flags=0x25, bitmap_alias="b")])


def test_the_longest_bits_are_read() -> None:
    bits = DirtyBitmapRecord(flags=0x41, bits=ALL_SECTORS, words=b"\xa5" * 10240)
    check("dirty-bitmap", [bits], steps=[997])


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("80", "flags: found 0x80, with EXTRA 0x80, which no QEMU sends"),
        ("08 00", "node_alias: the name is empty"),
        ("04 00", "bitmap_alias: the name is empty"),
        (
            "10 00010000 08",
            "start: flags: unknown flags 0x8, expected ENABLED 0x1, PERSISTENT 0x2, AUTOLOAD 0x4",
        ),
        (
            "40 0000000000000000 00005000 0000000000002801",
            "words: size is 10241, expected at most 10240",
        ),
        (
            "40 0000000000000000 00005000 ffffffffffffffff",
            "words: size is 18446744073709551615, expected at most 10240",
        ),
    ],
)
def test_a_dirty_bitmap_that_qemu_refuses_is_refused(data: str, text: str) -> None:
    said = refusal("dirty-bitmap", data)
    assert said == refusal("dirty-bitmap", data, step=1)
    assert said.partition(": dirty-bitmap: ")[2] in (text, text.removeprefix("start: "))


def test_a_record_is_not_written_without_what_its_flags_announce() -> None:
    with pytest.raises(StreamError, match="can't be written: words is announced and missing"):
        encode(DirtyBitmapRecord(flags=0x40, bits=ALL_SECTORS))
    with pytest.raises(StreamError, match="can't be written: nothing announces node_alias"):
        encode(DirtyBitmapRecord(flags=0x01, node_alias="n0"))


# -- block


@st.composite
def block_sections(draw: st.DrawFn) -> list[Record]:
    """Zero chunks and progress: a chunk with its 1 MiB has a test of its own."""
    zeros = st.builds(
        lambda sector, name: BlockRecord(word=sector << 9 | 0x9, device=name), st.integers(0, 1 << 54), NAMES
    )
    progress = st.builds(lambda percent: BlockRecord(word=percent << 9 | 0x4), st.integers(0, 100))
    return [*draw(st.lists(zeros | progress, max_size=5)), BlockRecord(word=2)]


@given(block_sections())
def test_block_records_come_back_from_their_bytes(section: list[Record]) -> None:
    check("block", section)


def test_a_chunk_of_a_disk_has_one_mebibyte() -> None:
    chunk = BlockRecord(word=2048 << 9 | 0x1, device="drive0")
    assert (chunk.sector, chunk.flags) == (2048, 1)
    check(
        "block",
        [
            chunk,
            Payload(data=bytes(range(256)) * 4096),
            BlockRecord(word=100 << 9 | 0x4),
            BlockRecord(word=0x2),
        ],
        END,
        steps=[65521],
    )


def test_a_chunk_may_also_end_the_section() -> None:
    check("block", [BlockRecord(word=0xB, device="d")])


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("0000000000000010", "0x100: block: word: unknown flags 0x10"),
        ("0000000000000111", "0x100: block: word: unknown flags 0x110"),
        (
            "0000000000000208",
            "0x100: block: word: found the flags 0x8, expected one of DEVICE_BLOCK 0x1, EOS 0x2, PROGRESS 0x4",
        ),
        (
            "0000000000000001 01 61 00",
            "0x10b: block: the stream ends here, 1048575 of 1048576 bytes too soon",
        ),
    ],
)
def test_a_wrong_block_section_is_refused(data: str, text: str) -> None:
    assert refusal("block", data) == refusal("block", data, step=1) == text


# -- vfio


def data_state(*payload: bytes) -> list[Record]:
    return [VfioData(length=sum(map(len, payload))), *(Payload(data=piece) for piece in payload)]


@given(st.lists(st.binary(max_size=60), max_size=4), st.sampled_from([1, 5, 6]))
def test_vfio_data_come_back_from_their_bytes(buffers: list[bytes], end: int) -> None:
    sent = [record for buffer in buffers for record in data_state(*([buffer] if buffer else []))]
    check("0000:00:02.0/vfio", [*sent, VfioMark(tag=VfioTag(0xFFFFFFFFEF100000 + end))])


def test_vfio_start_is_setup_and_its_end() -> None:
    setup = [VfioMark(tag=VfioTag.DEV_SETUP_STATE), VfioEnd()]
    data = bytes.fromhex("ffffffffef100003 ffffffffef100001")
    assert b"".join(map(encode, setup)) == data
    check("vfio", setup, START)


def test_long_vfio_data_come_in_pieces_however_they_were_received() -> None:
    pieces = [b"\x01" * (1 << 20), b"\x02" * (1 << 20), b"\x03"]
    check("vfio", [*data_state(*pieces), END_OF_STATE], steps=[100_003])


def test_vfio_data_take_no_memory_for_what_they_claim() -> None:
    text = "0x112: vfio: DEV_DATA_STATE: the stream ends here, 1048574 of 1048576 bytes too soon"
    assert refusal("vfio", "ffffffffef100004 ffffffffffffffff 0000") == text


CONFIGURATIONS = st.lists(
    st.binary(max_size=20) | st.just(encode(END_OF_STATE)) | st.just(encode(END_OF_STATE)[:5]), max_size=6
).map(b"".join)


@given(CONFIGURATIONS)
def test_a_vfio_configuration_ends_at_the_tag_before_the_footer(opaque: bytes) -> None:
    between = [Opaque(data=opaque)] if opaque else []
    check(
        "vfio",
        [VfioMark(tag=VfioTag.DEV_CONFIG_STATE), *between, VfioEnd()],
        FULL,
        state=LiveState(section_id=7, footers=True),
    )


@pytest.mark.parametrize("behind", [b"\x00", b"\x04\x00\x00\x00\x09\x05timer", b"\x08\x00\x02"])
def test_without_footers_a_vfio_configuration_ends_before_what_opens_a_section(behind: bytes) -> None:
    opaque = b"ab" + encode(END_OF_STATE) + FOOTER
    check(
        "vfio",
        [VfioMark(tag=VfioTag.DEV_CONFIG_STATE), Opaque(data=opaque), VfioEnd()],
        FULL,
        state=LiveState(section_id=7, footers=False),
        behind=behind,
    )


def test_the_footer_of_another_section_does_not_end_a_vfio_configuration() -> None:
    opaque = bytes(20) + encode(END_OF_STATE) + Footer(section_id=8).build()
    check("vfio", [VfioMark(tag=VfioTag.DEV_CONFIG_STATE), Opaque(data=opaque), VfioEnd()], FULL)


def test_in_5_2_the_configuration_stands_inside_end_with_data_behind_it() -> None:
    opaque = bytes(20) + encode(END_OF_STATE) + FOOTER
    check(
        "vfio",
        [
            VfioMark(tag=VfioTag.DEV_CONFIG_STATE),
            Opaque(data=opaque),
            VfioEnd(),
            *data_state(b"data"),
            END_OF_STATE,
        ],
        END,
    )


@pytest.mark.parametrize("length", [65535, 65536, 65537, 131072, 200_000])
def test_a_long_vfio_configuration_comes_in_pieces_however_it_was_received(length: int) -> None:
    tag = encode(END_OF_STATE)
    opaque = (bytes(65530) + tag + bytes(70000) + tag * 9000)[:length]
    pieces = [Opaque(data=opaque[at : at + 65536]) for at in range(0, length, 65536)]
    check(
        "vfio",
        [VfioMark(tag=VfioTag.DEV_CONFIG_STATE), *pieces, VfioEnd()],
        FULL,
        steps=[4093, 65536],
        state=LiveState(section_id=7, footers=True),
    )


def test_a_vfio_configuration_at_the_end_of_the_stream_is_read() -> None:
    data = encode(VfioMark(tag=VfioTag.DEV_CONFIG_STATE)) + b"xyz" + encode(END_OF_STATE)
    entries = collect("vfio", data, FULL, state=LiveState(section_id=7, footers=True))
    assert records(entries)[1:] == [Opaque(data=b"xyz"), VfioEnd()]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            "ffffffffef100007",
            "0x100: vfio: tag: found 0xffffffffef100007, expected one of END_OF_STATE 0xffffffffef100001, "
            "DEV_CONFIG_STATE 0xffffffffef100002, DEV_SETUP_STATE 0xffffffffef100003, "
            "DEV_DATA_STATE 0xffffffffef100004, DEV_INIT_DATA_SENT 0xffffffffef100005, "
            "DEV_CONFIG_LOAD_READY 0xffffffffef100006",
        ),
        (
            "ffffffffef100003 ffffffffef100004",
            "0x108: vfio: DEV_SETUP_STATE: tag: found 0xffffffffef100004, expected END_OF_STATE 0xffffffffef100001",
        ),
        (
            "ffffffffef100002 000000",
            "0x10b: vfio: DEV_CONFIG_STATE: the stream ends here, before END_OF_STATE",
        ),
    ],
)
def test_a_wrong_vfio_section_is_refused(data: str, text: str) -> None:
    assert refusal("vfio", data) == refusal("vfio", data, step=1) == text


# -- spapr/htab


@st.composite
def htab_parts(draw: st.DrawFn) -> list[Record]:
    """Chunks that fit into a table of 2**21 bytes."""
    sent: list[Record] = [HtabHeader(word=0)]
    for _ in range(draw(st.integers(0, 4))):
        valid, invalid = draw(st.integers(0, 3)), draw(U16)
        sent.append(HtabChunk(index=draw(st.integers(1, 0x20000 - 0x10003)), valid=valid, invalid=invalid))
        sent += [Payload(data=draw(st.binary(min_size=16 * valid, max_size=16 * valid)))] if valid else []
    return [*sent, HtabChunk(index=0, valid=0, invalid=0)]


@given(htab_parts())
def test_htab_chunks_come_back_from_their_bytes(part: list[Record]) -> None:
    check("spapr/htab", part, state=LiveState(htab_shift=21))


def test_a_captured_htab_is_read() -> None:
    state = LiveState()
    assert records(collect("spapr/htab", bytes.fromhex("00000015"), START, state=state)) == [HtabHeader(word=21)]
    for kind in (PART, END):
        assert records(collect("spapr/htab", bytes(12), kind, state=state)) == [
            HtabHeader(word=0),
            HtabChunk(index=0, valid=0, invalid=0),
        ]


@pytest.mark.parametrize("kind", [START, PART, END])
def test_a_guest_without_a_hash_table_sends_nothing_else(kind: SectionType) -> None:
    check("spapr/htab", [HtabHeader(word=0xFFFFFFFF)], kind)


def test_the_largest_chunk_is_read() -> None:
    chunk = HtabChunk(index=1, valid=0xFFFF, invalid=0)
    part = [HtabHeader(word=0), chunk, Payload(data=bytes(0xFFFF0)), HtabChunk(index=0, valid=0, invalid=0)]
    check("spapr/htab", part, steps=[65521], state=LiveState(htab_shift=21))


@pytest.mark.parametrize(
    ("kind", "data", "text"),
    [
        (START, "00000000", "0x100: spapr/htab: found 0x0, expected a shift from 18 to 46, or 0xffffffff"),
        (START, "0000002f", "0x100: spapr/htab: found 0x2f, expected a shift from 18 to 46, or 0xffffffff"),
        (PART, "00000015", "0x100: spapr/htab: found 0x15, expected 0x0, or 0xffffffff"),
        (PART, "00000000 00001fff 0001 0001", "0x104: spapr/htab: a chunk ends at entry 0x2001 of 0x2000"),
    ],
)
def test_a_wrong_htab_is_refused(kind: SectionType, data: str, text: str) -> None:
    for step in (None, 1):
        state = LiveState(htab_shift=17)
        assert refusal("spapr/htab", data, kind, state=state, step=step) == text


def test_htab_chunks_without_a_start_are_refused() -> None:
    text = "0x100: spapr/htab: chunks come, and no START gave the table's size"
    assert refusal("spapr/htab", "00000000 0000000000000000", END) == text


# -- s390

FRAMES = st.integers(0, (1 << 52) - 1).map(lambda frame: frame << 12)


@given(st.lists(st.tuples(FRAMES, st.binary(max_size=50)), max_size=4), st.booleans())
def test_storage_attributes_come_back_from_their_bytes(runs: list[tuple[int, bytes]], done: bool) -> None:
    sent: list[Record] = []
    for frame, values in runs:
        sent.append(StorageAttributes(word=frame | 2, count=len(values)))
        sent += [Payload(data=values)] if values else []
    end = [StorageAttributesMark(word=flag) for flag in ((8, 1) if done else (1,))]
    check("s390-storage_attributes", [*sent, *end])


@pytest.mark.parametrize(
    ("kind", "data"),
    [(START, "0000000000000001"), (PART, "0000000000000001"), (END, "0000000000000008 0000000000000001")],
)
def test_captured_storage_attributes_are_read(kind: SectionType, data: str) -> None:
    entries = collect("s390-storage_attributes", bytes.fromhex(data), kind)
    assert b"".join(encode(record) for record in records(entries)) == bytes.fromhex(data)


@given(st.lists(st.tuples(FRAMES, st.binary(max_size=50)), max_size=4), st.sampled_from([1, 4]))
def test_storage_keys_come_back_from_their_bytes(runs: list[tuple[int, bytes]], end: int) -> None:
    sent: list[Record] = []
    for frame, keys in runs:
        sent.append(StorageKeys(word=frame | 2, count=len(keys)))
        sent += [Payload(data=keys)] if keys else []
    check("s390-skeys", [*sent, StorageKeysMark(word=end)], FULL)


def test_many_storage_keys_come_in_pieces() -> None:
    pieces = [Payload(data=bytes(1 << 20)), Payload(data=b"\x06" * 5)]
    check(
        "s390-skeys",
        [StorageKeys(word=2, count=(1 << 20) + 5), *pieces, StorageKeysMark(word=1)],
        FULL,
        steps=[65521],
    )


@given(U8, U64)
def test_the_clock_comes_back_from_its_bytes(high: int, low: int) -> None:
    check(
        "todclock",
        [TodClock(presence=TodPresence.PRESENT, value=TodValue(high=high, low=low))],
        FULL,
    )


def test_a_missing_clock_is_one_byte() -> None:
    check("todclock", [TodClock(presence=TodPresence.MISSING)], FULL)


@pytest.mark.parametrize(
    ("idstr", "data", "text"),
    [
        (
            "s390-storage_attributes",
            "0000000000001004",
            "0x100: s390-storage_attributes: ERROR: the source could not read all attributes",
        ),
        (
            "s390-storage_attributes",
            "0000000000001003",
            "0x100: s390-storage_attributes: word: found 0x3, expected one of EOS 0x1, MORE 0x2, ERROR 0x4, DONE 0x8",
        ),
        (
            "s390-storage_attributes",
            "0000000000000002 ffffffffffffffff 00",
            "0x111: s390-storage_attributes: the stream ends here, 1048575 of 1048576 bytes too soon",
        ),
        (
            "s390-skeys",
            "0000000000000000",
            "0x100: s390-skeys: word: found 0x0, expected one of EOS 0x1, SKEYS 0x2, ERROR 0x4",
        ),
        ("todclock", "02", "0x100: todclock: presence: found 0x2, expected one of MISSING 0x0, PRESENT 0x1"),
    ],
)
def test_a_wrong_s390_section_is_refused(idstr: str, data: str, text: str) -> None:
    assert refusal(idstr, data) == refusal(idstr, data, step=1) == text


# -- all of them

WHOLE = {
    "block": (END, bytes.fromhex("0000000000000009 01 61 000000000000c804 0000000000000002")),
    "dirty-bitmap": (END, BITMAP_END),
    "s390-skeys": (FULL, bytes.fromhex("0000000000001002 0000000000000003 060606 0000000000000001")),
    "s390-storage_attributes": (END, bytes.fromhex("0000000000001002 0000000000000001 00 0000000000000001")),
    "spapr/htab": (PART, bytes.fromhex("00000000 00000001 0001 0001") + bytes(16) + bytes(8)),
    "todclock": (FULL, bytes.fromhex("01 00 0011223344556677")),
    "vfio": (PART, bytes.fromhex("ffffffffef100004 0000000000000002 6162 ffffffffef100001")),
}


def test_every_reader_has_a_whole_section_here() -> None:
    assert WHOLE.keys() == READERS.keys()


@given(st.data(), st.sampled_from(sorted(WHOLE)), st.sampled_from([START, PART, END, FULL]))
def test_damaged_bytes_are_read_back_or_refused(data: st.DataObject, idstr: str, kind: SectionType) -> None:
    stream = bytearray(WHOLE[idstr][1])
    for at in data.draw(st.lists(st.integers(0, len(stream) - 1), min_size=1, max_size=4)):
        stream[at] = data.draw(st.sampled_from([0x00, 0x01, 0x02, 0x04, 0x7E, 0x80, 0xFF]) | U8)
    reader, feed, written = READERS[idstr], Feed(), b""
    refused_at: int | None = 0
    feed.receive(stream)
    feed.end()
    try:
        for entry in reader(feed, kind, LiveState(htab_shift=21), (idstr,)):
            assert entry is not None
            written += encode(entry.record)
    except StreamError as exc:
        refused_at = exc.offset
    assert refused_at in range(len(stream) + 1)
    assert written == stream[: len(written)]


@pytest.mark.parametrize("idstr", WHOLE)
def test_a_section_cut_anywhere_is_reported_as_cut(idstr: str) -> None:
    kind, data = WHOLE[idstr]
    assert collect(idstr, data, kind, state=LiveState(htab_shift=21))
    for cut in range(len(data)):
        for step in (None, 1):
            with pytest.raises(TruncatedError) as caught:
                collect(idstr, data[:cut], kind, state=LiveState(htab_shift=21), step=step)
            assert caught.value.offset == 0x100 + cut
            assert caught.value.trail[0] == idstr
