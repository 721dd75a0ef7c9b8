"""Schemas for a stand-in that loads a package: asked only where the bytes alone leave it open where sections end.

The guest waits for its package, and shows nothing of its devices.
"""

from collections.abc import Callable

from qmigrate.format.tail import Tail
from qmigrate.format.vmdesc import Description

__all__ = ["InDoubt"]


class InDoubt:
    """The user's schemas, where they are needed."""

    def choose(self, read: Callable[[Description | None], Tail], machine_type: str | None) -> Tail:
        """What was read without any, if each section has its end; else as ``SchemaCache.choose()``."""
        plain = read(None)
        if plain.error is None and all(item.header is not None or item.command is not None for item in plain.items):
            return plain
        from qmigrate.capture.schemas import SchemaCache, cache_folder

        return SchemaCache(cache_folder()).choose(read, machine_type)
