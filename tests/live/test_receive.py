"""``receive``: real sources of each version migrate into our stand-in, and find nothing wrong with it."""

import asyncio
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from qmigrate.analysis.check import check
from qmigrate.capture.migration import Migration
from qmigrate.endpoint.destination import Workload
from qmigrate.events import StatusChanged
from qmigrate.operations.control import ask
from qmigrate.operations.receive import BlocksCame, Latency, Paused
from qmigrate.qmp import migration
from tests.guests import console
from tests.live.receiving import (
    HELD,
    LARGER,
    TIMEOUT_S,
    after_passes,
    assert_same_ram,
    huge_pages,
    hurry,
    loading,
    migrate,
    receiving,
    source_of,
    start,
)
from tests.live.versions import Qemu, installed, newest

pytestmark = [pytest.mark.live, pytest.mark.asyncio]

every_qemu = pytest.mark.parametrize("qemu", installed(), ids=lambda qemu: qemu.name)


# A pass takes a second, and another one is never short enough to be the last.
AFTER_PASS: Final = {"max-bandwidth": 8 << 20, "max-postcopy-bandwidth": 0, "downtime-limit": 1}


def loses_writes(qemu: Qemu) -> bool:
    """See ``same.loses_writes``: the memory of such a source, running, is no measure."""
    return qemu.number < (10,)


@every_qemu
async def test_after_precopy_memory_is_the_stopped_sources(qemu: Qemu, tmp_path: Path) -> None:
    raw = tmp_path / "ram"
    async with (
        source_of(qemu, tmp_path, paused=loses_writes(qemu)) as source,
        receiving(tmp_path, raw=raw) as receiver,
    ):
        await migrate(source, receiver.uri, postcopy=False)
        result = await receiver.result()
        assert (result.exit_code, result.is_postcopy) == (0, False)
        assert {"pc.ram", "pc.bios"} <= await assert_same_ram(source, raw, tmp_path / "memory")


MULTIFD: Final = {"multifd": True}
ENCODED: Final[dict[str, tuple[dict[str, bool], dict[str, str]]]] = {
    "multifd": (MULTIFD, {}),
    "zlib": (MULTIFD, {"multifd-compression": "zlib"}),
    "zstd": (MULTIFD, {"multifd-compression": "zstd"}),
    "xbzrle": ({"xbzrle": True}, {}),
    "compress": ({"compress": True}, {}),
}
ENCODERS: Final = [
    *((qemu, "multifd") for qemu in installed()),
    *((qemu, "zlib") for qemu in installed() if (7,) <= qemu.number < (8,)),
    *((qemu, "zstd") for qemu in installed() if qemu.number >= (11,)),
    *((qemu, "xbzrle") for qemu in installed() if qemu.number >= (11,)),
    *((qemu, "compress") for qemu in installed() if qemu.number < (6,)),
]


@pytest.mark.parametrize(("qemu", "way"), ENCODERS, ids=[f"{way}-{qemu.name}" for qemu, way in ENCODERS])
async def test_pages_that_come_beside_the_main_channel_or_encoded_are_the_stopped_sources(
    qemu: Qemu, way: str, tmp_path: Path
) -> None:
    raw = tmp_path / "ram"
    capabilities, parameters = ENCODED[way]
    async with (
        source_of(qemu, tmp_path, paused=loses_writes(qemu)) as source,
        receiving(tmp_path, raw=raw) as receiver,
    ):
        await migration.set_parameters(source.session, parameters)
        await migrate(source, receiver.uri, postcopy=False, capabilities=capabilities)
        result = await receiver.result()
        assert (result.exit_code, result.message) == (0, "the migration was received")
        assert {"pc.ram", "pc.bios"} <= await assert_same_ram(source, raw, tmp_path / "memory")


@pytest.mark.parametrize(
    "qemu", [qemu for qemu in installed() if qemu.number < (6,) or qemu.number >= (11,)], ids=lambda qemu: qemu.name
)
async def test_a_postcopy_that_began_on_multifd_channels_ends_on_main(qemu: Qemu, tmp_path: Path) -> None:
    """7.2 aborts at its end, 10.0 refuses the two together."""
    raw = tmp_path / "ram"
    async with (
        source_of(qemu, tmp_path, paused=loses_writes(qemu), guest=LARGER) as source,
        receiving(tmp_path, raw=raw, workloads=[Workload(seed=1)]) as receiver,
    ):
        await migrate(source, receiver.uri, postcopy=True, capabilities=MULTIFD)
        result = await receiver.result()
        assert (result.exit_code, result.numbers["duplicates"]) == (0, 0)
        assert {"pc.ram", "pc.bios"} <= await assert_same_ram(source, raw, tmp_path / "memory")


