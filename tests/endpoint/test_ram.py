"""Pages that came, put in place."""

import os
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qmigrate.endpoint.ram import Counts, GuestRam, Placer, write_pages
from qmigrate.errors import StreamError
from qmigrate.format.ram import RamBlock, RamFlag
from qmigrate.format.stretch import Stretch
from qmigrate.protocol.page_channel import PageChannel
from qmigrate.uffd.userfault import Userfaultfd
from tests import streams
from tests.uffd.kernel import needs_userfaultfd

PAGE = streams.PAGE
PAGES = 5000
BOUNDARY = (16 << 20) // PAGE  # where the words' common bytes change


@pytest.mark.parametrize("step", [1 << 16, 10_007, 1 << 20])
def test_each_page_is_written_once_where_long_runs_and_short_ones_meet_at_16_mib(step: int) -> None:
    long = b"".join(streams.page(page * PAGE) for page in range(BOUNDARY - 20, BOUNDARY + 1))
    short = [streams.zero((4200 + 3 * pair) * PAGE) + streams.page((4201 + 3 * pair) * PAGE) for pair in range(30)]
    data = streams.page(0, block="pc.ram") + long + b"".join(short)
    ram, counts = GuestRam.create([RamBlock(name="pc.ram", used_length=PAGES * PAGE)], PAGE), Counts()
    channel = PageChannel({"pc.ram": PAGES * PAGE}, PAGE)
    for at in range(0, len(data), step):
        channel.feed.receive(data[at : at + step])
        for came in channel.events():
            write_pages(ram, came, counts)
    assert (counts.normal, counts.zero) == (1 + 21 + 30, 30)
    sent = [0, *range(BOUNDARY - 20, BOUNDARY + 1), *range(4201, 4201 + 90, 3)]
    for page in range(PAGES):
        expected = streams.page(page * PAGE)[-PAGE:] if page in sent else bytes(PAGE)
        assert ram.memory[0].mapping[page * PAGE : (page + 1) * PAGE] == expected, page
    ram.close()


def placed(data: bytes, *, plainly: bool) -> tuple[bytes, Counts, list[bool], bool]:
    """What a block of 64 pages holds once ``data`` is placed by COPY, the counts, what came; was any a stretch?"""
    ram, counts = GuestRam.create([RamBlock(name="pc.ram", used_length=64 * PAGE)], PAGE), Counts()
    (memory,) = ram.memory
    was_stretch = False
    with Userfaultfd.open() as faults:
        faults.register(memory.address, memory.mapped_length)
        placer = Placer(ram, faults, [memory.address], counts)
        channel = PageChannel({"pc.ram": 64 * PAGE}, PAGE)
        channel.feed.receive(data)
        for came in channel.events():
            was_stretch |= isinstance(came.pages.runs, Stretch)
            if plainly:
                placer.place_plainly(0, came)
            else:
                placer.place(came)
        received = [ram.pages.is_received(0, start) for start in range(0, 64 * PAGE, PAGE)]
        contents = os.pread(memory.descriptor, 64 * PAGE, 0)
    ram.close()
    return contents, counts, received, was_stretch


def records(pages: dict[int, bool]) -> bytes:
    """Records of these pages, in this order; True: of zeros.  Page 0, which names the block, comes first."""
    return streams.page(0, b"\x01" * PAGE, block="pc.ram") + b"".join(
        streams.zero(page * PAGE) if is_zero else streams.page(page * PAGE, bytes([page + 1]) * PAGE)
        for page, is_zero in pages.items()
    )


@needs_userfaultfd
@given(st.dictionaries(st.integers(1, 63), st.booleans(), min_size=1))
@example({page: bool(page % 3) for page in range(1, 64)})
@example({page: page < 32 for page in range(63, 0, -1)})
def test_pages_in_short_runs_are_placed_as_the_plain_version_places_them(pages: dict[int, bool]) -> None:
    plain, fast = (placed(records(pages), plainly=plainly)[:3] for plainly in (True, False))
    assert fast == plain
    filled = {0, *(page for page, is_zero in pages.items() if not is_zero)}
    assert fast == (
        b"".join((bytes([page + 1]) if page in filled else b"\0") * PAGE for page in range(64)),
        Counts(normal=len(filled), zero=1 + len(pages) - len(filled)),
        [page in pages or not page for page in range(64)],
    )


@needs_userfaultfd
def test_short_runs_are_placed_as_a_stretch() -> None:
    *_, was_stretch = placed(records({page: bool(page % 2) for page in range(1, 64)}), plainly=False)
    assert was_stretch


def placed_in_pieces(data: bytes, cuts: list[int], *, ahead: bool) -> tuple[bytes, Counts, list[bool], str | None]:
    """The same from a channel that is read in pieces; and the error that ended it.  ``ahead``: as the listener does."""
    ram, counts, error = GuestRam.create([RamBlock(name="pc.ram", used_length=64 * PAGE)], PAGE), Counts(), None
    (memory,) = ram.memory
    with Userfaultfd.open() as faults:
        faults.register(memory.address, memory.mapped_length)
        placer = Placer(ram, faults, [memory.address], counts)
        channel = PageChannel({"pc.ram": 64 * PAGE}, PAGE)
        places = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
        try:
            for begin, end in pairwise(places):
                channel.feed.receive(data[begin:end])
                if ahead and (came := channel.plain_pages()) is not None:
                    placer.place(came)
                    if channel.has_less_than_a_page:
                        continue
                for came in channel.events():
                    placer.place(came)
            channel.feed.end()
            for came in channel.events():
                placer.place(came)
        except StreamError as exc:
            error = str(exc)
        received = [ram.pages.is_received(0, start) for start in range(0, 64 * PAGE, PAGE)]
        contents = os.pread(memory.descriptor, 64 * PAGE, 0)
    ram.close()
    return contents, counts, received, error


EOS = int(RamFlag.EOS).to_bytes(8)
MARKERS = (EOS, (1).to_bytes(8) + b"junk", b"\x51")
PIECE = st.one_of(
    st.tuples(st.integers(1, 64), st.booleans()).map(
        lambda page: (
            streams.zero(page[0] * PAGE) if page[1] else streams.page(page[0] * PAGE, bytes([page[0] + 1]) * PAGE)
        )
    ),
    st.integers(1, 63).map(lambda page: streams.page(page * PAGE, bytes([page + 2]) * PAGE, block="pc.ram")),
    st.sampled_from(MARKERS),
)


@needs_userfaultfd
@given(st.lists(PIECE, max_size=12), st.lists(st.integers(0, 13 * (PAGE + 16)), max_size=6))
@example([streams.page(page * PAGE) for page in range(1, 4)], [PAGE, PAGE + 30, 2 * PAGE + 31, 3 * PAGE + 38])
@example([streams.page(PAGE), EOS, streams.page(2 * PAGE, block="pc.ram")], [2 * 4104 + 11, 2 * 4104 + 15])
def test_pages_taken_ahead_of_the_grammar_are_those_that_it_gives(pieces: list[bytes], cuts: list[int]) -> None:
    """Memory, counts, page map and error: any stream, also a wrong one, in any pieces."""
    data = streams.page(0, b"\x01" * PAGE, block="pc.ram") + b"".join(pieces)
    ahead, plain = (placed_in_pieces(data, cuts, ahead=ahead) for ahead in (True, False))
    assert ahead == plain
