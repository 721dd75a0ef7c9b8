"""``receive`` against sources that are scripts: what it answers, and what it does with what no QEMU would send."""

import asyncio
import os
import resource
import signal
import stat
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import pytest

from qmigrate.capture.migration import Migration
from qmigrate.capture.schemas import SchemaCache, cache_folder, read_schema
from qmigrate.endpoint.destination import Workload
from qmigrate.errors import RefusedError
from qmigrate.events import StatusChanged, Troubled
from qmigrate.format import xbzrle
from qmigrate.format.command import (
    DiscardRange,
    OpenReturnPath,
    PageSizes,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRamDiscard,
    PostcopyRun,
)
from qmigrate.format.feed import Feed
from qmigrate.format.multifd import (
    InitialPacket,
    MultifdFlag,
    PageHeader,
    PagePacket,
    encode_packet,
    pack_offsets,
    page_capacity,
)
from qmigrate.format.ram import RamBlock
from qmigrate.format.return_path import Message, Pong, RequestPages, RequestPagesId, Shut, read_return_path
from qmigrate.operations import received
from qmigrate.operations.control import ask
from qmigrate.operations.receive import Latency, NotSaved, Paused, Receiver
from tests import streams
from tests.live.receiving import Receiving, receiving
from tests.uffd.kernel import needs_userfaultfd

pytestmark = [pytest.mark.asyncio, needs_userfaultfd]

