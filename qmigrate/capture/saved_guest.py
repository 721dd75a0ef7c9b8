"""A saved guest, ready to be served: where its pages are, and all the rest as bytes that go out verbatim."""

import os
from dataclasses import dataclass, field

from qmigrate.capture.owner import Owner
from qmigrate.capture.placed import PlacedPages
from qmigrate.format.ram import RamBlock

__all__ = ["SavedGuest"]


@dataclass
class SavedGuest(Owner):
    """One saved guest.  Closes its index, and the ``inputs`` that it has; not one that it was read from.

    ``opening``: FileHeader and CONFIGURATION; ``before`` and ``behind`` are the sections other than RAM that came
    before its START, and after; ``devices`` the FULL ones after RAM; ``description`` as it came, empty without one.
    ``page_size`` is the target's, in bytes.  ``was_running`` is None where the stream does not tell.
    ``absent``: target pages that were never sent, as the guest does not use them; they are zero.
    ``virtio_mems``: paths of devices, which stand in front of their blocks' names, too; told by a stream, not kept.
    """

    index: PlacedPages
    opening: bytes = b""
    machine_type: str | None = None
    before: bytes = b""
    behind: bytes = b""
    devices: bytes = b""
    description: bytes = b""
    section_id: int = 0
    footers: bool = False
    was_running: bool | None = None
    has_balloon: bool = False
    virtio_mems: set[str] = field(default_factory=set)
    absent: int = 0
    blocks: list[RamBlock] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)

    @property
    def page_size(self) -> int:
        return self.index.page_size

    def close(self) -> None:
        self.index.close()
        while self.inputs:
            os.close(self.inputs.pop())
