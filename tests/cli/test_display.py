"""The live display: what stands on a terminal while a migration goes on, and when it is over."""

import argparse
import inspect
import io
import json
import re
import sys

import pytest

from qmigrate import events
from qmigrate.cli import lines
from qmigrate.cli.display import Display, Panel
from qmigrate.cli.lines import EventLines
from qmigrate.cli.panel_below import is_for
from qmigrate.events import Side
from qmigrate.operations.result import MigrationResult, Outcome
from qmigrate.operations.whereabouts import Place, Reach, View, Whereabouts
from qmigrate.report.reception_words import moment_words
from qmigrate.report.wording import wording
from tests import stories
from tests.report.papers import Terminal
from tests.stories import HOSTILE, MIB, Story

SOURCE, DESTINATION = Side.SOURCE, Side.DESTINATION
CONTROL = re.compile("[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202e]")
SGR_OR_MOVE = re.compile(r"\x1b\[[0-9;]*[mAK]|\r")


def args(**wishes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"quiet": False, "verbose": False, "ndjson": False, "json": None, **wishes})


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error is a terminal of 100 columns."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "24")
    return Terminal()


def shown(monkeypatch: pytest.MonkeyPatch, terminal: Terminal, story: Story, out: io.StringIO) -> str:
    monkeypatch.setattr(sys, "stderr", terminal)
    with Display(args(), out) as teller:
        for event in story.events:
            teller.take(event)
            teller.refresh()
    return terminal.getvalue()


def panel_of(story: Story, width: int = 100) -> list[str]:
    panel = Panel()
    for event in story.events:
        panel.take(event)
    return panel.text(width).plain.split("\n")


def underway() -> Story:
    story = Story()
    story.begins()
    story.status(0, SOURCE, "active")
    story.status(1, DESTINATION, "active")
    story.passes(2, 4)
    story.numbers(
        3,
        remaining_bytes=16 * MIB,
        transferred_bytes=48 * MIB,
        total_bytes=64 * MIB,
        dirty_bytes_per_s=10 * MIB,
        sent_bytes_per_s=40 * MIB,
        expected_downtime_ms=1_300,
    )
    return story


def test_the_panel_sets_what_is_left_and_dirtied_against_what_is_sent() -> None:
    head, *rows = panel_of(underway())
    assert head.endswith("active, pass 4 · the guest runs on the source")
    assert rows == [
        "      left 16 MiB of 64 MiB        ━━━━━━━━━━━━────────────────────────────────────",
        "      sent 40 MiB/s                ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━",
        "   dirtied 10 MiB/s                ━━━━━━━━━━━━────────────────────────────────────",
        "  downtime 1,300 ms expected",
    ]


def test_in_postcopy_it_shows_requests_and_no_stale_dirty_rate() -> None:
    story = underway()
    story.status(4, SOURCE, "postcopy-active")
    story.guest(5, SOURCE, running=False)
    story.guest(6, DESTINATION, running=True)
    story.numbers(
        7,
        status="postcopy-active",
        remaining_bytes=MIB,
        transferred_bytes=63 * MIB,
        dirty_bytes_per_s=77,
        page_requests=1_234,
        downtime_ms=8,
    )
    told = panel_of(story)
    assert told[0].endswith("postcopy-active · destination active · the guest runs on the destination")
    assert told[1:] == ["      left 1 MiB", "  downtime 8 ms", " requested 1,234 pages"]


@pytest.mark.parametrize("width", [1, 5, 20, 30, 42, 60, 80, 100, 300])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    for story in (underway(), stories.postcopy(), stories.precopy(), Story()):
        assert max(len(line) for line in panel_of(story, width)) <= max(width - 1, 1)


def test_a_narrow_terminal_gets_numbers_without_bars() -> None:
    told = panel_of(underway(), 42)
    assert told[1:3] == ["          the guest runs on the source", "      left 16 MiB of 64 MiB"]


def test_before_anything_is_known_it_says_so() -> None:
    assert panel_of(Story())[0].strip().endswith("preparing")


