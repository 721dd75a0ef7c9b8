"""Told where to send a guest, or where to wait for one, in the words that this QEMU takes.

To ask what arguments it knows takes it and us longer than all else before a migration: its schema is 150 to 250 KB.
So it is told first, and an argument that it does not know it refuses before it does anything.
"""

from collections.abc import Mapping
from typing import Any

from qmigrate.errors import QmpCommandError, RefusedError
from qmigrate.operations.addresses import SPOILED, takes_any_port
from qmigrate.operations.watch import Watched
from qmigrate.qmp.features import Schema

__all__ = ["tell_to_listen", "tell_where"]


async def tell_to_listen(destination: Watched, uri: str) -> None:
    """Have a QEMU that was started with ``-incoming defer`` listen there.  Raises ``RefusedError``, ``QmpError``."""
    try:
        # Not to end at an error: so that it can say what went wrong.
        await tell_where(destination, "migrate-incoming", uri, may={"exit-on-error": False})
    except QmpCommandError as exc:
        raise await _refused_to_listen(destination, exc) from exc
    if takes_any_port(uri):
        await destination.ask_status()


async def _refused_to_listen(destination: Watched, error: QmpCommandError) -> RefusedError:
    await destination.ask_status()
    spoiled = destination.status == "setup" and "already" not in error.message
    return RefusedError(f"destination: {error.message}{SPOILED if spoiled else ''}")


async def tell_where(
    told: Watched,
    command: str,
    uri: str,
    *,
    must: Mapping[str, Any] | None = None,
    may: Mapping[str, Any] | None = None,
) -> None:
    """``migrate`` or ``migrate-incoming``, with ``uri`` or, where that is not taken, ``channels``.

    ``must``: further arguments; ``may``: those that are left out where they are not known.  Raises ``QmpError``.
    """
    must, may = must or {}, may or {}
    schema = Schema.known(told.session)
    if schema is None:
        arguments = {"uri": uri, **must, **may}
    else:
        taken = schema.arguments(command)
        arguments = {**schema.place(command, uri), **must, **{name: may[name] for name in may if name in taken}}
    while True:
        try:
            await told.execute(command, arguments)
        except QmpCommandError as exc:
            unknown = _unknown(exc, arguments)
            where = await _otherwise(told, command, uri) if unknown == "uri" else {}
            if not where and unknown not in may:
                raise
            arguments = {name: value for name, value in arguments.items() if name != unknown} | where
        else:
            return


async def _otherwise(told: Watched, command: str, uri: str) -> dict[str, Any]:
    """How to say where without `uri`; empty where its schema has no other way."""
    schema = await Schema.of(told.session, timeout_s=told.answer_timeout_s)
    where = schema.place(command, uri)
    return {} if "uri" in where else where


def _unknown(error: QmpCommandError, arguments: Mapping[str, Any]) -> str:
    """The argument that was refused because this QEMU has none of that name; empty for any other refusal."""
    refused = f"{error.command}: Parameter '{{}}' is unexpected"
    return next((name for name in arguments if error.message == refused.format(name)), "")
