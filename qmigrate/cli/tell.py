"""What is said on standard error: one line each."""

import argparse
import errno
import os
import sys
import time
from collections.abc import Iterable
from typing import Final, TextIO

from qmigrate.errors import NoStreamError, QmigrateError, StreamError, StreamErrors
from qmigrate.report.names import clean

__all__ = ["FAILURES", "Stopped", "add_telling", "failed", "input_name", "tell", "tell_cost", "tell_faults"]

BAD_STREAM: Final = 1
NOTHING_DONE: Final = 2

_NAMELESS: Final = "'' (an empty name)"

FAILURES: Final = (QmigrateError, OSError, RecursionError, MemoryError)
"""What a user's input may end in; anything else is our fault, and shows a traceback."""


_OF_A_WRITE: Final = (
    None,
    errno.EAGAIN,
    errno.EBADF,
    errno.ECONNRESET,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EINVAL,
    errno.EIO,
    errno.ENOSPC,
    errno.ENXIO,
    errno.EPIPE,
)
"""What a write may fail with; else it is a limit of files or processes, or no folder for what is temporary."""


class Stopped(KeyboardInterrupt):
    """Another signal ends the command as Ctrl-C does: it removes what is half written, and leaves no process behind."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


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
        tell(*_named(name, error))
        status = BAD_STREAM
    return status


def _named(name: str, failure: NoStreamError | StreamError) -> tuple[str, ...]:
    """Of one of several inputs it says itself which one."""
    return (str(failure),) if failure.input is not None else (name, str(failure))


def failed(failure: BaseException, name: str, out: TextIO) -> int:
    """Tell what one of ``FAILURES`` means for the input ``name``; the exit code.  Raises it again where it is
    about ``out`` itself.
    """
    if isinstance(failure, OSError) and failure.filename is None and failure.errno in _OF_A_WRITE:
        raise failure  # to ``out``: whatever else is opened, read or written has a name
    out.flush()  # what was good is given, and stands before what is said of the rest
    match failure:
        case NoStreamError():
            tell(*_named(name, failure))
            return NOTHING_DONE
        case StreamErrors():
            return tell_faults(name, failure.errors)
        case StreamError():
            return tell_faults(name, [failure])
        case RecursionError():
            tell(name, "nested too deep to be shown")
            return BAD_STREAM
        case MemoryError():
            tell(name, "not enough memory")
            return NOTHING_DONE
        case OSError(filename=opened):
            file = name if opened is None or isinstance(opened, int) else os.fsdecode(opened) or _NAMELESS
            tell(file, failure.strerror or str(failure))
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
    return "standard input" if file == "-" else file or _NAMELESS
