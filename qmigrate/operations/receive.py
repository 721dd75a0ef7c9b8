"""``receive``: a stand-in destination, which a real QEMU's migration comes into.

    result = await Receiver("unix:/run/in.sock", raw="ram/").run()

Precopy or postcopy, as the source likes.  Where the guest is at the end is said as for every live command: after
precopy failed it is still the source's; once postcopy runs here, it is ours.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qmigrate.endpoint.destination import Destination, ProcessDiedError, Workload
from qmigrate.endpoint.incoming import Arrived, ChannelKind, Incoming
from qmigrate.endpoint.link import Said
from qmigrate.errors import QmigrateError, RefusedError
from qmigrate.events import LiveEvent, OnEvent, Side, StatusChanged, Troubled
from qmigrate.operations.control import control_socket, default_path
from qmigrate.protocol.phases import Phase

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


@dataclass(frozen=True, kw_only=True)
class Listening(LiveEvent):
    """A source may come now; ``uri`` has the port that was taken, ``control`` is the control socket's path."""

    uri: str
    control: str


@dataclass(frozen=True, kw_only=True)
class Paused(LiveEvent):
    """The connection broke in postcopy.  The guest's memory is kept; who asks at ``control`` brings it back."""

    reason: str
    control: str


@dataclass(frozen=True, kw_only=True)
class NotSaved(LiveEvent):
    """All has come by postcopy, and could not be saved: this memory is the only copy.  Ask at ``control``."""

    reason: str
    control: str


@dataclass(frozen=True, kw_only=True)
class BlocksCame(LiveEvent):
    """The source's RAM: each block's name, length and page size here, in bytes."""

    blocks: Sequence[tuple[str, int, int]]


@dataclass(frozen=True, kw_only=True)
class Received(LiveEvent):
    """How far it has come: target pages by kind; host pages that came twice, and that were discarded."""

    received_bytes: int = 0
    normal: int = 0
    zero: int = 0
    duplicates: int = 0
    discarded: int = 0


@dataclass(frozen=True, kw_only=True)
class Latency(LiveEvent):
    """How long pages took: ``counts[i]`` from 2^i up to 2^(i+1) µs, as QEMU's postcopy-latency-dist.

    ``where``: ``touchers``, ``package``: from the touch of a missing page until it was read; ``requests``,
    ``preempt``: from REQ_PAGES until the page was in place, by the channel that it came on.
    """

    where: str
    counts: Sequence[int]
    mean_us: float
    longest_us: float


@dataclass(frozen=True, kw_only=True)
class ReceiveResult:
    """The end.  ``exit_code`` as design.md has it: 0 as asked, 3 the guest is the source's, 6 lost."""

    exit_code: int
    message: str
    is_postcopy: bool = False
    numbers: Mapping[str, int] = field(default_factory=dict)
    phases: Sequence[tuple[str, int]] = ()
    """Each phase with the time when it began, in microseconds since 1970."""

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    def plain(self) -> dict[str, Any]:
        """As JSON has it, the last of the events."""
        return {
            "event": "finished",
            "exit_code": self.exit_code,
            "message": self.message,
            "postcopy": self.is_postcopy,
            "numbers": dict(self.numbers),
            "phases": [{"phase": phase, "time_us": at} for phase, at in self.phases],
        }


STILL_ON_SOURCE: Final = 3
LOST: Final = 6
_COUNTED: Final = ("received_bytes", "normal", "zero", "duplicates", "discarded")
_POSTCOPY: Final = frozenset(phase.value for phase in (Phase.LISTENING, Phase.RUNNING, Phase.PAUSED, Phase.RECOVERING))