@every_qemu
async def test_after_postcopy_memory_is_the_stopped_sources(qemu: Qemu, tmp_path: Path) -> None:
    raw = tmp_path / "ram"
    workloads = [Workload(pattern="random", seed=1), Workload(pattern="zipf", seed=2, rate=500)]
    async with (
        source_of(qemu, tmp_path, paused=loses_writes(qemu)) as source,
        receiving(tmp_path, raw=raw, workloads=workloads) as receiver,
    ):
        await migrate(source, receiver.uri, postcopy=True, first=receiver.wait_for_answers)
        result = await receiver.result()
        assert (result.exit_code, result.message) == (0, "the migration was received")
        assert [phase for phase, _ in result.phases][-3:] == ["listening", "running", "ended"]
        assert result.numbers["discarded"] > 0 < result.numbers["requested"]
        assert result.numbers["duplicates"] == 0
        latencies = {event.where: sum(event.counts) for event in receiver.events if isinstance(event, Latency)}
        assert latencies["touchers"] > 0
        assert 0 < latencies["requests"] <= result.numbers["requested"]
        assert {"pc.ram", "pc.bios"} <= await assert_same_ram(source, raw, tmp_path / "memory")


@every_qemu
async def test_a_running_guest_comes_by_postcopy_after_a_pass(qemu: Qemu, tmp_path: Path) -> None:
    """What was sent and written to since is discarded, and comes again."""
    raw, saved = tmp_path / "ram", tmp_path / "guest.mig"
    async with source_of(qemu, tmp_path) as source, receiving(tmp_path, raw=raw, save=saved) as receiver:
        await start(source, receiver.uri, postcopy=False, capabilities={"postcopy-ram": True}, limits=AFTER_PASS)
        await after_passes(source, 1)
        await source.session.execute("migrate-start-postcopy")
        await migration.wait_until(source.session, "completed", timeout_s=TIMEOUT_S)
        result = await receiver.result()
        assert (result.exit_code, result.is_postcopy, result.numbers["duplicates"]) == (0, True, 0), result.message
        assert result.numbers["discarded"] > 0
        if not loses_writes(qemu):
            assert {"pc.ram", "pc.bios"} <= await assert_same_ram(source, raw, tmp_path / "memory")
    async with loading(qemu, tmp_path, saved) as said:
        await console.assert_goes_on(said)


async def test_a_page_that_the_package_waits_for_comes_while_it_is_loaded(tmp_path: Path) -> None:
    """S7: were the package loaded by whoever reads the stream, this would hang."""
    qemu = newest()
    if qemu is None:
        pytest.skip("no QEMU")
    async with (
        source_of(qemu, tmp_path) as source,
        receiving(tmp_path, touch_in_package=True) as receiver,
    ):
        await migrate(source, receiver.uri, postcopy=True, first=receiver.wait_for_answers)
        result = await receiver.result()
        assert result.exit_code == 0, result.message
        latencies = {event.where: sum(event.counts) for event in receiver.events if isinstance(event, Latency)}
        assert latencies["package"] > 0 < latencies["requests"]


@every_qemu
@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_a_saved_stream_loads_into_a_stock_qemu_and_the_guest_goes_on(
    qemu: Qemu, postcopy: bool, tmp_path: Path
) -> None:
    saved = tmp_path / "guest.mig"
    async with source_of(qemu, tmp_path) as source, receiving(tmp_path, save=saved) as receiver:
        await migrate(source, receiver.uri, postcopy=postcopy)
        # The source was told that all went well: from then on this is the only copy.
        assert saved.exists()
        assert (await receiver.result()).exit_code == 0
    with Migration(saved) as read:
        checked = check(read)
    assert (checked.valid, checked.differences) == (True, [])
    async with loading(qemu, tmp_path, saved) as said:
        await console.assert_goes_on(said)


@pytest.mark.parametrize("qemu", [qemu for qemu in installed() if qemu.number >= (7, 1)], ids=lambda qemu: qemu.name)
async def test_requested_pages_come_on_the_preempt_channel(qemu: Qemu, tmp_path: Path) -> None:
    raw = tmp_path / "ram"
    async with (
        source_of(qemu, tmp_path, paused=loses_writes(qemu)) as source,
        receiving(tmp_path, raw=raw, workloads=[Workload(seed=1)], touch_in_package=True) as receiver,
    ):
        # A page that is asked for may be on its way already: the rest is held until some were not.
        first = partial(receiver.wait_for_answers, "preempt")
        await migrate(source, receiver.uri, postcopy=True, capabilities={"postcopy-preempt": True}, first=first)
        result = await receiver.result()
        assert result.exit_code == 0, result.message
        assert 0 < result.numbers["preempt"] <= result.numbers["requested"]
        assert result.numbers["duplicates"] == 0
        assert {"pc.ram", "pc.bios"} <= await assert_same_ram(source, raw, tmp_path / "memory")


