"""Each way in which RAM can travel, of each version: recorded, read, and held to the QEMU that loaded it."""

import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from qmigrate.capture.migration import Migration
from tests.guests.build import Guest
from tests.live.encodings import assert_read_as_loaded
from tests.live.receiving import huge_pages
from tests.live.recording import ENCODED, Kind, Recording, extra, recorded
from tests.live.versions import Qemu
from tests.soak.migrations import Unit

# More of everything than scripts/test has: several passes, many pages that change.
GUEST: Final = Guest("walker", memory_mib=16, zero_share=0.4, walked_share=0.3, pages_per_tick=64)
HURRIED: Final = replace(GUEST, pages_per_tick=0)
UUID: Final = "-uuid 00112233-4455-6677-8899-aabbccddeeff"


def backend(guest: Guest) -> str:
    """Options of the object that is its memory; the block is called as ever."""
    return f"size={guest.memory_mib}M,x-use-canonical-path-for-ramblock-id=off"


def huge_backend(guest: Guest) -> tuple[str, str]:
    """Arguments that put its memory onto huge pages."""
    return "-object", f"memory-backend-memfd,id=pc.ram,hugetlb=on,hugetlbsize=2M,{backend(guest)}"


BACKEND: Final = backend(GUEST)
HUGE: Final[Mapping[str, Any]] = {
    "machine": "pc,memory-backend=pc.ram",
    "devices": extra(*huge_backend(GUEST)),
}
SHARED: Final[Mapping[str, Any]] = {
    "machine": "pc,memory-backend=pc.ram",
    "devices": extra(f"-object memory-backend-file,id=pc.ram,share=on,mem-path=FOLDER/ram.img,{BACKEND}"),
}


def _multifd(shows: str, parameters: Mapping[str, Any], **more: Any) -> Kind:
    return replace(ENCODED["pc-multifd"], shows=shows, guest=GUEST, passes=3, parameters=parameters, **more)


def huge_pages_for(kind: Kind) -> AbstractContextManager[None]:
    """Those that a source and a destination of this kind need, if they do."""
    return huge_pages(2 * GUEST.memory_mib // 2) if kind.devices is HUGE["devices"] else nullcontext()


def ways() -> Iterator[tuple[str, Kind]]:
    for channels in (1, 2, 3, 4):
        for method, since in (("none", ()), ("zlib", ()), ("zstd", (7,))):
            parameters = {"multifd-channels": channels, "multifd-compression": method}
            yield f"multifd {channels} {method}", _multifd("multifd", parameters, since=since)
    for method, level in (("zlib", 9), ("zstd", 20)):
        parameters = {"multifd-compression": method, f"multifd-{method}-level": level}
        # A guest that runs may dirty its memory faster than it is compressed so.
        yield f"multifd 2 {method} level {level}", _multifd("the highest level", parameters, since=(7,), paused=True)
    for detection in ("none", "legacy", "multifd"):
        parameters = {"zero-page-detection": detection, "multifd-compression": "zlib"}
        yield f"multifd zero pages {detection}", _multifd("zero pages by another way", parameters, since=(9,))
    for name, kind in _then_postcopy().items():
        yield f"multifd postcopy from {name}", kind
    xbzrle = replace(ENCODED["pc-xbzrle"], guest=HURRIED, passes=6)
    yield "xbzrle", xbzrle
    yield "xbzrle small cache", replace(xbzrle, parameters={"xbzrle-cache-size": 1 << 20})
    compress = replace(ENCODED["pc-compress"], guest=GUEST, passes=3)
    yield "compress", compress
    yield "compress level 9", replace(compress, parameters={"compress-level": 9, "compress-threads": 3})
    yield "compress and xbzrle", replace(compress, guest=HURRIED, capabilities={"compress": True, "xbzrle": True})


def _then_postcopy() -> dict[str, Kind]:
    """By the oldest that can: 7.2's destination aborts at the end (hazard 4), 8.0 to 10.0 refuse the pair."""
    kind = _multifd("pages over multifd, then postcopy", {})
    kind = replace(kind, capabilities={"multifd": True, "postcopy-ram": True}, postcopy=True, passes=1)
    return {"5.2": replace(kind, before=(6,)), "11.1": replace(kind, since=(10, 1))}


def more_ways() -> Iterator[tuple[str, Kind]]:
    """One capability with another, and kinds of memory.  `restore` makes the same of these as of those above."""
    for since, kind in _then_postcopy().items():
        for channels in (2, 3, 4):
            for method in ("none", "zlib", "zstd"):
                parameters = {"multifd-channels": channels, "multifd-compression": method}
                # 5.2 of Debian has no zstd.
                if (channels, method) != (2, "none") and (since, method) != ("5.2", "zstd"):
                    yield f"multifd {channels} {method} postcopy from {since}", replace(kind, parameters=parameters)
        yield f"multifd postcopy at once from {since}", replace(kind, passes=0)
        yield f"multifd postcopy huge from {since}", replace(kind, **HUGE)
    for detection in ("none", "legacy", "multifd"):
        for method in ("none", "zstd"):
            parameters = {"zero-page-detection": detection, "multifd-compression": method}
            kind = _multifd("zero pages by another way", parameters, since=(9,))
            yield f"multifd {method} zero pages {detection}", kind
    multifd = _multifd("multifd", {})
    yield "multifd uuid", replace(multifd, devices=extra(UUID), capabilities={"multifd": True, "validate-uuid": True})
    yield "multifd release-ram", replace(multifd, capabilities={"multifd": True, "release-ram": True})
    # 7.2 refuses the pair; with xbzrle 5.2 and 7.2 take multifd alone.
    yield "multifd and compress", replace(multifd, capabilities={"multifd": True, "compress": True}, before=(6,))
    yield "multifd huge", replace(multifd, **HUGE)
    for name in ("pc-xbzrle", "pc-compress"):
        yield f"{name.removeprefix('pc-')} huge", replace(ENCODED[name], guest=HURRIED, passes=4, **HUGE)
    both = {"multifd": True, "x-ignore-shared": True}
    yield "multifd ignore-shared", replace(multifd, capabilities=both, **SHARED)


def units() -> Iterator[Unit]:
    """All ways of all versions."""
    for name, kind in (*ways(), *more_ways()):
        for qemu in kind.qemus():
            yield Unit(f"encoded {name} {qemu.name}", _record(qemu, kind))


def _record(qemu: Qemu, kind: Kind) -> Callable[[random.Random, Path], Awaitable[str]]:
    without = ["pc.ram"] if "x-ignore-shared" in kind.capabilities else []
    source_keeps = "release-ram" not in kind.capabilities

    async def run(_: random.Random, folder: Path) -> str:
        with huge_pages_for(kind):
            async with recorded(qemu, kind, folder) as recording:
                found = await assert_read_as_loaded(recording, folder, without=without, source_keeps=source_keeps)
        assert len(recording.channels) == (
            kind.parameters.get("multifd-channels", 2) if "multifd" in kind.capabilities else 0
        )
        return _switched(recording) if kind.postcopy else _what_travelled(kind, found.pages)

    return run


def _switched(recording: Recording) -> str:
    with Migration(recording.stream, channels=recording.channels) as migration:
        names = {place.command.name for place in migration.commands}
    return "" if "PACKAGED" in names else "completed before the switch"


def _what_travelled(kind: Kind, pages: Mapping[str, int]) -> str:
    """A note where the way was not taken: a migration that ends in its first pass has no deltas."""
    for capability, record in (("xbzrle", "xbzrle"), ("compress", "compress_page")):
        if capability in kind.capabilities and record not in pages:
            return f"no {record} page was sent"
    return ""
