"""``receive`` and its connections: recorded, late, silent, and sockets that a dead process left behind."""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Final

import pytest

from qmigrate.analysis.recording import RecordingStory
from qmigrate.capture.frames import Direction
from qmigrate.capture.recorder import Recorder
from qmigrate.capture.recording import Recording
from qmigrate.endpoint.destination import Touch, Workload
from qmigrate.events import ChannelCame, Latency, Paused, Troubled
from qmigrate.format.command import DiscardRange, OpenReturnPath, PostcopyRamDiscard, PostcopyResume
from qmigrate.format.multifd import InitialPacket, encode_packet
from qmigrate.format.return_path import Pong, RequestPages, RequestPagesId, Shut, encode_message
from qmigrate.operations import receive_channels
from qmigrate.operations.control import ask
from qmigrate.operations.traces import read_trace
from tests import streams
from tests.live.receiving import Receiving, receiving
from tests.operations.test_receive import (
    END,
    EVERYTHING,
    PACKAGE,
    PAGE,
    PAGES,
    SYNC,
    Source,
    advised,
    limited_files,
    packet,
    phase,
    source_of,
)
from tests.uffd.kernel import needs_userfaultfd

pytestmark = [pytest.mark.asyncio, needs_userfaultfd]

TIMEOUT_S: Final = 60.0
PRECOPY: Final = b"".join(
    (
        streams.header(),
        streams.configuration(),
        streams.command(OpenReturnPath()),
        streams.ram_start(),
        EVERYTHING,
        streams.ram_end(),
        streams.devices(),
        streams.eof(),
        streams.devices_described(),
    )
)


# -- recorded


def recorded(path: Path) -> list[tuple[bytes, bytes]]:
    """What went forward and back on each connection."""
    with Recording(path) as recording:
        recording.read()
        return [
            (_bytes(recording, number, Direction.FORWARD), _bytes(recording, number, Direction.RETURN))
            for number in range(len(recording.connections))
        ]


def _bytes(recording: Recording, number: int, direction: Direction) -> bytes:
    pieces = recording.connections[number].pieces(direction)
    return recording.stream(number, direction).read_at(0, pieces.length)


async def test_a_recording_holds_every_byte_both_ways_of_all_connections(tmp_path: Path) -> None:
    tap = tmp_path / "in.tap"
    stream = advised() + PACKAGE
    with Recorder(tap) as recorder:
        async with receiving(tmp_path, recorder=recorder) as receiver:
            async with source_of(receiver) as source:
                source.send(stream)
                await phase(receiver, "running")
                source.close()
                await receiver.wait_for(lambda event: isinstance(event, Paused))
            uri = f"unix:{tmp_path / 'again'}"
            await ask(receiver.receiver.control, "recover", uri)
            receiver.uri = uri
            resumed = streams.command(PostcopyResume())
            async with source_of(receiver) as source, source_of(receiver) as preempt:
                source.send(resumed, EVERYTHING)
                await receiver.wait_for(lambda event: isinstance(event, ChannelCame) and event.kind == "resumed")
                preempt.send(EVERYTHING[:0] + streams.page(0, block="pc.ram"))
                await receiver.wait_for(lambda event: isinstance(event, ChannelCame) and event.kind == "pages")
                source.send(END)
                assert await source.until_shut() == 0
            assert (await receiver.result()).exit_code == 0
    first, again, pages = recorded(tap)
    assert first == (stream, b"".join(encode_message(Pong(token=token)) for token in (1, 3)))
    assert again[0] == resumed + EVERYTHING + END
    assert again[1].endswith(encode_message(Shut(value=0)))
    assert pages == (streams.page(0, block="pc.ram"), b"")
    with Recording(tap) as recording:
        assert RecordingStory(recording).read().recording.fault is None


async def test_a_file_is_recorded_as_a_connection_is(tmp_path: Path) -> None:
    stream, tap = tmp_path / "x.mig", tmp_path / "x.tap"
    stream.write_bytes(streams.minimal())
    with Recorder(tap) as recorder:
        async with receiving(tmp_path, f"file:{stream}", recorder=recorder) as receiver:
            assert (await receiver.result()).exit_code == 0
    assert recorded(tap) == [(streams.minimal(), b"")]


