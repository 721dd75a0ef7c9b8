"""RAM as QEMU can send it otherwise: xbzrle, compressed pages, multifd with each compression.

Each is recorded between two real QEMUs; the destination is kept stopped, so that it holds what it was sent.
"""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import pytest

from qmigrate.capture.migration import Gathering, Migration
from qmigrate.format import xbzrle
from qmigrate.format.entry import Entry, RamPage
from qmigrate.format.ram import XBZRLE_ENCODING, NormalPage, Pages, RamFlag, RamRecord, RamWord, XbzrlePage, ZeroPage
from qmigrate.format.stream import SectionPart, SectionType
from qmigrate.format.write import write
from tests.guests import console
from tests.joining import joined, pages_of
from tests.live.encodings import assert_read_as_loaded, in_files
from tests.live.loading import loaded
from tests.live.recording import ENCODED, KINDS, recorded
from tests.live.same import assert_same_ram
from tests.live.saved import saved
from tests.live.versions import Qemu, installed

pytestmark = [pytest.mark.live, pytest.mark.asyncio]

# Two kinds of every version, the others of those whose recording is in the corpus; tests/soak has all of all.
EVERYWHERE: Final = ("pc-multifd", "pc-xbzrle")
RECORDED: Final = [
    (qemu, name)
    for name, kind in ENCODED.items()
    for qemu in kind.qemus()
    if name in EVERYWHERE or qemu.name in kind.kept
]
SENT_AS: Final = {
    "pc-multifd": "multifd nocomp",
    "pc-multifd-zlib": "multifd zlib",
    "pc-multifd-zstd": "multifd zstd",
    "pc-xbzrle": "xbzrle",
    "pc-compress": "compress_page",
}
PAGE: Final = 4096


@pytest.mark.parametrize(("qemu", "name"), RECORDED, ids=[f"{qemu.name}-{name}" for qemu, name in RECORDED])
async def test_ram_that_travelled_otherwise_is_that_of_the_qemu_that_loaded_it(
    qemu: Qemu, name: str, tmp_path: Path
) -> None:
    async with recorded(qemu, name, tmp_path) as recording:
        found = await assert_read_as_loaded(recording, tmp_path)
    assert found.pages[SENT_AS[name]] > 0, found.pages
    assert len(recording.channels) == (2 if "multifd" in name else 0)
    # Zero pages travel over multifd since 9.0.
    assert ("multifd zero" in found.pages) == ("multifd" in name and qemu.number >= (9,))


# -- our encoder


@pytest.mark.parametrize("qemu", installed(), ids=lambda qemu: qemu.name)
async def test_what_we_encode_as_xbzrle_qemu_decodes(qemu: Qemu, tmp_path: Path) -> None:
    """Each page comes as another copy first; what makes it what it was comes as the difference from that."""
    file = await saved(qemu, "pc-paused", tmp_path / "saved")
    with Migration(file.stream) as migration:
        expected = joined(migration.entries())
    with Migration(file.stream) as migration:
        changed = b"".join(write(with_differences(migration.entries())))
    (tmp_path / "changed.mig").write_bytes(changed)
    with Migration(tmp_path / "changed.mig") as migration:
        gathering = Gathering(migration.entries())
        found = joined(gathering)
    assert gathering.contents.errors == []
    assert found.blocks == expected.blocks
    assert found.pages["xbzrle"] == expected.pages["page"] > 50
    extracted = in_files(found.blocks, gathering, tmp_path / "ram")
    # The capability is the source's alone: a destination decodes without it.
    async with loaded(qemu, KINDS["pc-paused"], tmp_path / "destination", changed, stopped=True) as destination:
        await assert_same_ram(destination.machine, extracted, tmp_path / "memory")
        await destination.machine.session.execute("cont")
        await console.assert_goes_on(destination.console)


def with_differences(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Each normal page with other contents, and before RAM ends the differences that undo this."""
    differences: list[RamPage] = []
    in_end = False
    for entry in entries:
        match entry.record:
            case SectionPart(kind=kind):
                in_end = kind == SectionType.END
            case RamRecord(is_marker=True) if in_end:
                yield from (entry._replace(record=each) for each in differences)
                differences = []
            case Pages(block=block) as pages:
                for start, contents in pages_of(pages, entry.view):
                    body: NormalPage | ZeroPage = ZeroPage(fill=0)
                    flag = RamFlag.ZERO
                    if any(contents):
                        older, delta = older_copy(contents, seed=start)
                        body, flag = NormalPage(contents=older), RamFlag.PAGE
                        xbzrle_page = XbzrlePage(encoding=XBZRLE_ENCODING, length=len(delta), data=delta)
                        record = RamRecord(word=RamWord(start, int(RamFlag.XBZRLE)), block=block, body=xbzrle_page)
                        differences.append(RamPage(block, PAGE, record))
                    record = RamRecord(word=RamWord(start, int(flag)), block=block, body=body)
                    yield entry._replace(record=record)
                continue
        yield entry


def older_copy(contents: bytes, *, seed: int) -> tuple[bytes, bytes]:
    """A page that differs from this one in runs of all lengths, and what makes this one of it."""
    chance = random.Random(seed)
    older = bytearray(contents)
    for _ in range(chance.choice([1, 2, 20, 200])):
        at, length = chance.choice([0, chance.randrange(PAGE), PAGE - 1]), chance.choice([1, 1, 1, 2, 130, 600])
        older[at : at + length] = bytes(byte ^ 0x55 for byte in older[at : at + length])
    delta = xbzrle.encode(bytes(older), contents)
    if not delta:  # too long, or none: then one byte
        older = bytearray(contents)
        older[seed // PAGE % PAGE] ^= 0xFF
        delta = xbzrle.encode(bytes(older), contents)
        assert delta
    return bytes(older), delta