TIMEOUT_S: Final = 60.0
PAGE: Final = streams.PAGE
PAGES: Final = {name: length // PAGE for name, length in streams.BLOCKS.items()}


class Source:
    """A connection to the receiver: what is written, and the messages that come back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._feed = Feed()
        self._messages = read_return_path(self._feed)

    def send(self, *pieces: bytes) -> None:
        self._writer.write(b"".join(pieces))

    async def message(self) -> Message:
        """The next one."""
        async with asyncio.timeout(TIMEOUT_S):
            for entry in self._messages:
                if entry is not None:
                    return entry.message
                data = await self._reader.read(1 << 16)
                assert data, "the destination closed the connection"
                self._feed.receive(data)
        raise AssertionError("nothing follows SHUT")

    async def messages(self, count: int) -> list[Message]:
        return [await self.message() for _ in range(count)]

    async def until_shut(self) -> int:
        """Its value."""
        while True:
            message = await self.message()
            if isinstance(message, Shut):
                return message.value

    def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def source_of(receiver: Receiving) -> AsyncGenerator[Source]:
    reader, writer = await asyncio.open_unix_connection(receiver.uri.removeprefix("unix:"))
    try:
        yield Source(reader, writer)
    finally:
        writer.close()


def advised(blocks: "list[RamBlock] | None" = None, *, summary: int = PAGE) -> bytes:
    """Until RAM's START, with a return path and postcopy advised."""
    return b"".join(
        (
            streams.header(),
            streams.configuration(),
            streams.command(OpenReturnPath()),
            streams.command(Ping(token=1)),
            streams.command(PostcopyAdvise(sizes=PageSizes(summary=summary, target_page_size=PAGE))),
            streams.ram_start() if blocks is None else streams.ram_start(blocks),
        )
    )


PACKAGE: Final = streams.package(
    streams.command(PostcopyListen()),
    streams.devices(),
    streams.command(Ping(token=3)),
    streams.command(PostcopyRun()),
)
END: Final = streams.ram_end() + streams.eof()
EVERYTHING: Final = b"".join(
    streams.ram_part(*(streams.page(start * PAGE, block=name) for start in range(count)))
    for name, count in PAGES.items()
)


async def phase(receiver: Receiving, name: str) -> None:
    """Until it is there."""
    await receiver.wait_for(lambda event: isinstance(event, StatusChanged) and event.status == name)


async def test_every_ping_is_answered_those_in_the_package_too_and_shut_is_last(tmp_path: Path) -> None:
    async with receiving(tmp_path, raw=tmp_path / "ram") as receiver, source_of(receiver) as source:
        source.send(streams.postcopy())
        messages = await source.messages(6)
        assert messages[-1] == Shut(value=0)
        assert {message.token for message in messages if isinstance(message, Pong)} == {1, 2, 3, 0x42, 4}
        assert (await receiver.result()).exit_code == 0
    ram = (tmp_path / "ram" / "pc.ram.raw").read_bytes()
    expected = {PAGE: streams.page(PAGE)[-PAGE:], 2 * PAGE: streams.page(2 * PAGE)[-PAGE:]}
    for start in range(0, streams.BLOCKS["pc.ram"], PAGE):
        assert ram[start : start + PAGE] == expected.get(start, bytes(PAGE)), hex(start)


async def test_listen_is_obeyed_without_a_discard_and_what_is_touched_is_asked_for(tmp_path: Path) -> None:
    workloads = [Workload(pattern="sequential")]
    async with receiving(tmp_path, workloads=workloads) as receiver, source_of(receiver) as source:
        # Page 0 came as zeros before LISTEN: it is not asked for.  Page 1 is.
        source.send(advised(), streams.ram_part(streams.zero(0, block="pc.ram")), PACKAGE)
        asked: list[Message] = []
        while not asked or len(asked) < 2:
            message = await source.message()
            if isinstance(message, RequestPagesId | RequestPages):
                asked.append(message)
                source.send(streams.ram_part(streams.page(message.start, block="pc.ram")))
        assert asked == [
            RequestPagesId(start=PAGE, length=PAGE, block="pc.ram"),
            RequestPages(start=2 * PAGE, length=PAGE),
        ]
        rest = [streams.page(number * PAGE, block="pc.ram") for number in range(3, PAGES["pc.ram"])]
        rom = [streams.page(number * PAGE, block="pc.rom") for number in range(PAGES["pc.rom"])]
        source.send(streams.ram_part(*rest, *rom), END)
        assert await source.until_shut() == 0
        result = await receiver.result()
        assert (result.exit_code, result.numbers["duplicates"]) == (0, 0)
        # As it goes and at the end.
        assert {event.where for event in receiver.events if isinstance(event, Latency)} == {"requests", "touchers"}


async def test_a_page_that_comes_twice_after_listen_stays_as_it_came_first(tmp_path: Path) -> None:
    async with receiving(tmp_path, raw=tmp_path / "ram") as receiver, source_of(receiver) as source:
        again = streams.ram_part(streams.page(0, b"\xee" * PAGE, block="pc.ram"))
        source.send(advised(), PACKAGE, EVERYTHING, again, END)
        assert await source.until_shut() == 0
        assert (await receiver.result()).numbers["duplicates"] == 1
    assert (tmp_path / "ram" / "pc.ram.raw").read_bytes()[:PAGE] == streams.page(0)[-PAGE:]


async def test_a_discard_makes_a_page_come_again(tmp_path: Path) -> None:
    async with receiving(tmp_path, raw=tmp_path / "ram") as receiver, source_of(receiver) as source:
        discard = PostcopyRamDiscard(block="pc.ram", ranges=(DiscardRange(start=PAGE, length=PAGE),))
        again = streams.ram_part(streams.page(PAGE, b"\xee" * PAGE, block="pc.ram"))
        source.send(advised(), EVERYTHING, streams.command(discard), PACKAGE, again, END)
        assert await source.until_shut() == 0
        result = await receiver.result()
        assert (result.numbers["duplicates"], result.numbers["discarded"]) == (0, 1)
    assert (tmp_path / "ram" / "pc.ram.raw").read_bytes()[PAGE : 2 * PAGE] == b"\xee" * PAGE


LIES: Final = {
    "a page outside its block": (
        advised() + streams.ram_part(streams.page(streams.BLOCKS["pc.ram"], block="pc.ram")),
        "the block ends at",
    ),
    "a discard of an unknown block": (
        advised() + streams.command(PostcopyRamDiscard(block="no", ranges=(DiscardRange(start=0, length=PAGE),))),
        "'no' was not listed",
    ),
    "a discard of half a page": (
        advised()
        + streams.command(PostcopyRamDiscard(block="pc.ram", ranges=(DiscardRange(start=0, length=PAGE // 2),))),
        "expected multiples of the page size 0x1000",
    ),
    "a discard beyond the end": (
        advised()
        + streams.command(PostcopyRamDiscard(block="pc.ram", ranges=(DiscardRange(start=0, length=1 << 40),))),
        "the block has",
    ),
    "a guest of an exbibyte": (
        advised([RamBlock(name="pc.ram", used_length=1 << 60)]),
        "a guest of 1152921504606846976 bytes",
    ),
    "huge pages that this host has not": (
        advised([RamBlock(name="pc.ram", used_length=1 << 44, page_size=2 << 20)], summary=0x201000),
        "huge pages of 2048 KiB are not free",
    ),
    "RUN before LISTEN": (
        advised() + streams.package(streams.command(PostcopyRun())),
        "POSTCOPY_RUN inside a package while ADVISED; may come now: PING, POSTCOPY_LISTEN",
    ),
    "LISTEN outside a package": (
        advised() + streams.command(PostcopyListen()),
        "POSTCOPY_LISTEN while ADVISED",
    ),
    "ADVISE twice": (
        advised() + streams.command(PostcopyAdvise(sizes=None)),
        "POSTCOPY_ADVISE while ADVISED",
    ),
    "a package that is no package": (advised() + streams.package(b"\xff" * 100), "found 0xff"),
    "the end": (advised(), "the stream ends here"),
    "no migration at all": (b"Qwerty, not QEVM", "no migration stream"),
}


@pytest.mark.parametrize("lie", LIES)
async def test_what_no_qemu_sends_is_refused_by_name_and_the_source_told(lie: str, tmp_path: Path) -> None:
    data, reason = LIES[lie]
    async with receiving(tmp_path) as receiver, source_of(receiver) as source:
        source.send(data)
        if lie == "the end":
            source._writer.write_eof()
        result = await receiver.result()
        assert result.exit_code in (3, 6)
        assert reason in result.message
        if data.startswith(streams.header()):
            assert await source.until_shut() == 1


async def test_wrong_bytes_after_run_pause_it_as_a_broken_connection_does(tmp_path: Path) -> None:
    async with receiving(tmp_path) as receiver:
        async with source_of(receiver) as source:
            source.send(advised(), PACKAGE)
            await phase(receiver, "running")
            source.send(streams.ram_part(streams.page(0, block="no such block")))
            event = await receiver.wait_for(lambda event: isinstance(event, Paused))
        assert isinstance(event, Paused)
        assert "no such block" in event.reason
        assert receiver.receiver.place_of_guest == "lost"


async def test_a_connection_that_says_nothing_waits_and_does_not_stand_in_the_way(tmp_path: Path) -> None:
    async with receiving(tmp_path) as receiver, source_of(receiver) as silent, source_of(receiver) as source:
        silent.send()
        source.send(streams.minimal())
        assert (await receiver.result()).exit_code == 0


async def test_a_connection_that_comes_and_goes_is_no_source(tmp_path: Path) -> None:
    async with receiving(tmp_path) as receiver:
        async with source_of(receiver):
            pass
        async with source_of(receiver) as source:
            source.send(streams.minimal())
            assert (await receiver.result()).exit_code == 0


async def test_a_second_migration_is_closed_and_the_first_goes_on(tmp_path: Path) -> None:
    async with receiving(tmp_path) as receiver, source_of(receiver) as source, source_of(receiver) as other:
        source.send(streams.header())
        await receiver.wait_for_connection()
        other.send(streams.header())
        await receiver.wait_for(lambda event: isinstance(event, Troubled) and "another connection" in event.message)
        source.send(streams.minimal()[len(streams.header()) :])
        assert (await receiver.result()).exit_code == 0


async def test_what_cannot_be_saved_after_precopy_is_the_sources_still(tmp_path: Path) -> None:
    gone = tmp_path / "no such folder"
    gone.mkdir()
    async with receiving(tmp_path, save=gone / "x.mig") as receiver:
        gone.rmdir()
        async with source_of(receiver) as source:
            source.send(streams.header(), streams.configuration(), streams.command(OpenReturnPath()))
            source.send(streams.ram_start(), streams.ram(), streams.devices(), streams.eof())
            source.send(streams.devices_described())
            assert await source.until_shut() == 1
        result = await receiver.result()
        assert result.exit_code == 3
        assert "no such folder" in result.message


async def test_what_cannot_be_saved_after_postcopy_is_held_until_it_is_saved_elsewhere(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.mig"
    gone = tmp_path / "no such folder"
    gone.mkdir()
    async with receiving(tmp_path, save=gone / "x.mig") as receiver:
        gone.rmdir()
        async with source_of(receiver) as source:
            source.send(advised(), PACKAGE, EVERYTHING, END)
            event = await receiver.wait_for(lambda event: isinstance(event, NotSaved))
            assert isinstance(event, NotSaved)
            with pytest.raises(RefusedError, match="no such folder"):
                await ask(Path(event.control), "save", str(gone / "y.mig"))
            assert await ask(Path(event.control), "save", str(elsewhere)) == str(elsewhere)
            assert await source.until_shut() == 0
        assert (await receiver.result()).exit_code == 0
    assert elsewhere.exists()


async def test_who_asks_to_save_while_it_is_being_saved_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client waits for a minute; the RAM of a large guest takes longer, and he asks again."""
    elsewhere, begun, may_go_on = tmp_path / "elsewhere.mig", threading.Event(), threading.Event()
    write = received.write_stream

    def slowly(path: Path, parts: received.Parts, stops: threading.Event) -> None:
        if path == elsewhere:
            begun.set()
            assert may_go_on.wait(TIMEOUT_S)
        write(path, parts, stops)

    monkeypatch.setattr(received, "write_stream", slowly)
    gone = tmp_path / "no such folder"
    gone.mkdir()
    async with receiving(tmp_path, save=gone / "x.mig") as receiver:
        gone.rmdir()
        async with source_of(receiver) as source:
            source.send(advised(), PACKAGE, EVERYTHING, END)
            event = await receiver.wait_for(lambda event: isinstance(event, NotSaved))
            assert isinstance(event, NotSaved)
            control = Path(event.control)
            first = asyncio.create_task(ask(control, "save", str(elsewhere)))
            try:
                assert await asyncio.to_thread(begun.wait, TIMEOUT_S)
                with pytest.raises(RefusedError, match="it is being saved just now, as "):
                    await ask(control, "save", str(tmp_path / "again.mig"))
            finally:
                may_go_on.set()
            assert await first == str(elsewhere)
            assert await source.until_shut() == 0
        assert (await receiver.result()).exit_code == 0
    assert elsewhere.exists()
    assert not (tmp_path / "again.mig").exists()


@pytest.mark.parametrize("has_schema", [False, True])
async def test_sections_that_cannot_be_told_apart_are_saved_with_a_schema_and_without(
    has_schema: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest has put a whole section, a PING, and a footer of the section around them into a buffer."""
    planted = streams.footer(3) + streams.device("false", b"f", section_id=9) + streams.command(Ping(token=99))
    inside = planted + streams.device("a", b"2", section_id=3)[:-5]
    sections = streams.device("a", inside, section_id=3) + streams.device("d", b"d", section_id=4)
    monkeypatch.setenv("QMIGRATE_CACHE", str(tmp_path / "cache"))
    if has_schema:
        described = [
            streams.described(name, streams.field("x", "buffer", size)) for name, size in (("a", len(inside)), ("d", 1))
        ]
        head = streams.header() + streams.configuration() + streams.ram_start() + streams.ram()
        (tmp_path / "precopy.mig").write_bytes(head + sections + streams.eof() + streams.description(*described))
        with Migration(tmp_path / "precopy.mig") as migration:
            SchemaCache(cache_folder()).add(read_schema(migration, made_from="precopy.mig"))
    package = streams.package(streams.command(PostcopyListen()), sections, streams.command(PostcopyRun()))
    saved = tmp_path / "saved.mig"
    async with receiving(tmp_path, save=saved, touch_in_package=True) as receiver, source_of(receiver) as source:
        source.send(advised(), EVERYTHING, package, END)
        assert await source.until_shut() == 0
        assert (await receiver.result()).exit_code == 0
    assert saved.read_bytes().endswith(sections + streams.eof() + b"\6" + bytes(4))


@contextmanager
def limited_files(length: int) -> Iterator[None]:
    """No file of this process grows beyond ``length`` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_a_disk_that_gets_full_leaves_nothing_half_written(postcopy: bool, tmp_path: Path) -> None:
    saved, elsewhere = tmp_path / "x.mig", tmp_path / "elsewhere.mig"
    precopy = advised() + EVERYTHING + streams.ram_end() + streams.devices() + streams.eof()
    precopy += streams.devices_described()
    async with receiving(tmp_path, save=saved) as receiver, source_of(receiver) as source:
        with limited_files(2 * PAGE):
            source.send(advised() + PACKAGE + EVERYTHING + END if postcopy else precopy)
            await receiver.wait_for(lambda event: isinstance(event, Troubled) and "File too large" in event.message)
        if postcopy:
            assert await ask(receiver.receiver.control, "save", str(elsewhere)) == str(elsewhere)
        assert await source.until_shut() == (0 if postcopy else 1)
        assert (await receiver.result()).exit_code == (0 if postcopy else 3)
    assert {path.name for path in tmp_path.glob("*.mig*")} == ({"elsewhere.mig"} if postcopy else set())


async def test_a_package_that_is_cut_leaves_the_guest_to_the_source(tmp_path: Path) -> None:
    """Nothing of it has run yet."""
    async with receiving(tmp_path) as receiver, source_of(receiver) as source:
        source.send(advised(), PACKAGE[:-10])
        source.close()
        result = await receiver.result()
        assert result.exit_code == 3
        assert "PACKAGED: the stream ends here, 10 of" in result.message


def packet(*pages: tuple[int, bytes], sync: bool = False) -> bytes:
    """Of a multifd channel: pages of pc.ram, or none."""
    header = PageHeader(
        flags=int(MultifdFlag.SYNC) if sync else 0,
        pages_alloc=page_capacity(PAGE),
        normal_pages=len(pages),
        next_packet_size=len(pages) * PAGE,
        packet_num=0,
        name=b"pc.ram".ljust(256, b"\0"),
        offsets=pack_offsets([start for start, _ in pages], page_size=PAGE),
    )
    return encode_packet(PagePacket(header, PAGE), b"".join(contents for _, contents in pages))


SYNC: Final = packet(sync=True)


async def test_a_later_copy_on_another_multifd_channel_waits_for_the_earlier_one(tmp_path: Path) -> None:
    """The new copy is here long before the old one, which is of the epoch before: it is loaded last."""
    old, new = b"\x11" * PAGE, b"\x22" * PAGE
    async with (
        receiving(tmp_path, raw=tmp_path / "ram") as receiver,
        source_of(receiver) as source,
        source_of(receiver) as slow,
        source_of(receiver) as fast,
    ):
        # Each EOS ends an epoch: START's, that of the part, that of END.
        slow.send(encode_packet(InitialPacket(channel_id=0)), SYNC)
        fast.send(encode_packet(InitialPacket(channel_id=1)), SYNC, SYNC, packet((0, new)), SYNC)
        source.send(streams.header(), streams.configuration(), streams.command(OpenReturnPath()))
        source.send(streams.command(Ping(token=1)))
        assert await source.message() == Pong(token=1)
        source.send(streams.ram_start(), streams.ram_part(), streams.command(Ping(token=2)), streams.ram_end())
        source.send(streams.devices(), streams.eof(), streams.devices_described())
        slow.send(packet((0, old)), SYNC, SYNC)
        assert await source.until_shut() == 0
        assert (await receiver.result()).exit_code == 0
    assert (tmp_path / "ram" / "pc.ram.raw").read_bytes()[:PAGE] == new


async def test_a_multifd_channel_that_ends_before_its_sync_is_named(tmp_path: Path) -> None:
    async with receiving(tmp_path) as receiver, source_of(receiver) as source:
        async with source_of(receiver) as channel:
            channel.send(encode_packet(InitialPacket(channel_id=3)), SYNC)
        source.send(advised(), streams.ram_part())
        assert await source.until_shut() == 1
        assert "multifd 3: the channel ended before a SYNC" in (await receiver.result()).message


async def test_a_page_as_a_delta_is_applied_to_the_page_that_was_there(tmp_path: Path) -> None:
    async with receiving(tmp_path, raw=tmp_path / "ram") as receiver, source_of(receiver) as source:
        before = b"\x11" * PAGE
        delta = streams.xbzrle(0, xbzrle.encode(before, b"\x22" + before[1:]) or b"", block="pc.ram")
        source.send(streams.header(), streams.configuration(), streams.command(OpenReturnPath()), streams.ram_start())
        source.send(streams.ram_part(streams.page(0, before, block="pc.ram"), delta), streams.ram_end())
        source.send(streams.devices(), streams.eof(), streams.devices_described())
        assert await source.until_shut() == 0
        assert (await receiver.result()).exit_code == 0
    assert (tmp_path / "ram" / "pc.ram.raw").read_bytes()[: PAGE + 1] == b"\x22" + before[1:] + b"\0"


async def test_the_control_socket_is_its_users_alone_and_refuses_what_cannot_be(tmp_path: Path) -> None:
    async with receiving(tmp_path) as receiver:
        control = receiver.receiver.control
        assert stat.S_IMODE(control.stat().st_mode) == 0o600
        with pytest.raises(RefusedError, match="nothing to recover: it is idle"):
            await ask(control, "recover", "unix:/nowhere")
        with pytest.raises(RefusedError, match="nothing to save"):
            await ask(control, "save", "file")
        with pytest.raises(RefusedError, match="'explode' is not known here"):
            await ask(control, "explode", "now")
    assert not control.exists()


@pytest.mark.parametrize(("name", "reason"), [("none/x.mig", "No such file"), (".", "Is a directory")])
async def test_a_place_where_nothing_can_be_saved_is_refused_before_a_source_comes(
    name: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=reason):
        await Receiver(f"unix:{tmp_path / 'in'}", save=tmp_path / name, control=tmp_path / "control").run()
    assert not list(tmp_path.iterdir())


async def test_what_is_saved_is_not_written_to() -> None:
    with pytest.raises(RefusedError, match="nothing may write to memory"):
        Receiver("-", save="x", workloads=[Workload(writes=0.1)])


@pytest.mark.parametrize("name", ["listener", "guest", "pager"])
async def test_a_process_that_is_killed_ends_the_others_and_the_result_says_where_the_guest_is(
    name: str, tmp_path: Path
) -> None:
    async with receiving(tmp_path) as receiver, source_of(receiver) as source:
        source.send(advised(), PACKAGE)
        await phase(receiver, "running")
        os.kill(receiver.receiver._destination.pids[name], signal.SIGKILL)
        result = await receiver.result()
        assert result.exit_code == 6
        assert f"the {name}'s process ended with -9" in result.message


async def test_no_process_outlives_the_command_when_it_is_killed(tmp_path: Path) -> None:
    """Also one whose toucher sleeps in a fault that nobody answers."""
    uri = f"unix:{tmp_path / 'in'}"
    words = ["receive", uri, "--touch", "sequential", "--ndjson", "--control", str(tmp_path / "control")]
    command = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "qmigrate", *words, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            assert command.stdout is not None
            assert b'"listening"' in await command.stdout.readline()
            children = [int(word) for word in _children(command.pid)]
            assert len(children) == 3
            pidfds = [os.pidfd_open(pid) for pid in children]
            reader, writer = await asyncio.open_unix_connection(tmp_path / "in")
            writer.write(advised() + PACKAGE)
            asked = Source(reader, writer)
            while not isinstance(await asked.message(), RequestPagesId):
                pass
            command.send_signal(signal.SIGKILL)
            await command.wait()
            for pidfd in pidfds:
                await _ended(pidfd)
            writer.close()
    finally:
        if command.returncode is None:
            command.kill()
            await command.wait()


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


async def _ended(pidfd: int) -> None:
    """Until the process has; a pidfd can be read then."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(pidfd, lambda: None if ended.done() else ended.set_result(None))
    try:
        await ended
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
