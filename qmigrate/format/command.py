"""QEMU_VM_COMMAND: what the source tells the destination to do.

migration/savevm.c: qemu_savevm_command_send(), loadvm_process_command()
"""

from collections.abc import Generator, Mapping, Sequence
from enum import IntEnum
from typing import ClassVar, Final

from construct import Int8ub, Int16ub, Int32ub, Int64ub

from qmigrate.errors import StreamError, TruncatedError
from qmigrate.format._record import CountedString, EverythingLeft, IfMore, Known, Nested, Only, Record, wire
from qmigrate.format.feed import Feed
from qmigrate.format.stream import SectionType

__all__ = [
    "COMMANDS",
    "Command",
    "CommandHeader",
    "CommandNumber",
    "DiscardRange",
    "EnableColo",
    "OpenReturnPath",
    "Packaged",
    "PageSizes",
    "Ping",
    "PostcopyAdvise",
    "PostcopyListen",
    "PostcopyRamDiscard",
    "PostcopyResume",
    "PostcopyRun",
    "RecvBitmap",
    "SwitchoverStart",
    "encode_command",
    "read_command",
]


class CommandNumber(IntEnum):
    """migration/savevm.c: enum qemu_vm_cmd.  Number 8 is refused by 11.1; 11 came with 10.0."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


class CommandHeader(Record):
    """Opens a command.  ``length`` counts the payload; of PACKAGED, without the package."""

    kind: SectionType = wire(Only(SectionType.COMMAND, Int8ub), default=SectionType.COMMAND)
    command: CommandNumber = wire(Known(CommandNumber, Int16ub))
    length: int = wire(Int16ub)


class Command(Record):
    """A command's payload; ``NUMBER`` says which command it is."""

    NUMBER: ClassVar[CommandNumber]

    @property
    def name(self) -> str:
        """As QEMU's messages spell it."""
        return self.NUMBER.name


class OpenReturnPath(Command):
    """The destination shall answer on the way back of this channel.  PING 1 always follows."""

    NUMBER = CommandNumber.OPEN_RETURN_PATH


class Ping(Command):
    """The destination shall answer PONG with the same token."""

    NUMBER = CommandNumber.PING
    token: int = wire(Int32ub)


class PageSizes(Record):
    """What both ends must agree on before postcopy.  ``summary`` ORs the host page sizes of all blocks.

    In 2.5 and 2.6 it was the source host's plain page size.
    """

    summary: int = wire(Int64ub)
    target_page_size: int = wire(Int64ub)


class PostcopyAdvise(Command):
    """Postcopy may come.  ``sizes`` is None where only the capability dirty-bitmaps is on (since 2.12).

    migration/savevm.c: qemu_savevm_send_postcopy_advise()
    """

    NUMBER = CommandNumber.POSTCOPY_ADVISE
    sizes: PageSizes | None = wire(IfMore(Nested(PageSizes)))


class PostcopyListen(Command):
    """First in the package: RAM becomes sensitive to faults, a thread takes over the main channel."""

    NUMBER = CommandNumber.POSTCOPY_LISTEN


class PostcopyRun(Command):
    """Last in the package: the guest runs at the destination."""

    NUMBER = CommandNumber.POSTCOPY_RUN


class DiscardRange(Record):
    """``start`` and ``length`` in bytes inside the block."""

    start: int = wire(Int64ub)
    length: int = wire(Int64ub)


class PostcopyRamDiscard(Command):
    """Forget these ranges of one block: they are stale, or were never sent.

    A source packs at most 12 ranges; a destination takes any number.
    migration/savevm.c: qemu_savevm_send_postcopy_ram_discard()
    """

    NUMBER = CommandNumber.POSTCOPY_RAM_DISCARD
    version: int = wire(Int8ub, default=0)
    block: str = wire(CountedString)
    terminator: int = wire(Int8ub, default=0)
    ranges: tuple[DiscardRange, ...] = wire(EverythingLeft(Nested(DiscardRange)))


