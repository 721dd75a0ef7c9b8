"""Pages that came, put in place."""

import pytest

from qmigrate.endpoint.ram import Counts, GuestRam, write_pages
from qmigrate.format.ram import RamBlock
from qmigrate.protocol.destination import PageChannel
from tests import streams

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
