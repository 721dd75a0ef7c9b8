"""Every other way that RAM takes: into files, with each capability that changes them, and through a tap.

The stream is the same again when it is rebuilt, its RAM is that of the stopped source where that is a measure, and of a
file what was rebuilt loads into a real QEMU whose guest goes on.
"""

import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from qmigrate.analysis.check import check
from qmigrate.analysis.extract import Extracted, extract
from qmigrate.capture.migration import Migration
from qmigrate.endpoint.relay import Relay
from qmigrate.format.write import write
from qmigrate.operations.migrate import migrate
from qmigrate.operations.policy import AfterPass
from tests.guests import console
from tests.guests.build import Guest
from tests.live.broken import Cutter, broken_plan
from tests.live.loading import loaded
from tests.live.pair import pair
from tests.live.receiving import huge_pages
from tests.live.recording import ODD, Kind, Recording, at_once, extra, into_file, recorded, slowly
from tests.live.same import assert_same_ram, loses_writes
from tests.live.tapping import assert_recording_holds_what_they_have, tapped
from tests.live.versions import Qemu, installed
from tests.soak.encodings import BACKEND, GUEST, HUGE, UUID, huge_backend, huge_pages_for
from tests.soak.migrations import Unit

MIB: Final = 1 << 20
# Through a tap: does the destination's channel of its own answer, and is the connection cut?
TAPPED: Final = {
    "at once": (False, False),
    "after a pass": (False, False),
    "cut": (False, True),
    "preempt": (True, False),
    "preempt cut": (True, True),
}


@dataclass(frozen=True)
class Tapping:
    """A migration through a tap, into postcopy ``after_passes``.

    ``held``: the destination is not to run, so what it has is what it was sent, also of 5.2 and 7.2, which lose writes.
    ``gives_back``: the source keeps nothing of what it has sent.
    """

    preempt: bool = False
    cut: bool = False
    after_passes: int = 0
    held: bool = False
    huge: bool = False
    gives_back: bool = False
    wishes: Mapping[str, Any] = field(default_factory=dict)
    since: tuple[int, ...] = ()

    @property
    def guest(self) -> Guest:
        """Where it is on huge pages."""
        return TO_BE_CUT if self.cut else ON_HUGE_PAGES


# It needs the next huge page now and then: a guest that jumps about has them all before the cut.
ON_HUGE_PAGES: Final = replace(GUEST, memory_mib=128, pages_per_tick=4, stride=0)
# A source of 11.1 looks whether it may leave postcopy-device after each 64 host pages or so, and when all is sent.
# Who cuts it before fails it, and may have the guest on both sides: there have to be many more than 64 huge pages.
TO_BE_CUT: Final = replace(ON_HUGE_PAGES, memory_mib=512, pages_per_tick=16)
ENOUGH_FOR_HUGE_PAGES: Final[dict[str, Any]] = {"bandwidth": 48 * MIB, "postcopy_bandwidth": 48 * MIB}
PREEMPT: Final = (7, 1)
MULTIFD_POSTCOPY: Final = (10, 1)
TAPS: Final = {
    name: Tapping(preempt, cut, int(name == "after a pass"), since=PREEMPT if preempt else ())
    for name, (preempt, cut) in TAPPED.items()
} | {
    "held at once": Tapping(held=True),
    "held after a pass": Tapping(held=True, after_passes=1),
    "held cut": Tapping(held=True, cut=True),
    "held preempt": Tapping(held=True, preempt=True, since=PREEMPT),
    "held preempt cut": Tapping(held=True, preempt=True, cut=True, since=PREEMPT),
    "held release-ram": Tapping(held=True, gives_back=True, wishes={"capabilities": {"source:release-ram": True}}),
    "held xbzrle": Tapping(held=True, after_passes=2, wishes={"xbzrle": True}),
    "huge": Tapping(huge=True),
    "huge after a pass": Tapping(huge=True, after_passes=1),
    "huge cut": Tapping(huge=True, cut=True),
    "huge preempt": Tapping(huge=True, preempt=True, since=PREEMPT),
    "huge preempt cut": Tapping(huge=True, preempt=True, cut=True, since=PREEMPT),
    "held huge": Tapping(held=True, huge=True),
    "held huge cut": Tapping(held=True, huge=True, cut=True),
    "held huge preempt cut": Tapping(held=True, huge=True, preempt=True, cut=True, since=PREEMPT),
    "multifd": Tapping(wishes={"multifd": 2}, since=MULTIFD_POSTCOPY),
    "multifd after a pass": Tapping(wishes={"multifd": 4}, after_passes=1, since=MULTIFD_POSTCOPY),
    "multifd zstd preempt": Tapping(
        wishes={"multifd": 3, "compression": "zstd"}, preempt=True, after_passes=1, since=MULTIFD_POSTCOPY
    ),
    "multifd cut": Tapping(wishes={"multifd": 2}, cut=True, after_passes=1, since=MULTIFD_POSTCOPY),
}

