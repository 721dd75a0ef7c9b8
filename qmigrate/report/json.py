"""The answers as JSON: one value, or one record a line.

Names from the stream are data: all but ASCII is escaped, and a byte that is no UTF-8 appears as the escaped
surrogate that Python decodes it to.
"""

import json
from collections.abc import Iterable
from typing import Any, TextIO

from qmigrate.analysis.records import coalesce, describe_record
from qmigrate.format.walk import Entry

__all__ = ["write_json", "write_json_line", "write_ndjson"]


def write_json(value: Any, out: TextIO) -> None:
    """One value, indented."""
    json.dump(value, out, indent=2)
    out.write("\n")


def write_json_line(value: Any, out: TextIO) -> None:
    """One value, on a line."""
    json.dump(value, out, separators=(",", ":"))
    out.write("\n")


def write_ndjson(entries: Iterable[Entry], out: TextIO, *, file: str | None = None) -> None:
    """One record a line, as they are read: memory stays bounded.  Raises what reading raises.

    ``file`` goes into each line, where there are several.
    """
    named = {} if file is None else {"file": file}
    for entry in coalesce(entries):
        write_json_line(named | describe_record(entry), out)
