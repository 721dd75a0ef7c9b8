"""QMP for code without asyncio."""

import asyncio
import signal
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from qmigrate.qmp.blocking import Blocking


def test_what_a_coroutine_returns_or_raises_comes_out() -> None:
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    async def fail() -> None:
        raise KeyError("x")

    with Blocking() as blocking:
        assert blocking.run(double(21)) == 42
        with pytest.raises(KeyError):
            blocking.run(fail())


def test_what_was_entered_is_left_in_reverse_also_after_an_error() -> None:
    left: list[str] = []

    @asynccontextmanager
    async def named(name: str) -> AsyncGenerator[str, None]:
        try:
            yield name
        finally:
            left.append(name)

    def use() -> None:
        with Blocking() as blocking:
            assert blocking.enter(named("source")) == "source"
            blocking.enter(named("destination"))
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert left == ["destination", "source"]


def test_no_thread_is_left_behind() -> None:
    before = set(threading.enumerate())  # of which one may still be about to end
    with Blocking():
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) <= before


async def use_it_in_a_loop() -> None:
    with Blocking():
        pass


def test_inside_a_running_loop_it_is_refused_with_what_to_do() -> None:
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match=r"an event loop runs in this thread, .*: await the coroutine instead"):
        asyncio.run(use_it_in_a_loop())
    assert set(threading.enumerate()) <= before


def test_ctrl_c_cancels_and_waits_until_the_coroutine_has_ended() -> None:
    said: list[str] = []

    async def work() -> None:
        main = threading.main_thread().ident
        assert main is not None
        try:
            signal.pthread_kill(main, signal.SIGINT)
            await asyncio.sleep(60)
        finally:
            for _ in range(10):  # what it still has to say takes some turns of the loop
                await asyncio.sleep(0)
            said.append("told QEMU")

    with Blocking() as blocking:
        with pytest.raises(KeyboardInterrupt):
            blocking.run(work())
        assert said == ["told QEMU"]
        assert blocking.run(asyncio.sleep(0, "and goes on")) == "and goes on"
