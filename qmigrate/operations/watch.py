"""One side of a migration: what it says, what it answers, and what we tell it.

Events come at once; what QEMU does not say by events (or does not say because somebody else began the migration,
without the capability `events`) is found by asking, seldom while events come.  A side that dies or falls silent
has a ``failure``; nothing is raised into the middle of somebody else's step.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from qmigrate.errors import QmpCommandError, QmpError, QmpTimeoutError
from qmigrate.events import (
    CommandSent,
    GuestChanged,
    LiveEvent,
    OnEvent,
    PassBegan,
    Progressed,
    QemuSaid,
    Side,
    SideFound,
    StatusChanged,
    Troubled,
)
from qmigrate.operations.policy import PassCounter, PassStart
from qmigrate.operations.whereabouts import INCOMING
from qmigrate.qmp import migration
from qmigrate.qmp.session import Event, Listener, Session

__all__ = ["Watched", "progress", "version_of"]

FIRST_POLL_S: Final = 0.1
LAST_POLL_S: Final = 1.0
CLOSE_LOOKS: Final = 100


class Watched:
    """A side.  ``status`` and ``run_state`` are the newest that are known; ``news`` is set at every change.

    ``counts_passes``: ask for numbers whenever QEMU announces a pass, so that passes can be counted.
    ``looks_closely``: ask for them ten times a second at first, then each hundredth of the time that has gone by.
    """

    def __init__(
        self, side: Side, session: Session, tell: OnEvent, news: asyncio.Event, *, answer_timeout_s: float
    ) -> None:
        self.side = side
        self.session = session
        self.answer_timeout_s = answer_timeout_s
        self.status = "none"
        self.history: list[str] = []
        self.troubled_s: float | None = None
        # In postcopy a destination may hold its main loop while it waits for a page.  Then it answers no question;
        # events and out-of-band commands pass.
        self.may_block: Callable[[], bool] = lambda: False
        self.silence = ""
        self.run_state = ""
        self.info: dict[str, Any] = {}
        self.failure: QmpError | None = None
        self.passes = PassCounter()
        self.counts_passes = False
        self.looks_closely = False
        self.downtime_limit_ms = 300
        self.last_sign_s = time.monotonic()
        self._tell = tell
        self._news = news
        self._hurry = asyncio.Event()
        self._pause_s = LAST_POLL_S
        self._listener: Listener | None = None
        self._heard = 0
        self._said_status = ""
        self._said_running: bool | None = None
        self._announced = False

    # ---- what is known ----

    @property
    def running(self) -> bool:
        return self.run_state == "running"

    @property
    def took_over(self) -> bool:
        """Is this destination past RUN, the point after which a broken connection can be mended?"""
        return self.run_state not in (INCOMING, "")

    def said(self, status: str, *, running: bool) -> bool:
        """Did it tell this by events, as the last that it told, and was nothing lost since?"""
        self._catch_up()
        lost = self._listener is None or self._listener.dropped or self.silence or self.failure is not None
        return not lost and self.session.connected and (self._said_status, self._said_running) == (status, running)

    def found(self) -> SideFound:
        """Who it is."""
        return SideFound(
            side=self.side,
            address=self.session.address,
            version=version_of(self.session.greeting),
            run_state=self.run_state,
            status=self.status,
        )

    # ---- what we tell it ----

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None, *, oob: bool = False) -> Any:
        """Have it do something.  What it was told is reported."""
        self._tell(CommandSent(side=self.side, command=command, arguments=dict(arguments or {})))
        try:
            return await self.session.execute(command, arguments, oob=oob, timeout_s=self.answer_timeout_s)
        except QmpError as exc:
            self.fail(exc)
            raise

    async def ask(self) -> None:
        """Bring what is known up to date."""
        await asyncio.gather(self.ask_status(), self.ask_run_state())

    async def ask_status(self) -> None:
        """What the migration is like.  A change that was not heard of is reported."""
        heard, asked_s = self._heard, time.monotonic()
        info = await migration.query(self.session, timeout_s=self.answer_timeout_s)
        round_trip_us = int((time.monotonic() - asked_s) * 1e6)
        self._catch_up()
        if _signs(info) != _signs(self.info):
            self.last_sign_s = time.monotonic()
        self.info = info
        if heard == self._heard:  # else the answer may be older than what was heard
            self._take_status(info["status"], heard=False)
        self._count_pass()
        self._tell(progress(self.side, info, self.passes.completed, round_trip_us))

    async def ask_run_state(self) -> None:
        """What the machine is like."""
        heard = self._heard
        answer = await self.session.execute("query-status", timeout_s=self.answer_timeout_s)
        self._catch_up()
        state = str(answer.get("status", ""))
        if heard != self._heard or state == self.run_state:
            return
        if self.run_state and (state == "running") != self.running:
            self._tell(GuestChanged(side=self.side, running=state == "running"))
        self.run_state = state
        self._news.set()

    async def ask_downtime_limit(self) -> None:
        """For how long it may stop the guest at the end of precopy, whoever said so."""
        answer = await self.session.execute("query-migrate-parameters", timeout_s=self.answer_timeout_s)
        limit_ms = _number(answer.get("downtime-limit")) if isinstance(answer, Mapping) else None
        if limit_ms is not None:
            self.downtime_limit_ms = limit_ms

    def poll_soon(self, *, within_s: float = FIRST_POLL_S) -> None:
        """Somebody waits for it: ask it soon, and often for a while."""
        if within_s < self._pause_s:
            self._pause_s = within_s
            self._hurry.set()

    # ---- watching ----

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[None]:
        """Inside this block events are heard, and the side is asked from time to time."""
        with self.session.listen() as self._listener:
            tasks = [
                asyncio.create_task(self._hear(self._listener), name=f"hear the {self.side}"),
                asyncio.create_task(self._poll(), name=f"ask the {self.side}"),
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _hear(self, listener: Listener) -> None:
        async for event in listener:
            self._take(event)
        self.fail(await self.session.death("watching the migration"))

    def _catch_up(self) -> None:
        """An answer has come: first take what was said before it."""
        while self._listener is not None and (event := self._listener.get_nowait()) is not None:
            self._take(event)

    async def _poll(self) -> None:
        # The source has numbers to tell; what the destination does it says itself, if it is not asked to hurry.
        self._pause_s = FIRST_POLL_S if self.side is Side.SOURCE else LAST_POLL_S
        began_s = time.monotonic()
        while self.failure is None:
            if await self._hurried_within(self._pause_s):
                continue
            longest_s = LAST_POLL_S
            if self.looks_closely:
                longest_s = min(max((time.monotonic() - began_s) / CLOSE_LOOKS, FIRST_POLL_S), LAST_POLL_S)
            self._pause_s = min(max(self._pause_s, FIRST_POLL_S) * 1.3, longest_s)
            await self._poll_once()

    async def _poll_once(self) -> None:
        try:
            if self.side is Side.SOURCE:
                await self.ask_status()
            else:
                await self.ask()
        except QmpTimeoutError as exc:
            if not self.may_block():
                self.fail(exc)
            elif not self.silence:
                self.silence = exc.message
                self._tell(Troubled(side=self.side, message=f"{exc.message}: it may wait for a page"))
        except QmpError as exc:
            self.fail(exc)
        else:
            self.silence = ""

    async def _hurried_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._hurry.wait()
        except TimeoutError:
            return False
        self._hurry.clear()
        return True

    def fail(self, error: QmpError) -> None:
        """It can't be talked to any more.  That it refused something is no such thing."""
        if self.failure is None and not (isinstance(error, QmpCommandError) and self.session.connected):
            self.failure = error
            self._trouble()
            self._tell(Troubled(side=self.side, message=str(error)))
            self._news.set()

    def _trouble(self) -> None:
        if self.troubled_s is None:
            self.troubled_s = time.monotonic()

    # ---- what it says ----

    def _take(self, event: Event) -> None:
        self._heard += 1
        self.last_sign_s = time.monotonic()
        stamp: dict[str, Any] = {"side": self.side, "qemu_us": event.timestamp_us or None}
        if event.name == "MIGRATION" and isinstance(event.data.get("status"), str):
            self._said_status = event.data["status"]
            self._take_status(self._said_status, heard=True, **stamp)
        elif event.name == "MIGRATION_PASS" and isinstance(event.data.get("pass"), int):
            self._take_pass(event.data["pass"], stamp)
        elif event.name in ("STOP", "RESUME"):
            runs = event.name == "RESUME"
            self._said_running = runs
            self.run_state = "running" if runs else "stopped"
            self._tell(GuestChanged(running=runs, **stamp))
        else:
            self._tell(QemuSaid(qemu_event=event.name, data=dict(event.data), **stamp))
        self._news.set()

    def _take_status(self, status: str, *, heard: bool, **stamp: Any) -> None:
        if status == self.status:
            return
        self.status = status
        self.history.append(status)
        self.last_sign_s = time.monotonic()
        if status == "failed":
            self._trouble()
        self._tell(StatusChanged(status=status, heard=heard, **(stamp or {"side": self.side})))
        self._news.set()

    def _take_pass(self, number: int, stamp: dict[str, Any]) -> None:
        self._tell(PassBegan(number=number, completed=self.passes.completed, **stamp))
        if self.counts_passes:
            self._announced = True
            self.poll_soon(within_s=0)

    def _count_pass(self) -> None:
        """If a pass was announced since the last numbers came: does it begin one?"""
        if self._announced and (ram := self.info.get("ram")):
            self._announced = False
            began = self.passes.announced(
                PassStart.of(self.info, self.downtime_limit_ms),
                page_size=ram.get("page-size", 4096),
                counts_pages="xbzrle-cache" not in self.info,
            )
            if began:
                self._news.set()


