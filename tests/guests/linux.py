"""A real Linux as a guest: Debian's kernel, and an initramfs of a static busybox that counts on the serial console.

Both are taken out of Debian's packages, as `scripts/qemu_versions` takes QEMUs, and are kept in its cache folder.
"""

import gzip
import os
import shutil
import stat
import sys
import tempfile
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Self

__all__ = ["Linux"]

SUITE: Final = "bookworm"
PACKAGES: Final = ("linux-image-cloud-amd64", "busybox-static")
MEMORY_MIB: Final = 256
# Each second a number, the seconds since it was started, and the time of day.
INIT: Final = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
number=0
while :; do
    number=$((number + 1))
    read up idle < /proc/uptime
    echo "count $number at $up, $(/bin/busybox date +%s)"
    /bin/busybox sleep 1
done
"""
_SCRIPT: Final = Path(__file__).parents[2] / "scripts" / "qemu_versions"


@dataclass(frozen=True)
class Linux:
    """``kernel`` and ``initramfs`` are files."""

    kernel: Path
    initramfs: Path

    @classmethod
    def installed(cls) -> Self:
        """Fetched and made at the first time.  Raises what apt or the cache folder gives."""
        versions = _qemu_versions()
        folder: Path = versions.cache_folder() / "linux"
        found = cls(folder / "vmlinuz", folder / "initramfs.gz")
        if not (folder / "done").exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as work:
                _unpack(versions, Path(work), found)
            (folder / "done").touch()
        wanted = initramfs((folder / "busybox").read_bytes())
        if not found.initramfs.exists() or found.initramfs.read_bytes() != wanted:
            found.initramfs.write_bytes(wanted)
        return found

    def arguments(self, serial: Path) -> list[str]:
        """Arguments for a QEMU that runs it, which speaks into the file ``serial``."""
        return [
            *("-machine", "pc,accel=tcg", "-m", str(MEMORY_MIB), "-nodefaults", "-display", "none", "-no-reboot"),
            *("-kernel", str(self.kernel), "-initrd", str(self.initramfs)),
            *("-append", "console=ttyS0 quiet rdinit=/init panic=1"),
            *("-chardev", f"file,id=serial,path={str(serial).replace(',', ',,')}", "-serial", "chardev:serial"),
        ]


def _qemu_versions() -> ModuleType:
    """The script as a module: it has no extension."""
    loader = SourceFileLoader("qemu_versions", str(_SCRIPT))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[loader.name] = module  # its dataclasses look themselves up
    loader.exec_module(module)
    return module


def _unpack(versions: Any, work: Path, wanted: Linux) -> None:
    root = work / "root"
    root.mkdir()
    versions.Archive(work, versions.mirrors()).unpack(SUITE, PACKAGES, root)
    (kernel,) = root.glob("boot/vmlinuz-*")
    busybox = next(path for path in (root / "bin/busybox", root / "usr/bin/busybox") if path.exists())
    shutil.copyfile(kernel, wanted.kernel)
    shutil.copyfile(busybox, wanted.initramfs.with_name("busybox"))


def initramfs(busybox: bytes) -> bytes:
    """A packed cpio archive in the form that Linux reads (newc), with busybox, INIT, and a console."""
    entries = [
        *((name, stat.S_IFDIR | 0o755, b"", (0, 0)) for name in ("bin", "dev", "proc")),
        ("bin/busybox", stat.S_IFREG | 0o755, busybox, (0, 0)),
        ("init", stat.S_IFREG | 0o755, INIT.encode(), (0, 0)),
        ("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)),
        ("TRAILER!!!", 0, b"", (0, 0)),
    ]
    archive = b"".join(
        _entry(number, name, mode, data, device) for number, (name, mode, data, device) in enumerate(entries)
    )
    return gzip.compress(archive, compresslevel=1, mtime=0)


def _entry(number: int, name: str, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
    """Documentation/driver-api/early-userspace/buffer-format.rst of Linux."""
    named = os.fsencode(name) + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (number + 1, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(named), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(head + named) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
