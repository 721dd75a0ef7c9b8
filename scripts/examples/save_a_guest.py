#!/usr/bin/env python3
"""Save a running guest to a file: python scripts/examples/save_a_guest.py FILE [QEMU]

Starts a QEMU with a small guest of ours that writes to its memory all the time, migrates it to FILE while it
runs, and waits until that is done.
"""

import asyncio
import shlex
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qmigrate.errors import QmpError
from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from tests.guests import console
from tests.guests.build import Guest


async def save(executable: str, path: Path) -> None:
    """Boot, let the guest go through its memory once, migrate to ``path``."""
    with tempfile.TemporaryDirectory(prefix="qmigrate-") as folder:
        said = Path(folder) / "console"
        guest = Guest("walker", memory_mib=32)
        devices = ["-device", "VGA", "-device", "virtio-rng-pci", "-device", "virtio-balloon-pci"]
        arguments = [*guest.arguments(console=said, machine="q35"), *devices]
        async with Machine(executable, arguments, name="guest") as machine:
            await console.wait_for_passes(said, 1)
            await migration.set_parameters(machine.session, {"max-bandwidth": 1 << 40})
            await migration.start(machine.session, f"exec:cat > {shlex.quote(str(path))}")
            await migration.wait_until(machine.session, "completed", timeout_s=60)


def main() -> int:
    """0: saved; 2: not, and why."""
    if not 2 <= len(sys.argv) <= 3:
        print(__doc__, file=sys.stderr)
        return 2
    path = Path(sys.argv[1])
    try:
        asyncio.run(save(sys.argv[2] if len(sys.argv) > 2 else "qemu-system-x86_64", path))
    except (QmpError, OSError, RuntimeError) as exc:
        print(f"save_a_guest: {exc}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
