"""What is said on standard error: one line each."""

import sys
from collections.abc import Iterable

from qmigrate.errors import StreamError
from qmigrate.report.names import clean

__all__ = ["tell", "tell_faults"]


def tell(*parts: str) -> None:
    """``qmigrate: PART: PART``.  What can't be said is not said."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(": ".join(["qmigrate", *map(clean, parts)]) + "\n")
        sys.stderr.flush()
    except OSError:
        return


def tell_faults(name: str, errors: Iterable[StreamError]) -> int:
    """Each fault of the stream in the input ``name``; the exit code that they make."""
    status = 0
    for error in errors:
        tell(name, str(error))
        status = 1
    return status
