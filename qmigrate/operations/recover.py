"""A paused postcopy is brought back: the destination listens anew, the source connects and resumes.

Both have to be paused first.  A side that has not noticed that the connection broke is paused, but never before
the destination is past RUN: until then a broken connection loses the guest.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Final

from qmigrate.errors import QmpCommandError, QmpTimeoutError
from qmigrate.events import Recovering, Side
from qmigrate.operations.addresses import takes_any_port, uri_of, where_to_connect
from qmigrate.operations.telling import tell_where
from qmigrate.operations.watch import Watched
from qmigrate.qmp.postcopy import PAUSED
from qmigrate.value import Value

__all__ = [
    "NAME_A_PORT",
    "NOTICES_WITHIN_S",
    "Attempt",
    "Recoveries",
    "bring_back",
    "heard",
    "listen_anew",
    "pause_both",
    "pause_one",
    "until",
]

NOTICES_WITHIN_S: Final = 2.0
RETRIES_AFTER_S: Final = 0.5
LATEST_RETRY_AFTER_S: Final = 10.0
NAME_A_PORT: Final = "recover with a --uri that names the port"
WHEREVER: Final = "HOST"


class Recoveries:
    """How often a migration was brought back, and whether it may be again.  ``limit`` None: always."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.count = 0
        self._failed_in_a_row = 0
        self._trouble = ""

    @property
    def exhausted(self) -> bool:
        return self.limit is not None and self.count >= self.limit

    @property
    def delay_s(self) -> float:
        """Before the next attempt: none at first, then longer each time that it failed."""
        if not self._failed_in_a_row:
            return 0.0
        return min(RETRIES_AFTER_S * 2.0 ** (self._failed_in_a_row - 1), LATEST_RETRY_AFTER_S)

    def begin(self, uri: str) -> Recovering:
        """An attempt begins."""
        self.count += 1
        return Recovering(attempt=self.count, limit=self.limit, uri=uri)

    def tried(self, trouble: str) -> None:
        """It succeeded, or what went wrong."""
        self._failed_in_a_row = self._failed_in_a_row + 1 if trouble else 0
        self._trouble = trouble

    @property
    def why(self) -> str:
        """Why it stays paused."""
        attempts = "one attempt" if self.count == 1 else f"{self.count} attempts"
        tried = f" after {attempts} to bring it back" if self.count else ""
        last = f": {self._trouble}" if self._trouble else ""
        return f"the connection of the postcopy broke{tried}{last}"

    @property
    def summary(self) -> str:
        """For the sentence of a success."""
        if not self.count:
            return ""
        return f", brought back {'once' if self.count == 1 else f'{self.count} times'}"


async def pause_both(sides: Mapping[Side, Watched], news: asyncio.Event) -> bool:
    """Until both are paused; one that does not notice by itself is told.  False: they are not."""
    both = list(sides.values())
    destination = sides[Side.DESTINATION]

    def paused() -> bool:
        # One whose main loop waits for a page can't say what it is; if it is not paused, it refuses to listen.
        return all(each.status == PAUSED or (each.silence and each is destination) for each in both)

    def over() -> bool:
        return paused() or _hopeless(both)

    if not await until(over, news, both, NOTICES_WITHIN_S) and destination.took_over:
        for each in both:
            if each.status != PAUSED:
                await pause_one(each)
        await until(over, news, both, destination.answer_timeout_s)
    return paused()


async def pause_one(watched: Watched) -> None:
    """Break the connection on this side.  That it is broken already is no error."""
    try:
        await watched.execute("migrate-pause", oob=True)
    except QmpCommandError:
        await watched.ask_status()


class Attempt(Value):
    """What became of an attempt.  ``trouble`` is empty when pages flow again."""

    trouble: str = ""
    connected: bool = True


async def bring_back(
    sides: Mapping[Side, Watched],
    news: asyncio.Event,
    *,
    uri: str,
    listen: str,
    connect_timeout_s: float,
) -> Attempt:
    """One attempt.  Raises QmpError where a side is gone."""
    source, destination = sides[Side.SOURCE], sides[Side.DESTINATION]
    both = [source, destination]
    if refusal := await listen_anew(destination, listen):
        return Attempt(f"destination: {refusal}")
    if takes_any_port(uri):
        try:
            await destination.ask_status()
        except QmpTimeoutError:
            return Attempt(f"destination: which port it took can't be asked, it is silent: {NAME_A_PORT}")
        uri = where_to_connect(uri, destination)
    since = len(source.history)
    try:
        await tell_where(source, "migrate", uri, must={"resume": True})
    except QmpCommandError as exc:
        return Attempt(f"source: {exc.message}")

    def left() -> bool:
        return any(status != PAUSED for status in source.history[since:])

    def settled() -> bool:
        there = destination.status not in (PAUSED, *RECOVERING, "setup") or bool(destination.silence)
        flows = source.status not in (PAUSED, *RECOVERING) and there
        return flows or (left() and source.status == PAUSED) or _hopeless(both)

    await until(settled, news, both, connect_timeout_s)
    for each in both:
        if each.failure is not None:
            raise each.failure
    await source.ask_status()
    if source.status != PAUSED:
        return Attempt()
    what = "the connection broke again" if left() else "it could not connect"
    return Attempt(f"source: {source.info.get('error-desc') or what}", connected=left())


async def listen_anew(destination: Watched, listen: str) -> str:
    """Have it listen; why it does not, or empty.

    QEMU 5.2 listens at one address until somebody comes.  To send the source elsewhere would be in vain.
    """
    try:
        await destination.execute("migrate-recover", {"uri": listen}, oob=True)
    except QmpCommandError as exc:
        if "already" not in exc.message:
            return exc.message
        await destination.ask_status()
        listens = uri_of(destination.info, host=WHEREVER) if destination.info.get("socket-address") else listen
        if not _is_there(listen, listens):
            return f"it listens already, at {listens}: recover with --uri {listens}"
    return ""


def _is_there(listen: str, listens: str) -> bool:
    """Is what was asked for where it listens?  A host has many names; that it is this one is taken for granted."""
    if takes_any_port(listen) or listen == listens:
        return True
    both_tcp = listen.startswith("tcp:") and listens.startswith("tcp:")
    return both_tcp and listen.rpartition(":")[2] == listens.rpartition(":")[2]


RECOVERING: Final = ("postcopy-recover", "postcopy-recover-setup")


def _hopeless(both: list[Watched]) -> bool:
    return any(each.failure is not None or each.status in ("failed", "cancelled") for each in both)


async def until(condition: Callable[[], bool], news: asyncio.Event, watched: list[Watched], timeout_s: float) -> bool:
    """Wait until this holds, looking at each piece of news.  False: time is up."""
    deadline = time.monotonic() + timeout_s
    for each in watched:
        each.poll_soon()
    while not condition():
        if not await heard(news, deadline - time.monotonic()):
            return condition()
    return True


async def heard(news: asyncio.Event, timeout_s: float) -> bool:
    """Wait for news; False: there was none in this time."""
    try:
        async with asyncio.timeout(max(timeout_s, 0)):
            await news.wait()
    except TimeoutError:
        return False
    news.clear()
    return True