@every_qemu
async def test_a_broken_postcopy_is_recovered_and_nothing_is_lost(qemu: Qemu, tmp_path: Path) -> None:
    raw = tmp_path / "ram"
    async with (
        source_of(qemu, tmp_path, paused=loses_writes(qemu)) as source,
        # Half a minute until all of it was asked for.
        receiving(tmp_path, raw=raw, workloads=[Workload(seed=1, rate=100)]) as receiver,
    ):
        await start(source, receiver.uri, postcopy=True, limits={"max-postcopy-bandwidth": HELD})
        await receiver.wait_for(lambda event: isinstance(event, StatusChanged) and event.status == "running")
        await migration.wait_until(source.session, "postcopy-active", timeout_s=TIMEOUT_S)
        await source.session.execute("migrate-pause", oob=True)
        await receiver.wait_for(lambda event: isinstance(event, Paused))
        await migration.wait_until(source.session, "postcopy-paused", timeout_s=TIMEOUT_S)
        uri = f"unix:{tmp_path / 'again'}"
        assert await ask(receiver.receiver.control, "recover", uri) == uri
        await hurry(source)
        await migration.start(source.session, uri, {"resume": True})
        await migration.wait_until(source.session, "completed", timeout_s=TIMEOUT_S)
        result = await receiver.result()
        assert result.exit_code == 0, result.message
        assert [phase for phase, _ in result.phases][-5:] == ["running", "paused", "recovering", "running", "ended"]
        assert result.numbers["duplicates"] == 0
        assert {"pc.ram", "pc.bios"} <= await assert_same_ram(source, raw, tmp_path / "memory")


async def test_a_source_that_sends_no_description_is_not_left_waiting(tmp_path: Path) -> None:
    """QEMU's own destination, of the same machine, knows that none comes."""
    qemu = newest()
    if qemu is None:
        pytest.skip("no QEMU")
    async with (
        source_of(qemu, tmp_path, machine="pc,suppress-vmdesc=on") as source,
        receiving(tmp_path) as receiver,
    ):
        await migrate(source, receiver.uri, postcopy=False)
        assert (await receiver.result()).exit_code == 0


HUGE: Final = ("-object", "memory-backend-memfd,id=ram0,size=16M,hugetlb=on,hugetlbsize=2M")


@every_qemu
async def test_a_source_on_huge_pages_finds_huge_pages(qemu: Qemu, tmp_path: Path) -> None:
    raw = tmp_path / "ram"
    machine = "pc,memory-backend=ram0"
    with huge_pages(16):
        async with (
            source_of(qemu, tmp_path, paused=loses_writes(qemu), more=HUGE, machine=machine) as source,
            receiving(tmp_path, raw=raw, workloads=[Workload(seed=1)]) as receiver,
        ):
            await migrate(source, receiver.uri, postcopy=True, some_before=False)
            result = await receiver.result()
            assert result.exit_code == 0, result.message
            (blocks,) = [event.blocks for event in receiver.events if isinstance(event, BlocksCame)]
            assert {name: size for name, _, size in blocks}["ram0"] == 2 << 20
            assert result.numbers["duplicates"] == 0
            assert {"ram0", "pc.bios"} <= await assert_same_ram(source, raw, tmp_path / "memory")


@every_qemu
async def test_a_source_whose_stream_cannot_be_saved_goes_on(qemu: Qemu, tmp_path: Path) -> None:
    gone = tmp_path / "no such folder"
    gone.mkdir()
    async with source_of(qemu, tmp_path) as source, receiving(tmp_path, save=gone / "x.mig") as receiver:
        gone.rmdir()
        await start(source, receiver.uri, postcopy=False)
        await migration.wait_until(source.session, "failed", timeout_s=TIMEOUT_S)
        assert (await receiver.result()).exit_code == 3
        await console.assert_goes_on(tmp_path / "source-console")


@pytest.mark.parametrize("scheme", ["tcp", "exec", "file", "fd", "-"])
async def test_a_migration_comes_in_by_every_kind_of_uri(scheme: str, tmp_path: Path) -> None:
    """The command itself, as a shell starts it."""
    qemu = newest()
    if qemu is None:
        pytest.skip("no QEMU")
    stream = tmp_path / "stream.mig"
    async with source_of(qemu, tmp_path) as source:
        if scheme == "tcp":
            async with receiving(tmp_path, "tcp:127.0.0.1:0") as receiver:
                await migrate(source, receiver.uri, postcopy=True)
                assert (await receiver.result()).exit_code == 0
            return
        await migration.start(source.session, f"exec:cat > {shlex.quote(str(stream))}")
        await migration.wait_until(source.session, "completed", timeout_s=TIMEOUT_S)
        uris = {"exec": f"exec:cat {shlex.quote(str(stream))}", "file": f"file:{stream}", "fd": "fd:0", "-": "-"}
        with stream.open("rb") as file:
            command = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "qmigrate", "receive", uris[scheme], "--raw", str(tmp_path / "ram")),
                *("--control", str(tmp_path / "control")),
                stdin=file,
                stdout=asyncio.subprocess.PIPE,
            )
        async with asyncio.timeout(TIMEOUT_S):
            said, _ = await command.communicate()
        assert (command.returncode, said.splitlines()[0]) == (0, b"the migration was received")
        assert {"pc.ram", "pc.bios"} <= await assert_same_ram(source, tmp_path / "ram", tmp_path / "memory")