def version_of(greeting: Mapping[str, Any]) -> str:
    """What QMP's greeting calls this QEMU: ``11.1.3 (Debian 1:11.1.3+ds-1)``; empty where it says nothing."""
    version = greeting.get("version")
    qemu = version.get("qemu") if isinstance(version, Mapping) else None
    if not isinstance(version, Mapping) or not isinstance(qemu, Mapping):
        return ""
    number = ".".join(str(qemu.get(part, 0)) for part in ("major", "minor", "micro"))
    package = str(version.get("package", "")).strip()
    return f"{number} ({package.strip('()')})" if package else number


def progress(side: Side, info: Mapping[str, Any], passes: int = 0, round_trip_us: int | None = None) -> LiveEvent:
    """The numbers of an answer to ``query-migrate``.  What is no number is as if it were not told."""
    ram = _ram(info)
    dirty_pages, mbps = _number(ram.get("dirty-pages-rate")), ram.get("mbps")
    return Progressed(
        side=side,
        status=str(info.get("status", "none")),
        remaining_bytes=_number(ram.get("remaining")),
        transferred_bytes=_number(ram.get("transferred")),
        total_bytes=_number(ram.get("total")),
        dirty_bytes_per_s=None if dirty_pages is None else dirty_pages * (_number(ram.get("page-size")) or 4096),
        sent_bytes_per_s=_number(mbps * 125_000 if isinstance(mbps, int | float) else None),
        passes=passes,
        page_requests=_number(ram.get("postcopy-requests")),
        downtime_ms=_number(info.get("downtime")),
        expected_downtime_ms=_number(info.get("expected-downtime")),
        round_trip_us=round_trip_us,
        data=dict(info),
    )


def _ram(info: Mapping[str, Any]) -> Mapping[str, Any]:
    ram = info.get("ram")
    return ram if isinstance(ram, Mapping) else {}


def _number(value: Any) -> int | None:
    """One that QEMU can mean: from 0, in 64 bits."""
    return int(value) if isinstance(value, int | float) and 0 <= value < 1 << 64 else None


def _signs(info: Mapping[str, Any]) -> tuple[Any, ...]:
    """What changes as long as anything goes on."""
    ram = _ram(info)
    return info.get("status"), ram.get("transferred"), ram.get("remaining"), ram.get("dirty-sync-count")
