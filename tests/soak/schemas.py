"""Schemas of every version, made both ways, for postcopy streams of two machines.

What they decode is compared with what the other way decodes; nothing is undecoded but what only a guest sets up.
"""

import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from qmigrate.analysis.check import check
from qmigrate.analysis.devices import plain
from qmigrate.capture.migration import Migration
from qmigrate.capture.saved import read_saved
from qmigrate.capture.schemas import Schema, SchemaCache, read_schema
from qmigrate.operations.schema import make_schema
from tests.live.recording import KINDS, Kind, arguments_of, recorded
from tests.live.versions import Qemu, installed
from tests.soak.migrations import Unit

POSTCOPY: Final[Mapping[str, Any]] = {
    "capabilities": {"postcopy-ram": True},
    "through_relay": True,
    "postcopy": True,
    "passes": 0,
}
MACHINES: Final = {
    "pc": KINDS["pc-postcopy"],
    "q35": replace(KINDS["pc-postcopy"], machine="q35"),
    "q35 with many devices": replace(KINDS["q35-many"], **POSTCOPY),
}
# Both have lists whose lengths only the guest decides.
LISTS: Final = {"virtio-gpu", "nvme"}


def units() -> Iterator[Unit]:
    """Every version with each machine."""
    for name, kind in MACHINES.items():
        for qemu in installed():
            yield Unit(f"schema {name} {qemu.name}", _both_ways(qemu, kind))


def _both_ways(qemu: Qemu, kind: Kind) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(_: random.Random, folder: Path) -> str:
        for name in ("stopped", "precopy", "postcopy"):
            (folder / name).mkdir()
        arguments = arguments_of(qemu, kind, folder / "stopped", folder / "stopped" / "console")
        stopped = await make_schema([str(qemu.path), *arguments])
        assert (stopped.qemu, stopped.machine_type is None) == (qemu.version, False)
        alone = replace(kind, capabilities={}, through_relay=False, postcopy=False, paused=True)
        async with recorded(qemu, alone, folder / "precopy") as recording:
            with Migration(recording.stream) as migration:
                captured = read_schema(migration, made_from="a precopy")
        async with recorded(qemu, kind, folder / "postcopy") as recording:
            stream = recording.stream
        found = {
            name: _decoded(stream, schema, folder / name) for name, schema in (("-S", stopped), ("file", captured))
        }
        lost = [key for key in found["file"] if key not in found["-S"]]
        assert {key.rpartition("/")[0].rpartition("/")[2] for key in lost} <= LISTS, lost
        assert {key: fields for key, fields in found["file"].items() if key not in lost} == found["-S"]
        assert len(found["-S"]) > 20
        return f"only a running guest tells of {', '.join(lost)}" if lost else ""

    return run


def _decoded(stream: Path, schema: Schema, folder: Path) -> dict[str, Any]:
    """Each device by the schema; the stream is whole, the same again, and what a stand-in makes of it is the same."""
    cache = SchemaCache(folder)
    cache.add(schema)
    with Migration(stream, description=cache) as migration:
        checked = check(migration)
        contents = checked.gathering.contents
        assert (checked.valid, checked.identical) == (True, True)
        assert {section.schema for section in contents.sections if section.state is not None} == {str(schema)}
        with read_saved(migration) as saved, Migration(stream) as bare, read_saved(bare) as without:
            assert saved.devices == without.devices
            assert saved.was_running is not None
        return {name: plain(state) for name, state in contents.devices.items()}
