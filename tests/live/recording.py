"""Real migrations, recorded: what `scripts/record_corpus` keeps and live tests make afresh.

Each kind is a machine with its guest, and how it is migrated.  The QEMUs are still there, stopped, when the
recording is handed over, so that it can be compared with what they say of themselves.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from qmigrate.endpoint.relay import Relay
from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.guests.build import Guest
from tests.live.snapshot import snapshot_disk, vm_state
from tests.live.versions import Qemu, installed

TIMEOUT_S: Final = 90.0
SLOW: Final = 2 << 20  # bytes a second: several passes go by before anybody lets the migration converge
FAST: Final = 1 << 40

# Small working set, mostly zero: the capture is small, and still every pass has something to send.
WALKER: Final = Guest("walker", memory_mib=8, zero_share=0.95, walked_share=0.02, pages_per_tick=64)


@dataclass(frozen=True)
class Kind:
    """What is migrated and how.  ``capabilities`` are set on both sides; ``through_relay``: to a real peer."""

    shows: str
    machine: str = "pc"
    guest: Guest = WALKER
    devices: Callable[[Qemu, Path], list[str]] | None = None
    paused: bool = False
    passes: int = 2
    capabilities: Mapping[str, bool] = field(default_factory=dict)
    through_relay: bool = False
    postcopy: bool = False
    since: tuple[int, ...] = ()
    before: tuple[int, ...] = (999,)
    target: str = "x86_64"
    kept: tuple[str, ...] = ()
    """The versions whose stream is in the corpus, of an odd kind; of the others all are."""
    course: Callable[[Machine, Path], Awaitable[Path]] | None = None
    """How it goes, where it is no migration to its end; gives the stream."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Set on both sides, through a relay."""
    destination_stopped: bool = False
    """It keeps what it loaded: its guest does not run on."""

    @property
    def has_guest(self) -> bool:
        """Does our own guest run in it?  It is for x86; other targets never leave their start."""
        return self.target == "x86_64"

    def qemus(self) -> list[Qemu]:
        """Those installed that can make it, oldest first."""
        return [qemu for qemu in installed(self.target) if self.since <= qemu.number < self.before]


def many_devices(qemu: Qemu, folder: Path) -> list[str]:
    """virtio, e1000, USB, AHCI, NVMe where it can migrate (11.x), VGA, four CPUs."""
    disk, namespace = folder / "disk.img", folder / "namespace.img"
    for image in (disk, namespace):
        with image.open("wb") as file:
            file.truncate(1 << 20)
    words = [
        "-smp 4 -vga none -device VGA,vgamem_mb=1",
        "-netdev user,id=net0 -device virtio-net-pci,netdev=net0,romfile=",
        "-netdev user,id=net1 -device e1000,netdev=net1,romfile=",
        f"-drive if=none,id=disk0,file={disk},format=raw,readonly=on -device virtio-blk-pci,drive=disk0",
        "-device virtio-rng-pci -device virtio-balloon-pci -device virtio-serial-pci",
        "-device virtio-gpu-pci,max_outputs=1",
        "-device qemu-xhci -device usb-tablet -device ahci,id=ahci1",
        "-serial null -parallel null",
    ]
    if qemu.number >= (11,):  # before, nvme is marked as not migratable
        # Without a drive 11.1.3 dies of SIGSEGV while it saves the device.
        words.append(f"-drive if=none,id=nvme0,file={namespace},format=raw,readonly=on")
        words.append("-device nvme,serial=qmigrate,drive=nvme0")
    return " ".join(words).split()


