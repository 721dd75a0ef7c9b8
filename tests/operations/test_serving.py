"""What is told while a saved guest is served, by whose thread ever it is found out."""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from qmigrate.endpoint.served import End
from qmigrate.events import Decided, LiveEvent, Troubled
from qmigrate.operations.serving import Restored, Serving
from tests.capture.test_arriving import ONCE, arriving
from tests.endpoint.test_source import SIZES, guest_of

pytestmark = pytest.mark.asyncio

TIMEOUT_S = 30.0
INDEXED = "where all pages are is known"


async def told(said: list[LiveEvent], until: Callable[[LiveEvent], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not any(map(until, said)):  # noqa: ASYNC110 - the loop is what tells it
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("why", [None, "the disk is full"])
async def test_why_no_index_is_kept_is_told_once_all_pages_are_known(why: str | None, tmp_path: Path) -> None:
    said: list[LiveEvent] = []
    path = tmp_path / "guest.mig"
    serving = Serving(path, on_event=said.append)
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        arriving(path, ONCE + ONCE, is_once=False) as one,
        serving._serving(guest_of(one), SIZES) as server,
    ):
        ending = asyncio.create_task(asyncio.to_thread(server.serve, ours))
        try:
            await told(said, lambda event: isinstance(event, Restored) and event.moment == "the package is sent")
            assert [each for each in said if isinstance(each, Decided)] == []
            one.say(made=True, not_kept=why)
            await told(said, lambda event: isinstance(event, Restored) and event.moment == INDEXED)
        finally:
            server.stop()
            assert (await ending).end is End.STOPPED
        await asyncio.sleep(0)  # what the thread has told by then is taken
        decided = [(each.decision, each.reason) for each in said if isinstance(each, Decided)]
        assert decided == ([] if why is None else [("keep no index", why)])
        assert [each for each in said if isinstance(each, Troubled)] == []  # no page is absent


async def test_pages_that_are_found_to_be_absent_are_told_of(tmp_path: Path) -> None:
    said: list[LiveEvent] = []
    path = tmp_path / "guest.mig"
    serving = Serving(path, on_event=said.append)
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        arriving(path, ONCE + ONCE, is_once=False) as one,
        serving._serving(guest_of(one), SIZES) as server,
    ):
        ending = asyncio.create_task(asyncio.to_thread(server.serve, ours))
        try:
            one.read()
            one.say(done=True, absent=3, one_pass=False)
            await told(said, lambda event: isinstance(event, Troubled))
        finally:
            server.stop()
            await ending
        (event,) = [each for each in said if isinstance(each, Troubled)]
        assert event.message == "3 pages that the guest did not use were never saved: zero here"
