"""Several FILEs: one after the other, or with --json side by side in processes, an answer a line."""

import argparse
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TextIO

from qmigrate.cli.asked import answer_with, answering
from qmigrate.cli.tell import BAD_STREAM, FAILURES, NOTHING_DONE, failed, input_name, tell
from qmigrate.errors import RefusedError
from qmigrate.report.units import plural

if TYPE_CHECKING:
    from concurrent.futures import Future, ProcessPoolExecutor

__all__ = ["Answer", "Headings", "add_jobs", "answer_lines", "each_file", "in_lines"]

_FOR_WHO_STARTED_THEM: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_BESIDES: Final = 4  # what starts processes, what looks after them, and two threads here
_SMALL_STACK: Final = 1 << 18
_NO_PROCESS: Final = "no further process can be started"

Answer = Callable[[str], dict[str, Any]]
"""A file's answer: ``{"file": …}`` and its values, or its ``error``.  It can be pickled, and raises nothing."""


def add_jobs(parser: "argparse._ActionsContainer") -> None:
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=_jobs,
        help="with --json: read N files at once, in processes of their own; one answer a line also for one file",
    )


def _jobs(argument: str) -> int:
    if not argument.isascii() or not argument.isdecimal() or not 1 <= int(argument[:6]) <= 1024:
        raise argparse.ArgumentTypeError(f"{argument!r} is no number of processes: expected 1 to 1024")
    return int(argument)


def in_lines(args: argparse.Namespace) -> bool:
    """Is there an answer a line, rather than one for people, or for a program that asks for a single file?"""
    if args.jobs is not None and not args.json:
        args.usage_error("--jobs goes with --json: answers come a line each")
    if args.jobs is not None and "-" in args.files:
        args.usage_error("--jobs reads files: standard input can't be one of them")
    return args.json and (len(args.files) > 1 or args.jobs is not None)


def each_file(args: argparse.Namespace, out: TextIO, answer: Callable[[str], int]) -> int:
    """``answer`` for each FILE in turn.  One that fails says so, and the others go on; the worst exit code."""
    worst = 0
    with answering():
        for file in args.files:
            try:
                status = answer(file)
            except FAILURES as failure:
                status = failed(failure, input_name(file), out)
            worst = max(worst, status)
    return worst


class Headings:
    """Sets apart what is said of several files."""

    def __init__(self, args: argparse.Namespace, out: TextIO) -> None:
        self._several = len(args.files) > 1
        self._out = out
        self._begun = False

    def begin(self, name: str = "") -> None:
        """Something is said now of the next file; its ``name`` goes above, unless what is said begins with it."""
        if not self._several:
            return
        from qmigrate.report.names import clean
        from qmigrate.report.paper import HEAD, Paper, text

        if self._begun:
            self._out.write("\n")
        self._begun = True
        if name:
            Paper(self._out).line(text((clean(name), HEAD)))


# -- an answer a line


def answer_lines(
    args: argparse.Namespace, out: TextIO, answer: Answer, *, severity: Callable[[dict[str, Any]], int]
) -> int:
    """The answer for each FILE as a line of JSON, in the order given; what is wrong also on standard error.

    ``severity`` is the exit code that an answer means in itself.
    """
    worst = done = 0
    with answering(), closing(_lines(args.files, partial(_line, answer, severity), args.jobs or 1)) as lines:
        answer_with(lambda: f"{done} of {plural(len(args.files), 'file')} read")
        for line, told, status in lines:
            done += 1
            out.write(line + "\n")
            out.flush()
            for parts in told:
                tell(*parts)
            worst = max(worst, status)
    return worst


_Line = tuple[str, list[tuple[str, ...]], int]


def _line(answer: Answer, severity: Callable[[dict[str, Any]], int], file: str) -> _Line:
    """One file's line, what is told beside it, and its exit code.  It is made where the file is read."""
    found = answer(file)
    name = input_name(file)
    try:
        line = _json(found)
    except RecursionError:
        found = {"file": file, "error": "nested too deep to be shown"}
        line = _json(found)
    if "error" in found:
        return line, [(name, found["error"])], NOTHING_DONE
    told = [_told(name, error) for error in found["errors"]]
    return line, told, max(BAD_STREAM if told else 0, severity(found))


