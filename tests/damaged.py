"""Recordings of ``qmigrate tap``, damaged: what each command then has to say.

``test_damaged_recordings.py`` has some, ``soak/recordings.py`` thousands.
"""

import contextlib
import hashlib
import io
import json
import lzma
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from qmigrate.analysis.extract import extract
from qmigrate.capture.frames import HEADER, Direction, FrameKind
from qmigrate.capture.migration import Migration
from qmigrate.capture.recorder import Recorder
from qmigrate.capture.recording import Recording
from qmigrate.cli.main import main
from qmigrate.format.command import PostcopyResume, RecvBitmap
from qmigrate.format.return_path import Pong, Shut, encode_message
from tests import streams
from tests.joining import channel_entries, joined
from tests.test_mutations import slim
from tests.walking import entries

CORPUS: Final = Path(__file__).parent / "corpus"
LONGEST_S: Final = 20.0  # of one command; it takes a fraction of a second
PIECE: Final = 3000  # bytes of a frame: so that frames stand close together, of which QEMU writes fewer and longer ones
FORWARD, RETURN = Direction.FORWARD, Direction.RETURN


def packed(name: str) -> bytes:
    return lzma.decompress((CORPUS / f"{name}.xz").read_bytes())


def multifd(name: str) -> list[tuple[bytes, bytes]]:
    """Each connection's bytes, forward and back."""
    folder = CORPUS / "channels"
    others = sorted(folder.glob(f"{name}.0*-forward.xz"))
    return [(packed(f"channels/{name}.mig"), b""), *((lzma.decompress(each.read_bytes()), b"") for each in others)]


def preempt() -> list[tuple[bytes, bytes]]:
    """Synthetic: a postcopy with a page on its own channel, cut near the end and resumed."""
    whole, end = streams.postcopy(), streams.ram_end() + streams.eof()
    asked = streams.page(0x3000, b"p" * streams.PAGE, block="pc.ram")
    again = streams.command(RecvBitmap(block="pc.ram")) + streams.command(PostcopyResume()) + end
    return [
        (whole[: -len(end)], encode_message(Pong(token=1))),
        (asked, b""),
        (again, encode_message(Shut(value=0))),
    ]


KINDS: Final[dict[str, Callable[[], list[tuple[bytes, bytes]]]]] = {
    "precopy": lambda: [(slim("pc-paused-11.1")[0], b"")],
    "postcopy": lambda: [(packed("pc-postcopy-10.0.mig"), packed("pc-postcopy-10.0.back"))],
    "preempt": preempt,
    "multifd": lambda: multifd("pc-multifd-11.1"),
    "multifd zlib": lambda: multifd("pc-multifd-zlib-7.2"),
}


def write_recording(path: Path, connections: list[tuple[bytes, bytes]], *, piece: int) -> None:
    """All connections at once, a piece of each in turn."""
    with Recorder(path) as recorder:
        for number in range(len(connections)):
            recorder.opened(number, peer="", listen="unix:/a", forward="unix:/b")
        longest = max(len(data) for connection in connections for data in connection)
        for at in range(0, longest, piece):
            for number, (forward, back) in enumerate(connections):
                for direction, data in ((FORWARD, forward), (RETURN, back)):
                    if part := data[at : at + piece]:
                        recorder.data(number, direction, part)
        for number, (forward, back) in enumerate(connections):
            recorder.closed(number, forward_bytes=len(forward), return_bytes=len(back))


@dataclass(frozen=True)
class Sample:
    """A whole recording, and where its frames are: begin, end, and of DATA that its bytes begin at HEADER.size."""

    name: str
    data: bytes
    frames: tuple[tuple[int, int, FrameKind], ...]


@lru_cache(maxsize=2)
def sample(name: str, folder: Path) -> Sample:
    path = folder / f"{name}.tap"
    if not path.exists():
        write_recording(path, KINDS[name](), piece=PIECE if name in ("precopy", "preempt") else 20 * PIECE)
    frames = []
    with Recording(path) as recording:
        frames += [(each.offset - HEADER.size, each.offset + each.length, each.kind) for each in recording.advance()]
    return Sample(name, path.read_bytes(), tuple(frames))


@dataclass(frozen=True)
class Damage:
    """What was done, in words; the file; and does the file itself, not only what was relayed, tell that?"""

    what: str
    data: bytes
    is_told: bool


