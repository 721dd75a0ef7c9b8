"""An index that another process is still making: what may be served of it, and what ends it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qmigrate.capture.arriving import ArrivingPages
from qmigrate.capture.migration import Migration
from qmigrate.capture.one_pass import OnePass
from qmigrate.capture.plain import blocks_of
from qmigrate.capture.plain_ends import read_head, read_tail
from qmigrate.capture.plain_pages import PlainPages
from qmigrate.capture.saved import read_saved
from qmigrate.capture.saved_guest import SavedGuest
from qmigrate.errors import StreamError
from tests import streams
from tests.capture.test_index import ram_of, whole
from tests.streams import BLOCKS, PAGE

ONCE = (
    streams.zero(0, 15, block="pc.ram") + streams.page(15 * PAGE) + streams.page(0, block="pc.rom") + streams.zero(PAGE)
)


class Arriving:
    """One, and the other end of its pipe.  ``read()`` is what that process does."""

    def __init__(self, path: Path, *, is_once: bool) -> None:
        self.path = path
        self.file = os.open(path, os.O_RDONLY)
        news, self.pipe = os.pipe()
        head = read_head(self.file)
        self.entries = {name: memoryview(bytearray(8 * length // PAGE)).cast("Q") for name, length in BLOCKS.items()}
        once = OnePass(self.file, head)
        assert once.prove(read_tail(self.file, head).devices_at) == is_once
        self.pages = PlainPages(self.file, head)
        self.index = ArrivingPages(
            self.file,
            news=news,
            heard=b"",
            blocks=blocks_of(head),
            entries=self.entries,
            proven=lambda starts: OnePass(self.file, head, starts=starts),
            made=self.made,
            why_not=lambda: "it was killed",
        )
        if is_once:
            self.say(starts=once.starts)
            self.index.hear()

    def say(self, **said: Any) -> None:
        os.write(self.pipe, json.dumps(said).encode() + b"\n")

    def read(self) -> None:
        self.pages.index(self.entries)

    def made(self) -> SavedGuest:
        with Migration(self.path) as migration:
            return read_saved(migration)

    def has(self, *, search: bool = True) -> bool:
        return self.index.has("pc.ram", 14, 2, search)

    def close(self) -> None:
        self.index.close()
        os.close(self.file)
        if self.pipe >= 0:
            os.close(self.pipe)

    def hang_up(self) -> None:
        os.close(self.pipe)
        self.pipe = -1


@contextmanager
def arriving(path: Path, records: bytes, *, is_once: bool) -> Iterator[Arriving]:
    path.write_bytes(whole(records))
    one = Arriving(path, is_once=is_once)
    try:
        yield one
    finally:
        one.close()


def plainly(path: Path) -> dict[str, bytes]:
    with Migration(path) as migration, read_saved(migration) as saved:
        return ram_of(saved)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stream.mig"


def test_of_several_passes_no_page_may_be_served_before_all_are_read(path: Path) -> None:
    with arriving(path, ONCE + ONCE, is_once=False) as one:
        one.read()
        one.say(at=100)
        one.index.hear()
        assert not one.has()
        assert not one.index.is_complete
        one.say(done=True, absent=0, one_pass=False)
        one.index.hear()
        assert one.has()
        assert one.index.is_complete
        assert one.index.news is None
        expected = plainly(path)["pc.ram"]
        assert b"".join(one.index.contents("pc.ram", page) for page in range(16)) == expected


def test_of_one_pass_a_page_that_is_asked_for_is_looked_for(path: Path) -> None:
    with arriving(path, ONCE, is_once=True) as one:
        assert not one.has(search=False)
        assert one.has(search=True)
        assert one.has(search=False)  # as it was found
        assert one.index.contents("pc.ram", 15) == plainly(path)["pc.ram"][15 * PAGE :]
        assert not one.index.has("pc.ram", 0, 14, False)
        one.read()
        assert one.index.has("pc.ram", 0, 14, False)


def test_what_is_said_may_come_in_pieces(path: Path) -> None:
    with arriving(path, ONCE, is_once=True) as one:
        line = b'{"done": true, "absent": 3, "one_pass": true}\n'
        for at in range(len(line)):
            one.index.hear()
            assert not one.index.is_complete
            os.write(one.pipe, line[at : at + 1])
        one.index.hear()
        assert one.index.is_complete
        assert one.index.absent_pages == 3


def test_why_there_will_be_none_is_told(path: Path) -> None:
    with arriving(path, ONCE + ONCE, is_once=False) as one:
        one.say(error="0x10: it is damaged")
        with pytest.raises(StreamError, match="it is damaged"):
            one.index.hear()
    with arriving(path, ONCE + ONCE, is_once=False) as one:
        one.hang_up()
        with pytest.raises(StreamError, match="its index can't be made: it was killed"):
            one.index.hear()


def test_where_a_page_may_have_been_served_too_early_it_ends(path: Path) -> None:
    with arriving(path, ONCE, is_once=True) as one:
        assert one.has()
        one.say(done=True, absent=0, one_pass=False)
        with pytest.raises(StreamError, match="a page comes again that may have been served"):
            one.index.hear()
    with arriving(path, ONCE, is_once=True) as one:
        one.say(made=True, not_kept=None)
        with pytest.raises(StreamError, match="it is not what it was taken for"):
            one.index.hear()


def test_what_was_no_plain_file_after_all_is_served_as_it_was_read(path: Path) -> None:
    with arriving(path, ONCE + streams.xbzrle(0, b"\x03\x02ab", block="pc.ram"), is_once=False) as one:
        assert not one.has()
        one.say(made=True, not_kept=None)
        one.index.hear()
        assert one.has()
        expected = plainly(path)["pc.ram"]
        assert expected[3:5] == b"ab"
        assert b"".join(one.index.contents("pc.ram", page) for page in range(16)) == expected
