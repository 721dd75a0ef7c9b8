"""An index of pages that another process is still making: what it has of it is used, what it has not is waited for.

The guest can be started with it.  A page is at hand once no later copy of it can exist: of a file that is proven to
have one pass at once, as it is looked for where it must be; of any other when all has been read.  That process writes
into memory that both have, and says how far it is in lines of JSON:

    {"starts": [81, 4200]}    it is proven to have one pass: where each block begins, and RAM ends
    {"at": 12345}             so many bytes have been read
    {"done": true, ...}       all of them: ``absent`` pages have not come, ``one_pass`` tells whether each came once
    {"made": true, ...}       in the plain way, as it was not what it seemed; the index is a kept one, and ``not_kept``
                              says why it is not kept, where it should be
    {"error": "why"}          it can't be read
"""

import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from qmigrate.capture.placed import PlacedPages
from qmigrate.capture.places import Input
from qmigrate.capture.saved_guest import SavedGuest
from qmigrate.errors import QmigrateError, StreamError
from qmigrate.format.ram import RamBlock

if TYPE_CHECKING:
    from qmigrate.capture.one_pass import OnePass

__all__ = ["ArrivingPages"]

_READ_BYTES: Final = 1 << 16


class ArrivingPages(PlacedPages):
    """Closes ``news``, the pipe.  ``proven`` makes of what is told by ``starts`` what looks for pages; ``made`` reads
    what was made in the plain way; ``why_not`` says, when the pipe ends too early, how that process did.
    """

    def __init__(
        self,
        descriptor: int,
        *,
        news: int,
        heard: bytes,
        blocks: Mapping[str, RamBlock],
        entries: Mapping[str, memoryview],
        proven: "Callable[[list[int]], OnePass]",
        made: Callable[[], SavedGuest],
        why_not: Callable[[], str],
    ) -> None:
        super().__init__([Input.of(descriptor)], blocks=blocks, entries=entries)
        self.absent_pages = 0
        """How many never came; known in the end."""
        self.not_kept: str | None = None
        """Why no index is kept, where one should be; known in the end."""
        self._news: int | None = news
        self._heard = heard
        self._proven = proven
        self._one_pass: OnePass | None = None
        self._made = made
        self._why_not = why_not
        self._is_complete = False
        os.set_blocking(news, False)

    def close(self) -> None:
        super().close()
        self._hang_up()

    def _hang_up(self) -> None:
        if self._news is not None:
            os.close(self._news)
            self._news = None

    @property
    def news(self) -> int | None:
        """What is readable when there is something for ``hear()``; None where there will be nothing more."""
        return self._news

    @property
    def is_complete(self) -> bool:
        """Are all pages known?"""
        return self._is_complete

    def hear(self) -> None:
        """What was said since.  Raises ``StreamError`` where there will be no index, or it was wrong so far."""
        while self._news is not None:
            line, found, rest = self._heard.partition(b"\n")
            if found:
                self._heard = rest
                self._take(json.loads(line))
                continue
            try:
                data = os.read(self._news, _READ_BYTES)
            except BlockingIOError:
                return
            if not data:
                raise StreamError(f"its index can't be made: {self._why_not()}")
            self._heard += data

    def _take(self, said: dict[str, Any]) -> None:
        if (error := said.get("error")) is not None:
            self._hang_up()
            raise StreamError(str(error))
        if (starts := said.get("starts")) is not None:
            self._one_pass = self._proven(starts)
        if said.get("made"):
            self._replace()
            self.not_kept = said["not_kept"]
        elif said.get("done"):
            self.absent_pages = said["absent"]
            if self._one_pass is not None and not said["one_pass"]:
                raise StreamError("a page comes again that may have been served")
        else:
            return
        self._is_complete = True
        self._one_pass = None
        self._hang_up()

    def _replace(self) -> None:
        """By what was read as every stream is."""
        if self._one_pass is not None:
            raise StreamError("it is not what it was taken for, and may have been served as that")
        try:
            made = self._made()
        except (QmigrateError, OSError) as exc:
            raise StreamError(str(exc)) from exc
        if made.blocks != list(self.blocks.values()):
            made.close()
            raise StreamError("its blocks are others than those that the destination was told of")
        self.absent_pages = made.absent
        self.page_size = made.page_size
        self._entries = {block.name: made.index.entries(block.name) for block in made.blocks}
        self._spill, made.index._spill = made.index._spill, None

    def has(self, block: str, first: int, count: int, search: bool) -> bool:
        """May these pages be served already?  ``search``: they are worth looking for.  Raises ``OSError``."""
        if self._is_complete:
            return True
        if self._one_pass is None:
            return False
        entries = self._of(block)
        if all(entries[first : first + count]):
            return True
        return search and self._one_pass.find(block, first, count, entries)
