"""``receive``: a stand-in destination, which a real QEMU's migration comes into.

    result = await Receiver("unix:/run/in.sock", raw="ram/").run()

Precopy or postcopy, as the source likes.  Where the guest is at the end is said as for every live command: after
precopy failed it is still the source's; once postcopy runs here, it is ours.
"""

import asyncio
import errno
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qmigrate.analysis.reception import ReceiveResult, Reception, reception
from qmigrate.endpoint.destination import Destination, ProcessDiedError, Touch, Workload
from qmigrate.endpoint.incoming import Arrived, ChannelKind, Incoming
from qmigrate.endpoint.link import Said
from qmigrate.errors import QmigrateError, RefusedError
from qmigrate.events import (
    BlocksCame,
    ChannelCame,
    Latency,
    Listening,
    LiveEvent,
    NotSaved,
    OnEvent,
    Paused,
    Received,
    Side,
    StatusChanged,
    Troubled,
)
from qmigrate.format.walk import Limits
from qmigrate.operations.control import control_socket, default_path
from qmigrate.protocol.phases import Phase

if TYPE_CHECKING:
    from qmigrate.capture.recorder import Recorder
    from qmigrate.endpoint.recorded import Recorded

__all__ = [
    "BlocksCame",
    "Latency",
    "Listening",
    "NotSaved",
    "Paused",
    "ReceiveResult",
    "Received",
    "Receiver",
]


STILL_ON_SOURCE: Final = 3
LOST: Final = 6
INTERRUPTED: Final = 130
MULTIFD_PATIENCE_S: Final = 5.0
_COUNTED: Final = ("received_bytes", "normal", "zero", "duplicates", "discarded")
_POSTCOPY: Final = frozenset(phase.value for phase in (Phase.LISTENING, Phase.RUNNING, Phase.PAUSED, Phase.RECOVERING))


