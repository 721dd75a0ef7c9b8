"""Every exception of qmigrate.

    QmigrateError
    ├── StreamError             the bytes are wrong; .offset, .trail, .message
    │   ├── TruncatedError      they end too soon
    │   ├── UnsupportedError    they may be right, but we cannot read this
    │   ├── SequenceError       a good message at a bad time
    │   └── StreamErrors        several faults, in several channels; .errors
    ├── NoStreamError           there is no migration stream in this input (exit code 2)
    ├── RefusedError            it was refused before anything began (exit code 2)
    └── QmpError                a QEMU could not be talked to; .address
        ├── QmpConnectError     it does not listen, is silent, or does not speak QMP
        ├── QmpCommandError     QEMU refused a command, in its own words; .command, .error_class
        ├── QmpTimeoutError     QEMU did not answer in time: what it does now is not known
        └── QemuDiedError       QEMU is gone; .exit_status and its last words in .stderr

A class stands for something that a caller would do differently, no more.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

__all__ = [
    "NoStreamError",
    "QemuDiedError",
    "QmigrateError",
    "QmpCommandError",
    "QmpConnectError",
    "QmpError",
    "QmpTimeoutError",
    "RefusedError",
    "SequenceError",
    "StreamError",
    "StreamErrors",
    "TruncatedError",
    "UnsupportedError",
    "about_file",
    "counted",
]


def _of(name: str | None) -> list[str]:
    return [] if name is None else [name]


@contextmanager
def about_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """An ``OSError`` inside that names no file (one of reading or writing) is about this one, and says so."""
    try:
        yield
    except OSError as exc:
        if exc.filename is None:
            exc.filename = os.fspath(path)
        raise


def counted(number: int, nouns: str, verb: str = "") -> str:
    """``1 byte``, ``2 bytes``; with a verb of the plural ``1 byte is``, ``2 bytes are``."""
    one = number == 1
    if not verb:
        return f"{number} {nouns.removesuffix('s') if one else nouns}"
    return f"{counted(number, nouns)} {_OF_ONE.get(verb, verb + 's') if one else verb}"


_OF_ONE: Final = {"are": "is", "have": "has"}


class QmigrateError(Exception):
    """The root: whoever catches this catches all that qmigrate raises on purpose."""


class StreamError(QmigrateError):
    """The bytes of a stream are wrong.

    ``offset`` counts bytes from the start of the stream, ``trail`` names what the fault lies in, outermost
    first (section, block, field), ``message`` says what was found and what could have been.  ``input`` names the
    file that the stream is in, where it is one of several of its migration.
    """

    input: str | None = None

    def __init__(self, message: str, *, offset: int | None = None, trail: Sequence[str] = ()) -> None:
        self.message = message
        self.offset = offset
        self.trail = tuple(trail)
        super().__init__(message)

    def __str__(self) -> str:
        place = [] if self.offset is None else [f"{self.offset:#x}"]
        return ": ".join([*_of(self.input), *place, *self.trail, self.message])


class TruncatedError(StreamError):
    """The stream ends inside something."""


class UnsupportedError(StreamError):
    """The bytes may be right, but we cannot read this."""


class SequenceError(StreamError):
    """A good message at a bad time."""


class StreamErrors(StreamError):
    """Several faults, one in each of several channels of a migration: as the first, with all in ``errors``."""

    def __init__(self, errors: Sequence[StreamError]) -> None:
        self.errors = list(errors)
        super().__init__(errors[0].message, offset=errors[0].offset, trail=errors[0].trail)
        self.input = errors[0].input


class NoStreamError(QmigrateError):
    """There is no migration stream in this input.  ``input`` names it where it is one of several."""

    input: str | None = None

    def __str__(self) -> str:
        return ": ".join([*_of(self.input), super().__str__()])


class RefusedError(QmigrateError):
    """What was asked for is refused before anything began: it can't be had, or it is known to end badly."""


class QmpError(QmigrateError):
    """A QEMU could not be talked to.  ``address`` is how it was reached."""

    def __init__(self, message: str, *, address: str = "") -> None:
        self.message = message
        self.address = address
        super().__init__(f"{address}: {message}" if address else message)


class QmpConnectError(QmpError):
    """It does not listen, is silent, or does not speak QMP."""


class QmpCommandError(QmpError):
    """QEMU refused a command, in its own words."""

    def __init__(self, message: str, *, command: str, error_class: str = "", address: str = "") -> None:
        self.command = command
        self.error_class = error_class
        super().__init__(f"{command}: {message}", address=address)


class QmpTimeoutError(QmpError):
    """QEMU did not answer in time: what it does now is not known."""


class QemuDiedError(QmpError):
    """QEMU is gone.  ``exit_status`` is None while unknown; ``stderr`` holds its last words."""

    def __init__(self, message: str, *, address: str = "", exit_status: int | None = None, stderr: str = "") -> None:
        self.exit_status = exit_status
        self.stderr = stderr
        super().__init__(message, address=address)
