"""``send``: a stand-in source.  A saved stream goes to whoever listens, by precopy or postcopy; nobody is asked by QMP.

    result = await Sender("guest.mig").run("tcp:127.0.0.1:4444")

So it tests destinations, ours (``receive``) and others'.  What a destination's host pages are is not to be seen from
here: they are the host's own, unless said.
"""

import mmap
import os
from collections.abc import Mapping

from qmigrate import exit_codes
from qmigrate.capture.saved_guest import SavedGuest
from qmigrate.endpoint.served import End
from qmigrate.endpoint.source import Server
from qmigrate.errors import RefusedError
from qmigrate.events import OnEvent
from qmigrate.operations.reading import Reading
from qmigrate.operations.serving import Serving, ServingResult

__all__ = ["Sender"]


class Sender(Serving):
    """One saved guest, sent once.  ``page_sizes``: of each block that has others at the destination, in bytes."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        channels: tuple[str, ...] = (),
        postcopy: bool = False,
        page_sizes: Mapping[str, int] | None = None,
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
        self.postcopy = postcopy
        self._page_sizes = page_sizes or {}

    async def run(self, uri: str) -> ServingResult:
        """To who listens at ``uri``, until they have it all.  Raises ``RefusedError`` where nothing could begin."""
        async with self.opened() as opening:
            saved = await opening
            sizes = self._sizes(saved)
            with await self._connected(uri) as peer, self._serving(saved, sizes) as server:
                ended = await self._served(server, peer, server.serve if self.postcopy else server.send)
                return self._result(ended.end, ended.reason, server)

    def _sizes(self, saved: SavedGuest) -> dict[str, int]:
        names = [block.name for block in saved.blocks]
        if unknown := sorted(self._page_sizes.keys() - set(names)):
            raise RefusedError(f"{self.path}: there is no RAM block {unknown[0]}; there are {', '.join(names)}")
        usual = max(mmap.PAGESIZE, saved.page_size)
        return {name: self._page_sizes.get(name, usual) for name in names}

    def _result(self, end: End, reason: str, server: Server) -> ServingResult:
        if end is End.DONE:
            return self._result_of(server, exit_codes.DONE, "the destination has it all", running=None)
        # By precopy a destination runs nothing that it has not all of; by postcopy it does from PING 3 on.
        lost = self.postcopy and "loaded" in self._moments
        return self._result_of(server, exit_codes.LOST if lost else exit_codes.AT_SOURCE, reason, running=None)
