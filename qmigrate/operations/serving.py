"""What restoring and sending a saved guest have in common: its file is read, then served by a thread of its own."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import field
from threading import Thread
from typing import TYPE_CHECKING, Any, Final, TypeVar

from qmigrate import exit_codes
from qmigrate.capture.arriving import ArrivingPages
from qmigrate.capture.saved_guest import SavedGuest
from qmigrate.endpoint.over_time import OverTime
from qmigrate.endpoint.served import Answered, Counts, Ended, Moment
from qmigrate.endpoint.source import Server
from qmigrate.endpoint.transport import SocketAddress, connect
from qmigrate.errors import NoStreamError, RefusedError, StreamError
from qmigrate.events import Decided, LiveEvent, OnEvent, Side, Troubled
from qmigrate.operations.reading import Reading
from qmigrate.value import Value

if TYPE_CHECKING:
    from qmigrate.capture.migration import Migration

T = TypeVar("T")

__all__ = ["Indexed", "Restored", "Served", "Serving", "ServingResult"]

DEPENDS: Final = (
    "the guest runs there now, and needs this process until all its pages are in. It goes on. Once more ends it, and "
    "leaves the guest waiting for pages (`qmigrate restore --resume` brings them)"
)
DEPENDS_WHOLLY: Final = (
    "the guest runs now, in a QEMU that ends with this command. It goes on. Once more ends both, and what the guest "
    "did since it ran is lost"
)
CONNECT_TIMEOUT_S: Final = 10.0
PROGRESS_EVERY_S: Final = 0.25


class Indexed(LiveEvent):
    """The file has been read: RAM of ``total_bytes`` in so many blocks, device state of ``device_bytes``.

    ``kept``: it has not, as an index of it was kept.
    """

    machine_type: str | None
    blocks: int
    total_bytes: int
    device_bytes: int
    took_us: int
    kept: bool = False


class Restored(LiveEvent):
    """A step on the way: its name, in words, and how long after the beginning it came."""

    moment: str
    after_us: int


class Served(LiveEvent):
    """How far it is: target pages, of them those that were asked for; bytes sent; bytes a second lately."""

    pages: int
    total: int
    requested: int
    requests: int
    sent_bytes: int
    bytes_per_s: int


class ServingResult(Value):
    """The end.  ``exit_code`` as design.md has it; 3 is: the guest is in the file, as it was.

    ``moments`` in microseconds after the beginning; ``latency`` of answers, in this process; ``over_time`` counts from
    the same beginning.  ``recoveries``: how often it was tried to bring it back.
    """

    exit_code: int
    message: str
    running: bool | None = None
    counts: Counts = field(default_factory=Counts)
    latency: Answered = field(default_factory=Answered)
    moments: Mapping[str, int] = field(default_factory=dict)
    recoveries: int = 0
    over_time: OverTime | None = None

    @property
    def ok(self) -> bool:
        return self.exit_code == exit_codes.DONE

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
                "median_us": self.latency.median_us,
                "mean_us": round(self.latency.total_ns / answered / 1000, 1) if answered else None,
                "longest_us": round(self.latency.longest_ns / 1000, 1) if answered else None,
            },
            "recoveries": self.recoveries,
            "over_time": None if self.over_time is None else self.over_time.plain(),
        }


class Serving:
    """One saved guest, served once.  The file is read in ``opened()``, which may go on while a QEMU is started.

    ``keep_index``: one that was kept will do, and a new one is kept, in ``index_folder``, which is by default in the
    user's cache.  ``reading``: the file, which is being read already.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        channels: tuple[str, ...] = (),
        keep_index: bool = True,
        index_folder: str | os.PathLike[str] | None = None,
        reading: Reading | None = None,
        on_event: OnEvent | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self._channels = channels
        self._keep_index = keep_index
        self._index_folder = index_folder
        self._reading = reading
        self._tell: OnEvent = on_event or _no_one
        self._began = time.monotonic_ns()
        self._moments: dict[str, int] = {}
        self._server: Server | None = None
        self._interrupted = 0
        self.depends = DEPENDS

    # -- being told to stop

    @property
    def is_switched(self) -> bool:
        """May the guest run there already?"""
        return self._server is not None and self._server.is_switched

    @property
    def is_off(self) -> bool:
        """Was it told to stop, and stops?"""
        return self._interrupted > (1 if self.is_switched else 0)

    def hang_up(self) -> bool:
        """The terminal went away.  Before the guest may run that is being told to stop; after it that changes nothing,
        however often it comes: what depends on us is not left because of it.  False as of ``interrupt()``.
        """
        return self.is_switched or self.interrupt()

    def interrupt(self) -> bool:
        """Told to stop.  False where nothing is served: then whoever runs it is to be cancelled."""
        if self._server is None:
            return False
        self._interrupted += 1
        if not self.is_switched or self._interrupted > 1:
            self._server.stop()
        else:
            self._tell(Decided(side=Side.DESTINATION, decision="go on", reason=self.depends))
        return True

    # -- the file

    @asynccontextmanager
    async def opened(self) -> "AsyncGenerator[asyncio.Task[SavedGuest]]":
        """The file's index and device state are on their way; what has come is closed at the end of the block.

        Raises ``OSError`` where the file can't be opened, the task ``RefusedError``, also for a damaged stream.
        """
        with closing(self._reading or self._begun()) as reading:
            began = time.monotonic_ns()
            task = asyncio.create_task(self._read_by(reading, began))
            try:
                yield task
            finally:
                task.cancel()
                for saved in await asyncio.gather(task, return_exceptions=True):
                    if isinstance(saved, SavedGuest):
                        saved.close()

    def _begun(self) -> "Reading | _Piped":
        if Reading.takes(self.path):
            return Reading(self.path, channels=self._channels, keep=self._keep_index, folder=self._index_folder)
        from qmigrate.capture.migration import Migration  # to be read here, as it can be only once

        return _Piped(Migration(self.path, channels=self._channels), self.read)

    async def _read_by(self, reading: "Reading | _Piped", began_ns: int) -> SavedGuest:
        saved = await reading.saved()
        if isinstance(reading, _Piped):
            return saved
        self._tell_read(saved, began_ns, kept=reading.is_kept)
        if reading.not_kept is not None:
            self._tell(_not_kept(reading.not_kept))
        return saved

    def read(self, migration: "Migration") -> SavedGuest:
        """The same, made here.  Blocks.  Raises ``RefusedError``, also for a damaged stream."""
        from qmigrate.capture.saved import read_saved

        began = time.monotonic_ns()
        try:
            saved = read_saved(migration)
        except (StreamError, NoStreamError, RefusedError) as exc:
            raise RefusedError(f"{self.path}: {exc}") from exc
        self._tell_read(saved, began)
        return saved

    def _tell_read(self, saved: SavedGuest, began_ns: int, *, kept: bool = False) -> None:
        self._tell(
            Indexed(
                machine_type=saved.machine_type,
                blocks=len(saved.blocks),
                total_bytes=sum(block.used_length for block in saved.blocks),
                device_bytes=len(saved.devices),
                took_us=(time.monotonic_ns() - began_ns) // 1000,
                kept=kept,
            )
        )
        if saved.absent:
            self._tell(_absent(saved.absent))

    # -- the connection

    @contextmanager
    def _serving(self, saved: SavedGuest, page_sizes: Mapping[str, int]) -> Generator[Server]:
        """A server, which can be told to stop as long as the block lasts."""
        loop = asyncio.get_running_loop()
        with Server(saved, page_sizes, on_moment=lambda moment: self._moment(loop, moment, saved)) as server:
            server.over_time.began_ns = self._began
            self._server = server
            try:
                yield server
            finally:
                self._server = None

    def _result_of(
        self, server: Server, code: int, message: str, *, running: bool | None, recoveries: int = 0
    ) -> ServingResult:
        return ServingResult(
            exit_code=code,
            message=message,
            running=running,
            counts=server.counts,
            latency=server.answered,
            moments=dict(self._moments),
            recoveries=recoveries,
            over_time=server.over_time,
        )

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

    async def _served(self, server: Server, peer: socket.socket, serve: Callable[[socket.socket], Ended]) -> Ended:
        """In a thread of its own, until it ends; we tell meanwhile how far it is."""
        work = asyncio.wrap_future(_in_thread(lambda: serve(peer)))
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

    def _moment(self, loop: asyncio.AbstractEventLoop, moment: Moment, saved: SavedGuest) -> None:
        """Called by the thread that serves."""
        after_us = (time.monotonic_ns() - self._began) // 1000
        self._moments[moment.name.lower()] = after_us
        events: list[LiveEvent] = [Restored(side=Side.DESTINATION, moment=moment.value, after_us=after_us)]
        if moment is Moment.INDEXED and isinstance(saved.index, ArrivingPages):
            events += [_absent(saved.index.absent_pages)] * bool(saved.index.absent_pages)
            events += [] if saved.index.not_kept is None else [_not_kept(saved.index.not_kept)]
        with suppress(RuntimeError):  # the loop has ended: nobody is told any more
            for event in events:
                loop.call_soon_threadsafe(self._tell, event)


