"""Live sections other than ``ram``, and the two of s390 that no description divides: who reads which."""

from collections.abc import Mapping
from typing import Final

from qmigrate.format.block import read_block
from qmigrate.format.dirty_bitmap import read_dirty_bitmap
from qmigrate.format.htab import read_htab
from qmigrate.format.live_section import LiveState, Reader
from qmigrate.format.s390 import read_storage_attributes, read_storage_keys, read_tod_clock
from qmigrate.format.vfio import read_vfio

__all__ = ["READERS", "LiveState", "reader_of"]

READERS: Final[Mapping[str, Reader]] = {
    "block": read_block,
    "dirty-bitmap": read_dirty_bitmap,
    "s390-skeys": read_storage_keys,
    "s390-storage_attributes": read_storage_attributes,
    "spapr/htab": read_htab,
    "todclock": read_tod_clock,
    "vfio": read_vfio,
}


def reader_of(idstr: str) -> Reader | None:
    """Who reads the section of this name; vfio's carries the path of its device: ``0000:00:02.0/vfio``."""
    return READERS.get("vfio" if idstr.endswith("/vfio") else idstr)
