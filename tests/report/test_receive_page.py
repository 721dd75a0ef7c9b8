"""What is kept of a reception: a page that is complete in itself, and data by the schema that is shipped."""

import json
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest

import qmigrate.report
from qmigrate import events
from qmigrate.analysis.reception import ReceiveResult, Reception, reception
from qmigrate.events import LiveEvent, Side
from qmigrate.report.paper import Paper
from qmigrate.report.receive_page import receive_page
from qmigrate.report.reception import write_reception
from qmigrate.report.reception_json import reception_json
from tests.report.papers import file
from tests.report.schemas import faults, not_missed, not_refused
from tests.report.test_migration_page import Read
from tests.stories import HOSTILE, MIB, ZERO_US

SCHEMA: Final = json.loads((Path(qmigrate.report.__file__).parent / "receive.schema.json").read_text())
DESTINATION: Final = Side.DESTINATION
COUNTS: Final = [0, 0, 0, 0, 0, 0, 0, 3, 16, 0, 1, *[0] * 13]


def received(at_us: int, **numbers: int) -> LiveEvent:
    return events.Received(side=DESTINATION, time_us=ZERO_US + at_us, **numbers)


def begun(name: str = "pc.ram") -> list[LiveEvent]:
    return [
        events.Listening(side=DESTINATION, time_us=ZERO_US - 5, uri="tcp:0.0.0.0:4444", control="/run/control"),
        events.ChannelCame(side=DESTINATION, time_us=ZERO_US, kind="main"),
        events.BlocksCame(side=DESTINATION, time_us=ZERO_US + 900, blocks=[(name, 64 * MIB, 4096)]),
    ]


def postcopy(name: str = "pc.ram", reason: str = "reset by peer") -> Reception:
    """Half a second of precopy, two of postcopy with a pause of one in between."""
    numbers = {
        "received_bytes": 12 * MIB,
        "normal": 3000,
        "zero": 1000,
        "duplicates": 1,
        "discarded": 512,
        "requested": 20,
        "faults": 22,
        "preempt": 20,
        "touches": 5000,
        "writes": 50,
    }
    told = [
        *begun(name),
        received(250_000, received_bytes=2 * MIB, normal=512),
        received(750_000, received_bytes=4 * MIB, normal=1024, requested=3, faults=3),
        events.Troubled(side=DESTINATION, time_us=ZERO_US + 1_000_000, message=reason),
        events.Paused(side=DESTINATION, time_us=ZERO_US + 1_000_000, reason=reason, control="/run/control"),
        events.ChannelCame(side=DESTINATION, time_us=ZERO_US + 2_000_000, kind="resumed"),
        events.Latency(
            side=DESTINATION, time_us=ZERO_US + 900_000, where="touchers", counts=[1] * 24, mean_us=1.0, longest_us=2.0
        ),
        events.Latency(
            side=DESTINATION, time_us=ZERO_US + 2_900_000, where="touchers", counts=COUNTS, mean_us=400, longest_us=1500
        ),
        received(3_000_000, **numbers),
    ]
    phases = [
        *(("precopy", 0), ("listening", 500_000), ("running", 510_000), ("paused", 1_000_000)),
        *(("recovering", 2_000_000), ("running", 2_010_000), ("ended", 3_000_000)),
    ]
    result = ReceiveResult(
        exit_code=0,
        message="the migration was received",
        place="here",
        is_postcopy=True,
        numbers=numbers,
        phases=[(phase, ZERO_US + at_us) for phase, at_us in phases],
    )
    return reception(told, result)


def failed(message: str = "0x10: ram: page header has unknown flags") -> Reception:
    result = ReceiveResult(exit_code=3, message=message, place="source", phases=[("precopy", ZERO_US)])
    return reception([*begun(), events.Troubled(time_us=ZERO_US + 5_000, message=message)], result)


def nothing() -> Reception:
    told = begun()[:1]
    return reception(told, ReceiveResult(exit_code=130, message="interrupted before anything began"))


STORIES: Final = {"postcopy": postcopy(), "failed": failed(), "nothing": nothing()}
every_story = pytest.mark.parametrize("found", STORIES.values(), ids=STORIES)


@every_story
def test_the_page_is_well_formed_and_asks_nobody_for_anything(found: Reception) -> None:
    page = receive_page(found)
    read = Read(page)
    assert {"html", "head", "body", "main", "title", "style"} <= set(read.tags)
    assert not {"link", "img", "iframe", "base", "object", "form", "a"} & set(read.tags)
    assert [each for each in read.attributes if each[1] in ("src", "href", "action", "srcset")] == []
    for forbidden in ("http://", "https://", "url(", "@import"):
        assert forbidden not in page


