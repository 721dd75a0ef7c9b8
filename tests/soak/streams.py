"""Damaged streams by the thousand: every stream of the corpus, changed and cut, in processes with little memory."""

import asyncio
import functools
import random
import resource
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Final

from qmigrate.analysis.summary import summarize
from qmigrate.errors import StreamError
from qmigrate.format import closing
from qmigrate.format.mapped_ram import MappedPages
from qmigrate.format.ram import Pages
from qmigrate.format.vmdesc import parse_description
from tests.soak.migrations import Unit
from tests.test_mutations import STREAMS, answer, mutated, slim
from tests.walking import corpus, entries

MUTATIONS: Final = 1000  # of a stream, a run
WHOLE: Final = 40  # of them with all its pages and devices
CUTS: Final = 200  # at pages, a run
WORKERS: Final = 2
ROOM: Final = 256 << 20  # bytes of address space beyond what a process has at its start
_NEAR: Final = (-1, 0, 1)


def units() -> Iterator[Unit]:
    """Each stream changed, and cut."""
    for name in STREAMS:
        yield Unit(f"damaged {name}", in_processes(functools.partial(_changed, name), MUTATIONS))
        yield Unit(f"damaged {name} in whole", in_processes(functools.partial(_changed_whole, name), WHOLE))
        yield Unit(f"damaged {name} by cuts", in_processes(functools.partial(_cut, name), CUTS))


def in_processes(work: Callable[[str, int], str], count: int) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(chance: random.Random, _: Path) -> str:
        loop, seeds = asyncio.get_running_loop(), [f"{chance.getrandbits(32)}" for _ in range(WORKERS)]
        with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn"), initializer=_begin) as pool:
            shares = [loop.run_in_executor(pool, work, seed, count // WORKERS) for seed in seeds]
            notes = await asyncio.gather(*shares)
        return next(filter(None, notes), "")

    return run


def _begin() -> None:
    """Memory that followed a claim in a stream would be more than there is; each description is parsed once."""
    setattr(closing, "parse_description", functools.lru_cache(maxsize=8)(parse_description))  # noqa: B010 - for mypy
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))


def _changed(name: str, seed: str, count: int) -> str:
    """Changes of the stream without most of its pages and devices, which are many a second."""
    stream, boundaries = slim(name)
    return _change(stream, boundaries, seed, count)


def _changed_whole(name: str, seed: str, count: int) -> str:
    """Changes of the stream as it was recorded."""
    stream = corpus(name)
    return _change(stream, [entry.offset for entry in entries(stream)], seed, count)


def _change(stream: bytes, boundaries: list[int], seed: str, count: int) -> str:
    chance = random.Random(seed)
    for number in range(count):
        _assert_answered(mutated(stream, boundaries, chance), f"seed {seed}, change {number}")
    return ""


def _cut(name: str, seed: str, count: int) -> str:
    """Cuts at, before and behind the records of pages, and within them."""
    stream, chance = corpus(name), random.Random(seed)
    places = [
        at
        for entry in entries(stream)
        if isinstance(entry.record, Pages | MappedPages)
        for run in entry.record.runs[:64]
        for at in (run.offset, run.offset + 8)
    ]
    for place in chance.sample(places, min(count, len(places))):
        cut = place + chance.choice(_NEAR)
        complete = _assert_answered(stream[:cut], f"cut at {cut:#x}")
        assert not complete, f"cut at {cut:#x} and said to be complete"
    return "" if places else "no records of pages"


def _assert_answered(data: bytes, what: str) -> bool:
    """An answer, the same bytes, and one fault or none; is it complete?"""
    checked = answer(data)
    if checked is None:
        return False
    contents = checked.gathering.contents
    assert checked.differences == [], f"{what}: comes back different at {checked.differences[0].offset:#x}"
    assert contents.complete == (not contents.errors), what
    assert all(isinstance(error, StreamError) for error in contents.errors), what
    assert contents.length == checked.length <= len(data), what
    assert contents.length == len(data) or contents.errors, what
    assert summarize(contents)["complete"] == contents.complete, what
    return contents.complete