def damaged(whole: Sample, chance: random.Random) -> Damage:
    """One of the things that happen to files, at a random place."""
    data = bytearray(whole.data)
    begin, end, kind = chance.choice(whole.frames)
    header = begin + chance.randrange(HEADER.size)
    match chance.randrange(8):
        case 0:
            data[header] ^= 1 << chance.randrange(8)
            return Damage(f"a bit of the header of {kind.name} at {header:#x}", bytes(data), True)
        case 1:
            cut = chance.choice((begin, header, chance.randrange(len(data)), len(data) - chance.randrange(1, 80)))
            return Damage(f"cut at {cut:#x}", bytes(data[:cut]), True)
        case 2:
            # OPENED moves the numbers of those behind it, DATA is counted, END is missed.
            del data[begin:end]
            return Damage(f"{kind.name} at {begin:#x} is missing", bytes(data), kind is not FrameKind.CLOSED)
        case 3:
            at, count = chance.randrange(36, len(data)), chance.choice((1, 4, 100))
            del data[at : at + count]
            return Damage(f"{count} bytes at {at:#x} are missing", bytes(data), True)
        case 4:
            at = begin // 512 * 512  # a block of the disk, with a header in it
            data[at : at + 512] = bytes(min(512, len(data) - at))
            return Damage(f"zeros from {at:#x} on", bytes(data), True)
        case 5:
            data[chance.randrange(36)] ^= 1 << chance.randrange(8)
            return Damage("a bit of the front", bytes(data), True)
        case 6 if kind is FrameKind.DATA:
            at = chance.randrange(begin + HEADER.size, end)
            data[at] ^= 1 << chance.randrange(8)
            return Damage(f"a bit of what was relayed, at {at:#x}", bytes(data), False)
        case _:
            at = chance.randrange(whole.frames[0][0], len(data))
            piece = chance.randbytes(chance.choice((1, 9, 700)))[: len(data) - at]
            data[at : at + len(piece)] = piece
            hit = [each for each in whole.frames if at < each[1] and each[0] < at + len(piece)]
            inside = all(kind is FrameKind.DATA and at >= begin + HEADER.size for begin, _, kind in hit)
            return Damage(f"{len(piece)} other bytes at {at:#x}", bytes(data), not inside)


def run(*words: str | Path) -> tuple[int, str, str]:
    """A command in this process: exit code, standard output and error.  Whatever it raises is raised here."""
    out, err = io.StringIO(), io.StringIO()
    began = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, words)])
    assert time.monotonic() - began < LONGEST_S, words
    return code, out.getvalue(), err.getvalue()


def assert_answered(whole: Sample, damage: Damage, folder: Path) -> None:
    """Each of the four commands gives an answer, and none says that all is well which is not."""
    original, path, ram = folder / f"{whole.name}.tap", folder / "damaged.tap", folder / "ram"
    path.write_bytes(damage.data)
    answers = {
        name: run(*words)
        for name, words in {
            "dissect": ("dissect", "--json", path),
            "check": ("check", "--json", path),
            "extract": ("extract", "--json", "--raw", ram, path),
            "diff": ("diff", "--json", original, path),
        }.items()
    }
    same = damage.data == whole.data
    for name, (code, out, err) in answers.items():
        assert code in (0, 1, 2), name
        assert "Traceback" not in err, name
        assert all(line.startswith("qmigrate: ") for line in err.splitlines()), (name, err)
        if out:
            json.loads(out)
        # Where something is wrong it is said what, unless it is the answer itself.
        assert code == 0 or err or name in ("check", "diff"), name
        assert code != 0 or same or not damage.is_told, f"{name} says 0"
    if answers["check"][0] == 0:
        assert json.loads(answers["check"][1])["identical"]
    if answers["extract"][0] == 0:
        assert_ram_is_that_of_the_plain_joiner(path, ram)
    if answers["diff"][0] == 0:
        assert what_counts(original) == what_counts(path), "diff says 0"


def assert_ram_is_that_of_the_plain_joiner(path: Path, ram: Path) -> None:
    """Where there is no channel that joiner does not know."""
    with Recording(path) as recording:
        recording.read()
        parts = [(each.channel.kind.value, each.stream.read_at(0, each.stream.size)) for each in recording.channels()]
    if not {kind for kind, _ in parts} <= {"main", "multifd", "return path"}:
        return
    (main_bytes,) = (data for kind, data in parts if kind == "main")
    others = [channel_entries(data) for kind, data in parts if kind == "multifd"]
    plain = joined(entries(main_bytes), others)
    files = {each["name"]: ram / each["file"] for each in json.loads((ram / "blocks.json").read_text())}
    assert files.keys() == plain.blocks.keys()
    for name, contents in plain.blocks.items():
        assert files[name].read_bytes() == contents, name


def what_counts(path: Path) -> Any:
    """What two captures must share to be the same: the machine, each device's bytes, RAM as it is in the end."""
    folder = path.with_suffix(".counts")
    with Recording(path) as recording, Migration(path) as migration:
        stream = recording.read().main()
        devices = [
            (section.key, stream.read_at(section.offset, section.length))
            for section in migration.sections
            if section.kind.name == "FULL"
        ]
        blocks = {block.name: block.length for block in migration.blocks.values()}
        found = extract(migration, folder)
    ram = {name: hashlib.sha256((folder / file).read_bytes()).hexdigest() for name, file in found.files.items()}
    return migration.machine_type, devices, blocks, ram


def assert_all_answered(whole: Sample, seed: str, count: int, folder: Path) -> None:
    """So many damages, one after the other.  Raises ``AssertionError``, which says which one it was."""
    chance = random.Random(seed)
    for number in range(count):
        damage = damaged(whole, chance)
        try:
            assert_answered(whole, damage, folder)
        except Exception as exc:
            what = f"{whole.name}, seed {seed}, damage {number} ({damage.what})"
            raise AssertionError(f"{what}: {type(exc).__name__}: {exc}") from exc
