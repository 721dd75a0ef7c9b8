"""What is said on standard error: one line each."""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Final, TextIO

from qmigrate.errors import NoStreamError, QmigrateError, StreamError
from qmigrate.report.names import clean

__all__ = [
    "FAILURES",
    "add_telling",
    "failed",
    "input_name",
    "tell",
    "tell_cost",
    "tell_faults",
    "wrong_with_recording",
]

BAD_STREAM: Final = 1
NOTHING_DONE: Final = 2

FAILURES: Final = (QmigrateError, OSError, RecursionError, MemoryError)
"""What a user's input may end in; anything else is our fault, and shows a traceback."""


def add_telling(parser: argparse.ArgumentParser) -> None:
    """``-q`` and ``-v``, unless the command has them in words of its own."""
    if "-q" not in parser._option_string_actions:
        parser.add_argument("-q", "--quiet", action="store_true", help="nothing on standard error but what is wrong")
    if "-v" not in parser._option_string_actions:
        parser.add_argument("-v", "--verbose", action="store_true", help="tell on standard error how long it took")


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
        status = BAD_STREAM
    return status


def wrong_with_recording(*, stopped: str | None = None, fault: str | None = None, **_: object) -> Iterator[str]:
    """What is to be told of a recording that stopped, or whose file is damaged or has no end."""
    if stopped is not None:
        yield f"the recording stopped before the migration ended: {stopped}"
    if fault is not None:
        yield fault


def failed(failure: BaseException, name: str, out: TextIO) -> int:
    """Tell what one of ``FAILURES`` means for the input ``name``; the exit code.  Raises it again where it is
    about ``out`` itself.
    """
    if isinstance(failure, BrokenPipeError) or (isinstance(failure, OSError) and failure.filename is None):
        raise failure  # a write: whatever is opened has a name
    out.flush()  # what was good is given, and stands before what is said of the rest
    match failure:
        case NoStreamError():
            tell(name, str(failure))
            return NOTHING_DONE
        case StreamError():
            tell(name, str(failure))
            return BAD_STREAM
        case RecursionError():
            tell(name, "nested too deep to be shown")
            return BAD_STREAM
        case MemoryError():
            tell(name, "not enough memory")
            return NOTHING_DONE
        case OSError(filename=opened):
            tell(name if isinstance(opened, int) else os.fsdecode(opened), failure.strerror or str(failure))
            return NOTHING_DONE
        case _:
            tell(str(failure))
            return NOTHING_DONE


def tell_cost(began: float) -> None:
    """What the command took since ``began``, a monotonic time; in this process, not in those of --jobs."""
    import resource

    from qmigrate.report.units import size

    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu, memory = used.ru_utime + used.ru_stime, size(1024 * used.ru_maxrss)
    tell(f"{time.monotonic() - began:.3f} s, {cpu:.3f} s of CPU time, {memory} of memory at most, in this process")


def input_name(file: str) -> str:
    """FILE as it is spoken of."""
    return "standard input" if file == "-" else file
