"""A stand-in destination: three processes, and what they tell.

    async with Destination() as destination:
        destination.connect(peer)
        async for said in destination.said():
            ...

``destination_listener`` owns the main channel, ``destination_guest`` the memory and who touches it,
``destination_pager`` the queue of faults.  They are started, never forked, with inherited descriptors, and each ends
when this process does, however it ends: a pipe of which only this process has the other end tells them.
"""

import asyncio
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from qmigrate.endpoint.link import Link, LinkClosedError, NoDescriptorError, Said
from qmigrate.endpoint.own_python import environment, own_python
from qmigrate.errors import QmigrateError
from qmigrate.format.walk import Limits
from qmigrate.uffd.toucher import Workload

__all__ = ["Destination", "ProcessDiedError", "Touch", "Workload"]

START_TIMEOUT_S: Final = 60.0
END_TIMEOUT_S: Final = 10.0
_PROCESSES: Final = ("listener", "guest", "pager")


class ProcessDiedError(QmigrateError):
    """One of the three ended before its time, or can't be understood: a fault of ours, or somebody killed it."""


class Touch(NamedTuple):
    """One of a recorded trace, by the block's name; ``start`` in bytes."""

    block: str
    start: int
    is_write: bool = False


class Destination:
    """The processes.  ``traces``: touchers that do just these; ``keep``: with ``loaded`` comes all that a saved stream
    needs; ``limits``: how much of a stream may be in memory, by ``format.walk.Limits``.
    """

    def __init__(
        self,
        *,
        workloads: Sequence[Workload] = (),
        traces: Sequence[Sequence[Touch]] = (),
        trace_rate: float | None = None,
        touch_in_package: bool = False,
        keep: bool = False,
        limits: Limits | None = None,
    ) -> None:
        self._wishes: dict[str, Any] = {
            "workloads": [asdict(each) for each in workloads],
            "traces": traces,
            "trace_rate": trace_rate,
            "touch_in_package": touch_in_package,
        }
        self._keep = keep
        self._limits = asdict(limits or Limits())
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._links: dict[str, Link] = {}
        self._lifeline = -1
        self._queue: asyncio.Queue[tuple[str, Said | ProcessDiedError | None]] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        reader, self._lifeline = os.pipe()
        to_guest, from_guest = socket.socketpair()
        to_pager, from_pager = socket.socketpair()
        shared = {"listener": [to_guest, to_pager], "guest": [from_guest], "pager": [from_pager]}
        try:
            for name in _PROCESSES:
                ours, theirs = socket.socketpair()
                with theirs:
                    self._start(name, reader, [theirs, *shared[name]])
                self._links[name] = Link(ours)
                asyncio.get_running_loop().add_reader(ours.fileno(), self._hear, name)
        finally:
            os.close(reader)
            for peer in (to_guest, from_guest, to_pager, from_pager):
                peer.close()
        self._links["guest"].tell("wishes", **self._wishes)
        self._links["listener"].tell("wishes", keep=self._keep, limits=self._limits)
        try:
            await self._all_ready()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def _all_ready(self) -> None:
        """They take a moment to start; a fault that comes before the pager is there would wait for it."""
        async with asyncio.timeout(START_TIMEOUT_S):
            ready = 0
            async for _ in self.said():
                ready += 1
                if ready == len(_PROCESSES):
                    return

    def _start(self, name: str, lifeline: int, peers: Sequence[socket.socket]) -> None:
        numbers = [lifeline, *(peer.fileno() for peer in peers)]
        command = own_python(f"qmigrate.endpoint.destination_{name}", *map(str, numbers))
        self._processes[name] = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=numbers,
            env=environment(),
            process_group=0,  # Ctrl-C is for the command, which then says what it means
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """All three end: at once where they do not by themselves."""
        os.close(self._lifeline)
        for link in self._links.values():
            asyncio.get_running_loop().remove_reader(link.fileno())
            link.close()
        for process in self._processes.values():
            try:
                await asyncio.to_thread(process.wait, END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @property
    def pids(self) -> dict[str, int]:
        """Of the three, by name."""
        return {name: process.pid for name, process in self._processes.items()}

    # -- what they are told

    def connect(self, descriptor: int, *, way_back: bool) -> None:
        """The main channel; the caller keeps his descriptor."""
        self._links["listener"].tell("connect", way_back=way_back, descriptors=[descriptor])

    def connect_preempt(self, descriptor: int) -> None:
        """The channel of requested pages; the caller keeps his descriptor."""
        self._links["pager"].tell("preempt", descriptors=[descriptor])

    def connect_multifd(self, descriptors: Sequence[int]) -> None:
        """The answer to ``channels``: all multifd channels that there are; the caller keeps his descriptors."""
        self._links["listener"].tell("channels", descriptors=descriptors)

    def too_late(self) -> None:
        """A multifd channel came after RAM had begun: what it brings would be lost."""
        self._tell("listener", "late")

    def ask(self) -> None:
        """How is it going?  Once postcopy runs; answered by ``paging`` and ``touching``."""
        for name in ("pager", "guest"):
            self._tell(name, "how")

    def finish(self, value: int) -> None:
        """The answer to ``loaded``: SHUT with this value."""
        self._tell("listener", "finish", value=value)

    def stop_touching(self) -> None:
        """Answered by ``touched``."""
        self._tell("guest", "stop")

    def _tell(self, name: str, kind: str, **values: Any) -> None:
        with suppress(LinkClosedError):  # said() tells of one that has ended
            self._links[name].tell(kind, **values)

    # -- what they tell

    async def said(self) -> AsyncIterator[Said]:
        """What the processes tell, in the order in which it came.  Raises ``ProcessDiedError``."""
        while True:
            name, said = await self._queue.get()
            if isinstance(said, ProcessDiedError):
                raise said
            if said is not None:
                yield said
            elif (status := await asyncio.to_thread(self._processes[name].wait)) != 0:
                raise ProcessDiedError(f"the {name}'s process ended with {status}")

    def _hear(self, name: str) -> None:
        try:
            self._queue.put_nowait((name, self._links[name].hear()))
        except NoDescriptorError:
            why = f"what the {name}'s process has can't be taken: too many files are open"
            self._queue.put_nowait((name, ProcessDiedError(why)))
        except LinkClosedError:
            asyncio.get_running_loop().remove_reader(self._links[name].fileno())
            self._queue.put_nowait((name, None))
