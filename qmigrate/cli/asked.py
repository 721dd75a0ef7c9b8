"""Signals of a command that reads: SIGUSR1 asks how far it is, and SIGTERM and SIGHUP end it.

One line on standard error answers, on a terminal or not.  What is half written is removed at the end, as at Ctrl-C.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from qmigrate.cli.tell import Stopped
from qmigrate.report.names import clean

__all__ = ["answer_with", "answering"]

_answers: list[Callable[[], str]] = []


@contextmanager
def answering() -> Iterator[None]:
    """Answer the signal inside, and be ended by others: before this they end the process, whatever it is at."""
    if threading.current_thread() is not threading.main_thread():  # who runs us there has signals of its own
        yield
        return
    ends = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]  # not: nohup
    before = signal.signal(signal.SIGUSR1, _answer)
    try:
        for each in ends:
            signal.signal(each, _stop)
        yield
    finally:
        for each in ends:
            signal.signal(each, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, before)
        _answers.clear()


def answer_with(where: Callable[[], str]) -> None:
    """From now on the answer is what this says: ``NAME: how far``."""
    _answers[:] = [where]


def _stop(number: int, _frame: object) -> NoReturn:
    raise Stopped(number)


def _answer(_number: int, _frame: object) -> None:
    where = _answers[-1]() if _answers else "nothing is read yet"
    line = f"qmigrate: {clean(where)}\n"
    try:
        # Not through sys.stderr: whoever the signal interrupts may be writing there.
        os.write(sys.stderr.fileno(), line.encode(errors="backslashreplace"))
    except (AttributeError, OSError, ValueError):  # it is closed, or none of the system's
        return
