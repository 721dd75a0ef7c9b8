"""One file, one answer, whatever is in it: for those who ask many files."""

import os
from collections.abc import Callable
from typing import Any

from qmigrate.capture.migration import Migration
from qmigrate.errors import QmigrateError
from qmigrate.format.tail import Chooser
from qmigrate.format.vmdesc import Description
from qmigrate.format.walk import Limits

__all__ = ["answer_file", "why"]


def answer_file(
    path: str | os.PathLike[str],
    answer: Callable[[Migration], dict[str, Any]],
    *,
    description: Description | Chooser | None = None,
    page_size: int | None = None,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """``{"file": path, **answer}``; where it can't be read, or holds no stream, ``{"file": path, "error": why}``.

    Nothing is raised for what a file is or holds: one bad file among thousands must not end the others.
    """
    named: dict[str, Any] = {"file": os.fsdecode(path)}
    try:
        with Migration(path, description=description, page_size=page_size, limits=limits) as migration:
            return named | answer(migration)
    except (QmigrateError, OSError, RecursionError, MemoryError) as exc:
        return named | {"error": why(exc).removeprefix(f"{named['file']}: ")}  # a connection of a recording names it


def why(failure: BaseException) -> str:
    """What failed, without the file's name."""
    match failure:
        case OSError():
            return failure.strerror or str(failure)
        case RecursionError():
            return "nested too deep to be shown"
        case MemoryError():
            return "not enough memory"
        case _:
            return str(failure)
