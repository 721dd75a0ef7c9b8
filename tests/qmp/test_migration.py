"""The steps of a migration, against a server that answers as told."""

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from qmigrate.errors import QemuDiedError, QmpCommandError, QmpError, QmpTimeoutError
from qmigrate.qmp import migration
from tests.qmp.scripted import ScriptedQemu, session_with

pytestmark = pytest.mark.asyncio

TIMEOUT_S = 20.0  # less than a command has, which would be what ends it


class MigratingQemu:
    """Has two capabilities, and goes through statuses, one with each query; the last one stays."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = list(answers)
        self.heard: list[tuple[str, Any]] = []

    async def __call__(self, qemu: ScriptedQemu) -> None:
        while True:
            try:
                command = await qemu.hear()
            except (EOFError, ConnectionError):
                return
            name = command["execute"]
            self.heard.append((name, command.get("arguments")))
            if name == "query-migrate-capabilities":
                states = [{"capability": each, "state": False} for each in ("events", "postcopy-ram")]
                await qemu.answer(command, states)
            elif name == "query-migrate":
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                await qemu.answer(command, answer)
            else:
                await qemu.answer(command)


async def test_a_capability_that_qemu_lacks_is_named_before_any_is_set() -> None:
    qemu = MigratingQemu()
    async with session_with(qemu) as session:
        with pytest.raises(QmpError, match="this QEMU has no migration capability mapped-ram"):
            await migration.set_capabilities(session, {"events": True, "mapped-ram": True})
    assert [name for name, _ in qemu.heard] == ["query-migrate-capabilities"]


async def test_a_capability_that_qemu_lacks_may_be_turned_off() -> None:
    qemu = MigratingQemu()
    async with session_with(qemu) as session:
        await migration.set_capabilities(session, {"events": True, "compress": False})
    assert qemu.heard[-1] == (
        "migrate-set-capabilities",
        {"capabilities": [{"capability": "events", "state": True}]},
    )


async def test_waiting_ends_with_the_status_that_came() -> None:
    qemu = MigratingQemu({}, {"status": "setup"}, {"status": "a-status-of-2031"}, {"status": "completed"})
    async with session_with(qemu) as session:
        assert await migration.wait_until(session, {"completed", "cancelled"}, timeout_s=30) == "completed"


async def test_a_failed_migration_raises_qemus_reason() -> None:
    failed = {"status": "failed", "error-desc": "Connection refused"}
    async with session_with(MigratingQemu({"status": "setup"}, failed)) as session:
        with pytest.raises(QmpCommandError, match="migrate: Connection refused") as caught:
            await migration.wait_until(session, "completed", timeout_s=30)
    assert caught.value.error_class == "failed"


async def test_an_end_that_was_not_waited_for_raises() -> None:
    async with session_with(MigratingQemu({"status": "active"}, {"status": "completed"})) as session:
        with pytest.raises(QmpCommandError, match="the migration is completed and not postcopy-active"):
            await migration.wait_until(session, "postcopy-active", timeout_s=30)


async def test_waiting_for_failure_is_no_failure() -> None:
    async with session_with(MigratingQemu({"status": "failed"})) as session:
        assert await migration.wait_until(session, "failed", timeout_s=30) == "failed"


async def test_a_migration_that_takes_too_long_is_a_time_out_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes on when a status was told, however long that took."""
    loop, passed_s = asyncio.get_running_loop(), 0.0
    time = loop.time
    monkeypatch.setattr(loop, "time", lambda: time() + passed_s)

    class Slow(MigratingQemu):
        async def __call__(self, qemu: ScriptedQemu) -> None:
            nonlocal passed_s
            command = await qemu.hear()
            await qemu.answer(command, self.answers[0])
            await qemu.hear()  # so the answer has come
            passed_s = TIMEOUT_S
            await qemu.until_left()

    async with session_with(Slow({"status": "active"})) as session:
        with pytest.raises(QmpTimeoutError, match=r"is active and not completed after 20 s"):
            await migration.wait_until(session, "completed", timeout_s=TIMEOUT_S)


async def test_that_no_status_was_told_is_no_status() -> None:
    """As of a QEMU whose main loop waits for a page."""

    async def say_nothing(qemu: ScriptedQemu) -> None:
        with suppress(EOFError, ConnectionError):
            while True:
                await qemu.hear()

    async with session_with(say_nothing) as session:
        with pytest.raises(QmpTimeoutError, match=r"query-migrate: no answer within 0\.1 s"):
            await migration.wait_until(session, "completed", timeout_s=0.1)


async def test_a_status_that_passes_between_two_queries_is_heard() -> None:
    async def pass_by(qemu: ScriptedQemu) -> None:
        await qemu.answer(await qemu.hear(), {"status": "active"})
        await qemu.event("MIGRATION", status="device")
        await qemu.event("MIGRATION", status="postcopy-active")
        while True:
            try:
                await qemu.answer(await qemu.hear(), {"status": "active"})
            except (EOFError, ConnectionError):
                return

    async with session_with(pass_by) as session:
        assert await migration.wait_until(session, "postcopy-active", timeout_s=30) == "postcopy-active"


async def test_death_ends_the_wait() -> None:
    async def die(qemu: ScriptedQemu) -> None:
        await qemu.answer(await qemu.hear(), {"status": "active"})

    async with session_with(die) as session:
        with pytest.raises(QemuDiedError):
            await migration.wait_until(session, "completed", timeout_s=30)