KINDS: Final[Mapping[str, Kind]] = {
    "pc-running": Kind("several passes of a running guest; no capabilities"),
    "pc-paused": Kind("a paused guest: one pass", paused=True),
    "q35-running": Kind("several passes of a running guest", machine="q35"),
    "q35-paused": Kind("a paused guest: one pass", machine="q35", paused=True),
    "q35-many": Kind("many devices, four CPUs, several passes", machine="q35", devices=many_devices),
    "q35-advised": Kind(
        "postcopy was advised and not used: precopy to a real destination",
        machine="q35",
        capabilities={"postcopy-ram": True},
        through_relay=True,
    ),
    "pc-postcopy": Kind(
        "a whole postcopy migration, both directions",
        capabilities={"postcopy-ram": True},
        through_relay=True,
        postcopy=True,
        # At once: later a small guest may complete as precopy before the switch comes.
        passes=0,
    ),
}


def extra(*words: str) -> Callable[[Qemu, Path], list[str]]:
    """More arguments; FOLDER in them is the recording's folder."""
    return lambda _, folder: [part.replace("FOLDER", str(folder)) for word in words for part in word.split()]


async def savevm(source: Machine, folder: Path) -> Path:
    """An internal snapshot into the qcow2 of ``SNAPSHOT_DISK``."""
    answer = await source.session.human_monitor_command("savevm odd")
    assert not answer.strip(), answer
    stream = folder / "stream.mig"
    stream.write_bytes(vm_state(folder / "disk.qcow2"))
    return stream


async def cancel(source: Machine, folder: Path) -> Path:
    """Cancelled while RAM is sent."""
    stream = folder / "stream.mig"
    await migration.set_parameters(source.session, {"max-bandwidth": SLOW, "downtime-limit": 1})
    await migration.start(source.session, f"exec:cat > {stream}")
    async with asyncio.timeout(TIMEOUT_S):
        while not stream.exists() or stream.stat().st_size < SLOW // 10:  # noqa: ASYNC110 - QEMU does not tell
            await asyncio.sleep(0.02)
    await source.session.execute("migrate_cancel")
    await migration.wait_until(source.session, "cancelled", timeout_s=TIMEOUT_S)
    return stream


async def at_once(source: Machine, folder: Path) -> Path:
    """As fast as it goes, whatever the guest does."""
    stream = folder / "stream.mig"
    await migration.set_parameters(source.session, {"max-bandwidth": FAST})
    await migration.start(source.session, f"exec:cat > {stream}")
    await migration.wait_until(source.session, "completed", timeout_s=TIMEOUT_S)
    return stream


def into_file(options: str = "") -> Callable[[Machine, Path], Awaitable[Path]]:
    """By QEMU's own `file:` (8.2 and later), as fast as it goes."""

    async def course(source: Machine, folder: Path) -> Path:
        stream = folder / "stream.mig"
        await migration.set_parameters(source.session, {"max-bandwidth": FAST})
        await migration.start(source.session, f"file:{stream}{options}")
        await migration.wait_until(source.session, "completed", timeout_s=TIMEOUT_S)
        return stream

    return course


def slowly(uri: str, *, passes: int) -> Callable[[Machine, Path], Awaitable[Path]]:
    """To this URI, STREAM in it the file; so slowly that it can't converge, until so many passes went by."""

    async def course(source: Machine, folder: Path) -> Path:
        stream = folder / "stream.mig"
        await migration.set_parameters(source.session, {"max-bandwidth": SLOW, "downtime-limit": 1})
        await migration.start(source.session, uri.replace("STREAM", str(stream)))
        await _wait_for_syncs(source, passes + 1)
        await migration.set_parameters(source.session, {"downtime-limit": 30_000, "max-bandwidth": FAST})
        await migration.wait_until(source.session, "completed", timeout_s=TIMEOUT_S)
        return stream

    return course


# Next to no RAM: what is odd about these is elsewhere.
SMALL: Final = Guest("walker", memory_mib=8, zero_share=0.99, walked_share=0.005, pages_per_tick=64)
NO_FOOTERS: Final = "-global migration.send-section-footer=off"
NO_CONFIGURATION: Final = "-global migration.send-configuration=off"
paused = partial(Kind, guest=SMALL, paused=True)

