"""Everything before `migrate`: may these two QEMUs do this, and are they set up for it?

Nothing has begun until here; whatever is wrong is a RefusedError that says which side lacks what.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from qmigrate.errors import QmigrateError, QmpCommandError, QmpError, RefusedError
from qmigrate.events import Side
from qmigrate.operations.addresses import (
    check,
    default_uri,
    reachable,
    uri_of,
    where_to_connect,
)
from qmigrate.operations.hazards import Situation, hazards, release_of
from qmigrate.operations.plan import Plan, Settings, needs_schema, settle
from qmigrate.operations.telling import tell_to_listen
from qmigrate.operations.watch import Watched
from qmigrate.operations.whereabouts import INCOMING
from qmigrate.qmp.features import Features
from qmigrate.qmp.migration import FINAL_STATUSES

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """What the preparation found: where the source connects to, and what both can do."""

    uri: str
    features: Mapping[Side, Features]


async def prepare(sides: Mapping[Side, Watched], plan: Plan) -> Prepared:
    """Check, set capabilities and parameters, and have the destination listen."""
    check(plan.uri, plan.listen, plan.recover_uri, plan.recover_listen)
    both = list(sides.values())
    found = await asyncio.gather(
        *(_features(each, plan) for each in both),
        *(each.ask() for each in both),
    )
    features = {side: each for side, each in zip(sides, found, strict=False) if isinstance(each, Features)}
    source, destination = sides[Side.SOURCE], sides[Side.DESTINATION]
    _ready(source, destination)
    settings = settle(plan, features)
    await _check_credentials(sides, settings)
    listens = destination.info.get("socket-address")
    listen = plan.listen or plan.uri or default_uri(destination)
    uri = plan.uri or (uri_of(destination.info) if listens else reachable(listen))
    if not plan.force:
        await _check_hazards(source, destination, settings, features, uri, recovers=plan.recoveries != 0)

    async def set_up_destination() -> None:
        await _apply(destination, settings[Side.DESTINATION])
        if not listens:
            await tell_to_listen(destination, listen)

    async with _undone_if_refused(sides, settings, features):
        await _all_of(_apply(source, settings[Side.SOURCE]), set_up_destination())
    return Prepared(where_to_connect(uri, destination), features)


async def _features(watched: Watched, plan: Plan) -> Features:
    wanted = needs_schema(plan, watched.side)
    return await Features.of(watched.session, timeout_s=watched.answer_timeout_s, with_schema=wanted)


def _ready(source: Watched, destination: Watched) -> None:
    if source.run_state == INCOMING:
        raise RefusedError("source: it waits for a guest itself (it was started with -incoming)")
    if source.run_state == "postmigrate":
        raise RefusedError("source: its guest has migrated away already")
    if source.status not in FINAL_STATUSES | {"none"}:
        raise RefusedError(f"source: a migration is under way already ({source.status}): see `qmigrate status`")
    if destination.run_state != INCOMING:
        raise RefusedError(f"destination: it takes no guest: it is {destination.run_state}, not started with -incoming")
    if destination.status not in ("none", "setup"):
        raise RefusedError(f"destination: it receives a migration already ({destination.status})")
    if reasons := source.info.get("blocked-reasons"):
        raise RefusedError(f"source: its guest can't migrate: {'; '.join(map(str, reasons))}")


async def _check_credentials(sides: Mapping[Side, Watched], settings: Mapping[Side, Settings]) -> None:
    for side, watched in sides.items():
        wanted = settings[side].parameters.get("tls-creds")
        if not wanted:
            continue
        listed = await watched.session.execute("qom-list", {"path": "/objects"}, timeout_s=watched.answer_timeout_s)
        names = sorted(each["name"] for each in listed if "tls-creds" in each["type"])
        if wanted not in names:
            raise RefusedError(f"{side}: it has no TLS credentials {wanted}; it has {', '.join(names) or 'none'}")


async def _check_hazards(
    source: Watched,
    destination: Watched,
    settings: Mapping[Side, Settings],
    features: Mapping[Side, Features],
    uri: str,
    *,
    recovers: bool,
) -> None:
    states = features[Side.SOURCE].capabilities | dict(settings[Side.SOURCE].capabilities)
    capabilities = frozenset(name for name, state in states.items() if state)
    devices: tuple[str, ...] = ()
    if "block" in capabilities:
        listed = await source.session.execute("query-block", timeout_s=source.answer_timeout_s)
        devices = tuple(each["device"] for each in listed if "inserted" in each)
    situation = Situation(
        uri,
        capabilities,
        {each.side: release_of(each.session.greeting) for each in (source, destination)},
        source.running,
        devices,
        recovers,
    )
    known = list(hazards(situation))
    if known:
        raise RefusedError(f"{'; '.join(known)} (--force does it all the same)")


async def _apply(watched: Watched, wanted: Settings) -> None:
    try:
        if wanted.capabilities:
            await watched.execute("migrate-set-capabilities", _states(wanted.capabilities))
        if wanted.parameters:
            await watched.execute("migrate-set-parameters", dict(wanted.parameters))
    except QmpCommandError as exc:
        raise RefusedError(f"{watched.side}: {exc.message}") from exc


async def _all_of(*work: Coroutine[Any, Any, None]) -> None:
    """All at once, each to its end; then the first error, if there was one: nothing goes on behind our back."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if outcome is not None:
            raise outcome


@asynccontextmanager
async def _undone_if_refused(
    sides: Mapping[Side, Watched], settings: Mapping[Side, Settings], features: Mapping[Side, Features]
) -> AsyncGenerator[None]:
    """Capabilities are as before when this ends badly: the next to migrate may be somebody else."""
    try:
        yield
    except QmigrateError:
        for side, watched in sides.items():
            before = {name: features[side].capabilities[name] for name in settings[side].capabilities}
            if before:
                with suppress(QmpError):
                    await watched.execute("migrate-set-capabilities", _states(before))
        raise


def _states(capabilities: Mapping[str, bool]) -> dict[str, Any]:
    return {"capabilities": [{"capability": name, "state": state} for name, state in capabilities.items()]}