def test_the_page_tells_all_of_it() -> None:
    text = Read(receive_page(postcopy())).text
    for expected in (
        "Received with postcopy",
        "tcp:0.0.0.0:4444",
        "received 12 MiB on 2 connections",
        "throughput 6.0 MiB/s in 1.99 s",
        "pages 3,000 and 1,000 zero pages",
        "requested 20 of 22 faults",
        "came twice 1",
        "a touch waited < 512 µs half of them; the longest 1.5 ms",
        "paused 1.000 s 1 s",
        "20 pages: half took less than 512 µs, 99 of 100 less than 2.05 ms, the longest 1.5 ms; 400 µs on average.",
        "256 – 512 µs 16 80 %",
        "on the preempt channel 20",
        "discarded 512",
        "there already 1",
        "5,000, 50 of them writes",
        "pc.ram 64 MiB 4 KiB",
        "What went wrong",
        "the connection broke: reset by peer",
    ):
        assert expected in text, expected


def test_a_failure_says_why_and_whose_the_guest_is() -> None:
    text = Read(receive_page(failed())).text
    for expected in ("Receiving by precopy failed", "The guest is the source's.", "page header has unknown flags"):
        assert expected in text


def test_names_and_reasons_are_never_more_than_text() -> None:
    page = receive_page(postcopy(HOSTILE, HOSTILE))
    read = Read(page)
    assert set(read.tags) == set(Read(receive_page(postcopy())).tags)
    assert not [each for each in read.attributes if each[1].startswith("on")]
    assert "\x1b" not in page
    assert faults(data_of(postcopy(HOSTILE, HOSTILE)), SCHEMA) == []


def data_of(found: Reception) -> Any:
    text = reception_json(found)
    assert text.isascii()
    return json.loads(text)


def test_the_schema_is_one_and_knows_every_part() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    data = data_of(postcopy())
    # A number that was not counted is left out; what an event says is its own.
    numbers = ("$.numbers.", "$.waited.", "$.samples[].", "$.events[].")
    assert [each for each in not_missed(data, SCHEMA) if not each.startswith(numbers)] == []
    assert not_refused(data, SCHEMA) == ["$.events[]"]


@every_story
def test_data_keeps_to_the_schema(found: Reception) -> None:
    data = data_of(found)
    assert faults(data, SCHEMA) == []
    assert data["guest"] == found.result.place


def test_data_holds_what_happened() -> None:
    data = data_of(postcopy())
    assert (data["guest"], data["postcopy"], data["length_us"]) == ("here", True, 3_000_000)
    assert (data["receiving_us"], data["bytes_per_s"]) == (1_990_000, round(12 * MIB / 1.99))
    assert [each["phase"] for each in data["phases"]] == [
        *("precopy", "listening", "running", "paused", "recovering", "running", "ended"),
    ]
    assert data["waited"]["touchers"]["buckets"][8] == {"begin_us": 256, "end_us": 512, "count": 16}
    assert data["waited"]["touchers"]["buckets"][-1] == {"begin_us": 1 << 23, "end_us": None, "count": 0}
    assert [each["at_us"] for each in data["samples"]] == [250_000, 750_000, 3_000_000]
    assert [each["event"] for each in data["events"]][:3] == ["listening", "channel-came", "blocks-came"]


def test_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    paper, out = file(monkeypatch)
    assert isinstance(paper, Paper)
    write_reception(postcopy(), paper)
    assert out.getvalue().splitlines() == [
        "the migration was received",
        "  received  12 MiB in 1.99 s, 6.0 MiB/s",
        "  pages     3,000 pages, 1,000 zero pages",
        "  postcopy  512 discarded, 20 requested, 1 that were there already, 20 on the preempt channel",
        "  touches   5,000, 50 of them writes",
        "  phases    precopy at 0, listening at 500 ms, running at 510 ms, paused at 1 s, recovering at 2 s, "
        "running at 2.01 s, ended at 3 s",
        "",
        "From touch to read, by touchers  20 pages, half took less than 512 µs, 99 of 100 less than 2.05 ms, the "
        "longest 1.5 ms",
        "  less than 256 µs             3   15 %  ████████",
        "  less than 512 µs            16   80 %  ████████████████████████████████████████",
        "  less than 1.02 ms            0    0 %",
        "  less than 2.05 ms            1    5 %  ███",
    ]