async def test_what_ends_badly_is_recorded_to_its_end(tmp_path: Path) -> None:
    tap = tmp_path / "in.tap"
    with Recorder(tap) as recorder:
        async with receiving(tmp_path, recorder=recorder) as receiver, source_of(receiver) as source:
            source.send(advised(), streams.ram_part(streams.page(0, block="no such block")))
            assert await source.until_shut() == 1
            assert (await receiver.result()).exit_code == 3
    ((forward, back),) = recorded(tap)
    assert forward == advised() + streams.ram_part(streams.page(0, block="no such block"))
    assert back == encode_message(Pong(token=1)) + encode_message(Shut(value=1))


async def test_a_recording_that_finds_the_disk_full_stops_and_the_migration_goes_on(tmp_path: Path) -> None:
    tap, told = tmp_path / "in.tap", asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell(_: OSError) -> None:
        loop.call_soon_threadsafe(told.set)

    with Recorder(tap, on_stop=tell) as recorder:
        async with receiving(tmp_path, raw=tmp_path / "ram", recorder=recorder) as receiver:
            async with source_of(receiver) as source:
                with limited_files(4 * PAGE):
                    source.send(PRECOPY[: 6 * PAGE])
                    async with asyncio.timeout(TIMEOUT_S):
                        await told.wait()
                source.send(PRECOPY[6 * PAGE :])
                assert await source.until_shut() == 0
            assert (await receiver.result()).exit_code == 0
    assert (tmp_path / "ram" / "pc.ram.raw").read_bytes()[:PAGE] == streams.page(0)[-PAGE:]
    with Recording(tap) as recording:
        stopped = RecordingStory(recording).read().recording.stopped
    assert stopped is not None
    assert stopped.reason == "File too large"


# -- channels that bytes can't tell


async def test_multifd_waits_for_as_many_channels_as_are_said(tmp_path: Path) -> None:
    """The second one has connected, and its bytes are on their way when RAM begins."""
    contents = b"\x22" * PAGE
    async with (
        receiving(tmp_path, raw=tmp_path / "ram", multifd=2) as receiver,
        source_of(receiver) as source,
        source_of(receiver) as first,
        source_of(receiver) as second,
    ):
        first.send(encode_packet(InitialPacket(channel_id=0)), SYNC, SYNC, SYNC)
        source.send(streams.header(), streams.configuration(), streams.command(OpenReturnPath()))
        source.send(streams.ram_start(), streams.ram_part(), streams.ram_end())
        source.send(streams.devices(), streams.eof(), streams.devices_described())
        await receiver.wait_for(lambda event: event.name == "blocks-came")
        second.send(encode_packet(InitialPacket(channel_id=1)), SYNC, packet((0, contents)), SYNC, SYNC)
        assert await source.until_shut() == 0
        assert (await receiver.result()).exit_code == 0
    assert (tmp_path / "ram" / "pc.ram.raw").read_bytes()[:PAGE] == contents


async def test_channels_that_do_not_come_are_missed_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive_channels, "MULTIFD_PATIENCE_S", 0.01)
    async with (
        receiving(tmp_path, multifd=3) as receiver,
        source_of(receiver) as source,
        source_of(receiver) as channel,
    ):
        channel.send(encode_packet(InitialPacket(channel_id=0)), SYNC)
        await receiver.wait_for(lambda event: isinstance(event, ChannelCame) and event.kind == "multifd")
        source.send(advised())
        event = await receiver.wait_for(lambda event: isinstance(event, Troubled))
        assert isinstance(event, Troubled)
        assert event.message == "1 of 3 multifd channels have come: waiting for more"


