"""What a walker says is read right, also in pieces."""

from pathlib import Path

import pytest

from tests.guests import console
from tests.guests.console import Pass


@pytest.fixture
def said(tmp_path: Path) -> Path:
    return tmp_path / "console"


def test_a_line_counts_when_it_is_whole(said: Path) -> None:
    said.write_text("ss 3 good\nready\npass 4 good\npass 5 bad since=5 page=7\npass 6 go")
    assert console.passes(said) == [Pass(4, ""), Pass(5, "pass 5 bad since=5 page=7")]


def test_a_console_that_is_not_there_yet_says_nothing(said: Path) -> None:
    assert console.passes(said) == []


@pytest.mark.asyncio
async def test_one_bad_pass_is_enough_to_fail(said: Path) -> None:
    said.write_text("pass 1 good\npass 2 bad since=2 page=7\npass 3 good\n")
    with pytest.raises(AssertionError, match="found its memory damaged: pass 2 bad since=2 page=7"):
        await console.wait_for_passes(said, 3)


@pytest.mark.asyncio
async def test_a_guest_that_stands_still_does_not_go_on(said: Path) -> None:
    said.write_text("pass 1 good\n" * 5)
    with pytest.raises(AssertionError, match=r"0 of 3 passes after 0\.05 s; its last words: b'pass 1 good"):
        await console.assert_goes_on(said, timeout_s=0.05)
