"""QMP for code without asyncio: an event loop in a thread of its own.

    with Blocking() as qmp:
        source = qmp.enter(Machine("qemu-system-x86_64", ["-display", "none"]))
        qmp.run(source.session.execute("stop"))
        qmp.run(migration.wait_until(source.session, "completed", timeout_s=60))

The loop runs on between two calls: events are heard, and what QEMU prints is read.

Inside a coroutine, or in a notebook that runs a loop of its own, this is refused: each call would hold up that loop.
There one awaits what is run here.
"""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Any, Final, Self, TypeVar

__all__ = ["Blocking"]

T = TypeVar("T")

END_TIMEOUT_S: Final = 30.0
"""A coroutine that is cancelled may have something to tell QEMU first: for so long it is waited for."""


class Blocking:
    """Runs coroutines one call at a time.  What was entered is left in reverse order, when the block ends."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmigrate qmp", daemon=True)
        self._stack = AsyncExitStack()

    def __enter__(self) -> Self:
        """Raises RuntimeError where this thread runs an event loop already."""
        if _in_a_loop():
            self._loop.close()
            raise RuntimeError("an event loop runs in this thread, and would be held up: await the coroutine instead")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.run(self._stack.aclose())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine, or the exception that it raised.  Ctrl-C cancels it, and waits for its end."""
        ended: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(coroutine))
            tasks[0].add_done_callback(lambda task: _pass_on(task, ended))

        try:
            self._loop.call_soon_threadsafe(begin)
            return ended.result()
        except BaseException:
            if not ended.done():  # it is not the coroutine's own
                self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])
                wait([ended], timeout=END_TIMEOUT_S)
            raise

    def enter(self, context: AbstractAsyncContextManager[T]) -> T:
        """Enter an ``async with``, until this block ends."""
        return self.run(self._stack.enter_async_context(context))


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _pass_on(task: asyncio.Task[T], ended: Future[T]) -> None:
    if task.cancelled():
        ended.cancel()
        ended.set_running_or_notify_cancel()  # wakes who waits; cancel() alone does not
    elif (error := task.exception()) is not None:
        ended.set_exception(error)
    else:
        ended.set_result(task.result())
