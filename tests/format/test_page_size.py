"""The size of the target's pages, where only the records of RAM show it."""

import pytest

from qmigrate.format.feed import Feed
from qmigrate.format.page_size import find_page_size, page_size_of_machine
from tests import streams
from tests.walking import run

BLOCKS = {"ram": 1 << 20, "rom": 1 << 16}


def found(records: bytes, *, default: int = 4096, step: int | None = None) -> int:
    return run(lambda feed: find_page_size(feed, BLOCKS, default), records + streams.eos(), step)


@pytest.mark.parametrize(
    ("machine", "size"),
    [("pc-q35-10.0", 4096), ("pseries-9.2", 4096), ("clipper", 8192), ("versatilepb", None), ("", None)],
)
def test_some_machines_tell_it_by_their_name(machine: str, size: int | None) -> None:
    assert page_size_of_machine(machine) == size


@pytest.mark.parametrize("step", [None, 1, 777])
@pytest.mark.parametrize("size", [1 << bits for bits in range(8, 17)])
def test_it_is_the_size_under_which_each_page_follows_the_one_before(size: int, step: int | None) -> None:
    pages = [streams.page(size * index, bytes([index]) * size, page_size=size) for index in range(2, 5)]
    records = streams.zero(0, 2, block="ram", page_size=size) + b"".join(pages)
    assert found(records, step=step) == size


def test_zero_pages_show_a_smaller_size_by_their_offsets() -> None:
    assert found(streams.zero(0, 200, block="ram", page_size=1024)) == 1024


def test_what_is_read_under_the_default_is_not_looked_at_further() -> None:
    # Pages of 8 KiB that are all zero are pages of 4 KiB of which every other one was left out.
    assert found(streams.zero(0, 8, block="ram", page_size=8192)) == 4096
    assert found(streams.zero(0, 8, block="ram", page_size=8192), default=8192) == 8192


@pytest.mark.parametrize(
    "records",
    [
        b"",
        b"\1" * 5000,
        (0x400 | 0x08).to_bytes(8) + bytes(5000),
        streams.zero(0, block="unknown", page_size=1024),
        streams.zero(1 << 20, 2, block="ram", page_size=1024),
        streams.zero(0, 1, block="ram") + streams.zero(0x1400, 1, page_size=1024) + streams.zero(0, 5, page_size=1024),
    ],
)
def test_damage_is_no_other_size(records: bytes) -> None:
    assert found(records) == 4096


def test_nothing_is_consumed_and_no_more_is_waited_for_than_it_takes() -> None:
    feed = Feed()
    feed.receive(streams.zero(0, 64, block="ram") + streams.page(0) * 300)
    finding = find_page_size(feed, BLOCKS, 4096)
    with pytest.raises(StopIteration) as ended:
        next(finding)
    assert (ended.value.value, feed.offset) == (4096, 0)
