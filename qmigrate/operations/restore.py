"""``restore``: a saved guest runs in a stock QEMU at once, its pages come as it asks for them.

    async with Machine("qemu-system-x86_64", [..., "-incoming", "defer"]) as machine:
        result = await Restorer("guest.mig").run(machine.session, uri="unix:/tmp/in.sock")

The guest is in the file until the destination has its devices; from then on it runs there, and needs us until all
pages are in.  So told to stop before that we leave nothing running; after it we say so, and stop when told again.
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, Final

from qmigrate.capture.migration import Migration
from qmigrate.capture.saved import Saved, read_saved
from qmigrate.endpoint.source import Answered, Counts, End, Ended, Moment, Server
from qmigrate.endpoint.transport import SocketAddress, connect
from qmigrate.errors import NoStreamError, QemuDiedError, QmpCommandError, QmpError, RefusedError, StreamError
from qmigrate.events import Decided, LiveEvent, OnEvent, Side, Troubled
from qmigrate.operations.restoring import fits, listen, listen_again
from qmigrate.operations.watch import Watched
from qmigrate.qmp.migration import wait_until
from qmigrate.qmp.session import Session

__all__ = ["Indexed", "RestoreResult", "Restored", "Restorer", "Served"]

DONE: Final = 0
STILL_IN_FILE: Final = 3
RUNS_THERE: Final = 4
PAUSED: Final = 5
LOST: Final = 6
UNKNOWN: Final = 7

TWICE: Final = "restoring a file twice writes to the same disk images: keep copies of them if you mean to"
DEPENDS: Final = (
    "the guest runs there now, and needs this process until all its pages are in. It goes on. Once more ends it, and "
    "leaves the guest waiting for pages (`qmigrate restore --resume` brings them)"
)
COMPLETION_TIMEOUT_S: Final = 60.0
CONNECT_TIMEOUT_S: Final = 10.0
PROGRESS_EVERY_S: Final = 0.25


@dataclass(frozen=True, kw_only=True)
class Indexed(LiveEvent):
    """The file has been read: RAM of ``total_bytes`` in so many blocks, device state of ``device_bytes``."""

    machine_type: str | None
    blocks: int
    total_bytes: int
    device_bytes: int
    took_us: int


@dataclass(frozen=True, kw_only=True)
class Restored(LiveEvent):
    """A step on the way: its name, in words, and how long after the beginning it came."""

    moment: str
    after_us: int


@dataclass(frozen=True, kw_only=True)
class Served(LiveEvent):
    """How far it is: target pages, of them those that were asked for; bytes sent; bytes a second lately."""

    pages: int
    total: int
    requested: int
    requests: int
    sent_bytes: int
    bytes_per_s: int


@dataclass(frozen=True, kw_only=True)
class RestoreResult:
    """The end.  ``exit_code`` as design.md has it; 3 is: the guest is in the file, as it was.

    ``moments`` in microseconds after the beginning; ``latency`` of answers, in this process.
    """

    exit_code: int
    message: str
    running: bool | None = None
    counts: Counts = field(default_factory=Counts)
    latency: Answered = field(default_factory=Answered)
    moments: Mapping[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.exit_code == DONE

    def plain(self) -> dict[str, Any]:
        """As JSON has it, the last of the events."""
        answered = sum(self.latency.counts)
        return {
            "event": "finished",
            "exit_code": self.exit_code,
            "message": self.message,
            "running": self.running,
            "pages": self.counts.pages,
            "total": self.counts.total,
            "requested": self.counts.requested,
            "requests": self.counts.requests,
            "sent_bytes": self.counts.sent_bytes,
            "moments_us": dict(self.moments),
            "latency": {
                "counts": self.latency.counts,
                "mean_us": round(self.latency.total_ns / answered / 1000, 1) if answered else None,
                "longest_us": round(self.latency.longest_ns / 1000, 1) if answered else None,
            },
        }


class Restorer:
    """One saved guest, restored once.  ``eager``: by precopy, all pages before it runs.  ``paused``: it does not run.
    ``resume``: the destination has it already, and is paused since whoever served it is gone.

    The file is read in ``read()``, which may go on while a QEMU is started; ``run()`` does it where nobody has.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        channels: tuple[str, ...] = (),
        eager: bool = False,
        paused: bool = False,
        resume: bool = False,
        answer_timeout_s: float = 30.0,
        on_event: OnEvent | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.eager = eager
        self.paused = paused
        self.resume = resume
        self._channels = channels
        self._answer_timeout_s = answer_timeout_s
        self._tell: OnEvent = on_event or _no_one
        self._began = time.monotonic_ns()
        self._moments: dict[str, int] = {}
        self._server: Server | None = None
        self._interrupted = 0

    # -- being told to stop

    @property
    def is_switched(self) -> bool:
        """May the guest run there already?"""
        return self._server is not None and self._server.is_switched

    def interrupt(self) -> bool:
        """Told to stop.  False where nothing is served: then whoever runs it is to be cancelled."""
        if self._server is None:
            return False
        self._interrupted += 1
        if not self.is_switched or self._interrupted > 1:
            self._server.stop()
        else:
            self._tell(Decided(side=Side.DESTINATION, decision="go on", reason=DEPENDS))
        return True

    # -- the course of it

    def read(self, migration: Migration) -> Saved:
        """The file's index and device state.  Blocks.  Raises ``RefusedError``, also for a damaged stream."""
        began = time.monotonic_ns()
        try:
            saved = read_saved(migration)
        except (StreamError, NoStreamError, RefusedError) as exc:
            raise RefusedError(f"{self.path}: {exc}") from exc
        self._tell(
            Indexed(
                machine_type=saved.machine_type,
                blocks=len(saved.blocks),
                total_bytes=sum(block.used_length for block in saved.blocks),
                device_bytes=len(saved.devices),
                took_us=(time.monotonic_ns() - began) // 1000,
            )
        )
        if saved.absent:
            self._tell(Troubled(message=f"{saved.absent} pages that the guest did not use were never saved: zero here"))
        if saved.was_running is False and not self.eager and not self.paused:
            self._tell(
                Troubled(message="the guest was paused when it was saved; a postcopy runs it (--paused does not)")
            )
        return saved

    async def run(self, session: Session, *, uri: str | None = None) -> RestoreResult:
        """Into the QEMU of this session, until all is in.  Before it began: ``RefusedError``, ``QmpError``."""
        with Migration(self.path, channels=self._channels) as migration:
            saved = await asyncio.to_thread(self.read, migration)
            with saved:
                return await self.run_saved(saved, session, uri=uri)

    async def run_saved(self, saved: Saved, session: Session, *, uri: str | None = None) -> RestoreResult:
        """The same, of a file that has been read."""
        news = asyncio.Event()
        there = Watched(Side.DESTINATION, session, self._tell, news, answer_timeout_s=self._answer_timeout_s)
        there.may_block = lambda: True  # its main loop may wait for a page of ours
        async with there.watching():
            if self.resume:
                where, page_sizes = await listen_again(saved, there, uri)
            else:
                page_sizes = await fits(saved, there)
                self._tell(Troubled(message=TWICE))
                where = await listen(there, uri, lazy=not self.eager, paused=self.paused)
            peer = await self._connected(where)
            loop = asyncio.get_running_loop()
            with peer, Server(saved, page_sizes, on_moment=lambda moment: self._moment(loop, moment)) as server:
                self._server = server
                try:
                    ended = await self._served(server, peer)
                    peer.close()
                    return await self._result(ended, server, there)
                finally:
                    self._server = None

    async def _connected(self, uri: str) -> socket.socket:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                peer = await connect(SocketAddress.parse(uri))
        except ValueError as exc:
            raise RefusedError(str(exc)) from exc
        except (OSError, TimeoutError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else "it does not answer"
            raise RefusedError(f"destination: it can't be reached at {uri}: {reason}") from exc
        peer.setblocking(True)
        return peer

    async def _served(self, server: Server, peer: socket.socket) -> Ended:
        """In a thread of its own, until it ends; we tell meanwhile how far it is."""
        work = asyncio.wrap_future(_in_thread(self._work(server), peer))
        telling = asyncio.create_task(self._tell_progress(server))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            server.stop()
            await work
            raise
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            self._tell_counts(server.counts, 0)

    def _work(self, server: Server) -> Callable[[socket.socket], Ended]:
        if self.resume:
            return server.resume
        return server.send if self.eager else server.serve

    async def _tell_progress(self, server: Server) -> None:
        before, before_ns = 0, time.monotonic_ns()
        while True:
            await asyncio.sleep(PROGRESS_EVERY_S)
            now, now_ns = server.counts.sent_bytes, time.monotonic_ns()
            self._tell_counts(server.counts, (now - before) * 10**9 // max(now_ns - before_ns, 1))
            before, before_ns = now, now_ns

    def _tell_counts(self, counts: Counts, rate: int) -> None:
        self._tell(
            Served(
                side=Side.DESTINATION,
                pages=counts.pages,
                total=counts.total,
                requested=counts.requested,
                requests=counts.requests,
                sent_bytes=counts.sent_bytes,
                bytes_per_s=rate,
            )
        )

    def _moment(self, loop: asyncio.AbstractEventLoop, moment: Moment) -> None:
        """Called by the thread that serves."""
        after_us = (time.monotonic_ns() - self._began) // 1000
        self._moments[moment.name.lower()] = after_us
        if self.eager and moment is Moment.SWITCHED:
            return  # there is no package then
        event = Restored(side=Side.DESTINATION, moment=moment.value, after_us=after_us)
        loop.call_soon_threadsafe(self._tell, event)

    # -- how it ended

    async def _result(self, ended: Ended, server: Server, there: Watched) -> RestoreResult:
        if ended.end is End.DONE:
            ended = await self._completed(there)
        if ended.end is End.DONE:
            paused = f"all is in; the guest is {there.run_state} there"
            return self._ended(DONE, "the guest runs, all its pages are in" if there.running else paused, server, there)
        if not server.is_switched:
            return self._ended(STILL_IN_FILE, f"{ended.reason}{await self._why(there)}", server, there)
        code, sentence = await self._place(there)
        return self._ended(code, f"{ended.reason}: {sentence}", server, there)

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
            with there.session.listen("MIGRATION"):
                await wait_until(
                    there.session, {"postcopy-paused", "completed"}, timeout_s=min(self._answer_timeout_s, 10.0)
                )
            await there.ask()
        except QemuDiedError as exc:
            return (
                LOST,
                f"the destination is gone, and what it did since with it ({exc.message}); the file is as it was",
            )
        except QmpCommandError as exc:
            return LOST, f"the destination failed ({exc.message}); the file is as it was"
        except QmpError as exc:
            ran = "" if "loaded" in self._moments else "; as far as is known it has not begun to run: end that QEMU"
            return UNKNOWN, f"the destination does not say where the guest is ({exc.message}){ran}"
        if there.status == "completed":
            return RUNS_THERE, "yet the destination has all its pages"
        return (
            PAUSED,
            "the destination is postcopy-paused: its guest stops where it needs a page that is only in the file",
        )

    def _ended(self, code: int, message: str, server: Server, there: Watched) -> RestoreResult:
        return RestoreResult(
            exit_code=code,
            message=message,
            running=there.running if there.run_state else None,
            counts=server.counts,
            latency=server.answered,
            moments=dict(self._moments),
        )


def _in_thread(serve: Callable[[socket.socket], Ended], peer: socket.socket) -> "Future[Ended]":
    """Not one of asyncio's own, for whose end the interpreter waits."""
    future: Future[Ended] = Future()

    def work() -> None:
        try:
            future.set_result(serve(peer))
        except BaseException as exc:
            future.set_exception(exc)

    Thread(target=work, name="serve pages", daemon=True).start()
    return future


def _no_one(_: LiveEvent) -> None:
    """Nobody listens."""
