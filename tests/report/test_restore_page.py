"""The page about a restore: complete in itself, well-formed, and never more than text where others' words stand."""

from dataclasses import replace

import pytest

from qmigrate.analysis.restore_story import RestoreStory, Row, Stretch, latency_of, phases_of, runs_of, troubles_of
from qmigrate.events import GuestChanged, LiveEvent, Side, StatusChanged, Troubled
from qmigrate.report.restore_page import restore_page
from tests.report.test_migration_page import Read
from tests.stories import HOSTILE

SECOND = 1_000_000
LAZY = RestoreStory(
    file="guest.mig",
    way="lazily",
    exit_code=0,
    message="the guest runs, all its pages are in",
    began_us=1_700_000_000 * SECOND,
    length_us=2 * SECOND,
    version="11.1.3 (Debian)",
    moments={
        "indexed": 90_000,
        "switched": 100_000,
        "loaded": 110_000,
        "running": 112_000,
        "sign": 115_000,
        "first_answer": 104_000,
        "filled": 2 * SECOND - 5000,
    },
    phases=[
        Stretch(95_000, 105_000, "setup"),
        Stretch(105_000, 1 * SECOND, "postcopy-active"),
        Stretch(SECOND, SECOND + 30_000, "postcopy-paused"),
        Stretch(SECOND + 30_000, 2 * SECOND, "postcopy-active"),
        Stretch(2 * SECOND, 2 * SECOND, "completed"),
    ],
    runs=[Stretch(112_000, 2 * SECOND, "runs")],
    total=65536,
    pages=65536,
    requested=640,
    requests=700,
    sent_bytes=200 << 20,
    recoveries=1,
    latency=latency_of([0, 0, 0, 0, 500, 139, 0, 0, 0, 1, *[0] * 22]),
    mean_us=22.5,
    longest_us=700.0,
    slice_us=1000,
    requests_in=[0] * 104 + [1] * 700 + [0] * 1195,
    pages_in=[0] * 104 + [36] * 1820 + [16],
    bytes_in=[0] * 104 + [100_000] * 1821,
    troubles=[Row(SECOND, "destination", "the destination closed the connection")],
    rows=[Row(95_000, "destination", "setup"), Row(100_000, "destination", "the package is sent")],
    facts=[("File", "guest.mig"), ("Machine", "pc-q35-11.1")],
)
NOTHING = RestoreStory(file="guest.mig", way="eagerly", exit_code=3, message="it broke")


@pytest.mark.parametrize("story", [LAZY, NOTHING, replace(LAZY, pages_in=(), requests_in=(), bytes_in=())])
def test_it_is_well_formed_and_asks_nobody_for_anything(story: RestoreStory) -> None:
    page = restore_page(story)
    found = Read(page)
    assert {"html", "head", "body", "main", "title", "style"} <= set(found.tags)
    assert not {"link", "img", "iframe", "base", "object", "form", "a"} & set(found.tags)
    assert [each for each in found.attributes if each[1] in ("src", "href", "xlink:href", "action", "srcset")] == []
    for forbidden in ("http://", "https://", "url(", "@import", "@font-face"):
        assert forbidden not in page


def test_a_lazy_restore_is_told_in_full() -> None:
    text = Read(restore_page(LAZY)).text
    for expected in (
        "Restored lazily",
        "guest.mig · into QEMU 11.1.3 · 2023-11-14 22:13:20 UTC",
        "devices loaded 110 ms",
        "guest runs 112 ms",
        "first sign of it 115 ms",
        "first answer 104 ms",
        "all sent 2 s",
        "memory 256 MiB 65,536 pages",
        "pages asked for 640 1 % of all, in 700 requests",
        "connection made anew 1 time",
        "postcopy-paused",
        "Memory missing missing of 256 MiB",
        "requests at most",
        "Until it ran",
        "Of its memory, 1 % was there when it began to run.",
        "640 pages that the destination asked for",
        "Half of them took less than 32 µs, 99 of 100 less than 64 µs.",
        "Longest 700 µs",
        "the destination closed the connection",
        "2 events",
        "Machine pc-q35-11.1",
    ):
        assert expected in text, expected


@pytest.mark.parametrize(
    ("exit_code", "title", "outcome"),
    [
        (3, "Not restored: the guest is in the file", "cancelled"),
        (5, "Paused: the guest waits for pages", "paused"),
        (6, "The guest is lost", "failed"),
        (7, "It is not known where the guest is", "failed"),
    ],
)
def test_how_it_ended_stands_first(exit_code: int, title: str, outcome: str) -> None:
    page = restore_page(replace(LAZY, exit_code=exit_code, message="the connection broke"))
    assert f'<header class="outcome {outcome}">' in page
    assert f"{title} The connection broke." in Read(page).text


@pytest.mark.parametrize("words", HOSTILE)
def test_what_others_say_is_text(words: str) -> None:
    story = replace(
        LAZY,
        file=words,
        message=words,
        version=words,
        phases=[Stretch(0, SECOND, words)],
        troubles=[Row(0, words, words)],
        rows=[Row(0, words, words)],
        facts=[("File", words)],
    )
    assert Read(restore_page(story)).tags.count("script") == Read(restore_page(LAZY)).tags.count("script")


def test_what_was_heard_becomes_stretches_of_time() -> None:
    there = Side.DESTINATION
    told: list[LiveEvent] = [
        StatusChanged(side=there, status="setup", time_us=1100),
        StatusChanged(side=there, status="postcopy-active", time_us=1300),
        GuestChanged(side=there, running=True, time_us=1310),
        GuestChanged(side=there, running=False, time_us=1400),
        GuestChanged(side=there, running=True, time_us=1500),
        Troubled(side=there, message="it closed", time_us=1450),
    ]
    assert phases_of(told, 1000, 900) == [Stretch(100, 300, "setup"), Stretch(300, 900, "postcopy-active")]
    assert runs_of(told, 1000, 900) == [Stretch(310, 400, "runs"), Stretch(500, 900, "runs")]
    assert troubles_of(told, 1000) == [Row(450, "destination", "it closed")]
    assert [each.count for each in latency_of([1, 2, 3]).buckets] == [1, 2, 3]
    assert [(each.begin_us, each.end_us) for each in latency_of([1, 2, 3]).buckets] == [(0, 2), (2, 4), (4, None)]
