"""The connections of one migration that comes in: which there are, and whom each is handed to.

The first is main, whatever it says; of others their first bytes tell (``endpoint.incoming``).
"""

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qmigrate.endpoint.destination import Destination
from qmigrate.endpoint.incoming import Arrived, ChannelKind, Incoming
from qmigrate.events import ChannelCame, Listening, Side
from qmigrate.operations.receive_events import ReceiveEvents
from qmigrate.protocol.phases import Phase

if TYPE_CHECKING:
    from qmigrate.endpoint.recorded import Recorded

__all__ = ["MULTIFD_PATIENCE_S", "ReceiveChannels"]

MULTIFD_PATIENCE_S: Final = 5.0
_MOST_MULTIFD: Final = 255  # migration/options.c: a channel's number has a byte


class ReceiveChannels:
    """All that come, handed to ``destination``.  ``multifd``: so many of these come; ``control`` is told of.

    ``stop()`` ends the listening and closes what was handed to nobody.
    """

    def __init__(self, destination: Destination, told: ReceiveEvents, *, control: Path, multifd: int) -> None:
        self.recorded: Recorded | None = None
        """All connections go through it, where there is one."""
        self.is_connected = False
        """Has a source come?"""
        self.is_paused = False
        """Did main break, where another may take its place?"""
        self._incoming: Incoming | None = None
        self._destination = destination
        self._told = told
        self._control = control
        self._accepting: asyncio.Task[None] | None = None
        self._multifd: list[int] = []  # channels that the listener has not been given yet
        self._multifd_count = multifd
        self._multifd_asked = self._multifd_given = False

    # -- listening

    async def listen(self, uri: str) -> str:
        """Take connections there from now on, and nowhere else; the URI with the port that was taken."""
        await self._stop_accepting()
        listens: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._accepting = asyncio.ensure_future(self._accept(uri, listens))
        waiting: set[asyncio.Future[Any]] = {self._accepting, listens}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not listens.done():
            await self._accepting
        return await listens

    async def stop(self) -> None:
        """Take no more; what was given to nobody is closed."""
        try:
            await self._stop_accepting()
        finally:
            self._drop_multifd()

    async def _stop_accepting(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)

    async def _accept(self, uri: str, listens: "asyncio.Future[str]") -> None:
        async with Incoming(uri) as incoming:
            self._incoming = incoming
            self._told.tell(Listening(side=Side.DESTINATION, uri=incoming.uri, control=str(self._control)))
            listens.set_result(incoming.uri)
            async for arrived in incoming:
                try:
                    self._arrived(arrived, incoming.uri)
                except OSError as exc:  # no descriptor is free, mostly
                    self._told.trouble(f"a connection came ({arrived.kind.value}): it can't be taken: {exc.strerror}")
                finally:
                    os.close(arrived.descriptor)

    def _arrived(self, arrived: Arrived, uri: str) -> None:
        if self.recorded is None:
            self._take(arrived)
            return
        recorded = self.recorded.through(arrived, uri)
        try:
            self._take(recorded)
        finally:
            os.close(recorded.descriptor)

    def _take(self, arrived: Arrived) -> None:
        """The first connection is the main channel, whatever it says; of others their first byte tells."""
        match arrived.kind:
            case ChannelKind.RESUMED if self.is_paused:
                self.is_paused = False
                self._came(ChannelKind.RESUMED)
                self._destination.connect(arrived.descriptor, way_back=arrived.way_back)
            case ChannelKind.PAGES if self.is_connected:
                self._came(ChannelKind.PAGES)
                self._destination.connect_preempt(arrived.descriptor)
            case ChannelKind.MULTIFD if self._multifd_given:
                self._destination.too_late()
            case ChannelKind.MULTIFD if len(self._multifd) == _MOST_MULTIFD:
                self._told.trouble(f"a connection came (multifd), there are {_MOST_MULTIFD} already: it is closed")
            case ChannelKind.MULTIFD:
                self._came(ChannelKind.MULTIFD)
                self._multifd.append(os.dup(arrived.descriptor))
                self._give_multifd_if_all()
            case _ if self.is_connected:
                self._told.trouble(f"another connection came ({arrived.kind.value}): it is closed")
            case _:
                self.is_connected = True
                self._told.phase_began(Phase.PRECOPY.value, self._came(ChannelKind.MAIN))
                self._destination.connect(arrived.descriptor, way_back=arrived.way_back)

    def _came(self, kind: ChannelKind) -> int:
        """When."""
        event = ChannelCame(side=Side.DESTINATION, kind=kind.value)
        self._told.tell(event)
        return event.time_us

    def take_silent(self) -> None:
        """A connection that has said nothing is that of the requested pages."""
        if self._incoming is not None:
            self._incoming.take_silent()

    # -- multifd

    async def give_multifd(self) -> None:
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
            have = f"{len(self._multifd)} of {self._multifd_count}"
            self._told.trouble(f"{have} multifd channels have come: waiting for more")

    def _drop_multifd(self) -> None:
        for descriptor in self._multifd:
            os.close(descriptor)
        self._multifd.clear()