async def test_a_multifd_channel_that_comes_too_late_ends_it_before_pages_are_lost(tmp_path: Path) -> None:
    async with (
        receiving(tmp_path) as receiver,
        source_of(receiver) as source,
        source_of(receiver) as first,
        source_of(receiver) as late,
    ):
        first.send(encode_packet(InitialPacket(channel_id=0)), SYNC)
        await receiver.wait_for(lambda event: isinstance(event, ChannelCame) and event.kind == "multifd")
        source.send(advised())
        await receiver.wait_for(lambda event: event.name == "blocks-came")
        await _given(receiver)
        late.send(encode_packet(InitialPacket(channel_id=1)), SYNC)
        assert await source.until_shut() == 1
        result = await receiver.result()
        assert (result.exit_code, result.place) == (3, "source")
        assert "say how many there are (--multifd N)" in result.message


async def _given(receiver: Receiving) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not receiver.receiver._channels._multifd_given:  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.01)


async def test_a_silent_connection_is_the_preempt_channel_where_that_is_said(tmp_path: Path) -> None:
    """So its pages are waited for when the main channel has ended."""
    async with (
        receiving(tmp_path, raw=tmp_path / "ram", preempt=True) as receiver,
        source_of(receiver) as source,
    ):
        source.send(advised())
        await receiver.wait_for_connection()
        async with source_of(receiver) as silent:
            await _waits(receiver)
            all_but_one = streams.ram_part(
                *(streams.page(start * PAGE, block="pc.ram") for start in range(1, PAGES["pc.ram"])),
                *(streams.page(start * PAGE, block="pc.rom") for start in range(PAGES["pc.rom"])),
            )
            source.send(PACKAGE)
            await receiver.wait_for(lambda event: isinstance(event, ChannelCame) and event.kind == "pages")
            source.send(all_but_one, END)
            silent.send(streams.page(0, b"\x77" * PAGE, block="pc.ram"))
            assert await source.until_shut() == 0
        result = await receiver.result()
        assert (result.exit_code, result.numbers["preempt"]) == (0, 1)
        assert not [event for event in receiver.events if isinstance(event, Troubled)]
    assert (tmp_path / "ram" / "pc.ram.raw").read_bytes()[:PAGE] == b"\x77" * PAGE


async def _waits(receiver: Receiving) -> None:
    """Until a connection that says nothing is known to."""
    incoming = receiver.receiver._channels._incoming
    assert incoming is not None
    async with asyncio.timeout(TIMEOUT_S):
        while not incoming._unidentified:  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.01)


# -- what a dead process left behind


def left_behind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


async def test_sockets_that_a_dead_process_left_behind_are_replaced(tmp_path: Path) -> None:
    for name in ("in", "control"):
        left_behind(tmp_path / name)
    async with receiving(tmp_path) as receiver, source_of(receiver) as source:
        source.send(streams.minimal())
        assert (await receiver.result()).exit_code == 0
    assert [path for path in tmp_path.iterdir() if path.is_socket()] == []


async def test_a_socket_at_which_somebody_listens_is_left_to_him(tmp_path: Path) -> None:
    async with receiving(tmp_path) as receiver, source_of(receiver) as source:
        other = tmp_path / "other"
        other.mkdir()
        with pytest.raises(OSError, match="Address already in use"):
            async with receiving(other, receiver.uri):
                pass
        source.send(streams.minimal())
        assert (await receiver.result()).exit_code == 0


async def test_what_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("mine")
    with pytest.raises(OSError, match="Address already in use"):
        async with receiving(tmp_path):
            pass
    assert (tmp_path / "in").read_text() == "mine"


# -- told


async def test_every_transition_is_told_with_its_time_though_all_comes_at_once(tmp_path: Path) -> None:
    discard = streams.command(PostcopyRamDiscard(block="pc.ram", ranges=(DiscardRange(start=0, length=PAGE),)))
    async with receiving(tmp_path) as receiver, source_of(receiver) as source:
        source.send(advised(), discard, PACKAGE, EVERYTHING, END)
        assert await source.until_shut() == 0
        result = await receiver.result()
    assert [name for name, _ in result.phases] == [
        *("precopy", "advised", "discarding", "listening", "running", "ended"),
    ]
    times = [at for _, at in result.phases]
    assert times == sorted(times)


# -- touched


