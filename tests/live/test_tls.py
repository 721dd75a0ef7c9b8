"""Migrations that are encrypted, by naming credentials that the QEMUs have; and what becomes of wrong ones."""

from pathlib import Path
from typing import Any

import pytest

from qmigrate.operations.migrate import migrate
from qmigrate.operations.plan import Plan
from qmigrate.operations.result import MigrationResult, Outcome
from tests.live.broken import broken_pair, broken_plan
from tests.live.command import qmigrate
from tests.live.credentials import NAME, credentials
from tests.live.pair import AT_ONCE, HELD, Pair, pair
from tests.live.some import every_qemu, oldest_and_newest, only_newest
from tests.live.versions import Qemu

pytestmark = [pytest.mark.live, pytest.mark.asyncio]


def named(**wishes: Any) -> dict[str, Any]:
    """Of a plan: what the credentials are called on either side."""
    return {"tls_creds": "tls-source", "destination_tls_creds": "tls-destination", "answer_timeout_s": 60.0, **wishes}


async def encrypted(two: Pair, **wishes: Any) -> MigrationResult:
    # The port is any that is free: the destination says which.
    return await migrate(*two.sessions, Plan(**named(uri="tcp:127.0.0.1:0", **wishes)))


@oldest_and_newest
async def test_precopy_through_tls(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path, **credentials(tmp_path, of="127.0.0.1")) as two:
        result = await encrypted(two)
        assert (result.exit_code, result.switched) == (0, False), result.message
        await two.assert_guest_goes_on()


@every_qemu
async def test_postcopy_through_tls(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path, **credentials(tmp_path, of="127.0.0.1")) as two:
        result = await encrypted(two, **AT_ONCE)
        assert (result.exit_code, result.switched) == (0, True), result.message
        parameters = await two.destination.session.execute("query-migrate-parameters")
        assert parameters["tls-creds"] == "tls-destination"
        await two.assert_guest_goes_on()


@only_newest
async def test_what_passes_through_tls_is_no_stream_and_a_broken_postcopy_is_brought_back(
    qemu: Qemu, tmp_path: Path
) -> None:
    async with broken_pair(qemu, tmp_path, [256 << 10], **credentials(tmp_path)) as (two, cutter):
        plan = broken_plan(two, **named(tls_hostname=NAME, bandwidth=HELD, postcopy_bandwidth=HELD))
        result = await migrate(*two.sessions, plan, on_event=cutter.heard)
        assert (result.exit_code, result.recoveries) == (0, 1), result.message
        assert cutter.relay is not None
        for channel in cutter.relay.channels:
            assert channel.forward_path.read_bytes()[:2] == b"\x16\x03"  # a TLS handshake
        await two.assert_guest_goes_on()


@oldest_and_newest
async def test_a_certificate_of_another_name_leaves_the_guest_on_the_source(qemu: Qemu, tmp_path: Path) -> None:
    async with pair(qemu, tmp_path, **credentials(tmp_path, of="127.0.0.1")) as two:
        names = ["--tls-creds", "tls-source", "--tls-creds-destination", "tls-destination"]
        where = [*two.addresses, "--uri", "tcp:127.0.0.1:0"]
        code, out, err = await qmigrate("migrate", *where, *names, "--tls-hostname", "wrong.example", "--quiet")
        assert (code, out) == (3, "The guest runs on the source.\n"), err
        assert "source, in precopy: Certificate does not match the hostname wrong.example" in err
        await two.assert_guest_stayed()


@only_newest
async def test_a_certificate_of_another_authority_leaves_the_guest_on_the_source(qemu: Qemu, tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    objects = credentials(tmp_path / "one", of="127.0.0.1")
    objects["destination_more"] = credentials(tmp_path / "other", of="127.0.0.1")["destination_more"]
    async with pair(qemu, tmp_path, **objects) as two:
        result = await encrypted(two)
        assert (result.outcome, result.exit_code, result.guest.running) == (Outcome.FAILED, 3, True)
        assert "source, in precopy: " in result.message
        assert "certificate" in result.message.lower()
        await two.assert_guest_stayed()
