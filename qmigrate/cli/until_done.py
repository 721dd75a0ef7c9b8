"""What live commands do while they wait for their work: hear signals, and renew what is shown."""

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from typing import Final, Protocol, TypeVar

__all__ = ["until_done"]

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


async def _refresh(teller: _Teller) -> None:
    while True:
        teller.refresh()
        await asyncio.sleep(REFRESHES_EVERY_S)
