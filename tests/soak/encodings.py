"""Each way in which RAM can travel, of each version: recorded, read, and held to the QEMU that loaded it."""

import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tests.guests.build import Guest
from tests.live.encodings import assert_read_as_loaded
from tests.live.recording import ENCODED, Kind, recorded
from tests.live.versions import Qemu
from tests.soak.migrations import Unit

# More of everything than scripts/test has: several passes, many pages that change.
GUEST: Final = Guest("walker", memory_mib=16, zero_share=0.4, walked_share=0.3, pages_per_tick=64)
HURRIED: Final = replace(GUEST, pages_per_tick=0)
MULTIFD: Final = {"multifd": True}


def _multifd(shows: str, parameters: Mapping[str, Any], **more: Any) -> Kind:
    return replace(ENCODED["pc-multifd"], shows=shows, guest=GUEST, passes=3, parameters=parameters, **more)


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
    # 7.2's destination aborts at the end (hazard 4), 8.0 to 10.0 refuse the pair.
    both = {"multifd": True, "postcopy-ram": True}
    for name, numbers in (("5.2", ((), (6,))), ("11.1", ((10, 1), (999,)))):
        kind = _multifd("pages over multifd, then postcopy", {}, since=numbers[0], before=numbers[1])
        yield f"multifd postcopy from {name}", replace(kind, capabilities=both, postcopy=True, passes=1)
    xbzrle = replace(ENCODED["pc-xbzrle"], guest=HURRIED, passes=6)
    yield "xbzrle", xbzrle
    yield "xbzrle small cache", replace(xbzrle, parameters={"xbzrle-cache-size": 1 << 20})
    compress = replace(ENCODED["pc-compress"], guest=GUEST, passes=3)
    yield "compress", compress
    yield "compress level 9", replace(compress, parameters={"compress-level": 9, "compress-threads": 3})
    yield "compress and xbzrle", replace(compress, guest=HURRIED, capabilities={"compress": True, "xbzrle": True})


def units() -> Iterator[Unit]:
    """All ways of all versions."""
    for name, kind in ways():
        for qemu in kind.qemus():
            yield Unit(f"encoded {name} {qemu.name}", _record(qemu, kind))


def _record(qemu: Qemu, kind: Kind) -> Callable[[random.Random, Path], Awaitable[str]]:
    async def run(_: random.Random, folder: Path) -> str:
        async with recorded(qemu, kind, folder) as recording:
            found = await assert_read_as_loaded(recording, folder)
        assert len(recording.channels) == (
            kind.parameters.get("multifd-channels", 2) if "multifd" in kind.capabilities else 0
        )
        return "" if kind.postcopy else _what_travelled(kind, found.pages)

    return run


def _what_travelled(kind: Kind, pages: Mapping[str, int]) -> str:
    """A note where the way was not taken: a migration that ends in its first pass has no deltas."""
    for capability, record in (("xbzrle", "xbzrle"), ("compress", "compress_page")):
        if capability in kind.capabilities and record not in pages:
            return f"no {record} page was sent"
    return ""
