"""``receive``: a stand-in destination, which a real QEMU's migration comes into.

    result = await Receiver("unix:/run/in.sock", raw="ram/").run()

Precopy or postcopy, as the source likes.  Where the guest is at the end is said as for every live command: after
precopy failed it is still the source's; once postcopy runs here, it is ours.
"""

import asyncio
import errno
import os
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from qmigrate import exit_codes
from qmigrate.analysis.reception import ReceiveResult, Reception, reception
from qmigrate.endpoint.destination import Destination, ProcessDiedError, Touch, Workload
from qmigrate.endpoint.link import Said
from qmigrate.errors import QmigrateError, RefusedError
from qmigrate.events import BlocksCame, Latency, Listening, LiveEvent, NotSaved, OnEvent, Paused, Received, Side
from qmigrate.format.walk import Limits
from qmigrate.operations.control import control_socket, default_path
from qmigrate.operations.receive_channels import ReceiveChannels
from qmigrate.operations.receive_events import ReceiveEvents
from qmigrate.protocol.phases import Phase

if TYPE_CHECKING:
    from qmigrate.capture.recorder import Recorder

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
        self._told = ReceiveEvents(on_event)
        self._channels = ReceiveChannels(self._destination, self._told, control=self.control, multifd=multifd)
        self._recorder = recorder
        self._preempt = preempt
        self._failure: str | None = None
        self._received: Said | None = None
        self._writing_stops = threading.Event()
        self._all_is_here = False

    @property
    def events(self) -> Sequence[LiveEvent]:
        """All that was told; of a histogram that grows, the last."""
        return self._told.events

    @property
    def is_paused(self) -> bool:
        """Does it wait for another main channel, as the one before broke?"""
        return self._channels.is_paused

    @property
    def place_of_guest(self) -> str:
        """Whose the guest is if everything ends now: ``none`` before a source came, ``source``, ``here``, ``lost``."""
        if self._all_is_here:
            return "here"
        if self._told.is_postcopy:
            return "lost"
        return "source" if self._channels.is_connected else "none"

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

                recorded = self._channels.recorded = Recorded(self._recorder)
                stack.push_async_callback(recorded.close)
            if self.raw is not None:
                self.raw.mkdir(parents=True, exist_ok=True)
            if self.save is not None:
                _check_can_be_made(self.save)
            await stack.enter_async_context(control_socket(self.control, self._asked))
            await stack.enter_async_context(self._destination)
            stack.callback(self._writing_stops.set)
            stack.push_async_callback(self._channels.stop)
            await self._channels.listen(self.uri)
            if self._recorder is not None:
                self._recorder.begin()
            try:
                return await self._follow()
            except ProcessDiedError as exc:
                self._failure = str(exc)
                self._told.trouble(self._failure)
                return self._result()

    # -- the control socket

    async def _asked(self, what: str, argument: str) -> str:
        match what:
            case "recover":
                if not self._channels.is_paused:
                    phases = self._told.phases
                    raise RefusedError(f"nothing to recover: it is {phases[-1][0] if phases else 'idle'}")
                return await self._channels.listen(argument)
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
                    await self._channels.give_multifd()
                case "loaded":
                    await self._loaded(said)
                case "shut":
                    self._told.measured("requests", said.values["waited"])
                    self._destination.stop_touching()
                case _:
                    self._heard(said)
            came.add(said.kind)
            if "touched" in came and ("paged" in came or not self._told.is_postcopy):  # the last of each process
                self._told.tell_numbers()
                return self._result()
        raise QmigrateError("its processes ended early")  # said() does not end by itself

    def _heard(self, said: Said) -> None:
        values, at = said.values, said.values.get("time_us", 0)
        match said.kind:
            case "phase":
                self._told.phase_began(values["phase"], at)
                if self._preempt and values["phase"] == Phase.LISTENING.value:
                    self._channels.take_silent()
            case "blocks":
                self._told.blocks_came(values)
            case "progress":
                self._told.counted(values)
                if "waited" in values:  # the others are asked: who serves faults has no time to tell by itself
                    self._told.measured("requests", values["waited"])
                    self._destination.ask()
            case "failed":
                self._told.counted(values)
                self._failure = values["message"]
                self._told.trouble(values["message"])
            case "paused":
                self._told.counted(values)
                self._destination.ask()
                self._channels.is_paused = True
                self._told.tell(
                    Paused(side=Side.DESTINATION, time_us=at, reason=values["reason"], control=str(self.control))
                )
            case "trouble":
                self._told.trouble(values["message"])
            case "paged" | "paging":
                self._told.paged(values)
            case "touching" | "touched":
                self._told.touched(values)
                if self._channels.is_paused:  # nothing else would tell
                    self._told.tell_numbers()

    async def _loaded(self, said: Said) -> None:
        """All is here: keep what was asked for, then say SHUT."""
        self._told.counted(said.values)
        if missing := said.values["missing"]:
            reason = f"the source has ended, and {missing} pages have not come"
            self._told.trouble(reason)
            if self._told.is_postcopy:  # RAM can be left out of a precopy alone
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
        self._told.trouble(reason)
        if said.values["section"].get("postcopy") and self.save is not None:
            self._received = said
            self._told.tell(NotSaved(side=Side.DESTINATION, reason=reason, control=str(self.control)))
            return
        self._failure = reason
        self._let_go(said, 1)

    def _result(self) -> ReceiveResult:
        if self._failure is None:
            return self._ended(exit_codes.DONE, "the migration was received", "here")
        if self._told.is_postcopy:
            return self._ended(exit_codes.LOST, f"it failed in postcopy, the guest is lost: {self._failure}", "lost")
        return self._ended(exit_codes.AT_SOURCE, f"it failed, the guest is the source's: {self._failure}", "source")

    def interrupted(self) -> ReceiveResult:
        """The end where it was cancelled: where the guest is, now that its connection is closed."""
        match self.place_of_guest:
            case "here":
                return self._ended(exit_codes.DONE, "interrupted when the migration had been received", "here")
            case "source":
                return self._ended(exit_codes.AT_SOURCE, "interrupted: the guest is the source's", "source")
            case "lost":
                return self._ended(exit_codes.LOST, "interrupted in postcopy: the guest is lost", "lost")
        return self._ended(exit_codes.INTERRUPTED, "interrupted before anything began", "none")

    def _ended(self, code: int, message: str, place: str) -> ReceiveResult:
        return ReceiveResult(
            exit_code=code,
            message=message,
            place=place,
            is_postcopy=self._told.is_postcopy,
            numbers=self._told.totals(),
            phases=tuple(self._told.phases),
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
