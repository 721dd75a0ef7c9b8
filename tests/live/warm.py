"""Memory for what is measured: where the host takes back what lies free, it may cost fifty times as much."""

import mmap
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["warm_memory"]

_POPULATE: Final = 0x8000  # MAP_POPULATE, which mmap names since 3.10 where the C library does


def warm_memory(length: int) -> None:
    """So many bytes are had and given back, in large pieces: who takes them next, within a second, need not wait.

    A balloon with free page reporting gives back what lies free for two seconds.
    """
    mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _POPULATE).close()
    with suppress(OSError):  # who was before leaves it in pieces, and who wants huge pages would pay for it
        Path("/proc/sys/vm/compact_memory").write_text("1")
