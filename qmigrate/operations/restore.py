"""``restore``: a saved guest runs in a stock QEMU at once, its pages come as it asks for them.

    async with Machine("qemu-system-x86_64", [..., "-incoming", "defer"]) as machine:
        result = await Restorer("guest.mig").run(machine.session, uri="unix:/tmp/in.sock")

The guest is in the file until the destination has its devices; from then on it runs there, and needs us until all
pages are in.  So told to stop before that we leave nothing running; after it we say so, and stop when told again.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from socket import socket
from typing import Final

from qmigrate import exit_codes
from qmigrate.capture.saved_guest import SavedGuest
from qmigrate.endpoint.served import End, Ended
from qmigrate.endpoint.source import Server
from qmigrate.errors import QemuDiedError, QmpCommandError, QmpError, RefusedError
from qmigrate.events import GuestChanged, LiveEvent, OnEvent, Side, Troubled
from qmigrate.operations.reading import Reading
from qmigrate.operations.reconnecting import Reconnecting
from qmigrate.operations.recover import Recoveries
from qmigrate.operations.restoring import check_fits, listen_again, look
from qmigrate.operations.restoring import listen as prepared
from qmigrate.operations.serving import DEPENDS_WHOLLY, Indexed, Restored, Served, Serving, ServingResult
from qmigrate.operations.watch import Watched
from qmigrate.qmp.migration import wait_until
from qmigrate.qmp.session import Session

__all__ = ["Indexed", "Restored", "Restorer", "Served", "ServingResult"]

TWICE: Final = "restoring a file twice writes to the same disk images: keep copies of them if you mean to"
MENDABLE: Final = (
    "the destination is postcopy-paused: its guest stops where it needs a page that is only in the file; "
    "`qmigrate restore --resume` goes on"
)
COMPLETION_TIMEOUT_S: Final = 60.0
SHUT_TIMEOUT_S: Final = 1.0
RECOVERIES: Final = 5


class Restorer(Serving):
    """One saved guest, restored once.  ``eager``: by precopy, all pages before it runs.  ``paused``: it does not run.

    ``resume``: the destination has it already, and is paused since whoever served it is gone.  ``preempt``: what is
    asked for goes over a connection of its own, where the destination can (since 7.1).  ``recoveries``: how often a
    connection that breaks is made anew; None: always.  ``owned``: that QEMU ends with us, whatever its guest is doing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        channels: tuple[str, ...] = (),
        eager: bool = False,
        paused: bool = False,
        resume: bool = False,
        preempt: bool = True,
        recoveries: int | None = RECOVERIES,
        owned: bool = False,
        answer_timeout_s: float = 30.0,
        keep_index: bool = True,
        index_folder: str | os.PathLike[str] | None = None,
        reading: Reading | None = None,
        on_event: OnEvent | None = None,
    ) -> None:
        super().__init__(
            path,
            channels=channels,
            keep_index=keep_index,
            index_folder=index_folder,
            reading=reading,
            on_event=on_event,
        )
        self.eager = eager
        self.paused = paused
        self.resume = resume
        self.preempt = preempt
        self.recoveries = recoveries
        self.owned = owned
        if owned:
            self.depends = DEPENDS_WHOLLY
        self._answer_timeout_s = answer_timeout_s

    # -- the course of it

    async def run(self, session: Session, *, uri: str | None = None, listen: str | None = None) -> ServingResult:
        """Into the QEMU of this session, until all is in.  Before it began: ``RefusedError``, ``QmpError``.

        ``uri``: where we reach it; it listens at ``listen``, or there.
        """
        async with self.opened() as opening:
            return await self.run_opening(opening, session, uri=uri, listen=listen)

    async def run_saved(
        self, saved: SavedGuest, session: Session, *, uri: str | None = None, listen: str | None = None
    ) -> ServingResult:
        """The same, of a file that has been read."""
        read = asyncio.get_running_loop().create_future()
        read.set_result(saved)
        return await self.run_opening(read, session, uri=uri, listen=listen)

    async def run_opening(
        self, opening: Awaitable[SavedGuest], session: Session, *, uri: str | None = None, listen: str | None = None
    ) -> ServingResult:
        """The same, of one that is being read: what QEMU can do is asked meanwhile."""
        news = asyncio.Event()
        there = Watched(Side.DESTINATION, session, self._heard, news, answer_timeout_s=self._answer_timeout_s)
        there.may_block = lambda: True  # its main loop may wait for a page of ours
        async with there.watching():
            wanted = listen or uri
            if self.resume:
                saved = await opening
                where, page_sizes, preempt = await listen_again(saved, there, wanted)
            else:
                found = await look(there)
                saved = await opening
                page_sizes = check_fits(saved, found)
                self._warn(saved)
                where, preempt = await prepared(
                    there, found, wanted, lazy=not self.eager, paused=self.paused, preempt=self.preempt
                )
            self._tell(there.found())
            if uri and listen:
                where = uri
            lines = await self._lines(where, preempt)
            with self._serving(saved, page_sizes) as server:
                ended = await self._over(lines, server, self._work(server))
                again = Reconnecting(
                    there,
                    news,
                    self._tell,
                    listen=wanted or where,
                    uri=uri or where,
                    limit=self.recoveries,
                    is_off=lambda: self.is_off,
                )
                ended = await self._mended(ended, server, again, preempt)
                return await self._result(ended, server, there, again.recoveries)

    def _heard(self, event: LiveEvent) -> None:
        """Of the destination."""
        if isinstance(event, GuestChanged) and event.running and "running" not in self._moments:
            self._moments["running"] = (time.monotonic_ns() - self._began) // 1000
            if self._server is not None:
                self._server.has_run = True
        self._tell(event)

    # -- its connections

    async def _lines(self, where: str, preempt: bool) -> list[socket]:
        """The main one; behind it that for what is asked for, where there is one.

        7.2 begins to load only when it has both, later ones take the second at any time after the first.
        """
        lines = [await self._connected(where)]
        try:
            if preempt:
                lines.append(await self._connected(where))
        except BaseException:
            lines[0].close()
            raise
        return lines

    async def _over(self, lines: list[socket], server: Server, work: Callable[..., Ended]) -> Ended:
        """Serve over these, which are closed then: a destination that hears nothing more pauses."""
        urgent = lines[1] if len(lines) > 1 else None
        try:
            return await self._served(server, lines[0], work if self.eager else partial(work, urgent=urgent))
        finally:
            lines[0].close()
            if urgent is not None:
                await _closed_by_peer(urgent)

    async def _mended(self, ended: Ended, server: Server, again: Reconnecting, preempt: bool) -> Ended:
        """Where the connection broke, it is made anew as often as that may be."""
        while ended.end is End.BROKEN and server.is_switched and not self.eager:
            where = await again.listens(ended.reason)
            if where is None:
                return ended
            try:
                lines = await self._lines(where, preempt)
            except RefusedError as exc:
                again.tried(str(exc))
                ended = Ended(End.BROKEN, "it could not be reached")
                continue
            again.tried("")
            ended = await self._over(lines, server, server.resume)
        return ended

    def _warn(self, saved: SavedGuest) -> None:
        self._tell(Troubled(message=TWICE))
        if saved.was_running is False and not self.eager and not self.paused:
            # The paused state is not carried by postcopy: seen of 5.2 to 11.1.
            self._tell(Troubled(message="the guest was paused when it was saved, and will run (--paused: it won't)"))

    def _work(self, server: Server) -> Callable[..., Ended]:
        if self.eager:
            return server.send
        return server.resume if self.resume else server.serve

    # -- how it ended

    async def _result(self, ended: Ended, server: Server, there: Watched, tries: Recoveries) -> ServingResult:
        if ended.end is End.REFUSED and not self._has_run(there):
            # It said so itself, by SHUT.  By QMP it may not answer any more: 10.0 and 11.1 do not always.
            reason = f"the destination failed before the guest ran: {ended.reason}; end that QEMU"
            return self._ended(exit_codes.AT_SOURCE, reason, server, there, tries)
        if ended.end is End.DONE or (ended.end is End.BROKEN and there.status == "completed"):
            ended = await self._completed(there)
        if ended.end is End.DONE:
            said = (
                "the guest runs, all its pages are in"
                if there.running
                else f"all is in; the guest is {there.run_state} there"
            )
            return self._ended(exit_codes.DONE, said + tries.summary, server, there, tries)
        if not server.is_switched:
            return self._ended(exit_codes.AT_SOURCE, f"{ended.reason}{await self._why(there)}", server, there, tries)
        if ended.end is End.UNREADABLE and not server.has_sent_pages:
            reason = f"{ended.reason}; no page was sent, so the guest has not begun to run there: end that QEMU"
            return self._ended(exit_codes.AT_SOURCE, reason, server, there, tries)
        code, sentence = await self._place(there)
        reason = tries.why if ended.end is End.BROKEN and tries.count else ended.reason
        return self._ended(code, f"{reason}: {sentence}", server, there, tries)

    async def _completed(self, there: Watched) -> Ended:
        """It has all pages: what does it say itself?"""
        try:
            await wait_until(there.session, "completed", timeout_s=COMPLETION_TIMEOUT_S)
            await there.ask_run_state()
        except QmpError as exc:
            return Ended(End.REFUSED, str(exc))
        return Ended(End.DONE)

    async def _why(self, there: Watched) -> str:
        """The destination's own reason, where it has one."""
        try:
            await there.ask_status()
        except QemuDiedError as exc:
            return f": {exc.message}"
        except QmpError:
            return ""
        reason = there.info.get("error-desc")
        return f": destination: {reason}" if reason else ""

    async def _place(self, there: Watched) -> tuple[int, str]:
        """Where the guest is, when serving broke after it may have begun to run."""
        try:
            # Not longer: where its main loop waits for a page it answers nothing.
            timeout_s = min(self._answer_timeout_s, 10.0)
            await wait_until(there.session, {"postcopy-paused", "completed"}, timeout_s=timeout_s)
            await there.ask()
        except (QemuDiedError, QmpCommandError) as exc:
            if self._has_run(there):
                return exit_codes.LOST, f"the destination failed, and what the guest did since it ran is lost: {exc}"
            return exit_codes.AT_SOURCE, f"the destination failed before the guest ran: {exc}"
        except QmpError as exc:
            ran = "" if self._has_run(there) else "; as far as is known it has not begun to run: end that QEMU"
            return exit_codes.UNKNOWN, f"the destination does not say where the guest is ({exc.message}){ran}"
        if there.status == "completed":
            return exit_codes.AT_DESTINATION, "yet the destination has all its pages"
        if self.owned:
            return (
                exit_codes.LOST,
                "the QEMU that was started for it ends with this command: what the guest did is lost",
            )
        return exit_codes.PAUSED, MENDABLE

    def _has_run(self, there: Watched) -> bool:
        """Did its devices come to life?  Either of the two says so: RUN follows at once."""
        return "loaded" in self._moments or there.took_over

    def _ended(self, code: int, message: str, server: Server, there: Watched, tries: Recoveries) -> ServingResult:
        running = there.running if there.run_state else None
        return self._result_of(server, code, message, running=running, recoveries=tries.count)


async def _closed_by_peer(urgent: socket) -> None:
    """The preempt channel is closed last, once the destination, which misses the main one, has shut it down itself.

    A hazard of QEMU's, met in 11.1: when the main channel breaks before RUN it gives up, and its main thread joins the
    thread that reads this one.  If this one broke before it was told to end, that thread waits for a recovery, which
    only a guest that has run gets; then both wait for ever, and QMP is not answered.  It did so in 20 of 34 breaks of
    both at once, which a network can do at any time, in 3 of 26 where this one was closed right after the main one, and
    in none of 42 since it waits.  7.2 and 10.0 exit instead (0 of 8 each).

    migration/postcopy-ram.c: postcopy_preempt_thread(), postcopy_ram_incoming_cleanup()
    """
    with urgent, suppress(OSError, TimeoutError):
        urgent.setblocking(False)
        async with asyncio.timeout(SHUT_TIMEOUT_S):
            while await asyncio.get_running_loop().sock_recv(urgent, 1):
                pass