class Packaged(Command):
    """``length`` bytes follow: a stream of sections without a header, read whole before it is loaded.

    migration/savevm.c: qemu_savevm_send_packaged()
    """

    NUMBER = CommandNumber.PACKAGED
    length: int = wire(Int32ub)


class EnableColo(Command):
    """Checkpoints will follow.  3.0 to 10.2; 11.1 refuses it."""

    NUMBER = CommandNumber.ENABLE_COLO


class PostcopyResume(Command):
    """The bitmaps are exchanged: a paused postcopy goes on."""

    NUMBER = CommandNumber.POSTCOPY_RESUME


class RecvBitmap(Command):
    """The destination shall say which pages of ``block`` it has."""

    NUMBER = CommandNumber.RECV_BITMAP
    block: str = wire(CountedString)


class SwitchoverStart(Command):
    """The source has stopped the guest; the rest of each live section follows.  Since 10.0."""

    NUMBER = CommandNumber.SWITCHOVER_START


COMMANDS: Final[Mapping[CommandNumber, type[Command]]] = {
    command.NUMBER: command
    for command in (
        OpenReturnPath,
        Ping,
        PostcopyAdvise,
        PostcopyListen,
        PostcopyRun,
        PostcopyRamDiscard,
        Packaged,
        EnableColo,
        PostcopyResume,
        RecvBitmap,
        SwitchoverStart,
    )
}

_HEADER_BYTES: Final = 5
_SHORTEST_DISCARD: Final = 20  # migration/savevm.c: loadvm_postcopy_ram_handle_discard()


def read_command(feed: Feed, trail: Sequence[str] = ()) -> Generator[None, None, tuple[Command, int]]:
    """The command at hand, not consumed, and its length in bytes.  Raises ``StreamError``."""
    header, _ = yield from feed.record(CommandHeader, trail)
    trail = (*trail, header.command.name)
    _check_length(header, feed.offset, trail)
    size = _HEADER_BYTES + header.length
    yield from feed.need(size, trail)
    payload = bytes(feed.view(size)[_HEADER_BYTES:])
    try:
        command = COMMANDS[header.command].read(payload, offset=feed.offset + _HEADER_BYTES, trail=trail)
    except TruncatedError as exc:  # what is too short is the payload: more of the stream would not help
        raise StreamError(
            f"the payload of {header.length} bytes ends here", offset=exc.offset, trail=exc.trail
        ) from exc
    _check_values(command, feed.offset + _HEADER_BYTES, trail)
    return command, size


def encode_command(command: Command) -> bytes:
    """Header and payload; of PACKAGED, without the package."""
    payload = command.build()
    return CommandHeader(command=command.NUMBER, length=len(payload)).build() + payload


def _check_length(header: CommandHeader, offset: int, trail: Sequence[str]) -> None:
    fixed = COMMANDS[header.command].size
    match header.command:
        case CommandNumber.POSTCOPY_ADVISE:
            good, expected = header.length in (0, 16), "16 or 0"
        case CommandNumber.POSTCOPY_RAM_DISCARD:
            good, expected = header.length >= _SHORTEST_DISCARD, f"at least {_SHORTEST_DISCARD}"
        case CommandNumber.RECV_BITMAP:
            good, expected = 1 <= header.length <= 256, "1 to 256"
        case _:
            good, expected = header.length == fixed, str(fixed)
    if not good:
        raise StreamError(f"length is {header.length}, expected {expected}", offset=offset + 3, trail=trail)


def _check_values(command: Command, offset: int, trail: Sequence[str]) -> None:
    if isinstance(command, PostcopyRamDiscard):
        if command.version != 0:
            raise StreamError(f"version is {command.version}, expected 0", offset=offset, trail=trail)
        if command.terminator != 0:
            at = offset + 2 + len(command.block.encode("utf-8", "surrogateescape"))
            raise StreamError(f"the name ends with {command.terminator:#x}, expected 0x0", offset=at, trail=trail)
