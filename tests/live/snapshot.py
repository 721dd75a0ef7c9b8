"""A snapshot's stream out of a qcow2, where it lies behind the end of the disk: docs/interop/qcow2.txt"""

import struct
import subprocess
from pathlib import Path
from typing import Final

from tests.live.versions import Qemu

_ADDRESS: Final = 0x00FF_FFFF_FFFF_FE00  # in an entry of a table


def snapshot_disk(qemu: Qemu, folder: Path) -> Path:
    """An empty qcow2 that ``savevm`` can write to."""
    disk = folder / "disk.qcow2"
    subprocess.run([qemu.img or "qemu-img", "create", "-q", "-f", "qcow2", disk, "1M"], check=True)
    return disk


def vm_state(disk: Path) -> bytes:
    """The stream of the first snapshot."""
    with disk.open("rb") as file:

        def read(layout: str, offset: int) -> tuple[int, ...]:
            file.seek(offset)
            return struct.unpack(layout, file.read(struct.calcsize(layout)))

        (cluster_bits,) = read(">I", 20)
        count, table = read(">IQ", 60)
        assert count, "no snapshot in this image"
        l1_offset, l1_count = read(">QI", table)
        (extra,) = read(">I", table + 36)
        assert extra >= 16
        length, disk_length = read(">QQ", table + 40)
        cluster, in_table = 1 << cluster_bits, 1 << (cluster_bits - 3)
        first = -(-disk_length // (cluster * in_table))
        found = bytearray()
        for (entry,) in (read(">Q", l1_offset + 8 * index) for index in range(first, l1_count)):
            for at in read(f">{in_table}Q", entry & _ADDRESS):
                if len(found) >= length:
                    break
                file.seek(at & _ADDRESS)
                found += file.read(cluster).ljust(cluster, b"\0") if at & _ADDRESS else bytes(cluster)
    return bytes(found[:length])
