"""Guests of our own: programs of some hundred lines that are the whole software of a virtual machine.

    guest = Guest("walker", memory_mib=32)
    Machine(qemu, guest.arguments(console=folder / "console"))

``walker`` writes its memory for ever and checks it, ``idle`` fills it with known contents and halts, ``speaker`` says
at each tick that it runs, and writes here and there.
Assembling them takes binutils and nothing else.  This module needs only the standard library, so that scripts
may use it.
"""

import hashlib
import math
import os
import struct
import subprocess
import tempfile
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

__all__ = ["Guest", "build"]

PAGE_BYTES: Final = 4096
MIB: Final = 1 << 20
_SOURCES: Final = Path(__file__).parent
_WORD: Final = 0xFFFF_FFFF
_PAGE_FACTOR, _PASS_FACTOR = 0x9E3779B1, 0x85EBCA6B  # as in walker.S


@dataclass(frozen=True)
class Guest:
    """A guest and what its memory holds.

    Its range are the pages from 2 MiB to 1 MiB below the end of its RAM, or below 2 GiB if it has more: the
    guest itself and the firmware's areas lie under it, the firmware's tables above.  ``zero_share`` of its
    pages stay zero, ``walked_share`` (of a walker) are written in every pass, and the rest keep contents that
    are known and do not compress.

    What a page is for is drawn for ``lot_pages`` (a power of two) neighbours at once; ``alternate``: it is not
    drawn, even pages stay zero and odd ones don't.
    ``pages_per_tick``: a walker looks at so many pages each millisecond; 0: as fast as it can.
    ``stride``: how far from one page to the next in a pass, as a share of the range; 0: in order.
    ``still_mib``: behind the range so much is filled likewise, and never looked at again.  A guest that was migrated
    asks for none of it: it comes as fast as somebody lets it.
    """

    kind: Literal["walker", "idle", "speaker"] = "walker"
    memory_mib: int = 32
    zero_share: float = 0.25
    walked_share: float = 0.5
    pages_per_tick: int = 32
    stride: float = 0.618
    seed: int = 2014
    lot_pages: int = 1
    alternate: bool = False
    still_mib: int = 0

    @property
    def first_address(self) -> int:
        return 2 * MIB

    @property
    def page_count(self) -> int:
        # RAM beyond 4 GiB is out of a 32-bit guest's reach, and q35 moves all but 2 GiB up there.
        return (min(self.memory_mib, 2048) - 3 - self.still_mib) * MIB // PAGE_BYTES

    @property
    def filled_count(self) -> int:
        """Pages of the range, and those behind it."""
        return self.page_count + self.still_mib * MIB // PAGE_BYTES

    # ---- the program ----

    def image(self, folder: Path | None = None) -> Path:
        """The guest's program, for ``-kernel``; assembled when it is not in ``folder`` yet."""
        folder = folder or _cache()
        sources = {name: (_SOURCES / name).read_bytes() for name in ("boot.S", f"{self.kind}.S")}
        key = hashlib.sha256(repr((astuple(self), sources)).encode()).hexdigest()[:16]
        image = folder / f"{self.kind}-{key}.bin"
        if not image.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                self._assemble(Path(scratch)).replace(image)
        return image

    def _assemble(self, scratch: Path) -> Path:
        numbers = {
            "SEED": self.seed,
            "FIRST_ADDRESS": self.first_address,
            "PAGE_COUNT": self.page_count,
            "FILL_COUNT": self.filled_count,
            "ZERO_BELOW": self._zero_below,
            "WALKED_FROM": self._walked_from,
            "STRIDE": self._stride_pages,
            "PAGES_PER_TICK": self.pages_per_tick,
            "LOT_SHIFT": self.lot_pages.bit_length() - 1,
            "ALTERNATE": int(self.alternate),
        }
        defines = [word for name, value in numbers.items() for word in ("--defsym", f"{name}={value}")]
        source, compiled, image = _SOURCES / f"{self.kind}.S", scratch / "guest.o", scratch / "guest.bin"
        _run("as", "--32", "-I", _SOURCES, *defines, "-o", compiled, source)
        _run(
            "ld",
            "-m",
            "elf_i386",
            "-Ttext=0x100000",
            "-e",
            "0x100000",
            "--oformat=binary",
            "-o",
            image,
            compiled,
        )
        return image

    # ---- the machine ----

    def arguments(
        self, *, console: Path, machine: str = "pc", image: Path | None = None, accel: str = "tcg"
    ) -> list[str]:
        """Arguments for a QEMU that runs this guest, which speaks into the file ``console``; add devices."""
        return [
            *("-machine", f"{machine},accel={accel}", "-m", str(self.memory_mib)),
            *("-nodefaults", "-display", "none", "-kernel", str(image or self.image())),
            *("-chardev", f"file,id=console,path={str(console).replace(',', ',,')}"),
            *("-device", "isa-debugcon,iobase=0xe9,chardev=console"),
        ]

    # ---- what its memory holds ----

    def page(self, index: int, *, last_pass: int = 0) -> bytes:
        """What page ``index`` of the range holds after the walker's pass ``last_pass``."""
        lot = index % 2 * 255 if self.alternate else _mix(index // self.lot_pages ^ self.seed) >> 24
        if lot < self._zero_below:
            return bytes(PAGE_BYTES)
        key = _mix((index ^ self.seed) + 0x9E3779B9)
        repeated = int.from_bytes(key.to_bytes(4, "little") * (PAGE_BYTES // 4), "little")
        contents = (self._table ^ repeated).to_bytes(PAGE_BYTES, "little")
        if lot < self._walked_from:
            return contents
        word = struct.pack("<I", (last_pass * _PASS_FACTOR ^ index * _PAGE_FACTOR) & _WORD)
        middle = PAGE_BYTES // 2
        return word + contents[4:middle] + word + contents[middle + 4 : -4] + word

    @property
    def _zero_below(self) -> int:
        return round(256 * self.zero_share)

    @property
    def _walked_from(self) -> int:
        return 256 - round(256 * self.walked_share) if self.kind == "walker" else 256

    @property
    def _stride_pages(self) -> int:
        stride = max(1, round(self.stride * self.page_count))
        while math.gcd(stride, self.page_count) != 1:
            stride += 1
        return stride

    @cached_property
    def _table(self) -> int:
        words, word = [], self.seed | 1
        for _ in range(PAGE_BYTES // 4):
            word ^= word << 13 & _WORD
            word ^= word >> 17
            word ^= word << 5 & _WORD
            words.append(word)
        return int.from_bytes(struct.pack(f"<{len(words)}I", *words), "little")


def build(
    kind: Literal["walker", "idle", "speaker"] = "walker", *, folder: Path | None = None, **parameters: float
) -> Path:
    """The image of ``Guest(kind, ...)``, for those who need nothing else of it."""
    return Guest(kind, **parameters).image(folder)  # type: ignore[arg-type]


def _mix(value: int) -> int:
    """The last step of MurmurHash3, as in boot.S."""
    value &= _WORD
    value = (value ^ value >> 16) * 0x85EBCA6B & _WORD
    value = (value ^ value >> 13) * 0xC2B2AE35 & _WORD
    return value ^ value >> 16


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qmigrate" / "guests"


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} (of binutils) failed:\n{done.stderr}")
