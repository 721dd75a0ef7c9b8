"""A hostile source: the command as a shell starts it, or one receiver that is lied to again and again.

What it says is refused by name, with little memory, and the end is told; nobody is left asleep.  That each command is
refused in each phase whose row does not name it, the core's own tests go through (``protocol/test_destination.py``).
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from qmigrate.events import StatusChanged
from qmigrate.format.command import (
    CommandNumber,
    DiscardRange,
    Packaged,
    PageSizes,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRamDiscard,
    PostcopyResume,
    PostcopyRun,
    RecvBitmap,
)
from qmigrate.format.ram import RamBlock
from qmigrate.format.return_path import Pong, ReceivedBitmap, RequestPages, RequestPagesId, ResumeAck, Shut
from qmigrate.operations.control import ask
from qmigrate.operations.receive import Latency, Paused
from qmigrate.protocol.phases import Phase, allowed
from tests import streams
from tests.live.answers import messages_in
from tests.live.receiving import Receiving, receiving
from tests.operations.test_receive import END, EVERYTHING, PACKAGE, PAGE, PAGES, Source, advised, phase, source_of
from tests.protocol.said import built
from tests.uffd.kernel import needs_userfaultfd

pytestmark = needs_userfaultfd

TIMEOUT_S: Final = 60.0
LOST: Final = 6
MOST_MEMORY: Final = 128 << 20  # bytes of the largest of its processes
UNIT: Final = 16 * PAGE  # a host page on a machine with large ones
OPEN_FILES: Final = 1024  # as most users have it


@dataclass
class Ended:
    """The command's end: what it said, what the source was told, and its memory."""

    exit_code: int
    said: str
    told: bytes
    memory: int

    @property
    def shut(self) -> int:
        last = messages_in(self.told)[-1]
        assert isinstance(last, Shut)
        return last.value


# A child's peak counts what it was forked from, until it became another program: so that is a small one.
MEASURED: Final = """
import os, resource, sys
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), most))
child = os.spawnv(os.P_NOWAIT, sys.argv[3], sys.argv[3:])
_, status, used = os.wait4(child, 0)
with open(sys.argv[2], "w") as file:
    file.write(f"{os.waitstatus_to_exitcode(status)} {used.ru_maxrss << 10}")
"""


