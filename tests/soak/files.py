"""Every other way that RAM takes: into files, with each capability that changes them, and through a tap.

The stream is the same again when it is rebuilt, its RAM is that of the stopped source where that is a measure, and of a
file what was rebuilt loads into a real QEMU whose guest goes on.
"""

import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from qmigrate.analysis.check import check
from qmigrate.analysis.extract import extract
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
from tests.live.recording import Kind, at_once, extra, into_file, recorded
from tests.live.same import assert_same_ram, loses_writes
from tests.live.tapping import assert_recording_holds_what_the_source_has, tapped
from tests.live.versions import Qemu, installed
from tests.soak.migrations import Unit

GUEST: Final = Guest("walker", memory_mib=16, zero_share=0.4, walked_share=0.3, pages_per_tick=64)
UUID: Final = "-uuid 00112233-4455-6677-8899-aabbccddeeff"
MIB: Final = 1 << 20
# Through a tap: does the destination's channel of its own answer, and is the connection cut?
TAPPED: Final = {
    "at once": (False, False),
    "after a pass": (False, False),
    "cut": (False, True),
    "preempt": (True, False),
    "preempt cut": (True, True),
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


def units() -> Iterator[Unit]:
    """All ways of all versions."""
    for name, kind in FILES.items():
        for qemu in kind.qemus():
            yield Unit(f"file {name} {qemu.name}", _record(qemu, kind))
    for qemu in installed():
        for name, (preempt, cut) in TAPPED.items():
            if not preempt or qemu.number >= (7, 1):
                yield Unit(f"tapped {name} {qemu.name}", _tap(qemu, name, preempt, cut))


def _record(qemu: Qemu, kind: Kind) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(_: random.Random, folder: Path) -> str:
        (folder / "source").mkdir()
        async with recorded(qemu, kind, folder / "source") as recording:
            with Migration(recording.stream) as migration:
                checked = check(migration)
                assert (checked.valid, checked.identical, checked.undecoded) == (True, True, 0)
                extracted = extract(migration, folder / "ram")
                written = b"".join(write(migration.entries()))
            # release-ram gives a page back once it is sent: the source has zeros there.
            if not loses_writes(qemu, kind) and "release-ram" not in kind.capabilities:
                await assert_same_ram(recording.source, extracted, folder / "memory")
        async with loaded(qemu, replace(kind, parameters={}), folder / "destination", written, stopped=True) as taker:
            await assert_same_ram(taker.machine, extracted, folder / "memory")
            await taker.machine.session.execute("cont")
            await console.assert_goes_on(taker.console)
        return ""

    return run


def _tap(qemu: Qemu, name: str, preempt: bool, cut: bool) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(chance: random.Random, folder: Path) -> str:
        cutter = Cutter([chance.randrange(MIB // 4, 2 * MIB)] if cut else [])
        behind = f"unix:{folder / 'behind'}"
        async with pair(qemu, folder) as two:
            async with (
                Relay(behind, two.uri, folder / "relayed", on_bytes=cutter.passed) as relay,
                tapped(folder, behind) as (listen, recording),
            ):
                cutter.relay = relay
                more = {"postcopy": [AfterPass(1)]} if name == "after a pass" else {}
                plan = broken_plan(two, uri=listen, preempt=preempt, **more)
                result = await migrate(*two.sessions, plan, on_event=cutter.heard)
                assert (result.exit_code, result.recoveries) == (0, cutter.cuts), result.message
                await two.assert_guest_goes_on()
            source = two.source if qemu.number >= (10,) else None
            await assert_recording_holds_what_the_source_has(recording, source, folder)
        return "" if result.switched else "completed before the switch"

    return run
