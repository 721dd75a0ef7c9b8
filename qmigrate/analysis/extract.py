"""RAM out of a stream: each block as a sparse file of its full length."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qmigrate.analysis.ram_files import ExtractError, RamWriter, distinct_names, file_name, file_names, refuse_input
from qmigrate.analysis.summary import describe_error, missing_pages
from qmigrate.capture.migration import Gathering, Migration
from qmigrate.errors import StreamError

__all__ = ["ExtractError", "Extracted", "describe_extract", "extract", "file_name", "file_names", "folder_names"]

_INDEX: Final = "blocks.json"
_MOST_FAULTS: Final = 20  # of pages that can't be decoded


@dataclass(slots=True)
class Extracted:
    """What was written: for each block its file and how many bytes of pages; and the stream's contents."""

    directory: Path
    files: dict[str, str]
    gathering: Gathering
    bytes_written: dict[str, int] = field(default_factory=dict)


def folder_names(inputs: Sequence[str]) -> dict[str, str]:
    """A folder name for each input, by the last part of its path: those that would collide get a number."""
    return distinct_names({each: "stdin" if each == "-" else Path(each).name for each in inputs})


def extract(
    migration: Migration, directory: str | os.PathLike[str], *, inputs: Iterable[str | os.PathLike[str]] = ()
) -> Extracted:
    """Write RAM as the stream leaves it into ``directory``, which is made if need be.

    Each block becomes a sparse file of the block's full length, ``blocks.json`` maps the names; the last copy
    of a page wins.  Files appear under their names once the stream has been read; at a fault what was good
    before it is kept.  Raises ``ExtractError`` and ``OSError`` where writing fails, or would overwrite one of the
    migration's files or of ``inputs``.
    """
    folder = Path(directory)
    kept = {each.identity for each in migration.sources if each.identity is not None}.union(_identities(inputs))
    refuse_input(folder / _INDEX, kept)
    folder.mkdir(parents=True, exist_ok=True)
    gathering = migration.gather()
    extracted = Extracted(folder, {}, gathering)
    faults: list[StreamError] = []
    with ExitStack() as stack:
        writer = RamWriter(folder, stack, kept)
        for entry in gathering:
            try:
                writer.take(entry, gathering.contents.blocks)
            except StreamError as exc:  # in what a page's data decodes to: the others are good
                exc.input = gathering.contents.input_of(entry.channel)
                faults.append(exc)
        writer.finish()
    faults += map(StreamError, writer.doubts())
    faults += (StreamError(sentence) for sentence in missing_pages(gathering.contents))
    if faults:
        gathering.contents.errors += faults[:_MOST_FAULTS]
        gathering.contents.complete = False
    extracted.files = writer.names
    extracted.bytes_written = writer.bytes_written
    _write_index(extracted)
    return extracted


def _identities(paths: Iterable[str | os.PathLike[str]]) -> Iterator[tuple[int, int]]:
    """Of those that are there."""
    for path in paths:
        with suppress(OSError):
            status = os.stat(path)  # noqa: PTH116 - a Path can't be of any string
            yield status.st_dev, status.st_ino


def _write_index(extracted: Extracted) -> None:
    blocks = extracted.gathering.contents.blocks
    index: list[dict[str, Any]] = [
        {"name": name, "file": file, "length": blocks[name].length, "address": blocks[name].address}
        for name, file in extracted.files.items()
    ]
    path = extracted.directory / _INDEX
    temporary = extracted.directory / f".blocks.json.{os.getpid()}.part"
    try:
        temporary.write_text(json.dumps(index, indent=2) + "\n")
        temporary.replace(path)
    except OSError as exc:
        exc.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def describe_extract(extracted: Extracted) -> dict[str, Any]:
    """As ``extract --json`` prints it; lengths in bytes, ``data`` without the holes."""
    contents = extracted.gathering.contents
    return {
        "directory": str(extracted.directory),
        "blocks": [
            {
                "name": name,
                "file": file,
                "length": contents.blocks[name].length,
                "data": extracted.bytes_written.get(name, 0),
            }
            for name, file in extracted.files.items()
        ],
        "complete": contents.complete,
        "errors": [describe_error(error) for error in contents.errors],
    }
