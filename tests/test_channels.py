"""Recorded migrations whose RAM travelled otherwise: over multifd channels, as xbzrle, compressed page by page.

The recipe of each has the hash of what the QEMU that loaded it then had in its RAM.
"""

import hashlib
import lzma
import random
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

from qmigrate.errors import StreamError, TruncatedError
from qmigrate.format import xbzrle
from qmigrate.format.entry import RamPage
from qmigrate.format.multifd import InitialPacket, MultifdFlag, PageHeader, PagePacket, encode_packet
from qmigrate.format.multifd_pages import PageDecoder
from qmigrate.format.ram import XbzrlePage
from tests.joining import channel_entries, joined
from tests.walking import entries, rebuilt

FOLDER: Final = Path(__file__).parent / "corpus" / "channels"
RECIPES: Final[dict[str, dict[str, Any]]] = tomllib.loads((FOLDER / "recipes.toml").read_text())
MULTIFD: Final = [name for name in RECIPES if "multifd" in name]
MIB: Final = 1 << 20
SENT_AS: Final = {
    "pc-multifd-5.2": {"page": 0, "multifd nocomp": 1, "zero": 1, "multifd zero": 0},
    "pc-multifd-11.1": {"page": 0, "multifd nocomp": 1, "zero": 0, "multifd zero": 1},
    "pc-multifd-zlib-7.2": {"page": 0, "multifd zlib": 1, "multifd nocomp": 0, "zero": 1, "multifd zero": 0},
    "pc-multifd-zstd-10.0": {"page": 0, "multifd zstd": 1, "multifd nocomp": 0, "zero": 0, "multifd zero": 1},
    "pc-xbzrle-11.1": {"page": 1, "zero": 1, "xbzrle": 1},
    # The first page of each block is sent as it is.
    "pc-compress-7.2": {"page": 1, "zero": 1, "compress_page": 1},
}


def unpacked(name: str) -> bytes:
    with lzma.open(FOLDER / f"{name}.xz") as file:
        return file.read()


def channels(name: str) -> list[bytes]:
    return [unpacked(path.name.removesuffix(".xz")) for path in sorted(FOLDER.glob(f"{name}.*-forward.xz"))]


def test_each_file_has_its_recipe_and_its_expectations() -> None:
    assert set(RECIPES) == set(SENT_AS) == {path.name.removesuffix(".mig.xz") for path in FOLDER.glob("*.mig.xz")}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_500_000


@pytest.mark.parametrize("name", SENT_AS)
def test_ram_is_that_of_the_qemu_that_loaded_it(name: str) -> None:
    raw = channels(name)
    assert len(raw) == (2 if name in MULTIFD else 0)
    found = joined(entries(unpacked(f"{name}.mig")), [channel_entries(each) for each in raw])
    contents = bytes(found.blocks["pc.ram"][MIB:])
    assert hashlib.sha256(contents).hexdigest() == RECIPES[name]["ram-from-1-mib-sha256"]
    assert {kind: min(found.pages.get(kind, 0), 1) for kind in SENT_AS[name]} == SENT_AS[name]


@pytest.mark.parametrize("name", SENT_AS)
def test_all_channels_are_written_again_as_they_were(name: str) -> None:
    main = unpacked(f"{name}.mig")
    assert rebuilt(entries(main)) == main
    for raw in channels(name):
        assert b"".join(encode_packet(entry.record, entry.data) for entry in channel_entries(raw, 1 << 16)) == raw


@pytest.mark.parametrize("name", MULTIFD)
def test_the_declared_header_says_of_real_packets_what_the_fast_one_says(name: str) -> None:
    ids = set()
    for raw in channels(name):
        for entry in channel_entries(raw):
            if isinstance(entry.record, InitialPacket):
                ids.add(entry.record.channel_id)
                continue
            assert isinstance(entry.record, PagePacket)
            header = entry.record.header
            assert PageHeader.read(entry.view[: entry.data_at], page_size=4096) == header
    assert ids == {0, 1}


def test_what_older_versions_leave_in_packets_without_pages_is_kept() -> None:
    left_over = [
        entry.record.header
        for raw in channels("pc-multifd-5.2")
        for entry in channel_entries(raw)
        if isinstance(entry.record, PagePacket) and not entry.record.header.normal_pages
    ]
    assert any(header.next_packet_size and header.block and any(header.offsets) for header in left_over)
    assert all(header.data_length == 0 and not len(header.normal) for header in left_over)


def test_until_8_2_a_sync_may_come_with_pages() -> None:
    flags = {
        bool(entry.record.header.normal_pages)
        for raw in [*channels("pc-multifd-5.2"), *channels("pc-multifd-zlib-7.2")]
        for entry in channel_entries(raw)
        if isinstance(entry.record, PagePacket) and entry.record.header.flags & MultifdFlag.SYNC
    }
    assert flags == {False, True}


@pytest.mark.parametrize("name", MULTIFD)
def test_a_real_channel_comes_in_pieces_of_any_size(name: str) -> None:
    raw = channels(name)[0]
    whole = [(entry.record, entry.offset, entry.length, entry.epoch) for entry in channel_entries(raw)]
    for step in (7, 1343, 65536):
        assert [(e.record, e.offset, e.length, e.epoch) for e in channel_entries(raw, step)] == whole


@pytest.mark.parametrize("name", MULTIFD)
def test_a_cut_channel_gives_its_whole_packets_and_is_reported_as_cut(name: str) -> None:
    raw, chance = channels(name)[0], random.Random(name)
    ends = [entry.offset + entry.length for entry in channel_entries(raw)]
    for _ in range(20):
        cut = chance.randrange(len(raw))
        found: list[int] = []
        fault: int | None = None
        try:
            for entry in channel_entries(raw[:cut]):
                found.append(entry.offset + entry.length)
        except TruncatedError as exc:
            fault = exc.offset
        assert found == [end for end in ends if end <= cut]
        assert fault == (None if cut in ends else cut)


@pytest.mark.parametrize("name", MULTIFD)
def test_a_damaged_channel_is_read_or_refused_with_its_place(name: str) -> None:
    """Headers are damaged, compressed data too: never more than a typed error."""
    raw, chance = channels(name)[0], random.Random(name)
    places = [entry.offset + chance.randrange(entry.length) for entry in channel_entries(raw) for _ in range(6)]
    for place in places:
        damaged = bytearray(raw)
        damaged[place] ^= 1 << chance.randrange(8)
        decoder = PageDecoder()
        try:
            for entry in channel_entries(bytes(damaged)):
                contents = decoder.contents(entry)
                if isinstance(entry.record, PagePacket):
                    assert len(contents) == 4096 * entry.record.header.normal_pages
        except StreamError as exc:
            reached = exc.offset
        else:
            reached = 0
        assert reached in range(len(raw) + 1)


def test_qemus_own_differences_are_those_that_our_encoder_makes() -> None:
    """Each delta of the recording, made again from the page before it and the page that it makes."""
    deltas: list[tuple[bytes, bytes, bytes]] = []

    def noted(page: RamPage, before: bytes, after: bytes) -> None:
        assert isinstance(page.record.body, XbzrlePage)
        deltas.append((before, after, page.record.body.data))

    joined(entries(unpacked("pc-xbzrle-11.1.mig")), on_encoded=noted)
    assert len(deltas) > 10
    for before, after, data in deltas:
        assert xbzrle.encode(before, after) == xbzrle.encode_plainly(before, after) == data
        assert xbzrle.decode(before, data) == xbzrle.decode_plainly(before, data) == after
