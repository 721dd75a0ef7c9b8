"""Guests that were saved: recordings of which only the files are wanted, each made once for all who ask for it."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from tests.live.recording import Kind, recorded
from tests.live.versions import Qemu

__all__ = ["File", "Saved", "saved"]


@dataclass(frozen=True)
class File:
    """A guest that was saved by a QEMU that has ended since.  ``back``: the way back, where it went to another."""

    qemu: Qemu
    kind: Kind
    stream: Path
    channels: tuple[str, ...]
    back: Path | None = None

    def copied_to(self, folder: Path) -> "File":
        """To be changed, or whatever else."""

        def copied(path: str | Path) -> Path:
            return Path(shutil.copyfile(path, folder / Path(path).name))

        return replace(
            self,
            stream=copied(self.stream),
            channels=tuple(str(copied(path)) for path in self.channels),
            back=None if self.back is None else copied(self.back),
        )


class Saved:
    """By version and name, in ``folder``; those that were not asked for yet are not there yet."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._files: dict[tuple[str, str], File] = {}

    async def file(self, qemu: Qemu, name: str) -> File:
        """The one that all share."""
        if (qemu.name, name) not in self._files:
            assert self.folder is not None, "conftest.py says where"
            folder = self.folder / f"{name}-{qemu.name}"
            folder.mkdir()
            self._files[qemu.name, name] = await _save(qemu, name, folder)
        return self._files[qemu.name, name]


KEPT = Saved()


async def saved(qemu: Qemu, name: str | Kind, folder: Path) -> File:
    """In the new ``folder``, a copy of one's own.  A kind that has no name is made anew."""
    folder.mkdir()
    if isinstance(name, Kind):
        return await _save(qemu, name, folder)
    return (await KEPT.file(qemu, name)).copied_to(folder)


async def _save(qemu: Qemu, name: str | Kind, folder: Path) -> File:
    async with recorded(qemu, name, folder) as recording:
        channels = tuple(map(str, recording.channels))
        return File(qemu, recording.kind, recording.stream, channels, recording.back)
