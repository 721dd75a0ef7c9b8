"""A saved guest's connection broke after it began to run: its destination listens anew, and pages go on.

The destination is ``postcopy-paused`` then, and says so by an event; that it answers nothing else, as its main loop
waits for a page of ours, changes nothing: what it is told goes out of band.  Whoever runs this connects.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from qmigrate.errors import QmpError
from qmigrate.events import OnEvent, Side, Troubled
from qmigrate.operations.addresses import takes_any_port, where_to_connect
from qmigrate.operations.recover import (
    NAME_A_PORT,
    NOTICES_WITHIN_S,
    Recoveries,
    heard,
    listen_anew,
    pause_one,
    until,
)
from qmigrate.operations.watch import Watched
from qmigrate.qmp.postcopy import PAUSED

__all__ = ["Reconnecting"]

_OVER: Final = ("failed", "completed", "cancelled")


class Reconnecting:
    """``listen``: where it is to listen, ``uri``: where that is reached; ``is_off``: nobody wants it any more."""

    def __init__(
        self,
        there: Watched,
        news: asyncio.Event,
        tell: OnEvent,
        *,
        listen: str,
        uri: str,
        limit: int | None,
        is_off: Callable[[], bool],
    ) -> None:
        self.recoveries = Recoveries(limit)
        self._there = there
        self._news = news
        self._tell = tell
        self._listen = listen
        self._uri = uri
        self._is_off = is_off

    async def listens(self, reason: str) -> str | None:
        """Until it listens again, after a break for this ``reason``: where to connect.

        None where it does not come to that: it is lost, has all, or there were attempts enough.
        """
        self._tell(Troubled(side=Side.DESTINATION, message=reason))
        while not self._is_off() and not self.recoveries.exhausted and await self._is_paused():
            if not await self._waited() or self._is_off():
                return None
            self._tell(self.recoveries.begin(self._uri))
            try:
                trouble, where = await self._told()
            except QmpError as exc:
                trouble, where = str(exc), ""
            if not trouble:
                return where
            self.tried(f"destination: {trouble}")
        return None

    def tried(self, trouble: str) -> None:
        """What went wrong; empty: pages flow again."""
        self.recoveries.tried(trouble)
        if trouble:
            self._tell(Troubled(message=trouble))

    async def _is_paused(self) -> bool:
        """One that does not notice by itself is told, if its guest runs: before RUN none can be brought back."""
        there = self._there

        def settled() -> bool:
            return there.status in (PAUSED, *_OVER) or there.failure is not None

        if not await until(settled, self._news, [there], NOTICES_WITHIN_S) and there.took_over:
            try:
                await pause_one(there)
            except QmpError:
                return False
            await until(settled, self._news, [there], there.answer_timeout_s)
        return there.status == PAUSED and there.failure is None

    async def _waited(self) -> bool:
        """As long as it takes longer each time; False where it is gone or nobody wants it meanwhile."""
        there, loop = self._there, asyncio.get_running_loop()
        deadline = loop.time() + self.recoveries.delay_s
        while (left_s := deadline - loop.time()) > 0:
            if self._is_off() or there.failure is not None:
                return False
            await heard(self._news, min(left_s, 0.25))
        return True

    async def _told(self) -> tuple[str, str]:
        """Why it does not listen, or where to connect."""
        if refusal := await listen_anew(self._there, self._listen):
            return refusal, ""
        if not takes_any_port(self._uri):
            return "", self._uri
        try:
            await self._there.ask_status()
        except QmpError as exc:
            return f"which port it took can't be asked ({exc.message}): {NAME_A_PORT}", ""
        return "", where_to_connect(self._uri, self._there)
