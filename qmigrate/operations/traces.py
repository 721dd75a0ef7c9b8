"""A trace of touches: from a recording, whose page requests are what a guest touched, or from lines of text."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qmigrate.capture.frames import MAGIC
from qmigrate.endpoint.destination import Touch
from qmigrate.errors import RefusedError

__all__ = ["read_trace"]

_WRITES: Final = {"r": False, "w": True}


def read_trace(path: str | os.PathLike[str]) -> tuple[Touch, ...]:
    """The touches, in their order.

    A recording (of ``tap``, or ``receive --record``) gives its page requests.  Else it is text, a touch a line:
    ``BLOCK START``, or ``BLOCK START w`` for a write; ``#`` begins a remark.
    Raises ``RefusedError`` for what is neither or holds none, ``OSError``.
    """
    with Path(path).open("rb") as file:
        is_recording = file.read(len(MAGIC)) == MAGIC
    found = tuple(_of_recording(path) if is_recording else _of_text(path))
    if not found:
        raise RefusedError(f"{os.fspath(path)} has no {'page requests' if is_recording else 'touches'}")
    return found


def _of_recording(path: str | os.PathLike[str]) -> Iterator[Touch]:
    from qmigrate.analysis.recording import RecordingStory
    from qmigrate.capture.recording import Recording

    with Recording(path) as recording:
        for moment in RecordingStory(recording).advance():
            if moment.name.startswith("REQ_PAGES") and "block" in moment.details:
                yield Touch(moment.details["block"], moment.details["start"])


def _of_text(path: str | os.PathLike[str]) -> Iterator[Touch]:
    text = Path(path).read_text("utf-8", "surrogateescape")
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            yield _touch(words)
        except (ValueError, KeyError, IndexError):
            raise RefusedError(
                f"{os.fspath(path)}: line {number} is no touch: expected BLOCK START, and w for a write"
            ) from None


def _touch(words: list[str]) -> Touch:
    block, start, *rest = words
    kind, *more = rest or ["r"]
    if more or int(start, 0) < 0:
        raise ValueError(words)
    return Touch(block, int(start, 0), _WRITES[kind])
