"""Recordings of the tap whose files are damaged, by the thousand: what each command says of them."""

import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.damaged import KINDS, assert_all_answered, sample
from tests.soak.migrations import Unit
from tests.soak.streams import in_processes

DAMAGES: Final = 600  # of a recording, a run


def units() -> Iterator[Unit]:
    """Each kind of recording."""
    for name in KINDS:
        yield Unit(f"damaged recording {name}", in_processes(functools.partial(_damaged, name), DAMAGES))


def _damaged(name: str, seed: str, count: int) -> str:
    with tempfile.TemporaryDirectory(prefix="qmigrate-soak-") as temporary:
        folder = Path(temporary)
        os.environ["QMIGRATE_CACHE"] = str(folder / "cache")
        assert_all_answered(sample(name, folder), seed, count, folder)
    return ""
