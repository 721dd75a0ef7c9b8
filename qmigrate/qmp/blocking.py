"""QMP for code without asyncio: an event loop in a thread of its own.

    with Blocking() as qmp:
        source = qmp.enter(Machine("qemu-system-x86_64", ["-display", "none"]))
        qmp.run(source.session.execute("stop"))
        qmp.run(migration.wait_until(source.session, "completed", timeout_s=60))

The loop runs on between two calls: events are heard, and what QEMU prints is read.
"""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Any, Self, TypeVar

__all__ = ["Blocking"]

T = TypeVar("T")


class Blocking:
    """Runs coroutines one call at a time.  What was entered is left in reverse order, when the block ends."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmigrate qmp", daemon=True)
        self._stack = AsyncExitStack()

    def __enter__(self) -> Self:
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
        """The result of a coroutine, or the exception that it raised.  Ctrl-C cancels it."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def enter(self, context: AbstractAsyncContextManager[T]) -> T:
        """Enter an ``async with``, until this block ends."""
        return self.run(self._stack.enter_async_context(context))
