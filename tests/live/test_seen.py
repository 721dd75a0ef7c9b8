"""What is kept of real migrations: the page and the data, of the newest QEMU's postcopy and the oldest's precopy."""

import asyncio
import json
import os
import pty
import sys
from pathlib import Path
from typing import Any, Self

import jsonschema
import pytest

from qmigrate import report
from tests.live.command import ROOT, qmigrate
from tests.live.pair import HELD, Pair, pair
from tests.live.some import only_newest
from tests.live.versions import Qemu, installed
from tests.report.test_migration_page import Read

pytestmark = [pytest.mark.live, pytest.mark.asyncio]

SCHEMA = json.loads((Path(report.__file__).parent / "migrate.schema.json").read_text())
only_oldest = pytest.mark.parametrize("qemu", installed()[:1], ids=lambda qemu: qemu.name)


async def seen(two: Pair, *options: str) -> tuple[Any, Read, str]:
    """The data, the page, and what was said on standard error."""
    path = two.folder / "report.html"
    words = ("migrate", *two.addresses, "--uri", two.uri, "--json", "--report", str(path), *options)
    status, out, err = await qmigrate(*words)
    data = json.loads(out)
    jsonschema.validate(data, SCHEMA)
    assert data["exit_code"] == status, err
    return data, Read(path.read_text()), err


def statuses(data: Any, side: str) -> list[str]:
    return [phase["status"] for phase in data["sides"][side]["phases"]]


@only_newest
async def test_a_postcopy_is_kept_with_how_long_pages_took(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        limits = ("--bandwidth", str(HELD), "--postcopy-bandwidth", str(HELD), "--downtime-limit", "1")
        # Until then many more looks than five: the guest is as slow as the machine that it runs on.
        (data, page, said), _ = await asyncio.gather(
            seen(two, "--postcopy-after", "0.5", *limits), two.hurry_once_walked(times=25)
        )
        assert (data["outcome"], data["switched"], data["guest"]["place"]) == ("completed", True, "destination")
        assert "the destination measures how long the guest waits for pages (postcopy-blocktime)" in said
        assert statuses(data, "source")[-2:] == statuses(data, "destination")[-2:] == ["postcopy-active", "completed"]
        # The guest ran nowhere between STOP and RESUME, and each bucket of QEMU's is there with what it counted.
        (stop,) = data["stops"]
        assert stop["resumed_on"] == "destination"
        assert 0 < stop["begin_us"] < stop["end_us"] < data["length_us"]
        destination = data["sides"]["destination"]["statistics"]
        buckets = data["latency"]["buckets"]
        assert [bucket["count"] for bucket in buckets] == destination["postcopy-latency-dist"]
        assert sum(bucket["count"] for bucket in buckets) > 0
        assert (buckets[8]["begin_us"], buckets[8]["end_us"]) == (256, 512)
        assert data["samples"][-1]["page_requests"] > 0
        assert data["samples"][-1]["remaining_bytes"] == 0
        assert len(data["samples"]) >= 5
        for expected in ("Migrated with postcopy", "Waiting for pages", "Pages requested, in all", "The guest moves"):
            assert expected in page.text
        # One host: both clocks are ours.
        assert [data["sides"][side]["clock"]["offset_us"] for side in ("source", "destination")] == [0, 0]
        # QEMU's own words for its buckets (`info migrate -a`): the ninth is that of 256 us.
        printed = await two.destination.session.human_monitor_command("info migrate -a")
        lines = [line.split() for line in printed.splitlines() if line.strip().startswith("[") and "]:" in line]
        assert [int(line[-1]) for line in lines] == destination["postcopy-latency-dist"]
        assert lines[8][1:3] == ["256", "us"]
        await two.assert_guest_goes_on()


@only_oldest
async def test_a_precopy_is_kept_with_its_passes(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path) as two:
        data, page, _ = await seen(two, "--bandwidth", "64M", "--downtime-limit", "2000")
        assert (data["outcome"], data["switched"], data["latency"]) == ("completed", False, None)
        assert statuses(data, "source") == ["setup", "active", "completed"]
        assert statuses(data, "destination")[-1] == "completed"
        assert data["passes"][0]["number"] == 1
        assert data["downtime_ms"] == data["sides"]["source"]["statistics"]["downtime"]
        (stop,) = data["stops"]
        assert stop["resumed_on"] == "destination"
        for expected in ("Migrated by precopy", f"QEMU {qemu.name}.", "Memory left to send", "passes"):
            assert expected in page.text
        assert "Waiting for pages" not in page.text
        await two.assert_guest_goes_on()


class OnTerminal:
    """A command whose standard error is a terminal of 100 columns."""

    def __init__(self) -> None:
        self.ours, self._theirs = pty.openpty()
        self.shown = b""
        self._news = asyncio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self.ours)
        os.close(self.ours)

    async def start(self, *words: str) -> asyncio.subprocess.Process:
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "24"}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "qmigrate", *words),
            cwd=ROOT,
            env=environment,
            stdin=self._theirs,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._theirs,
            preexec_fn=_take_terminal,
        )
        os.close(self._theirs)
        asyncio.get_running_loop().add_reader(self.ours, self._read)
        return process

    def _read(self) -> None:
        try:
            self.shown += os.read(self.ours, 65536)
        except OSError:  # nobody has it open any more
            asyncio.get_running_loop().remove_reader(self.ours)
        self._news.set()

    async def until(self, words: bytes, *, timeout_s: float = 60.0) -> None:
        async with asyncio.timeout(timeout_s):
            while words not in self.shown:
                self._news.clear()
                await self._news.wait()


def _take_terminal() -> None:
    """Its keys are signals to us: we lead a session of its own, and it is our terminal."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@only_oldest
async def test_ctrl_c_on_a_terminal_cancels_and_leaves_it_as_it_was(qemu: Qemu, tmp_path: Path) -> None:
    """The display is gone, the cursor was never hidden, and the report is there all the same."""
    async with pair(qemu, tmp_path) as two:
        path = tmp_path / "report.html"
        slow = ("--bandwidth", "2M", "--downtime-limit", "1", "--report", str(path))
        with OnTerminal() as terminal:
            process = await terminal.start("migrate", *two.addresses, "--uri", two.uri, *slow)
            await terminal.until(b"left ")
            os.write(terminal.ours, b"\x03")
            out, _ = await asyncio.wait_for(process.communicate(), 60)
            await terminal.until(b"qmigrate: in precopy: interrupted")
        assert (process.returncode, out) == (3, b"The guest runs on the source.\n")
        assert b"\x1b[?" not in terminal.shown
        assert b"Traceback" not in terminal.shown
        assert "Migration cancelled" in Read(path.read_text()).text
        assert sorted(each.name for each in tmp_path.glob("*report*")) == ["report.html"]
        await two.assert_guest_stayed()