async def test_a_trace_touches_its_pages_once_and_in_order(tmp_path: Path) -> None:
    trace = [Touch("pc.rom", PAGE + 7), Touch("gone", 0), Touch("pc.ram", 3 * PAGE, True), Touch("pc.ram", 1 << 40)]
    async with receiving(tmp_path, raw=tmp_path / "ram", traces=[trace]) as receiver:
        async with source_of(receiver) as source:
            source.send(advised(), PACKAGE)
            asked: list[object] = []
            while len(asked) < 2:
                message = await source.message()
                if isinstance(message, RequestPagesId | RequestPages):
                    asked.append(message)
                    block = getattr(message, "block", "pc.rom")
                    source.send(streams.ram_part(streams.page(message.start, block=block)))
            assert asked == [
                RequestPagesId(start=PAGE, length=PAGE, block="pc.rom"),
                RequestPagesId(start=3 * PAGE, length=PAGE, block="pc.ram"),
            ]
            rest = [
                streams.page(start * PAGE, block=name)
                for name, count in PAGES.items()
                for start in range(count)
                if (name, start) not in (("pc.rom", 1), ("pc.ram", 3))
            ]
            source.send(streams.ram_part(*rest), END)
            assert await source.until_shut() == 0
        result = await receiver.result()
        assert (result.numbers["touches"], result.numbers["writes"], result.numbers["duplicates"]) == (2, 1, 0)
        (trouble,) = [event.message for event in receiver.events if isinstance(event, Troubled)]
        assert trouble == "2 of 4 touches of the trace: this guest has no such pages"
        assert {event.where for event in receiver.events if isinstance(event, Latency)} == {"requests", "touchers"}


async def test_a_recording_is_a_trace_of_what_was_asked_for(tmp_path: Path) -> None:
    tap = tmp_path / "in.tap"
    with Recorder(tap) as recorder:
        async with receiving(tmp_path, recorder=recorder, workloads=[Workload(pattern="sequential")]) as receiver:
            async with source_of(receiver) as source:
                source.send(advised(), PACKAGE)
                while not isinstance(await source.message(), RequestPagesId):
                    pass
                source.send(EVERYTHING, END)
                assert await source.until_shut() == 0
            requested = (await receiver.result()).numbers["requested"]
    trace = read_trace(tap)
    assert trace[0] == Touch("pc.ram", 0)
    assert len(trace) == requested


# -- killed


async def test_what_was_recorded_is_there_when_the_command_is_killed(tmp_path: Path) -> None:
    tap, uri = tmp_path / "in.tap", f"unix:{tmp_path / 'in'}"
    words = ["receive", uri, "--ndjson", "--record", str(tap), "--control", str(tmp_path / "control")]
    command = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "qmigrate", *words, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            assert command.stdout is not None
            assert b'"listening"' in await command.stdout.readline()
            reader, writer = await asyncio.open_unix_connection(tmp_path / "in")
            source = Source(reader, writer)
            source.send(advised())
            assert await source.message() == Pong(token=1)
            command.send_signal(signal.SIGKILL)
            await command.wait()
            assert await reader.read() == b""
            writer.close()
    finally:
        if command.returncode is None:
            command.kill()
            await command.wait()
    assert recorded(tap) == [(advised(), encode_message(Pong(token=1)))]


async def test_a_command_whose_output_is_the_stream_ends_with_us(tmp_path: Path) -> None:
    """Also one that does not look at its pipe."""
    pid_file = tmp_path / "pid"
    words = ["receive", f"exec:echo $$ > {pid_file}; exec sleep 1000", "--ndjson", "--control", str(tmp_path / "c")]
    command = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "qmigrate", *words, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            assert command.stdout is not None
            assert b'"listening"' in await command.stdout.readline()
            while not (pid_file.exists() and pid_file.read_text().endswith("\n")):  # noqa: ASYNC110 - a shell's
                await asyncio.sleep(0.01)
            sleeper = os.pidfd_open(int(pid_file.read_text()))
            command.send_signal(signal.SIGKILL)
            await command.wait()
            loop, ended = asyncio.get_running_loop(), asyncio.Event()
            loop.add_reader(sleeper, ended.set)
            await ended.wait()
            loop.remove_reader(sleeper)
            os.close(sleeper)
    finally:
        if command.returncode is None:
            command.kill()
            await command.wait()
