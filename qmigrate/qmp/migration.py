"""Migration as seen over QMP, in the few steps that every user of it takes.

What a QEMU can do is asked of it, never concluded from its version.  Statuses are QEMU's own words; one that
is not known here means that the migration goes on.
"""

import asyncio
from collections.abc import Collection, Mapping
from typing import Any, Final

from qmigrate.errors import QmpCommandError, QmpError, QmpTimeoutError
from qmigrate.qmp.session import COMMAND_TIMEOUT_S, Listener, Session

__all__ = [
    "capabilities",
    "query",
    "set_capabilities",
    "set_parameters",
    "start",
    "start_incoming",
    "wait_until",
]

FINAL_STATUSES: Final = frozenset({"completed", "failed", "cancelled"})

# Events come only with the capability `events`, and not for every change: so ask again, after a little longer
# each time.
_FIRST_POLL_S: Final = 0.01
_LAST_POLL_S: Final = 0.25


async def capabilities(session: Session, *, timeout_s: float = COMMAND_TIMEOUT_S) -> dict[str, bool]:
    """The migration capabilities that this QEMU has, and which of them are on."""
    answer = await session.execute("query-migrate-capabilities", timeout_s=timeout_s)
    return {each["capability"]: each["state"] for each in answer}


async def set_capabilities(session: Session, states: Mapping[str, bool]) -> None:
    """Turn capabilities on or off.  One that QEMU does not know may be turned off."""
    known = await capabilities(session)
    missing = sorted(name for name, state in states.items() if state and name not in known)
    if missing:
        raise QmpError(f"this QEMU has no migration capability {', '.join(missing)}", address=session.address)
    changes = [{"capability": name, "state": state} for name, state in states.items() if name in known]
    if changes:
        await session.execute("migrate-set-capabilities", {"capabilities": changes})


async def set_parameters(session: Session, values: Mapping[str, Any]) -> None:
    """Set migration parameters, such as ``{"max-bandwidth": 1 << 30, "downtime-limit": 300}``."""
    await session.execute("migrate-set-parameters", values)


async def start(session: Session, uri: str, arguments: Mapping[str, Any] | None = None) -> None:
    """Begin to migrate to ``uri``.  That nobody listens there shows only later, in the status.

    ``arguments`` are further ones of ``migrate``, such as ``{"resume": True}``.
    """
    await session.execute("migrate", {"uri": uri, **(arguments or {})})


async def start_incoming(session: Session, uri: str, arguments: Mapping[str, Any] | None = None) -> None:
    """Have a QEMU that was started with ``-incoming defer`` listen at, or read from, ``uri``."""
    await session.execute("migrate-incoming", {"uri": uri, **(arguments or {})})


async def query(session: Session, *, timeout_s: float = COMMAND_TIMEOUT_S) -> dict[str, Any]:
    """What ``query-migrate`` tells, always with a ``status``: "none" before there was any migration."""
    return {"status": "none", **await session.execute("query-migrate", timeout_s=timeout_s)}


async def wait_until(session: Session, statuses: str | Collection[str], *, timeout_s: float) -> str:
    """Wait until the migration is, or is heard to pass through, one of these statuses; return which.

    Raises QmpCommandError, with the status as ``error_class`` and QEMU's reason, when the migration ends
    otherwise: so waiting for "postcopy-active" alone raises if precopy completes first.
    """
    wanted = {statuses} if isinstance(statuses, str) else set(statuses)
    status: str | None = None
    try:
        async with asyncio.timeout(timeout_s):
            with session.listen("MIGRATION") as changes:
                poll_s = _FIRST_POLL_S
                while True:
                    info = await query(session)
                    status = info["status"]
                    if status in wanted:
                        return status
                    if status in FINAL_STATUSES:
                        raise _ended(session, info, wanted)
                    passed = await _passed_through(changes, wanted, poll_s)
                    if passed is not None:
                        return passed
                    poll_s = min(poll_s * 1.5, _LAST_POLL_S)
    except TimeoutError as exc:
        found = (
            f"the migration is {status} and not {_either(wanted)} after {timeout_s:g} s"
            if status
            else f"query-migrate: no answer within {timeout_s:g} s"
        )
        raise QmpTimeoutError(found, address=session.address) from exc


async def _passed_through(changes: Listener, wanted: Collection[str], timeout_s: float) -> str | None:
    """The first wanted status that is heard of; None at the next change to another, or when time is up."""
    try:
        change = await changes.get(timeout_s=timeout_s)
    except QmpTimeoutError:
        return None
    status = change.data.get("status")
    return status if status in wanted else None


def _ended(session: Session, info: Mapping[str, Any], wanted: Collection[str]) -> QmpCommandError:
    status = info["status"]
    reason = info.get("error-desc") or f"the migration is {status} and not {_either(wanted)}"
    return QmpCommandError(reason, command="migrate", error_class=status, address=session.address)


def _either(statuses: Collection[str]) -> str:
    return " or ".join(sorted(statuses))
