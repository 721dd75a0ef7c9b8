"""The page about a migration: complete in itself, well-formed, and never more than text where QEMU's words stand."""

import base64
import hashlib
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate import events
from qmigrate.analysis.timeline import timeline
from qmigrate.events import LiveEvent, Side
from qmigrate.report.migration_page import migration_page
from tests import stories
from tests.stories import HOSTILE, MIB, ZERO_US, Story

SOURCE, DESTINATION = Side.SOURCE, Side.DESTINATION
VOID = {"meta", "br", "link", "img", "input", "hr"}
MEASURED = {
    "postcopy-blocktime": 12,
    "postcopy-vcpu-blocktime": [9, 3],
    "postcopy-latency": 300_000,
    "postcopy-latency-dist": [0, 0, 0, 0, 0, 0, 0, 3, 16, 0, 1, *[0] * 13],
}


class Read(HTMLParser):
    """A page as a browser takes it; an element that is not closed where it should be is an error."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} says twice what it is: {names}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page_of(told: Iterable[LiveEvent]) -> str:
    return migration_page(timeline(told))


def read(told: Iterable[LiveEvent]) -> Read:
    return Read(page_of(told))


STORIES = [stories.precopy(), stories.postcopy(MEASURED), stories.failed(), Story()]


@pytest.mark.parametrize("story", STORIES, ids=["precopy", "postcopy", "failed", "nothing"])
def test_it_is_well_formed_and_asks_nobody_for_anything(story: Story) -> None:
    page = page_of(story.events)
    found = Read(page)
    assert {"html", "head", "body", "main", "title", "style"} <= set(found.tags)
    assert not {"link", "img", "iframe", "base", "object", "form", "a"} & set(found.tags)
    fetching = [each for each in found.attributes if each[1] in ("src", "href", "xlink:href", "action", "srcset")]
    assert fetching == []
    assert not [each for each in found.attributes if each[1].startswith("on")]
    for forbidden in ("http://", "https://", "//cdn", "url(", "@import", "@font-face"):
        assert forbidden not in page


def test_no_script_can_run_but_its_own() -> None:
    page = page_of(stories.precopy().events)
    found = Read(page)
    (policy,) = [
        value for tag, name, value in found.attributes if (tag, name) == ("meta", "content") and "src" in value
    ]
    script = found.scripts[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}';" in policy


def test_precopy_is_told_in_full() -> None:
    text = read(stories.precopy().events).text
    for expected in (
        "Migrated by precopy",
        "QEMU 11.1.3 → 11.1.3",
        "The guest runs on the destination.",
        "guest stopped 5 ms QEMU counts 6 ms",
        "sent 40 MiB of 64 MiB of memory",
        "passes 3 as QEMU counts them",
        "Memory left to send left at most 19 MiB",
        "sent at most 20.2 MiB/s",
        "dirtied at most 4 MiB/s",
        "From STOP on one side to RESUME on the destination it ran nowhere for 5 ms.",
        "bandwidth 16 MiB/s",
        "tcp:there:4444",
        "taken to be ours",
    ):
        assert expected in text
    assert "Waiting for pages" not in text
    assert "What went wrong" not in text


def test_both_sides_are_on_one_axis() -> None:
    page = page_of(stories.precopy().events)
    assert 'class="band precopy" style="left:0.15%;width:99.7%" title="active · 1.99 s"' in page  # the source
    assert 'class="band precopy" style="left:0.1%;width:99.7%" title="active · 1.99 s"' in page  # the destination
    assert '<i class="mark stop" style="left:99.5%;width:0.25%">' in page


def test_postcopy_shows_pauses_requests_and_qemus_own_buckets() -> None:
    found = read(stories.postcopy(MEASURED).events)
    for expected in (
        "Migrated with postcopy",
        "pages requested 90",
        "brought back 1 time",
        "Pages requested, in all requests at most 90",
        "20 requests, by how long the guest waited for the page. Half of them took less than 512 µs, 99 of 100 less "
        "than 2.05 ms.",
        "128 – 256 µs 3 15 %",
        "256 – 512 µs 16 80 %",
        "512 µs – 1.02 ms 0 0 %",
        "1.02 – 2.05 ms 1 5 %",
        "All CPUs waited at once 12 ms",
        "CPU 1 waited 3 ms",
        "Mean of a request 300 µs",
    ):
        assert expected in found.text
    titles = [value for _, name, value in found.attributes if name == "title"]
    assert "postcopy-paused · 100 ms" in titles
    assert "contradicts" not in found.text


def test_a_mean_that_is_contradicted_is_said_to_be() -> None:
    assert (
        "which its own distribution contradicts"
        in read(stories.postcopy({**MEASURED, "postcopy-latency": 9_000_000}).events).text
    )


def test_an_older_destination_tells_only_for_how_long_cpus_waited() -> None:
    text = read(stories.postcopy({"postcopy-blocktime": 6, "postcopy-vcpu-blocktime": [6]}).events).text
    assert "how long single requests took, this QEMU does not tell" in text
    assert "All CPUs waited at once 6 ms" in text
    text = read(stories.postcopy({"postcopy-blocktime": 6, "postcopy-vcpu-blocktime": [6, 1, 1, 2, 3]}).events).text
    assert "CPUs 0 to 4 waited 6 · 1 · 1 · 2 · 3 ms" in text


def test_a_failure_says_what_and_where_the_guest_is() -> None:
    text = read(stories.failed().events).text
    for expected in ("Migration failed", "The guest runs on the source.", "destination: No such device", "Look at it."):
        assert expected in text
    assert "What went wrong" in text
    assert "source QEMU says: No such device" in text


def test_a_recovery_is_called_one() -> None:
    story = Story()
    story.begins({"recoveries": 1}, operation="recover")
    story.status(1, SOURCE, "postcopy-active")
    story.ends(9, switched=True, recoveries=1)
    assert "Postcopy brought back" in read(story.events).text


def test_two_clocks_are_told_of() -> None:
    text = read(stories.precopy(off_us={DESTINATION: -5_000_000}).events).text
    assert "5 s behind ours, to within 200 µs" in text
    assert "The clocks of two hosts are compared: this may be wrong by 200 µs." in text


def hostile() -> Story:
    """Everything that a QEMU may choose is hostile."""
    story = Story()
    story.begins({"parameters": {HOSTILE: HOSTILE}, "uri": HOSTILE}, version=HOSTILE, operation=HOSTILE)
    story.status(1, SOURCE, HOSTILE)
    story.status(2, DESTINATION, HOSTILE)
    story.trouble(3, SOURCE, HOSTILE)
    story.numbers(4, SOURCE, HOSTILE, remaining_bytes=1, data={"error-desc": HOSTILE, "downtime": HOSTILE})
    story.numbers(5, DESTINATION, HOSTILE, data={"postcopy-latency-dist": HOSTILE, "error-desc": {"a": HOSTILE}})
    said = events.QemuSaid(side=SOURCE, time_us=ZERO_US + 6, qemu_event=HOSTILE, data={HOSTILE: HOSTILE})
    story.events.append(said)
    story.ends(7, HOSTILE, message=HOSTILE, sentence=HOSTILE, advice=HOSTILE, place=HOSTILE)
    return story


def test_hostile_words_stay_words() -> None:
    page = page_of(hostile().events)
    found = Read(page)
    assert set(found.tags) <= set(read(stories.precopy().events).tags) | {"table", "tr", "td", "th", "thead", "tbody"}
    assert "b" not in [tag for tag in found.tags if ("b", "onclick", "x") in found.attributes]
    assert not [each for each in found.attributes if each[1].startswith("on")]
    assert found.tags.count("script") == page.count("<script") == 2
    assert "<script>alert(1)" in found.text  # as text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", page)
    page.encode("utf-8")


def test_one_sample_and_no_time_at_all_are_drawn() -> None:
    story = Story()
    story.begins()
    story.numbers(0, remaining_bytes=0, transferred_bytes=0, total_bytes=0, dirty_bytes_per_s=0)
    assert "Memory left to send" in read(story.events).text


def test_numbers_of_64_bits_are_drawn() -> None:
    most = (1 << 64) - 1
    story = Story()
    story.begins()
    for at_us in (0, 10, 10**15):
        story.numbers(
            at_us,
            remaining_bytes=most,
            transferred_bytes=most,
            total_bytes=most,
            dirty_bytes_per_s=most,
            page_requests=most,
        )
    story.ends(2 * 10**15)
    found = read(story.events)
    assert "16 EiB" in found.text
    assert "nan" not in page_of(story.events).lower()
    assert "inf" not in [value for _, name, value in found.attributes if name == "d"]


def test_a_very_long_migration_makes_no_very_long_page() -> None:
    story = Story()
    story.begins()
    for at in range(20_000):
        story.passes(at * 1_000_000, at)
        story.numbers(at * 1_000_000, remaining_bytes=(at * 7919) % 1000 * MIB, transferred_bytes=at * MIB)
    story.ends(20_000_000_000)
    page = page_of(story.events)
    assert len(page) < 400_000
    assert "The last 300 of" in Read(page).text


numbers = st.none() | st.integers(0, 1 << 64)
words = st.text(max_size=9) | st.sampled_from([HOSTILE, "</main><a href=x>", "<!--", "&lt;b&gt;"])


@given(st.lists(st.tuples(st.integers(-(10**16), 10**16), numbers, numbers, numbers, words), max_size=9))
def test_any_numbers_and_words_make_a_page(told: list[tuple[Any, ...]]) -> None:
    story = Story()
    story.begins()
    for at_us, one, two, three, words in told:
        story.status(at_us, SOURCE, words)
        story.guest(at_us, DESTINATION, running=bool(one))
        story.numbers(at_us, SOURCE, words, remaining_bytes=one, transferred_bytes=two, page_requests=three)
    found = read(story.events)
    assert [tag for tag in found.tags if tag in ("html", "body", "main", "a")] == ["html", "body", "main"]
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert "Migration without an end" in found.text
