"""What is told while a saved guest is served, by whose thread ever it is found out."""

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmigrate.endpoint.served import End
from qmigrate.events import Decided, LiveEvent, Troubled
from qmigrate.operations.serving import Restored, Serving
from tests.capture.test_arriving import ONCE, Arriving, arriving
from tests.endpoint.test_source import SIZES, guest_of

pytestmark = pytest.mark.asyncio

TIMEOUT_S = 60.0
INDEXED = "where all pages are is known"


@asynccontextmanager
async def served(folder: Path) -> AsyncGenerator[tuple[Arriving, list[LiveEvent]]]:
    """A guest in several passes, which is being served while its index is made; and what is told of that."""
    said: list[LiveEvent] = []
    path = folder / "guest.mig"
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
            yield one, said
        finally:
            server.stop()
            assert (await ending).end is End.STOPPED


async def told(said: list[LiveEvent], until: Callable[[LiveEvent], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not any(map(until, said)):  # noqa: ASYNC110 - the loop is what tells it
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("why", [None, "the disk is full"])
async def test_why_no_index_is_kept_is_told_once_all_pages_are_known(why: str | None, tmp_path: Path) -> None:
    async with served(tmp_path) as (one, said):
        await told(said, lambda event: isinstance(event, Restored) and event.moment == "the package is sent")
        assert [each for each in said if isinstance(each, Decided)] == []
        one.say(made=True, not_kept=why)
        await told(said, lambda event: isinstance(event, Restored) and event.moment == INDEXED)
    await asyncio.sleep(0)  # what the thread has told by then is taken
    decided = [(each.decision, each.reason) for each in said if isinstance(each, Decided)]
    assert decided == ([] if why is None else [("keep no index", why)])
    assert [each for each in said if isinstance(each, Troubled)] == []  # no page is absent


async def test_pages_that_are_found_to_be_absent_are_told_of(tmp_path: Path) -> None:
    async with served(tmp_path) as (one, said):
        one.read()
        one.say(done=True, absent=3, one_pass=False)
        await told(said, lambda event: isinstance(event, Troubled))
    (event,) = [each for each in said if isinstance(each, Troubled)]
    assert event.message == "3 pages that the guest did not use were never saved: zero here"
