"""A migration at rest: what its stream, or its streams, hold, gathered in one pass.

All else sees only this: ``with qmigrate.open(path) as migration``.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Self

from qmigrate.capture.contents import KINDS, Block, ChannelContents, CommandPlace, Contents, Section
from qmigrate.capture.gathering import Gathering
from qmigrate.capture.open import Source
from qmigrate.errors import StreamError
from qmigrate.format.tail import Chooser
from qmigrate.format.vm_state import VmState
from qmigrate.format.vmdesc import Description
from qmigrate.format.walk import (
    Entry,
    Limits,
)

if TYPE_CHECKING:
    from qmigrate.capture.joining import Part

__all__ = ["KINDS", "Block", "ChannelContents", "CommandPlace", "Contents", "Gathering", "Migration", "Section"]


class Migration:
    """A migration stream in a file or pipe.  Closes the files that it opened.

    ``channels`` are files with further connections of the same migration (multifd, preempt, resumed), in any order;
    then ``path`` may be any of them.  ``return_paths`` are files with what came back.  A recording of ``qmigrate tap``
    has them all.

    Its parts (``sections``, ``blocks``, ``devices`` and so on) come from one pass, made at the first need.
    A fault in the stream is kept in ``errors``, and what was good before it is given; ``NoStreamError`` is
    raised where there is no stream at all.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        channels: Sequence[str | os.PathLike[str]] = (),
        return_paths: Sequence[str | os.PathLike[str]] = (),
        description: Description | Chooser | None = None,
        page_size: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.source = Source(path)
        self._others: list[tuple[Source, bool | None]] = []
        try:
            self._others += [(Source(each), True) for each in channels]
            self._others += [(Source(each), False) for each in return_paths]
        except BaseException:
            self.close()
            raise
        self._description = description
        self._page_size = page_size
        self._limits = limits

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the inputs, but not standard input."""
        for source in self.sources:
            source.close()

    @property
    def sources(self) -> list[Source]:
        """All inputs, in the order in which they were given; those of return paths last."""
        return [self.source, *(other for other, _ in self._others)]

    @cached_property
    def parts(self) -> "list[Part]":
        """The channels, main first; none where there is but one stream.  Raises ``NoStreamError``."""
        if self.source.recording is None and not self._others:
            return []
        from qmigrate.capture.joining import classified, recorded_parts  # most migrations are one stream

        if self.source.recording is not None:
            return recorded_parts(self.source.recording)
        return classified([(self.source, None), *self._others])

    def entries(self) -> Iterator[Entry]:
        """Each record with its place, from the start; of a pipe only once.

        Raises ``StreamError``; where the migration has several channels, once all of them are read.
        """
        if not self.parts:
            return self.source.entries(description=self._description, page_size=self._page_size, limits=self._limits)
        from qmigrate.capture.joining import Joining

        return Joining(
            self.parts, description=self._description, page_size=self._page_size, limits=self._limits
        ).entries()

    def gather(self) -> "Gathering":
        """One pass: an iterator of the entries that fills ``contents`` as it goes."""
        channels = [
            ChannelContents(
                name=part.name,
                kind=part.channel.kind.value,
                known_by=part.channel.known_by.value,
                reason=part.channel.reason,
                input=part.readable.name,
            )
            for part in self.parts
        ]
        return Gathering(self.entries(), channels)

    @cached_property
    def contents(self) -> Contents:
        """What one pass over the whole stream finds."""
        gathering = self.gather()
        for _ in gathering:
            pass
        return gathering.contents

    @property
    def machine_type(self) -> str | None:
        """As CONFIGURATION names it, e.g. ``pc-q35-10.0``; None without one."""
        return self.contents.machine_type

    @property
    def sections(self) -> list[Section]:
        """All sections in order, a package's too."""
        return self.contents.sections

    @property
    def blocks(self) -> Mapping[str, Block]:
        """The RAM blocks by name."""
        return self.contents.blocks

    @property
    def devices(self) -> Mapping[str, VmState]:
        """The decoded state of each device, by ``name/instance``."""
        return self.contents.devices

    @property
    def commands(self) -> list[CommandPlace]:
        """The commands in order, a package's nested."""
        return self.contents.commands

    @property
    def complete(self) -> bool:
        """Did the grammar reach its end?"""
        return self.contents.complete

    @property
    def errors(self) -> list[StreamError]:
        """What is wrong with the stream: empty when ``complete``."""
        return self.contents.errors