class Receiver:
    """One migration that comes in at ``uri``.

    ``raw``: a folder that RAM is written into, a file a block.  ``save``: a file for all that came, as one stream that
    a stock QEMU loads.  ``control``: where the control socket is, None for a default, of which an event tells.
    ``recorder``: all connections are recorded there; it stays open.  ``workloads``: what touches memory once the guest
    would run; ``traces``: recorded touches, at most ``trace_rate`` a second.  ``multifd``: so many of these channels
    come, wait for them; ``preempt``: a connection that has said nothing when postcopy begins is that of the requested
    pages.  ``limits``: how much of a stream is kept in memory.  Events go to ``on_event``.
    """

    def __init__(
        self,
        uri: str,
        *,
        raw: str | os.PathLike[str] | None = None,
        save: str | os.PathLike[str] | None = None,
        control: str | os.PathLike[str] | None = None,
        recorder: "Recorder | None" = None,
        workloads: Sequence[Workload] = (),
        traces: Sequence[Sequence[Touch]] = (),
        trace_rate: float | None = None,
        touch_in_package: bool = False,
        multifd: int = 0,
        preempt: bool = False,
        limits: Limits | None = None,
        on_event: OnEvent | None = None,
    ) -> None:
        self.uri = uri
        self.raw = None if raw is None else Path(raw)
        self.save = None if save is None else Path(save)
        self.control = default_path() if control is None else Path(control)
        writes = any(each.writes for each in workloads) or any(touch.is_write for each in traces for touch in each)
        if self.save is not None and writes:
            raise RefusedError("what is saved must be what came: with --save nothing may write to memory")
        self._destination = Destination(
            workloads=workloads,
            traces=traces,
            trace_rate=trace_rate,
            touch_in_package=touch_in_package,
            keep=self.save is not None,
            limits=limits,
        )
        self.events: list[LiveEvent] = []
        """All that was told; of a histogram that grows, the last."""
        self._on_event = on_event
        self._recorder = recorder
        self._recorded: Recorded | None = None
        self._numbers: dict[str, dict[str, int]] = {}  # by the process that counts
        self._phases: list[tuple[str, int]] = []
        self._connected = False
        self._paused = False
        self._accepting: asyncio.Task[None] | None = None
        self._incoming: Incoming | None = None
        self._multifd: list[int] = []  # channels that the listener has not been given yet
        self._multifd_count = multifd
        self._multifd_asked = self._multifd_given = False
        self._preempt = preempt
        self._failure: str | None = None
        self._received: Said | None = None
        self._writing_stops = threading.Event()
        self._all_is_here = False

    @property
    def place_of_guest(self) -> str:
        """Whose the guest is if everything ends now: ``none`` before a source came, ``source``, ``here``, ``lost``."""
        if self._all_is_here:
            return "here"
        if self._is_postcopy:
            return "lost"
        return "source" if self._connected else "none"

    def reception(self, result: ReceiveResult) -> Reception:
        """All that was seen of it, for a report."""
        return reception(self.events, result)

    async def run(self) -> ReceiveResult:
        """Until it is over.  Raises ``RefusedError`` and ``OSError`` where nothing could begin.

        Where the task is cancelled once it listens, that is an end, too.
        """
        try:
            return await self._run()
        except asyncio.CancelledError:
            if not any(isinstance(event, Listening) for event in self.events):
                raise
            return self.interrupted()

    async def _run(self) -> ReceiveResult:
        async with AsyncExitStack() as stack:
            if self._recorder is not None:
                from qmigrate.endpoint.recorded import Recorded

                self._recorded = Recorded(self._recorder)
                stack.push_async_callback(self._recorded.close)
            if self.raw is not None:
                self.raw.mkdir(parents=True, exist_ok=True)
            if self.save is not None:
                _check_can_be_made(self.save)
            await stack.enter_async_context(control_socket(self.control, self._asked))
            await stack.enter_async_context(self._destination)
            stack.callback(self._drop_multifd)
            stack.callback(self._writing_stops.set)
            stack.push_async_callback(self._stop_accepting)
            await self._listen(self.uri)
            if self._recorder is not None:
                self._recorder.begin()
            try:
                return await self._follow()
            except ProcessDiedError as exc:
                self._failure = str(exc)
                self._trouble(self._failure)
                return self._result()

    # -- connections

    async def _listen(self, uri: str) -> str:
        """Take connections there from now on, and nowhere else; the URI with the port that was taken."""
        await self._stop_accepting()
        listens: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._accepting = asyncio.ensure_future(self._accept(uri, listens))
        waiting: set[asyncio.Future[Any]] = {self._accepting, listens}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not listens.done():
            await self._accepting
        return await listens

    async def _give_multifd(self) -> None:
        """RAM begins: by now a source has made all its channels, so those that are not seen yet are about to be.

        Or they are on their way through a slow network, which no byte tells: unless we know how many there are.
        """
        if self._incoming is not None:
            await self._incoming.settled()
        self._multifd_asked = True
        self._give_multifd_if_all()
        if not self._multifd_given:
            asyncio.get_running_loop().call_later(MULTIFD_PATIENCE_S, self._miss_multifd)

    def _give_multifd_if_all(self) -> None:
        if self._multifd_asked and not self._multifd_given and len(self._multifd) >= self._multifd_count:
            self._multifd_given = True
            self._destination.connect_multifd(self._multifd)
            self._drop_multifd()

    def _miss_multifd(self) -> None:
        if not self._multifd_given:
            self._trouble(f"{len(self._multifd)} of {self._multifd_count} multifd channels have come: waiting for more")

    def _drop_multifd(self) -> None:
        for descriptor in self._multifd:
            os.close(descriptor)
        self._multifd.clear()

    async def _stop_accepting(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)

    async def _accept(self, uri: str, listens: "asyncio.Future[str]") -> None:
        async with Incoming(uri) as incoming:
            self._incoming = incoming
            self._tell(Listening(side=Side.DESTINATION, uri=incoming.uri, control=str(self.control)))
            listens.set_result(incoming.uri)
            async for arrived in incoming:
                try:
                    self._arrived(arrived, incoming.uri)
                finally:
                    os.close(arrived.descriptor)

    def _arrived(self, arrived: Arrived, uri: str) -> None:
        if self._recorded is None:
            self._take(arrived)
            return
        recorded = self._recorded.through(arrived, uri)
        try:
            self._take(recorded)
        finally:
            os.close(recorded.descriptor)

    def _take(self, arrived: Arrived) -> None:
        """The first connection is the main channel, whatever it says; of others their first byte tells."""
        match arrived.kind:
            case ChannelKind.RESUMED if self._paused:
                self._paused = False
                self._came(ChannelKind.RESUMED)
                self._destination.connect(arrived.descriptor, way_back=arrived.way_back)
            case ChannelKind.PAGES if self._connected:
                self._came(ChannelKind.PAGES)
                self._destination.connect_preempt(arrived.descriptor)
            case ChannelKind.MULTIFD if self._multifd_given:
                self._destination.too_late()
            case ChannelKind.MULTIFD:
                self._came(ChannelKind.MULTIFD)
                self._multifd.append(os.dup(arrived.descriptor))
                self._give_multifd_if_all()
            case _ if self._connected:
                self._trouble(f"another connection came ({arrived.kind.value}): it is closed")
            case _:
                self._connected = True
                self._phase_began(Phase.PRECOPY.value, self._came(ChannelKind.MAIN))
                self._destination.connect(arrived.descriptor, way_back=arrived.way_back)

    def _came(self, kind: ChannelKind) -> int:
        """When."""
        event = ChannelCame(side=Side.DESTINATION, kind=kind.value)
        self._tell(event)
        return event.time_us

    # -- the control socket

    async def _asked(self, what: str, argument: str) -> str:
        match what:
            case "recover":
                if not self._paused:
                    raise RefusedError(f"nothing to recover: it is {self._phases[-1][0] if self._phases else 'idle'}")
                return await self._listen(argument)
            case "save":
                if self._received is None:
                    raise RefusedError("nothing to save: only what could not be saved before is saved elsewhere")
                self.save = Path(argument)
                await self._keep(self._received)
                return str(self.save)
        raise RefusedError(f"{what!r} is not known here: expected recover or save")

    # -- what the processes tell

    async def _follow(self) -> ReceiveResult:
        came: set[str] = set()
        async for said in self._destination.said():
            match said.kind:
                case "channels":
                    await self._give_multifd()
                case "loaded":
                    await self._loaded(said)
                case "shut":
                    self._measured("requests", said.values["waited"])
                    self._destination.stop_touching()
                case _:
                    self._heard(said)
            came.add(said.kind)
            if "touched" in came and ("paged" in came or not self._is_postcopy):  # the last of each process
                self._tell_numbers()
                return self._result()
        raise QmigrateError("its processes ended early")  # said() does not end by itself

    def _heard(self, said: Said) -> None:
        values, at = said.values, said.values.get("time_us", 0)
        match said.kind:
            case "phase":
                self._phase_began(values["phase"], at)
            case "blocks":
                blocks = [(str(name), int(length), int(size)) for name, length, size in values["blocks"]]
                self._tell(BlocksCame(side=Side.DESTINATION, time_us=at, blocks=blocks))
            case "progress":
                self._count(values)
                self._tell_numbers()
                if "waited" in values:  # the others are asked: who serves faults has no time to tell by itself
                    self._measured("requests", values["waited"])
                    self._destination.ask()
            case "failed":
                self._count(values)
                self._tell_numbers()
                self._failure = values["message"]
                self._trouble(values["message"])
            case "paused":
                self._count(values)
                self._tell_numbers()
                self._destination.ask()
                self._paused = True
                self._tell(
                    Paused(side=Side.DESTINATION, time_us=at, reason=values["reason"], control=str(self.control))
                )
            case "trouble":
                self._trouble(values["message"])
            case "paged" | "paging":
                counts = values["counts"]
                others = {name: values[name] for name in ("faults", "requested", "received_bytes")}
                self._numbers["pager"] = {**counts, **others, "preempt": counts["normal"] + counts["zero"]}
                self._measured("preempt", values["waited"])
            case "touching" | "touched":
                self._touched(values)
                if self._paused:  # nothing else would tell
                    self._tell_numbers()

    def _phase_began(self, phase: str, at: int | None = None) -> None:
        at = time.time_ns() // 1000 if at is None else at
        self._phases.append((phase, at))
        self._tell(StatusChanged(side=Side.DESTINATION, time_us=at, status=phase))
        if phase == Phase.RECOVERING.value:  # what comes from now on did not come in the pause
            self._tell_numbers()
        if phase == Phase.LISTENING.value and self._preempt and self._incoming is not None:
            self._incoming.take_silent()

    def _count(self, values: Mapping[str, Any]) -> None:
        self._numbers["listener"] = _counts(values)

    def _totals(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for counted in self._numbers.values():
            for name, count in counted.items():
                totals[name] = totals.get(name, 0) + count
        return totals

    def _tell_numbers(self) -> None:
        self._tell(Received(side=Side.DESTINATION, **self._totals()))

    def _tell(self, event: LiveEvent) -> None:
        if isinstance(event, Latency):
            self.events = [each for each in self.events if not _is_older(each, event)]
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)

    def _trouble(self, message: str) -> None:
        self._tell(Troubled(side=Side.DESTINATION, message=message))

    async def _loaded(self, said: Said) -> None:
        """All is here: keep what was asked for, then say SHUT."""
        self._count(said.values)
        self._tell_numbers()
        if missing := said.values["missing"]:
            reason = f"the source has ended, and {missing} pages have not come"
            self._trouble(reason)
            if self._is_postcopy:  # RAM can be left out of a precopy alone
                self._failure = reason
        try:
            await self._keep(said)
        except OSError as exc:
            self._not_kept(said, f"{os.fsdecode(exc.filename or '')}: {exc.strerror or exc}")

    async def _keep(self, said: Said) -> None:
        """Write what was asked for; after that the source is let go.  Raises ``OSError``, and holds it."""
        if self.raw is not None or self.save is not None:
            await self._write(said)
        self._let_go(said, 0 if self._failure is None else 1)

    async def _write(self, said: Said) -> None:
        # Few ask for files, and a source waits for SHUT meanwhile: loading this takes a tenth of a second.
        from qmigrate.operations.received import Parts, write_raw, write_stream

        values = said.values
        blocks = [tuple(block) for block in values["ram"].get("blocks", [])]
        memory = said.descriptors[2 : 2 + len(blocks)]
        stops = self._writing_stops
        if self.raw is not None:
            await asyncio.to_thread(write_raw, self.raw, blocks, memory, stops)
        if self.save is not None and blocks:
            parts = Parts(
                blocks=blocks,
                memory=memory,
                target_page=values["ram"]["target_page"],
                kept=dict(zip(values["kept"], said.descriptors[2 + len(blocks) :], strict=True)),
                section_id=values["section"]["id"],
                footers=values["section"]["footers"],
            )
            await asyncio.to_thread(write_stream, self.save, parts, stops)

    def _let_go(self, said: Said, value: int) -> None:
        for descriptor in said.descriptors:
            os.close(descriptor)
        self._received = None
        self._all_is_here = value == 0
        self._destination.finish(value)

    def _not_kept(self, said: Said, reason: str) -> None:
        """By precopy the guest goes on at the source, which is told so; by postcopy this memory is the only copy."""
        self._trouble(reason)
        if said.values["section"].get("postcopy") and self.save is not None:
            self._received = said
            self._tell(NotSaved(side=Side.DESTINATION, reason=reason, control=str(self.control)))
            return
        self._failure = reason
        self._let_go(said, 1)

    def _touched(self, values: Mapping[str, Any]) -> None:
        self._numbers["guest"] = {"touches": values["touches"], "writes": values["writes"]}
        self._measured("touchers", values["latency"])
        self._measured("package", values["in_package"])

    def _measured(self, where: str, measured: Mapping[str, Any]) -> None:
        """A histogram as it came from its process; nothing where nothing was counted."""
        if count := sum(measured["counts"]):
            self._tell(
                Latency(
                    side=Side.DESTINATION,
                    where=where,
                    counts=measured["counts"],
                    mean_us=round(measured["total_ns"] / count / 1000, 1),
                    longest_us=round(measured["longest_ns"] / 1000, 1),
                )
            )

    def _result(self) -> ReceiveResult:
        if self._failure is None:
            return self._ended(0, "the migration was received", "here")
        if self._is_postcopy:
            return self._ended(LOST, f"it failed in postcopy, the guest is lost: {self._failure}", "lost")
        return self._ended(STILL_ON_SOURCE, f"it failed, the guest is the source's: {self._failure}", "source")

    def interrupted(self) -> ReceiveResult:
        """The end where it was cancelled: where the guest is, now that its connection is closed."""
        match self.place_of_guest:
            case "here":
                return self._ended(0, "interrupted when the migration had been received", "here")
            case "source":
                return self._ended(STILL_ON_SOURCE, "interrupted: the guest is the source's", "source")
            case "lost":
                return self._ended(LOST, "interrupted in postcopy: the guest is lost", "lost")
        return self._ended(INTERRUPTED, "interrupted before anything began", "none")

    @property
    def _is_postcopy(self) -> bool:
        return any(phase in _POSTCOPY for phase, _ in self._phases)

    def _ended(self, code: int, message: str, place: str) -> ReceiveResult:
        return ReceiveResult(
            exit_code=code,
            message=message,
            place=place,
            is_postcopy=self._is_postcopy,
            numbers=self._totals(),
            phases=tuple(self._phases),
        )


def _check_can_be_made(path: Path) -> None:
    """While nothing has begun: a file that can't be made there.  Raises ``OSError``; leaves nothing behind."""
    trial = path.parent / f".{path.name[:100]}.{os.getpid()}"
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        trial.unlink()
    except OSError as exc:
        exc.filename = str(path)
        raise


def _is_older(told: LiveEvent, event: Latency) -> bool:
    return isinstance(told, Latency) and told.where == event.where


def _counts(values: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(values[name]) for name in _COUNTED}