class Command:
    """``qmigrate receive`` in a process of its own, and a connection to it that is read to its end."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "qmigrate", "receive", f"unix:{folder / 'in'}", "--ndjson"]
        measured = [sys.executable, "-I", "-S", "-c", MEASURED, str(OPEN_FILES), str(folder / "used")]
        self.process = subprocess.Popen(
            [*measured, *command, "--control", str(folder / "control"), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.told = bytearray()
        self.peer = socket.socket(socket.AF_UNIX)
        self.peer.settimeout(TIMEOUT_S)
        self._reader = threading.Thread(target=self._read, daemon=True)

    def connect(self) -> None:
        self.wait_for('"listening"')
        self.peer.connect(str(self.folder / "in"))
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):
            while data := self.peer.recv(1 << 16):
                self.told += data

    def send(self, data: bytes) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it has refused an earlier part
            self.peer.sendall(data)

    def wait_for(self, word: str) -> None:
        """Until it has said this."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if word in line.decode():
                return
        raise AssertionError(f"it ended without a word of {word}")

    def interrupt(self, exit_code: int) -> None:
        """Ctrl-C; where that would lose a guest, again once it has said so."""
        (pid,) = children_of(self.process.pid)
        os.kill(pid, signal.SIGINT)
        if exit_code == LOST:
            assert self.process.stderr is not None
            assert any(b"interrupted again, it is lost" in line for line in self.process.stderr)
            os.kill(pid, signal.SIGINT)

    def ended(self) -> Ended:
        """Wait for its end.  The largest of it and its processes counts, for it waits for them."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        said = self.process.stdout.read() + self.process.stderr.read()
        assert self.process.wait(TIMEOUT_S) == 0, said
        exit_code, memory = map(int, (self.folder / "used").read_text().split())
        self._reader.join(TIMEOUT_S)
        return Ended(exit_code, said.decode(), bytes(self.told), memory)

    def kill(self) -> None:
        """If it is still there."""
        for pid in children_of(self.process.pid):
            os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    """None of a process that has ended."""
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@contextmanager
def command(folder: Path, *words: str) -> Iterator[Command]:
    """Connected; killed if it is still there at the end, or after a time."""
    started = Command(folder, *words)
    late = threading.Timer(TIMEOUT_S, started.kill)
    late.start()
    try:
        started.connect()
        yield started
    finally:
        late.cancel()
        started.kill()
        started.process.wait()
        started.peer.close()
        for pipe in (started.process.stdout, started.process.stderr):
            assert pipe is not None
            pipe.close()


def discard(*ranges: tuple[int, int]) -> bytes:
    each = tuple(DiscardRange(start=start, length=length) for start, length in ranges)
    return streams.command(PostcopyRamDiscard(block="pc.ram", ranges=each))


LARGE: Final = [RamBlock(name="pc.ram", used_length=4 * UNIT, page_size=UNIT)]
HALF: Final = streams.ram_part(*(streams.page(start, block="pc.ram") for start in range(0, UNIT // 2, PAGE)))
# The package waits: its first device touches a page that does not come.
WAITING: Final = streams.package(streams.command(PostcopyListen()), streams.devices(), streams.command(PostcopyRun()))
ADVISE: Final = streams.command(PostcopyAdvise(sizes=PageSizes(summary=PAGE, target_page_size=PAGE)))
TOUCH: Final = ("--touch-in-package",)


@dataclass(frozen=True)
class Lie:
    """``ends``: the connection is closed behind it, for writing.  ``pauses``: it is a break that somebody gives up."""

    data: bytes
    reason: str
    exit_code: int = 3
    ends: bool = False
    words: tuple[str, ...] = ()
    pauses: bool = False


LIES: Final = {
    "a package of 4 GiB": Lie(
        advised() + streams.command(Packaged(length=0xFFFFFFFF)) + bytes(1 << 20), "a package of 4294967295 bytes"
    ),
    "a package that claims most of 1 GiB, and ends": Lie(
        advised() + streams.command(Packaged(length=(1 << 30) - 1)) + bytes(1 << 20),
        "PACKAGED: the stream ends here, 1072693247 of 1073741823 bytes too soon",
        ends=True,
    ),
    "32 TiB that never come": Lie(
        advised([RamBlock(name="pc.ram", used_length=1 << 45)]) + PACKAGE + END,
        "the source has ended, and 8589934592 pages have not come",
        exit_code=6,
    ),
    "more blocks than can be open": Lie(
        advised([RamBlock(name=f"block {number}", used_length=PAGE) for number in range(600)]),
        "ram: 600 blocks, each of which needs an open file: at most 512",
    ),
    "half a host page, and another": Lie(
        advised(LARGE, summary=UNIT | PAGE) + PACKAGE + HALF + streams.ram_part(streams.page(UNIT, block="pc.ram")),
        "a page of the host page at 0x10000, and that at 0x0 of pc.ram is not whole yet",
        exit_code=6,
        pauses=True,
    ),
    "half a host page, and the end": Lie(
        advised(LARGE, summary=UNIT | PAGE) + PACKAGE + HALF + END,
        "the source has ended, and 4 pages have not come",
        exit_code=6,
    ),
    "a discard before ADVISE": Lie(
        streams.header() + streams.configuration() + discard((0, PAGE)),
        "POSTCOPY_RAM_DISCARD while PRECOPY; may come now: OPEN_RETURN_PATH, PING, POSTCOPY_ADVISE, SWITCHOVER_START",
    ),
    "ADVISE after a discard": Lie(
        advised() + discard((0, PAGE)) + ADVISE,
        "POSTCOPY_ADVISE while DISCARDING; may come now: OPEN_RETURN_PATH, PACKAGED, PING, POSTCOPY_RAM_DISCARD, ",
    ),
    "a package in a package": Lie(advised() + streams.package(PACKAGE), "PACKAGED inside a package while ADVISED"),
    "LISTEN twice": Lie(
        advised() + streams.package(streams.command(PostcopyListen()) * 2),
        "POSTCOPY_LISTEN inside a package while LISTENING; may come now: PING, POSTCOPY_RUN",
        exit_code=6,
    ),
    "a discard while the package waits for a page": Lie(
        advised() + WAITING + discard((0, PAGE)),
        "POSTCOPY_RAM_DISCARD while LISTENING; may come now: OPEN_RETURN_PATH, PING, SWITCHOVER_START",
        exit_code=6,
        words=TOUCH,
    ),
    "the end while the package waits for a page": Lie(
        advised() + WAITING + END,
        "pc.rom: the package waits for the page at 0x1000, and the source has ended without it",
        exit_code=6,
        words=TOUCH,
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused_by_name_in_little_memory_and_the_end_is_told(name: str, tmp_path: Path) -> None:
    lie = LIES[name]
    with command(tmp_path, *lie.words) as receive:
        receive.send(lie.data)
        if lie.ends:
            receive.peer.shutdown(socket.SHUT_WR)
        if lie.pauses:
            receive.wait_for(lie.reason)
            receive.interrupt(lie.exit_code)
        ended = receive.ended()
    assert ended.exit_code == lie.exit_code, ended.said
    assert "Traceback" not in ended.said
    assert ("the guest is lost" if lie.pauses else lie.reason) in ended.said
    assert lie.pauses or not messages_in(ended.told) or ended.shut == 1
    assert ended.memory < MOST_MEMORY


PINGS, DISCARDS = 5_000, 500
FLOODS: Final = {
    "pings": advised() + streams.command(Ping(token=7)) * PINGS,
    "discards": advised() + discard(*((start, PAGE) for start in range(0, 12 * PAGE, PAGE))) * DISCARDS,
    "empty parts": advised() + streams.ram_part() * 5_000,
    "the same page": advised() + streams.ram_part(*[streams.page(0, block="pc.ram")] * 500),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_is_endured_in_little_memory(name: str, tmp_path: Path) -> None:
    with command(tmp_path) as receive:
        receive.send(FLOODS[name])
        receive.send(PACKAGE + EVERYTHING + END)
        ended = receive.ended()
    assert (ended.exit_code, ended.shut) == (0, 0), ended.said
    pongs = [message.token for message in messages_in(ended.told) if isinstance(message, Pong)]
    assert pongs == [1, *([7] * PINGS if name == "pings" else []), 3]
    assert ended.memory < MOST_MEMORY


def test_no_more_multifd_channels_are_kept_than_there_can_be(tmp_path: Path) -> None:
    with command(tmp_path) as receive, ExitStack() as stack:
        receive.send(streams.header())
        receive.wait_for('"precopy"')
        for _ in range(256):
            peer = stack.enter_context(socket.socket(socket.AF_UNIX))
            peer.connect(str(tmp_path / "in"))
            peer.sendall(b"\x11\x22\x33\x44")
        receive.wait_for("a connection came (multifd), there are 255 already: it is closed")
        receive.interrupt(3)
        ended = receive.ended()
    assert ended.exit_code == 3, ended.said


SILENT: Final = {
    "before its first byte": (b"", "", 130),
    "in precopy": (advised(), "advised", 3),
    "in the middle of a package": (advised() + PACKAGE[:-3], "advised", 3),
    "when touchers wait for it": (advised() + PACKAGE, '"running"', 6),
}


@pytest.mark.parametrize("name", SILENT)
def test_silence_is_ended_by_an_interrupt_which_says_where_the_guest_is(name: str, tmp_path: Path) -> None:
    data, comes, exit_code = SILENT[name]
    with command(tmp_path, "--touch", "random", "--touch", "sequential") as receive:
        (pid,) = children_of(receive.process.pid)
        children = children_of(pid)
        receive.send(data)
        if data:
            receive.wait_for(comes)
        receive.interrupt(exit_code)
        ended = receive.ended()
    assert ended.exit_code == exit_code, ended.said
    assert "Traceback" not in ended.said
    assert len(children) == 3
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


# -- one receiver, lied to again and again


@pytest.mark.asyncio
async def test_a_page_that_the_package_waits_for_is_read_while_it_is_loaded(tmp_path: Path) -> None:
    """S7: whoever waited for the package before it reads on would wait for ever."""
    async with receiving(tmp_path, touch_in_package=True) as receiver, source_of(receiver) as source:
        package = streams.package(
            streams.command(PostcopyListen()),
            streams.devices(),
            streams.command(Ping(token=3)),
            streams.command(PostcopyRun()),
        )
        source.send(advised(), package)
        assert await source.message() == Pong(token=1)
        for _ in ("timer", "serial"):  # each device touches a page, and the next is not begun before it has come
            asked = await source.message()
            assert isinstance(asked, RequestPagesId | RequestPages)
            source.send(streams.ram_part(streams.page(asked.start, block="pc.rom")))
        assert await source.message() == Pong(token=3)
        rest = [streams.page(number * PAGE, block="pc.ram") for number in range(PAGES["pc.ram"])]
        source.send(streams.ram_part(*rest), END)
        assert await source.until_shut() == 0
        assert (await receiver.result()).exit_code == 0
        (told,) = [event for event in receiver.events if isinstance(event, Latency) and event.where == "package"]
        assert sum(told.counts) == 2


async def _until_paused(receiver: Receiving, count: int) -> Paused:
    """Until it has been broken so often; the last break."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            breaks = [event for event in receiver.events if isinstance(event, Paused)]
            if len(breaks) == count:
                return breaks[-1]
            receiver.news.clear()
            await receiver.news.wait()