class Receiver:
    """One migration that comes in at ``uri``.

    ``raw``: a folder that RAM is written into, a file a block.  ``save``: a file for all that came, as one stream that
    a stock QEMU loads.  ``control``: where the control socket is, None for a default, of which an event tells.
    ``workloads``: what touches memory once the guest would run.  Events go to ``on_event``.
    """

    def __init__(
        self,
        uri: str,
        *,
        raw: str | os.PathLike[str] | None = None,
        save: str | os.PathLike[str] | None = None,
        control: str | os.PathLike[str] | None = None,
        workloads: Sequence[Workload] = (),
        touch_in_package: bool = False,
        on_event: OnEvent | None = None,
    ) -> None:
        self.uri = uri
        self.raw = None if raw is None else Path(raw)
        self.save = None if save is None else Path(save)
        self.control = default_path() if control is None else Path(control)
        if self.save is not None and any(workload.writes for workload in workloads):
            raise RefusedError("what is saved must be what came: with --save nothing may write to memory")
        self._destination = Destination(
            workloads=workloads, touch_in_package=touch_in_package, keep=self.save is not None
        )
        self._tell: OnEvent = on_event or _no_one
        self._numbers: dict[str, int] = {}
        self._phases: list[tuple[str, int]] = []
        self._connected = False
        self._paused = False
        self._accepting: asyncio.Task[None] | None = None
        self._incoming: Incoming | None = None
        self._multifd: list[int] = []  # channels that the listener has not been given yet
        self._failure: str | None = None
        self._received: Said | None = None

    @property
    def place_of_guest(self) -> str:
        """Whose the guest is if everything ends now: ``none`` before a source came, ``source``, ``lost``."""
        if any(phase in _POSTCOPY for phase, _ in self._phases):
            return "lost"
        return "source" if self._connected else "none"

    async def run(self) -> ReceiveResult:
        """Until it is over.  Raises ``RefusedError`` and ``OSError`` where nothing could begin."""
        async with AsyncExitStack() as stack:
            if self.raw is not None:
                self.raw.mkdir(parents=True, exist_ok=True)
            await stack.enter_async_context(control_socket(self.control, self._asked))
            await stack.enter_async_context(self._destination)
            stack.callback(self._drop_multifd)
            stack.push_async_callback(self._stop_accepting)
            uri = await self._listen(self.uri)
            self._tell(Listening(side=Side.DESTINATION, uri=uri, control=str(self.control)))
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
        """RAM begins: by now a source has made all its channels, so those that are not seen yet are about to be."""
        if self._incoming is not None:
            await self._incoming.settled()
        self._destination.connect_multifd(self._multifd)
        self._drop_multifd()

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
            listens.set_result(incoming.uri)
            async for arrived in incoming:
                try:
                    self._arrived(arrived)
                finally:
                    os.close(arrived.descriptor)

    def _arrived(self, arrived: Arrived) -> None:
        """The first connection is the main channel, whatever it says; of others their first byte tells."""
        match arrived.kind:
            case ChannelKind.RESUMED if self._paused:
                self._paused = False
                self._destination.connect(arrived.descriptor, way_back=arrived.way_back)
            case ChannelKind.PAGES if self._connected:
                self._destination.connect_preempt(arrived.descriptor)
            case ChannelKind.MULTIFD:
                self._multifd.append(os.dup(arrived.descriptor))
            case _ if self._connected:
                self._trouble(f"another connection came ({arrived.kind.value}): it is closed")
            case _:
                self._connected = True
                self._destination.connect(arrived.descriptor, way_back=arrived.way_back)

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
        async for said in self._destination.said():
            match said.kind:
                case "channels":
                    await self._give_multifd()
                case "loaded":
                    await self._loaded(said)
                case "shut":
                    self._measured("requests", said.values["waited"])
                    self._destination.stop_touching()
                case "touched":
                    self._touched(said.values)
                    return self._result()
                case _:
                    self._heard(said)
        raise QmigrateError("its processes ended early")  # said() does not end by itself

    def _heard(self, said: Said) -> None:
        values, at = said.values, said.values.get("time_us", 0)
        match said.kind:
            case "phase":
                self._phases.append((values["phase"], at))
                self._tell(StatusChanged(side=Side.DESTINATION, time_us=at, status=values["phase"]))
            case "blocks":
                blocks = [(str(name), int(length), int(size)) for name, length, size in values["blocks"]]
                self._tell(BlocksCame(side=Side.DESTINATION, time_us=at, blocks=blocks))
            case "progress":
                self._count(values)
                self._tell(Received(side=Side.DESTINATION, time_us=at, **_counts(values)))
            case "failed":
                self._count(values)
                self._failure = values["message"]
                self._trouble(values["message"])
            case "paused":
                self._count(values)
                self._paused = True
                self._tell(
                    Paused(side=Side.DESTINATION, time_us=at, reason=values["reason"], control=str(self.control))
                )
            case "trouble":
                self._trouble(values["message"])
            case "paged":
                self._numbers |= {"faults": values["faults"], "requested": values["requested"]}
                self._numbers["preempt"] = values["counts"]["normal"] + values["counts"]["zero"]
                for name, count in values["counts"].items():
                    self._numbers[name] = self._numbers.get(name, 0) + count
                self._measured("preempt", values["waited"])

    def _count(self, values: Mapping[str, Any]) -> None:
        self._numbers |= _counts(values)

    def _trouble(self, message: str) -> None:
        self._tell(Troubled(side=Side.DESTINATION, message=message))

    async def _loaded(self, said: Said) -> None:
        """All is here: keep what was asked for, then say SHUT."""
        self._count(said.values)
        self._tell(Received(side=Side.DESTINATION, **_counts(said.values)))
        if missing := said.values["missing"]:
            self._trouble(f"the source has ended, and {missing} pages have not come")
            if any(phase in _POSTCOPY for phase, _ in self._phases):  # RAM can be left out of a precopy alone
                self._failure = f"the source has ended, and {missing} pages have not come"
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
        if self.raw is not None:
            await asyncio.to_thread(write_raw, self.raw, blocks, memory)
        if self.save is not None and blocks:
            parts = Parts(
                blocks=blocks,
                memory=memory,
                target_page=values["ram"]["target_page"],
                kept=dict(zip(values["kept"], said.descriptors[2 + len(blocks) :], strict=True)),
                section_id=values["section"]["id"],
                footers=values["section"]["footers"],
            )
            await asyncio.to_thread(write_stream, self.save, parts)

    def _let_go(self, said: Said, value: int) -> None:
        for descriptor in said.descriptors:
            os.close(descriptor)
        self._received = None
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
        self._numbers |= {"touches": values["touches"], "writes": values["writes"]}
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
        is_postcopy = any(phase in _POSTCOPY for phase, _ in self._phases)
        if self._failure is None:
            message, code = "the migration was received", 0
        elif is_postcopy:
            message, code = f"it failed in postcopy, the guest is lost: {self._failure}", LOST
        else:
            message, code = f"it failed, the guest is the source's: {self._failure}", STILL_ON_SOURCE
        return ReceiveResult(
            exit_code=code,
            message=message,
            is_postcopy=is_postcopy,
            numbers=dict(self._numbers),
            phases=tuple(self._phases),
        )


def _no_one(_: LiveEvent) -> None:
    """Nobody listens to events."""


def _counts(values: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(values[name]) for name in _COUNTED}
