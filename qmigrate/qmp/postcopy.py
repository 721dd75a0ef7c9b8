"""The commands of postcopy: the switch, a pause, and the way back from it.

When each of them is safe is not decided here.
"""

from collections.abc import Mapping
from typing import Any, Final

from qmigrate.qmp.session import COMMAND_TIMEOUT_S, Session

__all__ = ["is_postcopy", "left_bytes", "listen_again", "pause", "switch"]

PAUSED: Final = "postcopy-paused"


def is_postcopy(status: str) -> bool:
    """Is the guest split over both sides?  True for any status that begins so, also one that is not known here."""
    return status.startswith("postcopy-")


def left_bytes(info: Mapping[str, Any]) -> int | None:
    """What a source has not sent yet, of its answer to ``query-migrate``; None where it does not say."""
    ram = info.get("ram")
    left = ram.get("remaining") if isinstance(ram, Mapping) else None
    return left if isinstance(left, int) else None


async def switch(session: Session, *, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
    """Ask the source to switch, at once or any time after the start.  After the end this changes nothing."""
    await session.execute("migrate-start-postcopy", timeout_s=timeout_s)


async def pause(session: Session, *, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
    """Break the connection, of either side.  It has to be out of band: QEMU's main loop may be waiting."""
    await session.execute("migrate-pause", oob=True, timeout_s=timeout_s)


async def listen_again(session: Session, uri: str, *, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
    """Have a destination that is paused listen at ``uri`` for a source that resumes."""
    await session.execute("migrate-recover", {"uri": uri}, oob=True, timeout_s=timeout_s)
