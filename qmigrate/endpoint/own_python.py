"""How a further process of ours is started: this Python, this package, and nothing of the folder that we stand in."""

import os
import sys

__all__ = ["environment", "own_python"]

_PARENT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120 - pathlib takes long


def own_python(module: str, *words: str) -> list[str]:
    """The command; to be run with ``environment()``.  ``-P``: a file of the user's may be called as one of Python's."""
    return [sys.executable, "-P", "-m", module, *words]


def environment() -> dict[str, str]:
    """Ours, and where this package is, installed or not."""
    paths = [_PARENT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