file = partial(Kind, guest=GUEST, since=(9,), course=into_file())
piped = partial(Kind, guest=GUEST, course=at_once)
FILES: Final = {
    "mapped-ram": file("pages at their places", capabilities={"mapped-ram": True}),
    "mapped-ram paused": file("pages at their places", capabilities={"mapped-ram": True}, paused=True),
    "mapped-ram multifd": file("written by several threads", capabilities={"mapped-ram": True, "multifd": True}),
    "mapped-ram direct-io": file(
        "written past the page cache",
        capabilities={"mapped-ram": True, "multifd": True},
        parameters={"direct-io": True},
        since=(9, 1),
    ),
    "plain file": file("as QEMU writes it into a file", since=(8, 2)),
    "uuid": piped("the UUID in CONFIGURATION", capabilities={"validate-uuid": True}, devices=extra(UUID)),
    "release-ram": piped("pages given back as they are sent", capabilities={"release-ram": True}),
}


# With each other, and of other memory: `restore` makes nothing of these that it does not of those above.
mapped = partial(file, "pages at their places")
MAPPED: Final = {"mapped-ram": True}
BY_CHANNELS: Final = {"mapped-ram": True, "multifd": True}
# Source and destination have the memory itself in common.
SHARED: Final[Mapping[str, Any]] = {
    "machine": "pc,memory-backend=pc.ram",
    "devices": lambda _, folder: [
        "-object",
        f"memory-backend-file,id=pc.ram,share=on,mem-path={folder.parent / 'ram.img'},{BACKEND}",
    ],
}
MORE_FILES: Final = {
    "mapped-ram passes": mapped(capabilities=MAPPED, course=slowly("file:STREAM", passes=3)),
    "mapped-ram multifd passes": mapped(capabilities=BY_CHANNELS, course=slowly("file:STREAM", passes=3)),
    **{
        f"mapped-ram multifd {channels}": mapped(capabilities=BY_CHANNELS, parameters={"multifd-channels": channels})
        for channels in (1, 3, 4)
    },
    "mapped-ram direct-io 4": mapped(
        capabilities=BY_CHANNELS, parameters={"direct-io": True, "multifd-channels": 4}, since=(9, 1)
    ),
    "mapped-ram direct-io alone": mapped(capabilities=MAPPED, parameters={"direct-io": True}, since=(9, 1)),
    **{
        f"mapped-ram zero pages {detection}": mapped(
            capabilities=BY_CHANNELS, parameters={"zero-page-detection": detection}
        )
        for detection in ("none", "legacy", "multifd")
    },
    "mapped-ram uuid": mapped(capabilities={"mapped-ram": True, "validate-uuid": True}, devices=extra(UUID)),
    "mapped-ram release-ram": mapped(capabilities={"mapped-ram": True, "release-ram": True}),
    "mapped-ram huge": mapped(capabilities=MAPPED, **HUGE),
    "mapped-ram multifd huge": mapped(capabilities=BY_CHANNELS, **HUGE),
    # 10.0 fails: "Unable to write to file: Bad address".
    "mapped-ram ignore-shared": mapped(
        capabilities={"mapped-ram": True, "x-ignore-shared": True}, since=(11,), **SHARED
    ),
    "huge": piped("RAM on huge pages", **HUGE),
    "huge passes": piped("RAM on huge pages", course=slowly("exec:cat > STREAM", passes=3), **HUGE),
    "ignore-shared": piped("shared RAM is left out", capabilities={"x-ignore-shared": True}, **SHARED),
    "uuid ignore-shared": piped(
        "both in CONFIGURATION",
        capabilities={"x-ignore-shared": True, "validate-uuid": True},
        machine=SHARED["machine"],
        devices=lambda qemu, folder: [*SHARED["devices"](qemu, folder), *UUID.split()],
    ),
    "passes": piped("several passes", course=slowly("exec:cat > STREAM", passes=3)),
    "snapshot": piped("a background snapshot", capabilities={"background-snapshot": True}, since=(6,)),
    "savevm": replace(ODD["pc-savevm"], guest=GUEST),
}


