"""The live display of ``receive``, and the lines where there is no terminal."""

import argparse
import io
import sys

import pytest

from qmigrate import events
from qmigrate.analysis.reception import ReceiveResult, reception
from qmigrate.cli.receive_display import ReceiveDisplay, ReceivePanel
from qmigrate.cli.receiving import ReceiveLines
from qmigrate.events import LiveEvent
from tests.cli.test_display import args, terminal  # noqa: F401 - a fixture
from tests.report.papers import Terminal
from tests.report.test_receive_page import COUNTS, begun, received
from tests.stories import HOSTILE, MIB, ZERO_US

STORY = [
    *begun(),
    events.StatusChanged(time_us=ZERO_US + 100_000, status="running"),
    received(1_000_000, received_bytes=4 * MIB, normal=1000, zero=1000),
    received(2_000_000, received_bytes=8 * MIB, normal=2500, zero=1000, requested=20, faults=22, touches=9, writes=1),
    events.Latency(time_us=ZERO_US + 2_000_000, where="touchers", counts=COUNTS, mean_us=400, longest_us=1500),
]


def panel_of(told: list[LiveEvent], width: int = 100, *, ascii_only: bool = False) -> list[str]:
    panel = ReceivePanel(ascii_only=ascii_only)
    for event in told:
        panel.take(event)
    return panel.text(width).plain.split("\n")


def test_the_panel_shows_progress_pages_by_kind_requests_and_latency_so_far() -> None:
    head, *rows = panel_of(STORY)
    assert head.endswith("running")
    assert rows == [
        "  received 8 MiB · 4 MiB/s",
        "     pages 2,500 and 1,000 zero pages            ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━───────────",
        " requested 20 of 22 faults                       ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━───",
        "   touches 9 · 1 write",
        "   touched half < 512 µs, 99 of 100 < 2.05 ms · 20",
    ]


def test_no_rate_is_told_while_nothing_can_come() -> None:
    told = panel_of([*STORY, events.StatusChanged(time_us=ZERO_US + 3_000_000, status="paused")])
    assert told[1] == "  received 8 MiB"


def test_before_a_source_comes_it_says_so() -> None:
    (head,) = panel_of(begun()[:1])
    assert head.endswith("waiting for a source")


@pytest.mark.parametrize("width", [1, 5, 20, 42, 60, 80, 300])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_no_line_is_longer_than_the_terminal(width: int, ascii_only: bool) -> None:
    lines = panel_of([*STORY, events.StatusChanged(status=HOSTILE)], width, ascii_only=ascii_only)
    assert max(map(len, lines)) <= max(width - 1, 1)
    assert not ascii_only or all(line.isascii() for line in lines[1:])


def test_the_terminal_is_left_as_it_was_with_all_lines_above(
    terminal: Terminal,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    out = io.StringIO()
    with ReceiveDisplay(args(), out) as teller:
        for event in STORY:
            teller.take(event)
            teller.refresh()
        result = ReceiveResult(exit_code=0, message="the migration was received", place="here")
        assert teller.end(reception(STORY, result)) == 0
    shown = terminal.getvalue()
    assert "listening at tcp:0.0.0.0:4444; control socket /run/control" in shown
    assert "running" in shown
    assert shown.rstrip(" \r\n").endswith("\x1b[2K")  # the panel is gone
    assert out.getvalue().startswith("the migration was received\n  received  0 bytes")


def lines_of(told: list[LiveEvent], capsys: pytest.CaptureFixture[str], **wishes: object) -> list[str]:
    lines = ReceiveLines(args(**wishes), io.StringIO())
    for event in told:
        lines.take(event)
    return [line.split(" s  ")[1] for line in capsys.readouterr().err.splitlines()]


def test_elsewhere_there_are_plain_lines_and_the_numbers_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    told = [*STORY, received(2_100_000, received_bytes=9 * MIB), received(3_100_000, received_bytes=9 * MIB, normal=1)]
    assert lines_of(told, capsys) == [
        "listening at tcp:0.0.0.0:4444; control socket /run/control",
        "1 block of RAM, 64 MiB",
        "running",
        "9 MiB, 1 page, 0 zero pages",
    ]
    assert "the source has connected" in lines_of(STORY, capsys, verbose=True)
    assert lines_of(STORY, capsys, quiet=True) == []


class Closed(io.StringIO):
    """Nobody reads it."""

    def write(self, _: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_that_nobody_reads_is_told_at_the_end_alone() -> None:
    lines = ReceiveLines(argparse.Namespace(ndjson=True, quiet=False, verbose=False, json=None), Closed())
    for event in STORY:
        lines.take(event)
    lost = ReceiveResult(exit_code=6, message="lost", place="lost")
    assert lines.end(reception(STORY, lost)) == 6
    with pytest.raises(BrokenPipeError):
        lines.end(reception(STORY, ReceiveResult(exit_code=0, message="received", place="here")))
