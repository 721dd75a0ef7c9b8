"""A migration as data keeps to the schema that is shipped, and holds what the page shows."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import qmigrate.report
from qmigrate.analysis.timeline import timeline
from qmigrate.events import Side
from qmigrate.report.migration_json import migration_json
from tests import stories
from tests.report.schemas import faults, not_missed, not_refused
from tests.report.test_migration_page import MEASURED, hostile
from tests.stories import ZERO_US, Story

SCHEMA = json.loads((Path(qmigrate.report.__file__).parent / "migrate.schema.json").read_text())


def data_of(story: Story) -> Any:
    text = migration_json(timeline(story.events))
    assert text.isascii()
    return json.loads(text)


def test_the_schema_is_one_and_knows_every_part() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    data = data_of(stories.postcopy(MEASURED))
    # What QEMU measures, what was asked for, and what an event says are theirs to name.
    open_ones = ("$.plan", "$.sides.source.statistics", "$.sides.destination.statistics", "$.events[]")
    assert [each for each in not_missed(data, SCHEMA) if not each.startswith(open_ones)] == []
    assert [each for each in not_refused(data, SCHEMA) if not each.startswith(open_ones)] == []


@pytest.mark.parametrize(
    "story",
    [stories.precopy(), stories.postcopy(MEASURED), stories.failed(), Story()],
    ids=["precopy", "postcopy", "failed", "nothing"],
)
def test_every_story_keeps_to_the_schema(story: Story) -> None:
    data = data_of(story)
    assert faults(data, SCHEMA) == []
    assert set(data) == set(SCHEMA["properties"])


def test_it_holds_what_happened() -> None:
    data = data_of(stories.postcopy(MEASURED))
    assert faults(data, SCHEMA) == []
    assert (data["operation"], data["outcome"], data["exit_code"], data["recoveries"]) == ("migrate", "completed", 0, 1)
    assert data["guest"]["place"] == "destination"
    assert (data["zero_us"], data["length_us"]) == (ZERO_US, 3_000_000)
    assert data["stops"] == [{"begin_us": 1_000_000, "end_us": 1_008_000, "resumed_on": "destination"}]
    statuses = [phase["status"] for phase in data["sides"]["source"]["phases"]]
    assert statuses == [
        *("setup", "active", "device", "postcopy-active", "postcopy-paused", "postcopy-recover", "postcopy-active"),
        "completed",
    ]
    assert data["samples"][-1]["page_requests"] == 90
    assert data["latency"]["buckets"][8] == {"begin_us": 256, "end_us": 512, "count": 16}
    assert data["latency"]["buckets"][-1] == {"begin_us": 1 << 23, "end_us": None, "count": 0}
    assert [event["event"] for event in data["events"]][-1] == "finished"


def test_what_is_hostile_is_data() -> None:
    """It breaks the schema only where that names words: QEMU's own are any."""
    story = hostile()
    told = timeline(story.events)
    data = json.loads(migration_json(told))
    assert data["sides"]["source"]["phases"][0]["status"] == stories.HOSTILE
    assert told.sides[Side.SOURCE].version == stories.HOSTILE
