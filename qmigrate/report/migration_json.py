"""A migration as data: what the page shows, as one JSON object.  Its schema is ``migrate.schema.json`` beside this.

Times are microseconds from ``zero_us``, which is microseconds since 1970 by our clock.  Nothing is left out where
it is not known: it is null.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from qmigrate import __version__
from qmigrate.analysis.latency import Latency
from qmigrate.analysis.timeline import SideLine, Timeline
from qmigrate.events import Progressed

__all__ = ["describe_migration", "migration_json"]


def migration_json(timeline: Timeline) -> str:
    """The object as text, with a newline at its end."""
    return json.dumps(describe_migration(timeline), indent=2) + "\n"


def describe_migration(timeline: Timeline) -> dict[str, Any]:
    """The object."""
    finished, began = timeline.finished, timeline.began
    return {
        "qmigrate": __version__,
        "operation": began.operation if began else None,
        "uri": began.uri if began else None,
        "plan": dict(began.plan) if began else {},
        "outcome": finished.outcome if finished else None,
        "exit_code": finished.exit_code if finished else None,
        "message": finished.message if finished else None,
        "guest": None
        if finished is None
        else {
            "place": finished.place,
            "running": finished.running,
            "sentence": finished.sentence,
            "advice": finished.advice,
        },
        "switched": finished.switched if finished else None,
        "recoveries": finished.recoveries if finished else None,
        "zero_us": timeline.zero_us,
        "length_us": timeline.length_us,
        "downtime_ms": timeline.downtime_ms,
        "stops": _plain(timeline.stops),
        "sides": {str(side): _side(line) for side, line in timeline.sides.items()},
        "passes": _plain(timeline.passes),
        "samples": _plain(timeline.samples),
        "latency": _latency(timeline.latency),
        "events": [
            {"at_us": each.at_us, **each.event.plain()}
            for each in timeline.moments
            if not isinstance(each.event, Progressed)  # those are the samples
        ],
    }


def _plain(values: Sequence[Any]) -> list[dict[str, Any]]:
    return [asdict(value) for value in values]


def _side(line: SideLine) -> dict[str, Any]:
    return {
        "address": line.address,
        "version": line.version,
        "clock": asdict(line.clock),
        "phases": _plain(line.phases),
        "runs": _plain(line.runs),
        "statistics": dict(line.statistics),
    }


def _latency(latency: Latency) -> dict[str, Any] | None:
    if not latency.known:
        return None
    return asdict(latency)
