"""Where things are kept that can be made again."""

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(kind: str) -> Path:
    """The folder of what is of this kind: below $QMIGRATE_CACHE, or qmigrate's in $XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("QMIGRATE_CACHE"):
        return Path(named).absolute() / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "qmigrate" / kind