def units() -> Iterator[Unit]:
    """All ways of all versions."""
    for name, kind in (FILES | MORE_FILES).items():
        for qemu in kind.qemus():
            yield Unit(f"file {name} {qemu.name}", _record(qemu, kind))
    for qemu in installed():
        for name, way in TAPS.items():
            if qemu.number >= way.since:
                yield Unit(f"tapped {name} {qemu.name}", _tap(qemu, way))


def _source_is_a_measure(qemu: Qemu, kind: Kind) -> bool:
    # release-ram gives a page back once it is sent: the source has zeros there.  A snapshot's source goes on.
    goes_on = kind.course is ODD["pc-savevm"].course or "background-snapshot" in kind.capabilities
    return not (loses_writes(qemu, kind) or goes_on or "release-ram" in kind.capabilities)


def _record(qemu: Qemu, kind: Kind) -> Callable[[random.Random, Path], Awaitable[str]]:
    without = ["pc.ram"] if "x-ignore-shared" in kind.capabilities else []

    async def run(_: random.Random, folder: Path) -> str:
        with huge_pages_for(kind):
            (folder / "source").mkdir()
            async with recorded(qemu, kind, folder / "source") as recording:
                with Migration(recording.stream) as migration:
                    checked = check(migration)
                    assert (checked.valid, checked.identical, checked.undecoded) == (True, True, 0)
                    extracted = extract(migration, folder / "ram")
                    written = b"".join(write(migration.entries()))
                measured = await _held_to_source(recording, extracted, folder, without)
                # The guest that shares its memory must not go on beside the other; QEMU has stopped it.
                async with loaded(
                    qemu, replace(kind, parameters={}), folder / "destination", written, stopped=True
                ) as taker:
                    await assert_same_ram(taker.machine, extracted, folder / "memory", without=without)
                    await taker.machine.session.execute("cont")
                    await console.assert_goes_on(taker.console)
        return "" if measured else "held to what loaded it alone"

    return run


async def _held_to_source(recording: Recording, extracted: Extracted, folder: Path, without: list[str]) -> bool:
    if not _source_is_a_measure(recording.qemu, recording.kind):
        return False
    await assert_same_ram(recording.source, extracted, folder / "memory", without=without)
    return True


def _tap(qemu: Qemu, way: Tapping) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(chance: random.Random, folder: Path) -> str:
        with huge_pages(2 * way.guest.memory_mib // 2) if way.huge else nullcontext():
            return await _tapped(qemu, way, chance, folder)

    return run


async def _tapped(qemu: Qemu, way: Tapping, chance: random.Random, folder: Path) -> str:
    least = 4 * MIB if way.held and way.huge else MIB // 4  # a huge page may go before what it loads
    cutter = Cutter([least + chance.randrange(2 * MIB)] if way.cut else [], guest_is_held=way.held)
    behind = f"unix:{folder / 'behind'}"
    memory: dict[str, Any] = {}
    if way.huge:
        memory = {"guest": way.guest, "machine": HUGE["machine"], "more": huge_backend(way.guest)}
    async with pair(qemu, folder, **memory, destination_more=["-S"] if way.held else []) as two:
        async with (
            Relay(behind, two.uri, folder / "relayed", on_bytes=cutter.passed) as relay,
            tapped(folder, behind) as (listen, recording),
        ):
            cutter.relay = relay
            wishes = (ENOUGH_FOR_HUGE_PAGES if way.huge else {}) | dict(way.wishes)
            if way.after_passes:
                wishes["postcopy"] = [AfterPass(way.after_passes)]
            plan = broken_plan(two, uri=listen, preempt=way.preempt, **wishes)
            result = await migrate(*two.sessions, plan, on_event=cutter.heard)
            assert (result.exit_code, result.recoveries) == (0, cutter.cuts), result.message
            if not way.held:
                await two.assert_guest_goes_on()
        source = two.source if qemu.number >= (10,) and not way.gives_back else None
        await assert_recording_holds_what_they_have(
            recording, [each for each in (source, two.destination if way.held else None) if each], folder
        )
        if way.held:
            await two.destination.session.execute("cont")
            await two.assert_guest_goes_on()
    if way.cut and not cutter.cuts:
        return "over before the cut"
    return "" if result.switched else "completed before the switch"
