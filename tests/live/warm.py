"""Memory for what is measured: where the host takes back what lies free, it may cost fifty times as much."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["warm_memory"]

_HAVE: Final = "import mmap, sys; mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x8000)"
"""0x8000 is MAP_POPULATE.  By another process: what this one had would count as a peak of those that it starts."""


def warm_memory(length: int) -> None:
    """So many bytes are had and given back, in large pieces: who takes them next, within a second, need not wait.

    A balloon with free page reporting gives back what lies free for two seconds.
    """
    subprocess.run([sys.executable, "-I", "-S", "-c", _HAVE, str(length)], check=True)
    with suppress(OSError):  # who was before leaves it in pieces, and who wants huge pages would pay for it
        Path("/proc/sys/vm/compact_memory").write_text("1")