ODD: Final[Mapping[str, Kind]] = {
    "pc-no-footers": paused("no section has a footer", devices=extra(NO_FOOTERS)),
    # Newer ones abort: hazard 3.
    "pc-no-configuration": paused("no CONFIGURATION", devices=extra(NO_CONFIGURATION), before=(10,)),
    "pc-no-description": paused("no description", machine="pc,suppress-vmdesc=on"),
    "pc-bare": paused(
        "no CONFIGURATION, no footers, no description",
        machine="pc,suppress-vmdesc=on",
        devices=extra(NO_FOOTERS, NO_CONFIGURATION),
        kept=("7.2",),
    ),
    "q35-bare": paused(
        "no footers and no description, many devices",
        machine="q35,suppress-vmdesc=on",
        devices=lambda qemu, folder: [*many_devices(qemu, folder), *NO_FOOTERS.split()],
    ),
    "pc-snapshot": Kind(
        "a background snapshot: no END of RAM",
        guest=SMALL,
        capabilities={"background-snapshot": True},
        since=(6,),
        course=at_once,
        kept=("11.1",),
    ),
    "pc-savevm": Kind(
        "an internal snapshot, taken out of its qcow2",
        guest=SMALL,
        devices=lambda qemu, folder: ["-drive", f"if=none,id=disk0,file={snapshot_disk(qemu, folder)},format=qcow2"],
        course=savevm,
        kept=("10.0",),
    ),
    "q35-early": paused(
        "virtio-mem's early section, and two RAM blocks of one length",
        machine="q35,memory-backend=ram0",
        devices=extra(
            "-m 8M,maxmem=64M -object memory-backend-ram,id=ram0,size=8M -object memory-backend-ram,id=more,size=8M",
            "-device virtio-mem-pci,memdev=more,requested-size=2M,block-size=2M",
        ),
        since=(8,),
        kept=("10.0", "11.1"),
    ),
    "pc-huge": paused(
        "RAM on huge pages, with postcopy advised: the block list has a page size",
        machine="pc,memory-backend=ram0",
        devices=extra("-object memory-backend-memfd,id=ram0,size=8M,hugetlb=on,hugetlbsize=2M"),
        capabilities={"postcopy-ram": True},
        through_relay=True,
        kept=("11.1",),
    ),
    "pc-huge-postcopy": Kind(
        "RAM on huge pages through a switch to postcopy: all pages of a huge one go together",
        machine="pc,memory-backend=ram0",
        devices=extra("-object memory-backend-memfd,id=ram0,size=8M,hugetlb=on,hugetlbsize=2M"),
        capabilities={"postcopy-ram": True},
        through_relay=True,
        postcopy=True,
        passes=0,
        kept=("11.1",),
    ),
    "pc-shared": paused(
        "x-ignore-shared: the block list has addresses, shared RAM is left out",
        machine="pc,memory-backend=ram0",
        devices=extra("-object memory-backend-file,id=ram0,size=8M,mem-path=FOLDER/ram.img,share=on"),
        capabilities={"x-ignore-shared": True},
        kept=("7.2",),
    ),
    "pc-huge-savevm": Kind(
        "a snapshot on huge pages with postcopy-ram on: a page size in the block list, and no ADVISE",
        guest=SMALL,
        machine="pc,memory-backend=ram0",
        devices=lambda qemu, folder: [
            *["-object", "memory-backend-memfd,id=ram0,size=8M,hugetlb=on,hugetlbsize=2M"],
            *("-drive", f"if=none,id=disk0,file={snapshot_disk(qemu, folder)},format=qcow2"),
        ],
        capabilities={"postcopy-ram": True},
        course=savevm,
        kept=("5.2",),
    ),
    "pc-mapped": Kind(
        "mapped-ram: each page has its place in the file",
        guest=SMALL,
        capabilities={"mapped-ram": True},
        since=(9,),
        course=into_file(),
        kept=("10.0", "11.1"),
    ),
    "pc-mapped-shared": Kind(
        "mapped-ram with x-ignore-shared: a block that is left out has neither bitmap nor pages",
        guest=SMALL,
        machine="pc,memory-backend=ram0",
        devices=extra("-object memory-backend-file,id=ram0,size=8M,mem-path=FOLDER/ram.img,share=on"),
        capabilities={"mapped-ram": True, "x-ignore-shared": True},
        since=(11,),  # 10.0 fails to write it
        course=into_file(),
        kept=("11.1",),
    ),
    "pc-cancelled": Kind("cancelled while RAM was sent", guest=WALKER, course=cancel),
    "arm-board": Kind("pages of 1 KiB, which nothing announces", machine="none", target="aarch64", kept=("7.2",)),
    "arm-virt": Kind("the size of pages in CONFIGURATION", machine="virt", target="aarch64", kept=("11.1",)),
}
"""Streams as QEMU writes them now and then; for ``Kind.qemus()`` only."""

