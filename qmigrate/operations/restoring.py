"""A QEMU that waits with -incoming: may this saved guest be restored there, and is it set up for it?

Nothing has begun until here: whatever is wrong is a RefusedError.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from qmigrate.capture.saved_guest import SavedGuest
from qmigrate.errors import QmpCommandError, QmpError, RefusedError
from qmigrate.operations.addresses import check, default_uri, reachable, takes_any_port, where_to_connect
from qmigrate.operations.telling import tell_to_listen
from qmigrate.operations.watch import Watched
from qmigrate.operations.whereabouts import INCOMING
from qmigrate.qmp.features import POSTCOPY_NAMES
from qmigrate.qmp.migration import capabilities
from qmigrate.qmp.postcopy import PAUSED
from qmigrate.qmp.ram_blocks import RamBlockThere, ram_blocks
from qmigrate.value import Value

__all__ = ["Found", "check_fits", "listen", "listen_again", "look"]

PREEMPT: Final = "postcopy-preempt"
"""Since 7.1: what is asked for comes on a connection of its own."""

_OFF: Final = ("multifd", PREEMPT, "mapped-ram", "compress", "x-ignore-shared", "x-colo")
"""What changes how RAM comes: we send it on one channel, page by page."""


class Found(Value):
    """What a QEMU that waits says of itself: its ``machine``, empty where it does not tell."""

    machine: str
    blocks: Mapping[str, RamBlockThere]
    capabilities: Mapping[str, bool]

    @property
    def postcopy(self) -> str | None:
        """What this QEMU calls the capability; None if it can't."""
        return next((name for name in POSTCOPY_NAMES if name in self.capabilities), None)


async def look(there: Watched) -> Found:
    """Ask it all at once.  Raises ``RefusedError`` where it does not wait for a guest."""
    timeout_s = there.answer_timeout_s
    _, machine, blocks, states = await asyncio.gather(
        there.ask(),
        _machine(there),
        ram_blocks(there.session, timeout_s=timeout_s),
        capabilities(there.session, timeout_s=timeout_s),
    )
    if there.run_state != INCOMING:
        raise RefusedError(f"destination: it takes no guest: it is {there.run_state}, not started with -incoming")
    if there.status not in ("none", "setup"):
        raise RefusedError(f"destination: it receives a migration already ({there.status})")
    return Found(machine, blocks, states)


async def _machine(there: Watched) -> str:
    try:
        kind = await there.session.execute(
            "qom-get", {"path": "/machine", "property": "type"}, timeout_s=there.answer_timeout_s
        )
    except QmpCommandError:
        return ""  # then QEMU itself says what does not fit
    return str(kind).removesuffix("-machine")


def check_fits(saved: SavedGuest, found: Found) -> dict[str, int]:
    """The size of the host's pages there, in bytes, of each block.  Raises ``RefusedError``."""
    # A prefix of the name will do for QEMU, an empty one too.
    if saved.machine_type is not None and found.machine and not found.machine.startswith(saved.machine_type):
        raise RefusedError(f"destination: its machine is {found.machine}, that in the file {saved.machine_type}")
    for block in saved.blocks:
        _check_block(block.name, block.used_length, found.blocks)
    return {block.name: found.blocks[block.name].page_size for block in saved.blocks}


def _check_block(name: str, length: int, blocks: Mapping[str, RamBlockThere]) -> None:
    found = blocks.get(name)
    if found is None:
        raise RefusedError(
            f"destination: it has no RAM block {name}, which is in the file; it has {', '.join(sorted(blocks))}"
        )
    if length > found.longest:
        raise RefusedError(f"destination: {name} has {found.longest} bytes there, and {length} in the file")


async def listen_again(saved: SavedGuest, there: Watched, uri: str | None) -> tuple[str, dict[str, int], bool]:
    """Have a destination that is paused wait for us; where to connect, its page sizes, and whether it takes a
    preempt channel.  Raises ``RefusedError``.

    It does not come to this where a CPU under TCG waits for a page and its main loop for that CPU: then the destination
    greets no new QMP client.  Seen of 5.2, 10.0 and 11.1, whose main threads slept in a futex.
    """
    check(uri)
    await there.ask()
    if there.status != PAUSED:
        raise RefusedError(f"destination: nothing to resume: its migration is {there.status}")
    blocks = await ram_blocks(there.session, timeout_s=there.answer_timeout_s)
    for block in saved.blocks:
        _check_block(block.name, block.used_length, blocks)
    there.info.pop("socket-address", None)  # of the connection that broke
    wanted = uri or default_uri(there)
    try:
        await there.execute("migrate-recover", {"uri": wanted}, oob=True)
    except QmpCommandError as exc:
        raise RefusedError(f"destination: {exc.message}") from exc
    if takes_any_port(wanted):
        await there.ask_status()
    states = await capabilities(there.session, timeout_s=there.answer_timeout_s)
    page_sizes = {block.name: blocks[block.name].page_size for block in saved.blocks}
    return where_to_connect(reachable(wanted), there), page_sizes, states.get(PREEMPT, False)


async def listen(
    there: Watched, found: Found, uri: str | None, *, lazy: bool, paused: bool, preempt: bool = True
) -> tuple[str, bool]:
    """Set it up and have it listen; where to connect, and whether it takes a preempt channel.

    ``preempt``: it shall, if it can.  Raises ``RefusedError``.
    """
    check(uri)
    wanted = uri or default_uri(there)
    preempt = lazy and preempt and PREEMPT in found.capabilities
    await _set_capabilities(there, found, lazy=lazy, preempt=preempt)
    if paused:
        # What -S does: a QEMU that waits for a guest is told not to start it.  softmmu/cpus.c: qmp_stop()
        await there.execute("stop")
    if not there.info.get("socket-address"):
        await _listen(there, wanted)
    return where_to_connect(reachable(wanted), there), preempt


async def _set_capabilities(there: Watched, found: Found, *, lazy: bool, preempt: bool) -> None:
    states = dict.fromkeys(_OFF, False)
    states[PREEMPT] = preempt
    if lazy and found.postcopy is None:
        raise RefusedError("destination: this QEMU can't do postcopy; --eager does without")
    states[found.postcopy or "postcopy-ram"] = lazy
    states["events"] = True
    changes = {name: state for name, state in states.items() if found.capabilities.get(name, False) != state}
    if not changes:
        return
    listed: list[dict[str, Any]] = [{"capability": name, "state": state} for name, state in changes.items()]
    try:
        await there.execute("migrate-set-capabilities", {"capabilities": listed})
    except QmpCommandError as exc:
        hint = "; --eager does without postcopy" if lazy else ""
        raise RefusedError(f"destination: {exc.message}{hint}") from exc


async def _listen(there: Watched, uri: str) -> None:
    """Nothing has begun yet: a QEMU that can't be talked to is a refusal too."""
    try:
        await tell_to_listen(there, uri)
    except RefusedError:
        raise
    except QmpError as exc:
        raise RefusedError(f"destination: {exc}") from exc
