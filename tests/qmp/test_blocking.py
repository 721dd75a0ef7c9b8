"""QMP for code without asyncio."""

import asyncio
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
    before = threading.active_count()
    with Blocking():
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