# Pages that are written again and again, and change little.
REWRITTEN: Final = Guest("walker", memory_mib=8, zero_share=0.99, walked_share=0.008, pages_per_tick=64)
encoded = partial(Kind, guest=REWRITTEN, passes=1, through_relay=True, destination_stopped=True)

ENCODED: Final[Mapping[str, Kind]] = {
    "pc-multifd": encoded(
        "multifd, pages as they are",
        capabilities={"multifd": True},
        kept=("5.2", "11.1"),
    ),
    "pc-multifd-zlib": encoded(
        "multifd, zlib",
        capabilities={"multifd": True},
        parameters={"multifd-compression": "zlib"},
        kept=("7.2",),
    ),
    "pc-multifd-zstd": encoded(
        "multifd, zstd",
        capabilities={"multifd": True},
        parameters={"multifd-compression": "zstd"},
        since=(7,),  # Debian's 5.2 has none
        kept=("10.0",),
    ),
    "pc-xbzrle": encoded(
        "xbzrle from the second pass on",
        capabilities={"xbzrle": True},
        # The second pass fills the source's cache, deltas come from the third on.  They are so short that a migration
        # ends at once, but for a guest in a hurry, and a second pass of more than a tenth of a second's bandwidth.
        guest=replace(REWRITTEN, zero_share=0.975, walked_share=0.02, pages_per_tick=0),
        parameters={"max-bandwidth": SLOW // 4},
        passes=4,
        kept=("11.1",),
    ),
    "pc-compress": encoded("zlib, page by page", capabilities={"compress": True}, before=(9, 1), kept=("7.2",)),
}
"""Other ways in which RAM travels; for ``Kind.qemus()`` only."""


@dataclass
class Recording:
    """``stream`` is the forward direction; ``back`` the way back, where there is one; ``channels`` those of multifd."""

    qemu: Qemu
    kind: Kind
    arguments: list[str]
    stream: Path
    source: Machine
    back: Path | None = None
    destination: Machine | None = None
    console: Path | None = None
    queried: dict[str, Any] = field(default_factory=dict)
    channels: list[Path] = field(default_factory=list)


@asynccontextmanager
async def recorded(qemu: Qemu, name: str | Kind, folder: Path) -> AsyncGenerator[Recording]:
    """Migrate once, as the kind (of this name) says.  Source (and destination) live until the block is left."""
    kind = name if isinstance(name, Kind) else {**KINDS, **ODD, **ENCODED}[name]
    said = folder / "source-console"
    arguments = arguments_of(qemu, kind, folder, said)
    async with Machine(qemu.path, arguments, name=f"source {qemu.name}") as source:
        if kind.has_guest:
            await console.wait_until_ready(said)
            await console.wait_for_passes(said, 1)
        if kind.paused:
            await source.session.execute("stop")
        if not kind.through_relay:
            await migration.set_capabilities(source.session, {"events": True, **kind.capabilities})
            if kind.parameters:
                await migration.set_parameters(source.session, kind.parameters)
        if kind.through_relay:
            async with _through_relay(qemu, kind, folder, source, arguments) as recording:
                yield recording
        else:
            stream = folder / "stream.mig"
            if kind.course is not None:
                stream = await kind.course(source, folder)
            elif not kind.has_guest:
                stream = await at_once(source, folder)
            else:
                await _migrate(source, kind, f"exec:cat > {stream}")
            yield Recording(qemu, kind, arguments, stream, source, queried=await migration.query(source.session))


def arguments_of(qemu: Qemu, kind: Kind, folder: Path, said: Path) -> list[str]:
    """The command line of this kind's machine, whose guest speaks into ``said``."""
    devices = [] if kind.devices is None else kind.devices(qemu, folder)
    if not kind.has_guest:
        return [*f"-machine {kind.machine},accel=tcg -m 8 -nodefaults -display none -S".split(), *devices]
    return [*kind.guest.arguments(console=said, machine=kind.machine), *devices]


@asynccontextmanager
async def _through_relay(
    qemu: Qemu, kind: Kind, folder: Path, source: Machine, arguments: list[str]
) -> AsyncGenerator[Recording]:
    said = folder / "destination-console"
    incoming = [*arguments_of(qemu, kind, folder, said), "-incoming", "defer"]
    incoming += ["-S"] if kind.destination_stopped else []
    listens, target = folder / "relay.sock", folder / "incoming.sock"
    async with (
        Machine(qemu.path, incoming, name=f"destination {qemu.name}") as destination,
        Relay(f"unix:{listens}", f"unix:{target}", folder) as relay,
    ):
        for machine in (source, destination):
            await migration.set_capabilities(machine.session, {"events": True, **kind.capabilities})
            await migration.set_parameters(machine.session, kind.parameters)
        await migration.start_incoming(destination.session, f"unix:{target}")
        await _migrate(source, kind, f"unix:{listens}")
        await migration.wait_until(destination.session, "completed", timeout_s=TIMEOUT_S)
        await relay.wait_closed(timeout_s=TIMEOUT_S)
        (channel,) = (each for each in relay.channels if _begins(each.forward_path) == b"QEVM")
        yield Recording(
            qemu,
            kind,
            arguments,
            channel.forward_path,
            source,
            back=channel.return_path,
            destination=destination,
            console=said,
            queried=await migration.query(source.session),
            channels=[each.forward_path for each in relay.channels if each is not channel],
        )


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


async def _migrate(source: Machine, kind: Kind, uri: str) -> None:
    """Slowly, and so that it can't converge, until enough passes went by; then let it end, or switch."""
    session = source.session
    held = not kind.paused
    limits = {"max-bandwidth": SLOW, "downtime-limit": 1} if held else {"max-bandwidth": FAST}
    if kind.postcopy:
        limits["max-postcopy-bandwidth"] = SLOW  # so that the guest has to ask for pages
    limits |= kind.parameters
    await migration.set_parameters(session, limits)
    await migration.start(session, uri)
    if held:
        await _wait_for_syncs(source, kind.passes + 1)
    if kind.postcopy:
        await session.execute("migrate-start-postcopy")
    elif held:
        await migration.set_parameters(session, {"downtime-limit": 30_000, "max-bandwidth": FAST})
    await migration.wait_until(session, "completed", timeout_s=TIMEOUT_S)


async def _wait_for_syncs(source: Machine, count: int) -> None:
    """Until the dirty bitmap was synced so often: each time a pass ended.  Or until it is over before."""
    async with asyncio.timeout(TIMEOUT_S):
        # 5.2 to 11.1 disagree on when they emit MIGRATION_PASS: the count is asked for.
        while (told := await migration.query(source.session))["status"] != "completed":
            if told.get("ram", {}).get("dirty-sync-count", 0) >= count:
                break
            await asyncio.sleep(0.02)
