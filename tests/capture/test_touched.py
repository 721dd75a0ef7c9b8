"""Of memory that was mapped and hardly written to, what was written is found, and the rest is not read."""

import mmap
import random
from itertools import pairwise

import pytest

from qmigrate.capture import placed
from qmigrate.capture.index import PageIndex
from qmigrate.capture.kind import absent_pages
from qmigrate.capture.touched import touched
from qmigrate.format.ram import BlockList, Pages, RamBlock
from tests import streams
from tests.walking import entries

PAGE = streams.PAGE
LAZILY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE


def test_all_that_was_written_is_found_and_hardly_more() -> None:
    memory = mmap.mmap(-1, 1 << 36, flags=LAZILY)
    written = sorted(random.Random(1).sample(range(1 << 36), 200))
    for place in written:
        memory[place] = 1
    there = list(touched(memory))
    assert all(any(begin <= place < end for begin, end in there) for place in written)
    assert all(before[1] <= after[0] for before, after in pairwise(there))
    assert sum(end - begin for begin, end in there) <= 200 << 21  # a huge page each at most
    memory.close()


def test_where_the_kernel_does_not_tell_all_may_have_been_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmigrate.capture.touched._PAGEMAP", "/nowhere")
    memory = mmap.mmap(-1, 3 * mmap.PAGESIZE + 8)
    assert list(touched(memory)) == [(0, len(memory))]
    memory.close()


def test_pages_of_a_block_that_claims_a_tebibyte_are_counted_without_reading_all_entries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It took 10 s."""
    looked = 0

    def counted(found: memoryview) -> int:
        nonlocal looked
        looked += len(found)
        return absent_pages(found)

    monkeypatch.setattr(placed, "absent_pages", counted)
    length = 1 << 40
    pages = [0, 1, 2, 77, 1 << 20, (length // PAGE) - 1]
    data = streams.header() + streams.configuration() + streams.ram_start({"pc.ram": length})
    data += streams.ram_part(streams.zero(0, block="pc.ram") + b"".join(streams.zero(page * PAGE) for page in pages))
    with PageIndex(None) as index:
        for entry in entries(data + streams.ram_end() + streams.eof()):
            if isinstance(entry.record, BlockList | Pages):
                index.take(entry)
        assert index.blocks == {"pc.ram": RamBlock(name="pc.ram", used_length=length)}
        assert index.absent("pc.ram") == length // PAGE - len(pages)
    assert looked <= len(pages) << 18  # a huge page of entries each at most
