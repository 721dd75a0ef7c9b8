"""Real migrations through ``qmigrate tap``, and what ``qmigrate dissect`` tells of them."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import qmigrate
from qmigrate.endpoint.relay import Relay
from qmigrate.operations.migrate import migrate
from qmigrate.operations.plan import Plan
from qmigrate.operations.result import MigrationResult
from tests.live import versions
from tests.live.broken import Cutter, broken_plan
from tests.live.pair import HELD, Pair, pair
from tests.live.tapping import assert_recording_holds_what_the_source_has, tapped
from tests.live.versions import Qemu

pytestmark = [pytest.mark.live, pytest.mark.asyncio]

CUT = 256 << 10
SCHEMA = json.loads((Path(qmigrate.__file__).parent / "report" / "dissect.schema.json").read_text())


def qemu_named(name: str) -> Qemu:
    found = versions.named(name)
    if found is None:
        pytest.skip(f"no QEMU {name} is installed: scripts/qemu_versions")
    return found


async def dissected(recording: Path) -> dict[str, Any]:
    """As the command line tells it."""
    command = [sys.executable, "-m", "qmigrate", "dissect", "--json", str(recording)]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    said, wrong = await process.communicate()
    assert (process.returncode, wrong) == (0, b"")
    answer: dict[str, Any] = json.loads(said)
    jsonschema.Draft202012Validator(SCHEMA).validate(answer)
    return answer


def kinds(answer: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Each direction: which, what, and by what that is known."""
    return [
        (way, direction["kind"], direction["known_by"])
        for channel in answer["channels"]
        for way, direction in channel["directions"].items()
    ]


def phases(answer: dict[str, Any]) -> list[str]:
    return [phase["name"] for phase in answer["phases"]]


MAIN = [("forward", "main", "bytes"), ("return", "return path", "bytes")]
RESUMED = [("forward", "main, resumed", "bytes"), ("return", "return path", "bytes")]
PREEMPT = [("forward", "preempt", "bytes")]


async def migrated(two: Pair, plan: Plan) -> MigrationResult:
    """By postcopy: what the guest asks for comes first."""
    result, _ = await asyncio.gather(migrate(*two.sessions, plan), two.hurry_once_asked(times=20))
    return result


def assert_requests_were_answered(answer: dict[str, Any], result: MigrationResult) -> None:
    """All of them, as fast as can be, and where an answer has to come."""
    requests = answer["page_requests"]
    assert result.switched
    assert requests["count"] == len(requests["requests"]) > 0
    assert requests["answered"] + requests["on_way"] == requests["count"]
    assert sum(bucket["count"] for bucket in requests["histogram"]) == requests["answered"] > 0
    for request in requests["requests"]:
        assert request["block"] in {block["name"] for block in answer["ram_blocks"]}
        if request["answered_ns"] is not None:
            assert request["asked_ns"] <= request["answered_ns"]


async def test_a_postcopy_with_preempt_answers_on_its_own_channel(tmp_path: Path) -> None:
    async with pair(qemu_named("11.1"), tmp_path) as two:
        async with tapped(tmp_path, two.uri) as (listen, recording):
            result = await migrated(
                two, broken_plan(two, uri=listen, preempt=True, bandwidth=HELD, postcopy_bandwidth=HELD)
            )
            assert result.exit_code == 0, result.message
            await two.assert_guest_goes_on()
        await assert_recording_holds_what_the_source_has(recording, two.source, tmp_path)
    answer = await dissected(recording)
    assert kinds(answer) == MAIN + PREEMPT
    assert phases(answer) == ["precopy", "switchover", "postcopy", "ending"]
    assert_requests_were_answered(answer, result)
    answered_on = {request["answered_on"] for request in answer["page_requests"]["requests"]} - {None}
    assert 1 in answered_on
    assert answer["recording"]["ended"]
    assert answer["complete"]


async def test_a_postcopy_of_7_2_answers_on_main(tmp_path: Path) -> None:
    async with pair(qemu_named("7.2"), tmp_path) as two:
        async with tapped(tmp_path, two.uri) as (listen, recording):
            result = await migrated(two, broken_plan(two, uri=listen, bandwidth=HELD, postcopy_bandwidth=HELD))
            assert result.exit_code == 0, result.message
            await two.assert_guest_goes_on()
        # 7.2 loses writes of a running guest (tests/live/same.py): what its source has is no measure.
        await assert_recording_holds_what_the_source_has(recording, None, tmp_path)
    answer = await dissected(recording)
    assert kinds(answer) == MAIN
    assert phases(answer) == ["precopy", "switchover", "postcopy", "ending"]
    assert_requests_were_answered(answer, result)
    names = [moment["name"] for moment in answer["timeline"]]
    for between in ("PONG", "PACKAGED"):  # whichever comes first
        assert names.index("OPEN_RETURN_PATH") < names.index(between) < names.index("SHUT")


async def test_once_ends_though_5_2_keeps_multifd_open_after_a_postcopy(tmp_path: Path) -> None:
    async with pair(qemu_named("5.2"), tmp_path) as two:
        async with tapped(tmp_path, two.uri) as (listen, recording):
            plan = broken_plan(two, uri=listen, multifd=2, recoveries=0, postcopy_bandwidth=0)
            result = await migrate(*two.sessions, plan)
            assert result.exit_code == 0, result.message
        await two.assert_guest_goes_on()
        await assert_recording_holds_what_the_source_has(recording, two.source, tmp_path)
    answer = await dissected(recording)
    assert [kind for _, kind, _ in kinds(answer)] == ["main", "return path", "multifd", "multifd"]
    errors = [channel["error"] for channel in answer["channels"]]
    kept_open = "cut: the migration was over, and the destination kept it open"
    assert errors == ["", kept_open, kept_open]


async def test_a_recovery_is_told_as_a_second_main_channel(tmp_path: Path) -> None:
    """What breaks it stands behind the tap: it sees one connection close, and another come."""
    cutter = Cutter([CUT])
    behind = f"unix:{tmp_path / 'behind'}"
    async with pair(qemu_named("11.1"), tmp_path) as two:
        async with (
            Relay(behind, two.uri, tmp_path / "relayed", on_bytes=cutter.passed) as relay,
            tapped(tmp_path, behind) as (listen, recording),
        ):
            cutter.relay, cutter.after_last = relay, two.hurry
            plan = broken_plan(two, uri=listen, bandwidth=HELD, postcopy_bandwidth=HELD)
            result = await migrate(*two.sessions, plan, on_event=cutter.heard)
            assert (result.exit_code, result.recoveries, cutter.cuts) == (0, 1, 1), result.message
            await two.assert_guest_goes_on()
        await assert_recording_holds_what_the_source_has(recording, two.source, tmp_path)
    answer = await dissected(recording)
    assert kinds(answer) == MAIN + RESUMED
    assert phases(answer) == ["precopy", "switchover", "postcopy", "paused", "recovery", "postcopy", "ending"]
    assert_requests_were_answered(answer, result)
    names = [moment["name"] for moment in answer["timeline"] if moment["connection"] == 1]
    assert names.index("RECV_BITMAP") < names.index("POSTCOPY_RESUME") < names.index("RESUME_ACK")
    assert answer["channels"][0]["faults"] or answer["channels"][0]["error"]
    assert not answer["channels"][1]["faults"]
