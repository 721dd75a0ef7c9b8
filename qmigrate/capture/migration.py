"""A migration at rest: what its stream, or its streams, hold, gathered in one pass.

All else sees only this: ``with qmigrate.open(path) as migration``.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from qmigrate.capture.contents import KINDS, Block, ChannelContents, CommandPlace, Contents, Section
from qmigrate.capture.gathering import Gathering
from qmigrate.capture.open import Source
from qmigrate.capture.owner import Owner
from qmigrate.errors import NoStreamError, StreamError
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


class Migration(Owner):
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
            for paths, is_forward in ((channels, True), (return_paths, False)):
                for each in paths:
                    self._others.append((_opened(each), is_forward))
        except BaseException:
            self.close()
            raise
        self._description = description
        self._page_size = page_size
        self._limits = limits

    def close(self) -> None:
        """Close the inputs, but not standard input."""
        for source in self.sources:
            source.close()

    @property
    def sources(self) -> list[Source]:
        """All inputs, in the order in which they were given; those of return paths last."""
        return [self.source, *(other for other, _ in self._others)]

    @property
    def known_description(self) -> Description | Chooser | None:
        """As it was given, for streams that have none of their own."""
        return self._description

    @cached_property
    def parts(self) -> "list[Part]":
        """The channels, main first; none where there is but one stream.

        Raises ``NoStreamError`` where the inputs are no channels of one migration; ``StreamError`` where one of them
        can't be read.
        """
        if self.source.recording is None and not self._others:
            return []
        from qmigrate.capture.joining import classified, recorded_parts  # most migrations are one stream

        if self._others:
            _refuse_odd_sets(self.sources)
        if self.source.recording is not None:
            return recorded_parts(self.source.recording)
        return classified([(self.source, None), *self._others])

    @property
    def strays(self) -> "list[Part]":
        """Inputs given as return paths that are something else by their bytes, and are read as that."""
        given = self.parts if self._others else []
        return [part for part in given if part.is_forward is False and part.channel.kind.value != "return path"]

    @property
    def recording_faults(self) -> list[StreamError]:
        """What is wrong with the file of a recording, apart from the streams in it."""
        return [] if self.source.recording is None else self.source.recording.faults

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
        return Gathering(self.entries(), channels, self.recording_faults)

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
        """What is wrong with the stream: empty when ``complete``, but for what is wrong with a recording's file."""
        return self.contents.errors


def _opened(path: str | os.PathLike[str]) -> Source:
    """One of several inputs: what is wrong with it is told with its name."""
    try:
        return Source(path)
    except NoStreamError as exc:
        exc.input = os.fsdecode(path)
        raise


def _refuse_odd_sets(sources: Sequence[Source]) -> None:
    """A file that is given twice would count twice; a recording has all channels of its own migration."""
    seen: set[tuple[int, int]] = set()
    for source in sources:
        message = ""
        if source.recording is not None:
            message = "a recording of qmigrate tap, which has all connections in it: no other file goes with it"
        elif source.identity is not None and source.identity in seen:
            message = "is given twice"
        if message:
            exc = NoStreamError(message)
            exc.input = source.name
            raise exc
        if source.identity is not None:
            seen.add(source.identity)
