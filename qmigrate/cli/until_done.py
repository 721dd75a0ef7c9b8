"""What live commands do while they wait for their work: hear signals, and renew what is shown."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, Protocol, TypeVar

__all__ = ["until_done", "until_served"]

REFRESHES_EVERY_S: Final = 0.25

T = TypeVar("T")


class _Teller(Protocol):
    def refresh(self) -> None: ...

    def suspend(self) -> None: ...

    def resume(self) -> None: ...


async def until_done(
    task: "asyncio.Future[T]", teller: _Teller, handlers: Mapping[signal.Signals, Callable[[], None]]
) -> T:
    """What the task gives.  Its signals have these handlers meanwhile; Ctrl-Z leaves the terminal as it was."""

    def suspend() -> None:
        teller.suspend()
        os.kill(os.getpid(), signal.SIGSTOP)  # we go on here when somebody says so
        teller.resume()

    loop = asyncio.get_running_loop()
    handlers = {**handlers, signal.SIGTSTP: suspend}
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    refreshing = asyncio.ensure_future(_refresh(teller))
    try:
        return await task
    finally:
        refreshing.cancel()
        await asyncio.wait([refreshing])
        for number in handlers:
            loop.remove_signal_handler(number)


async def until_served(work: Coroutine[Any, Any, T], interrupt: Callable[[], bool], hang_up: Callable[[], bool]) -> T:
    """What the work gives.  Ctrl-C and SIGTERM, and a terminal that goes away, cancel it where these answer False.

    Raises ``CancelledError`` then.
    """
    task = asyncio.ensure_future(work)

    def heard(is_dealt_with: Callable[[], bool]) -> None:
        if not is_dealt_with():
            task.cancel()

    loop = asyncio.get_running_loop()
    for number, answer in ((signal.SIGINT, interrupt), (signal.SIGTERM, interrupt), (signal.SIGHUP, hang_up)):
        loop.add_signal_handler(number, heard, answer)
    return await task


async def _refresh(teller: _Teller) -> None:
    while True:
        teller.refresh()
        await asyncio.sleep(REFRESHES_EVERY_S)
