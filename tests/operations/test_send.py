"""``send`` and ``receive``: the two stand-ins against each other, over sockets."""

import hashlib
import lzma
from pathlib import Path

import pytest

from qmigrate.analysis.extract import extract, file_names
from qmigrate.capture.migration import Migration
from qmigrate.endpoint.destination import Workload
from qmigrate.errors import RefusedError
from qmigrate.operations.send import Sender
from tests.live.receiving import receiving
from tests.test_channels import RECIPES, channels
from tests.uffd.kernel import needs_userfaultfd

pytestmark = [pytest.mark.asyncio, needs_userfaultfd]

CORPUS = Path(__file__).parents[1] / "corpus"


def corpus(name: str, folder: Path) -> Path:
    path = folder / "guest.mig"
    path.write_bytes(lzma.decompress((CORPUS / f"{name}.mig.xz").read_bytes()))
    return path


def ram_in(folder: Path, names: list[str]) -> dict[str, bytes]:
    return {name: (folder / file).read_bytes() for name, file in file_names(names).items()}


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
@pytest.mark.parametrize("name", ["pc-running-5.2", "q35-many-11.1", "odd/pc-mapped-10.0"])
async def test_what_is_sent_is_received(name: str, postcopy: bool, tmp_path: Path) -> None:
    path = corpus(name, tmp_path)
    workloads = [Workload(pattern="random", seed=1)] if postcopy else []
    async with receiving(tmp_path, raw=tmp_path / "received", workloads=workloads) as receiver:
        sent = await Sender(path, postcopy=postcopy).run(receiver.uri)
        assert (sent.exit_code, sent.message) == (0, "the destination has it all")
        received = await receiver.result()
        assert (received.exit_code, received.is_postcopy) == (0, postcopy)
        assert received.numbers["duplicates"] == 0
    with Migration(path) as migration:
        names = list(extract(migration, tmp_path / "extracted").files)
    assert ram_in(tmp_path / "received", names) == ram_in(tmp_path / "extracted", names)
    assert sent.counts.pages == sent.counts.total


ODD_INPUTS = (
    *("odd/pc-huge-postcopy-11.1", "odd/pc-snapshot-11.1", "odd/q35-early-11.1", "odd/arm-virt-11.1"),
    "q35-advised-7.2",
)


@pytest.mark.parametrize("name", ODD_INPUTS)
async def test_whatever_a_guest_was_saved_as_is_sent_by_postcopy(name: str, tmp_path: Path) -> None:
    path = corpus(name, tmp_path)
    async with receiving(tmp_path, raw=tmp_path / "received") as receiver:
        sent = await Sender(path, postcopy=True).run(receiver.uri)
        received = await receiver.result()
    assert (sent.exit_code, received.exit_code, received.numbers["duplicates"]) == (0, 0, 0)
    with Migration(path) as migration:
        names = list(extract(migration, tmp_path / "extracted").files)
    assert ram_in(tmp_path / "received", names) == ram_in(tmp_path / "extracted", names)


@pytest.mark.parametrize("name", RECIPES)
async def test_whatever_way_ram_travelled_what_is_received_is_what_qemu_loaded(name: str, tmp_path: Path) -> None:
    """Over multifd, as deltas, compressed: the recipe has the hash of what the QEMU that loaded it had."""
    path, more = corpus(f"channels/{name}", tmp_path), []
    for number, each in enumerate(channels(name)):
        more.append(str(tmp_path / f"{number}.channel"))
        Path(more[-1]).write_bytes(each)
    async with receiving(tmp_path, raw=tmp_path / "received") as receiver:
        sent = await Sender(path, channels=tuple(more), postcopy=True).run(receiver.uri)
        received = await receiver.result()
    assert (sent.exit_code, received.exit_code) == (0, 0)
    memory = ram_in(tmp_path / "received", ["pc.ram"])["pc.ram"][1 << 20 :]
    assert hashlib.sha256(memory).hexdigest() == RECIPES[name]["ram-from-1-mib-sha256"]


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
async def test_what_was_sent_and_saved_is_the_same_guest(postcopy: bool, tmp_path: Path) -> None:
    path, again = corpus("pc-running-11.1", tmp_path), tmp_path / "again.mig"
    async with receiving(tmp_path, save=again) as receiver:
        await Sender(path, postcopy=postcopy).run(receiver.uri)
        assert (await receiver.result()).exit_code == 0
    with Migration(path) as before, Migration(again) as after:
        first, second = extract(before, tmp_path / "before"), extract(after, tmp_path / "after")
        names = list(first.files)
        assert list(second.files) == names
        assert ram_in(tmp_path / "before", names) == ram_in(tmp_path / "after", names)
        # By postcopy no description comes along, so that only the bytes can be compared.
        wanted = [(each.key, each.length) for each in before.sections if each.kind.name == "FULL"]
        assert [(each.key, each.length) for each in after.sections if each.kind.name == "FULL"] == wanted


async def test_nobody_listens(tmp_path: Path) -> None:
    path = corpus("pc-paused-11.1", tmp_path)
    with pytest.raises(RefusedError, match=r"it can't be reached at unix:.*: No such file or directory"):
        await Sender(path).run(f"unix:{tmp_path / 'nowhere'}")
    with pytest.raises(RefusedError, match="is no socket: expected unix:PATH or tcp:HOST:PORT"):
        await Sender(path).run("exec:cat")


async def test_a_block_that_there_is_not_has_no_pages(tmp_path: Path) -> None:
    path = corpus("pc-paused-11.1", tmp_path)
    with pytest.raises(RefusedError, match=r"there is no RAM block ram0; there are pc\.ram,"):
        await Sender(path, postcopy=True, page_sizes={"ram0": 1 << 21}).run(f"unix:{tmp_path / 'in'}")
