"""The preempt channel: its pages however the bytes come."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import StreamError
from qmigrate.protocol.page_channel import PageChannel
from tests import streams
from tests.protocol.said import frozen

PAGE = streams.PAGE


@given(st.integers(1, 5000))
def test_the_preempt_channel_is_read_in_any_pieces(step: int) -> None:
    data = streams.page(PAGE, block="pc.ram") + streams.zero(3 * PAGE) + streams.page(0, block="pc.rom") + streams.eos()
    channel = PageChannel({"pc.ram": 16 * PAGE, "pc.rom": 2 * PAGE}, PAGE)
    said: list[Any] = []
    for at in range(0, len(data), step):
        channel.feed.receive(data[at : at + step])
        for came in channel.events():
            said += frozen(came)
    assert said == [("pc.ram", PAGE, 8), ("pc.ram", 3 * PAGE, 2), ("pc.rom", 0, 8)]


def test_a_page_outside_its_block_on_the_preempt_channel_is_refused() -> None:
    channel = PageChannel({"pc.ram": 2 * PAGE}, PAGE)
    channel.feed.receive(streams.page(2 * PAGE, block="pc.ram"))
    with pytest.raises(StreamError, match="page at 0x2000, the block ends at 0x2000"):
        list(channel.events())
