"""A plain stream in a file, read in the quick way, as the saved guest that ``saved.read_saved`` makes of it."""

from qmigrate.capture.placed import PlacedPages
from qmigrate.capture.plain_ends import Head, Tail
from qmigrate.capture.saved_guest import SavedGuest
from qmigrate.format.ram import RamBlock

__all__ = ["blocks_of", "plain_guest"]


def blocks_of(head: Head) -> dict[str, RamBlock]:
    """As an index has them."""
    return {name: RamBlock(name=name, used_length=length) for name, length in head.blocks.items()}


def plain_guest(head: Head, tail: Tail, index: PlacedPages) -> SavedGuest:
    """The guest in a plain file whose two ends were read."""
    return SavedGuest(
        index,
        opening=head.opening,
        machine_type=head.machine_type,
        devices=tail.devices,
        description=tail.description,
        section_id=head.section_id,
        footers=True,
        was_running=tail.was_running,
        has_balloon=tail.has_balloon,
        virtio_mems=set(tail.virtio_mems),
        blocks=list(index.blocks.values()),
    )
