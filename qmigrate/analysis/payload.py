"""What a command says, as a plain value."""

import dataclasses

from qmigrate.analysis.devices import Plain, plain
from qmigrate.format.command import Command, Packaged, PostcopyAdvise

__all__ = ["payload"]


def payload(command: Command) -> dict[str, Plain]:
    """The payload's fields under QEMU's names; ADVISE's two, where it has them, without a nesting."""
    if isinstance(command, PostcopyAdvise):
        return {} if command.sizes is None else dataclasses.asdict(command.sizes)
    if isinstance(command, Packaged):
        return {"package_length": command.length}
    fields = plain(command)
    assert isinstance(fields, dict)
    return fields
