"""Where things are kept that can be made again."""

import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["cache_folder", "index_name"]


def cache_folder(kind: str) -> Path:
    """The folder of what is of this kind: below $QMIGRATE_CACHE, or qmigrate's in $XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("QMIGRATE_CACHE"):
        return Path(named).absolute() / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache").absolute() / "qmigrate" / kind


def _home() -> Path:
    """/ for a user whom nobody has told of, as containers have them: nothing is there, and nothing can be put there."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")


def index_name(files: Sequence[tuple[int, int]]) -> str:
    """What the index of these files is called, each by its device and inode, whatever their names are."""
    first, *more = [f"{device:x}-{inode:x}" for device, inode in files]
    if not more:
        return first
    import zlib  # mostly there is one

    return f"{first}+{zlib.crc32(' '.join(more).encode()):08x}"
