"""The real QEMUs that tests may start, as `scripts/qemu_versions` left them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "qemu_versions"


@dataclass(frozen=True)
class Qemu:
    """One executable; `offer` is `newest` for the newest suite's, whatever its version is today."""

    version: str
    suite: str
    target: str
    path: Path
    offer: str

    @property
    def number(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.version.split("."))

    @property
    def name(self) -> str:
        """Major and minor, as in `10.0`; also the word for it in a test's id."""
        return ".".join(self.version.split(".")[:2])

    @property
    def img(self) -> Path | None:
        """The `qemu-img` that came with it."""
        path = self.path.with_name("qemu-img")
        return path if path.exists() else None


@functools.cache
def _all() -> tuple[Qemu, ...]:
    ran = subprocess.run([sys.executable, SCRIPT, "--json", "--list"], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr.strip())
    return tuple(Qemu(**{**entry, "path": Path(entry["path"])}) for entry in json.loads(ran.stdout))


def installed(target: str = "x86_64") -> list[Qemu]:
    """What is there for a target, oldest first. Asks once a process, installs nothing."""
    return [qemu for qemu in _all() if qemu.target == target]


def newest(target: str = "x86_64") -> Qemu | None:
    return max(installed(target), key=lambda qemu: qemu.number, default=None)


def named(name: str, target: str = "x86_64") -> Qemu | None:
    """The QEMU of that major and minor version, as in `7.2`."""
    return next((qemu for qemu in installed(target) if qemu.name == name), None)