class _Piped:
    """What can be read only once, read in a thread of its own: who is told to stop does not wait for its next byte."""

    def __init__(self, migration: "Migration", read: Callable[["Migration"], SavedGuest]) -> None:
        self._migration = migration
        self._read = read
        self._work: Future[SavedGuest] | None = None

    async def saved(self) -> SavedGuest:
        """Raises ``RefusedError``."""
        self._work = _in_thread(lambda: self._read(self._migration))
        return await asyncio.wrap_future(self._work)

    def close(self) -> None:
        """Not while it is read: then it is closed by who reads, in the end."""
        if self._work is None or self._work.done():
            self._migration.close()
        else:
            self._work.add_done_callback(self._close_all)

    def _close_all(self, work: "Future[SavedGuest]") -> None:
        if work.exception() is None:
            work.result().close()
        self._migration.close()


def _in_thread(do: Callable[[], T]) -> "Future[T]":
    """Not one of asyncio's own, for whose end the interpreter waits.  It can't be cancelled."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            future.set_result(do())
        except BaseException as exc:
            future.set_exception(exc)

    Thread(target=work, name="read or serve pages", daemon=True).start()
    return future


def _absent(count: int) -> LiveEvent:
    return Troubled(message=f"{count} pages that the guest did not use were never saved: zero here")


def _not_kept(why: str) -> LiveEvent:
    return Decided(decision="keep no index", reason=why)


def _no_one(_: LiveEvent) -> None:
    """Nobody listens."""
