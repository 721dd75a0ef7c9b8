"""SIGUSR1 asks how far a command is; one line on standard error answers, on a terminal or not."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qmigrate.report.names import clean

__all__ = ["answer_with", "answering"]

_answers: list[Callable[[], str]] = []


@contextmanager
def answering() -> Iterator[None]:
    """Answer the signal inside; before this it would have ended the process."""
    try:
        before = signal.signal(signal.SIGUSR1, _answer)
    except ValueError:  # not in the main thread: who runs us there has signals of its own
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
        _answers.clear()


def answer_with(where: Callable[[], str]) -> None:
    """From now on the answer is what this says: ``NAME: how far``."""
    _answers[:] = [where]


def _answer(_number: int, _frame: object) -> None:
    where = _answers[-1]() if _answers else "nothing is read yet"
    line = f"qmigrate: {clean(where)}\n"
    try:
        # Not through sys.stderr: whoever the signal interrupts may be writing there.
        os.write(sys.stderr.fileno(), line.encode(errors="backslashreplace"))
    except (AttributeError, OSError, ValueError):  # it is closed, or none of the system's
        return
