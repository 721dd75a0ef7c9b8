"""A migration that came in as data: what the page shows, as one JSON object.  Its schema: ``receive.schema.json``.

Times are microseconds from ``zero_us``, which is microseconds since 1970 by our clock: the source's first connection.
"""

import json
from dataclasses import asdict
from typing import Any

from qmigrate import __version__
from qmigrate.analysis.reception import Reception, Waited
from qmigrate.events import Received

__all__ = ["describe_reception", "reception_json"]


def reception_json(found: Reception) -> str:
    """The object as text, with a newline at its end."""
    return json.dumps(describe_reception(found), indent=2) + "\n"


def describe_reception(found: Reception) -> dict[str, Any]:
    """The object."""
    result = found.result
    return {
        "qmigrate": __version__,
        "uri": found.uri,
        "exit_code": result.exit_code,
        "message": result.message,
        "guest": result.place,
        "postcopy": result.is_postcopy,
        "zero_us": found.zero_us,
        "length_us": found.length_us,
        "receiving_us": found.receiving_us,
        "bytes_per_s": None if found.bytes_per_s is None else round(found.bytes_per_s),
        "numbers": dict(result.numbers),
        "phases": [{"phase": each.status, "begin_us": each.begin_us, "end_us": each.end_us} for each in found.phases],
        "waited": {where: _waited(each) for where, each in found.waited.items()},
        "blocks": [{"name": name, "length": length, "page_size": size} for name, length, size in found.blocks],
        "channels": list(found.channels),
        "samples": [{"at_us": each.at_us, **each.numbers} for each in found.samples],
        "events": [
            {"at_us": each.at_us, **each.event.plain()}
            for each in found.moments
            if not isinstance(each.event, Received)  # those are the samples
        ],
    }


def _waited(waited: Waited) -> dict[str, Any]:
    return {
        "count": waited.latency.count,
        "mean_us": waited.mean_us,
        "longest_us": waited.longest_us,
        "buckets": [asdict(each) for each in waited.latency.buckets],
    }