async def _resume(source: Source) -> None:
    """Take a recovery to its end."""
    source.send(*(streams.command(RecvBitmap(block=name)) for name in PAGES), streams.command(PostcopyResume()))
    while not isinstance(message := await source.message(), ResumeAck):
        assert isinstance(message, ReceivedBitmap)


BREAKS: Final = [
    (state, number)
    for state in (Phase.RUNNING, Phase.RECOVERING)
    for number in CommandNumber
    if number not in allowed(state)
]


@pytest.mark.asyncio
async def test_what_may_not_come_once_the_guest_runs_is_a_break_and_nothing_is_lost(tmp_path: Path) -> None:
    """Every command that the rows of RUNNING and RECOVERING do not name, and pages that are lies, one after another."""
    lies = [(state, built(number), f"{number.name} while {state.name};") for state, number in BREAKS]
    for record, reason in (
        (streams.page(streams.BLOCKS["pc.ram"], block="pc.ram"), "the block ends at"),
        (streams.page(0, block="nowhere"), "nowhere"),
        (streams.zero(PAGE, fill=0x77, block="pc.ram"), "a zero page with the value 0x77 in postcopy"),
        (streams.xbzrle(0, b"\0", block="pc.ram"), "a page is sent as XBZRLE in postcopy"),
    ):
        lies.append((Phase.RUNNING, streams.ram_part(record), reason))
    raw = tmp_path / "ram"
    async with receiving(tmp_path, raw=raw) as receiver:
        async with source_of(receiver) as source:
            source.send(advised(), PACKAGE, streams.ram_part(streams.page(0, block="pc.ram")))
            await phase(receiver, "running")
            source.send(streams.command(PostcopyRun()))
            await _until_paused(receiver, 1)
        for count, (state, lie, reason) in enumerate(lies, start=2):
            await ask(receiver.receiver.control, "recover", receiver.uri)
            async with source_of(receiver) as source:
                if state is Phase.RUNNING:
                    await _resume(source)
                source.send(lie)
                assert reason in (await _until_paused(receiver, count)).reason
        await ask(receiver.receiver.control, "recover", receiver.uri)
        async with source_of(receiver) as source:
            await _resume(source)
            rest = [streams.page(number * PAGE, block="pc.ram") for number in range(1, PAGES["pc.ram"])]
            rom = [streams.page(number * PAGE, block="pc.rom") for number in range(PAGES["pc.rom"])]
            source.send(streams.ram_part(*rest, *rom), END)
            assert await source.until_shut() == 0
        result = await receiver.result()
        assert (result.exit_code, result.numbers["duplicates"]) == (0, 0)
    for name, count in PAGES.items():
        whole = b"".join(streams.page(number * PAGE)[-PAGE:] for number in range(count))
        assert (raw / f"{name}.raw").read_bytes() == whole
    changes = [event.status for event in receiver.events if isinstance(event, StatusChanged)]
    assert changes.count("paused") == len(lies) + 1