def test_what_happens_stays_and_the_panel_goes(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    told = shown(monkeypatch, terminal, stories.precopy(), io.StringIO())
    plain = SGR_OR_MOVE.sub("", told)
    assert "source: active\n" in plain
    assert "destination: the guest runs\n" in plain
    assert "left 19 MiB of 64 MiB" in plain
    # Up over the panel, each line erased: nothing of it is left below.
    assert told.endswith("\x1b[1A\x1b[2K" * (told.rsplit("\n", 1)[1].count("\x1b[1A")))


def test_the_cursor_is_never_hidden_and_the_screen_never_changed(
    monkeypatch: pytest.MonkeyPatch, terminal: Terminal
) -> None:
    """So whatever ends us leaves the terminal as it was."""
    told = shown(monkeypatch, terminal, stories.postcopy(), io.StringIO())
    assert "\x1b[?" not in told


def test_hostile_words_are_neither_markup_nor_control(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    story = stories.failed(HOSTILE)
    story.events.insert(3, events.StatusChanged(side=SOURCE, status=HOSTILE))
    story.events.insert(4, events.Decided(decision=HOSTILE, reason=HOSTILE))
    told = SGR_OR_MOVE.sub("", shown(monkeypatch, terminal, story, io.StringIO()))
    assert "\x1b" not in told
    assert not CONTROL.search(told)
    assert "[red]" in told  # as it was written


def test_no_color_is_obeyed(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    told = shown(monkeypatch, terminal, stories.precopy(), io.StringIO())
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", told)


def test_a_terminal_that_goes_away_ends_nothing(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    """What goes elsewhere is told all the same."""
    lost: list[str] = []

    def lose(text: str) -> int:
        lost.append(text)
        return broken(text)

    monkeypatch.setattr(sys, "stderr", terminal)
    out = io.StringIO()
    with Display(args(), out) as teller:
        monkeypatch.setattr(terminal, "write", lose)
        for event in stories.precopy().events:
            teller.take(event)
            teller.refresh()
        teller.suspend()
        teller.resume()
    assert lost
    assert teller.finish(result()) == 0
    assert out.getvalue() == "migrated by precopy\nThe guest runs on the destination.\nAdvice.\n"


def broken(_text: str) -> int:
    raise OSError(5, "Input/output error")


# ---- whether ----


def test_it_is_for_terminals_that_can_be_written_anew(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    assert is_for(args())
    assert not is_for(args(quiet=True))
    assert not is_for(args(ndjson=True))
    monkeypatch.setenv("TERM", "dumb")
    assert not is_for(args())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not is_for(args())
    monkeypatch.setattr(sys, "stderr", None)
    assert not is_for(args())


# ---- lines, and the end ----


def result(outcome: Outcome = Outcome.COMPLETED, message: str = "migrated by precopy") -> MigrationResult:
    view = View(Reach.ANSWERS, "running", True, "completed")
    return MigrationResult(
        outcome=outcome,
        guest=Whereabouts(Place.DESTINATION, True, "The guest runs on the destination.", "Advice."),
        message=message,
        switched=False,
        views=dict.fromkeys(Side, view),
    )


def lines_of(story: Story, capsys: pytest.CaptureFixture[str], **wishes: object) -> list[str]:
    with EventLines(args(**wishes), io.StringIO()) as teller:
        for event in story.events:
            teller.take(event)
    return capsys.readouterr().err.splitlines()


def test_elsewhere_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    told = lines_of(stories.precopy(), capsys)
    assert told[:3] == ["   0.000 s  source: setup", "   0.001 s  destination: active", "   0.002 s  source: active"]
    assert "   0.099 s  19 MiB left, 20 MiB/s sent, 4 MiB/s dirtied" in told
    assert not [line for line in told if "\x1b" in line]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(stories.precopy(), capsys, quiet=True) == []


def test_verbose_says_who_is_there_and_what_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    story = stories.precopy()
    story.events.append(events.CommandSent(side=SOURCE, command="migrate", arguments={"uri": HOSTILE}))
    told = lines_of(story, capsys, verbose=True)
    assert "   0.000 s  source: QEMU 11.1.3, running, at /run/source" in told
    assert any("source is told: migrate {" in line for line in told)
    assert any("source: MIGRATION_PASS 2" in line for line in told)


def test_data_that_nobody_reads_ends_no_migration() -> None:
    """It is told at the end, where nothing can be harmed any more."""
    out = io.StringIO()
    teller = EventLines(args(ndjson=True), out)
    teller.take(stories.precopy().events[0])
    assert json.loads(out.getvalue())["event"] == "side-found"
    out.write = broken  # type: ignore[method-assign]
    for event in stories.precopy().events:
        teller.take(event)
    with pytest.raises(OSError, match="Input/output"):
        teller.finish(result())


def test_the_end_is_on_standard_output_unless_that_is_for_data(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    assert EventLines(args(), out).finish(result()) == 0
    assert out.getvalue() == "migrated by precopy\nThe guest runs on the destination.\nAdvice.\n"
    out = io.StringIO()
    assert EventLines(args(json="-"), out).finish(result(Outcome.FAILED, f"source: {HOSTILE}")) == 4
    assert out.getvalue() == ""
    told = capsys.readouterr().err
    assert told.startswith("qmigrate: source: </script>")
    assert not CONTROL.search(told)
    assert told.endswith("The guest runs on the destination.\nAdvice.\n")


def test_the_display_says_at_the_end_what_it_came_to(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    with Display(args(), io.StringIO()) as teller:
        for event in stories.precopy().events:
            teller.take(event)
    teller.finish(result())
    assert re.search(r"40 MiB sent in .*s · 3 passes · downtime 6 ms\n", SGR_OR_MOVE.sub("", terminal.getvalue()))


def test_every_event_is_told_or_left_out_on_purpose() -> None:
    """A new kind of event is not forgotten in words."""
    kinds = {each for each in vars(events).values() if isinstance(each, type) and issubclass(each, events.LiveEvent)}
    numbers_and_none = {events.LiveEvent, events.Progressed, events.Received, events.Latency}
    words = inspect.getsource(wording) + inspect.getsource(moment_words)
    assert [each.__name__ for each in kinds - numbers_and_none if f"events.{each.__name__}(" not in words] == []
    assert {lines.line_of(event, True) for event in stories.postcopy().events} >= {"", "source: device"}