def _json(value: dict[str, Any]) -> str:
    import json

    return json.dumps(value, separators=(",", ":"))


def _told(name: str, error: dict[str, Any]) -> tuple[str, ...]:
    place = [] if error["offset"] is None else [f"{error['offset']:#x}"]
    return (name, *place, *error["trail"], error["message"])


_Work = Callable[[str], _Line]


def _lines(files: Sequence[str], work: _Work, jobs: int) -> Generator[_Line]:
    if jobs == 1:
        return (work(file) for file in files)
    return _from_processes(files, work, min(jobs, len(files)))


def _from_processes(files: Sequence[str], work: _Work, jobs: int) -> Generator[_Line]:
    """In order, and never far ahead of the one that is due.  However it ends, no process is left behind."""
    import multiprocessing
    from concurrent.futures.process import BrokenProcessPool

    _refuse_without_room(jobs + _BESIDES)
    pool = _pool(jobs)
    waiting: deque[tuple[str, Future[_Line]]] = deque()
    left = iter(files)
    try:
        while True:
            while len(waiting) < 2 * jobs and (file := next(left, None)) is not None:
                try:
                    future = _submit(pool, work, file)
                except BrokenProcessPool:
                    pool = _pool(jobs)
                    future = _submit(pool, work, file)
                waiting.append((file, future))
            if not waiting:
                break
            file, future = waiting.popleft()
            try:
                line = future.result()
            except BrokenProcessPool:  # a process was killed: which file it had can't be told
                line = _alone(work, file)
            yield line
    except BaseException:  # Ctrl-C, or nobody reads on
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        with suppress(RuntimeError):  # its thread could not be started
            pool.shutdown(cancel_futures=True)


def _refuse_without_room(count: int) -> None:
    """Raises ``RefusedError`` where a limit allows fewer processes: it counts threads too, which are tried.

    The pool starts what it needs piece by piece, and some pieces print a traceback, or wait for ever, without another.
    """
    import threading

    done, threads = threading.Event(), list[threading.Thread]()
    before = threading.stack_size(_SMALL_STACK)
    try:
        for _ in range(count):
            thread = threading.Thread(target=done.wait)
            thread.start()
            threads.append(thread)
    except RuntimeError as exc:
        raise RefusedError(_NO_PROCESS) from exc
    finally:
        done.set()
        for thread in threads:
            thread.join()
        threading.stack_size(before)


def _alone(work: _Work, file: str) -> _Line:
    """In a process that reads nothing else."""
    from concurrent.futures.process import BrokenProcessPool

    with _pool(1) as pool:
        try:
            return _submit(pool, work, file).result()
        except BrokenProcessPool:
            error = "the process that read it was killed"
            return _json({"file": file, "error": error}), [(input_name(file), error)], NOTHING_DONE


def _pool(jobs: int) -> "ProcessPoolExecutor":
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    # A file of the current folder may be called as one of Python's: none of these processes shall import it.
    os.environ["PYTHONSAFEPATH"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qmigrate.analysis.check"])  # and all that it needs, once for all of them
    try:
        return ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_who_started_it)
    except ConnectionError as exc:  # the process that looks after the others has died
        raise RefusedError(_NO_PROCESS) from exc


def _end_with_who_started_it() -> None:
    """In each process: were who started it killed, it would wait for work for ever, and hold what both have open."""
    import multiprocessing
    import threading
    from multiprocessing.connection import wait

    starter = multiprocessing.parent_process()
    assert starter is not None

    def watch() -> None:
        wait([starter.sentinel])
        os._exit(1)

    with suppress(RuntimeError):  # there may be no further thread: then it works all the same
        threading.Thread(target=watch, daemon=True).start()


def _submit(pool: "ProcessPoolExecutor", work: _Work, file: str) -> "Future[_Line]":
    """Start it, and perhaps a process.  Those see none of the signals that are for who started them.

    Raises ``RefusedError`` where no process can be started.
    """
    from concurrent.futures import BrokenExecutor
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # it lets SIGINT through once it runs: that must not happen below
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_WHO_STARTED_THEM)
    try:
        return pool.submit(work, file)
    except BrokenExecutor:
        raise
    except (EOFError, ConnectionError, BlockingIOError, RuntimeError) as exc:  # a limit of processes, or of threads
        raise RefusedError(_NO_PROCESS) from exc
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
