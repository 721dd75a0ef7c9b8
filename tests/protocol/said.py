"""What the destination's core says of a stream, and commands to say to it."""

from collections.abc import Iterable, Iterator
from typing import Any

from qmigrate.format.command import (
    COMMANDS,
    Command,
    CommandNumber,
    DiscardRange,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRamDiscard,
    PostcopyRun,
    RecvBitmap,
)
from qmigrate.protocol.destination import Destination
from qmigrate.protocol.destination_events import Event, PackageCame, PagesCame
from tests import streams

PAGE = streams.PAGE


def frozen(event: Event) -> Any:
    """What of an event lasts."""
    if not isinstance(event, PagesCame):
        return event
    pages = event.pages
    starts = [start for run in pages.runs for start in range(run.start, run.start + run.page_count * PAGE, PAGE)]
    return [(pages.block, start, run_flag(event, start)) for start in starts]


def run_flag(event: PagesCame, start: int) -> int:
    (flag,) = [run.flag for run in event.pages.runs if 0 <= start - run.start < run.page_count * PAGE]
    return flag


def said_by(core: Destination, pieces: Iterable[bytes]) -> Iterator[Any]:
    """All events; the package is loaded as soon as it has come.  Pages of one stretch may come in several."""
    for piece in pieces:
        core.receive_data(piece)
        for event in core.events():
            if isinstance(event, PagesCame):
                yield from frozen(event)
                continue
            yield event
            if isinstance(event, PackageCame):
                core.listening()
                core.running()


def built(number: CommandNumber) -> bytes:
    """This command, with something in it; a package with LISTEN and RUN."""
    match number:
        case CommandNumber.PING:
            command: Command = Ping(token=9)
        case CommandNumber.POSTCOPY_ADVISE:
            command = PostcopyAdvise(sizes=None)
        case CommandNumber.POSTCOPY_RAM_DISCARD:
            command = PostcopyRamDiscard(block="pc.ram", ranges=(DiscardRange(start=0, length=PAGE),))
        case CommandNumber.RECV_BITMAP:
            command = RecvBitmap(block="pc.ram")
        case CommandNumber.PACKAGED:
            return streams.package(streams.command(PostcopyListen()), streams.command(PostcopyRun()))
        case _:
            command = COMMANDS[number]()
    return streams.command(command)
