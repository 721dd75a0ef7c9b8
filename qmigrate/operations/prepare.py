"""Everything before `migrate`: may these two QEMUs do this, and are they set up for it?

Nothing has begun until here; whatever is wrong is a RefusedError that says which side lacks what.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from qmigrate.errors import QmpCommandError, QmpError, RefusedError
from qmigrate.events import Side
from qmigrate.operations.hazards import Situation, hazards, release_of
from qmigrate.operations.plan import Plan, Settings, settle
from qmigrate.operations.watch import Watched
from qmigrate.operations.whereabouts import INCOMING
from qmigrate.qmp.features import Features
from qmigrate.qmp.migration import FINAL_STATUSES

__all__ = ["Prepared", "default_uri", "prepare", "uri_of"]

UNIX_PATH_LENGTH: Final = 107
WILDCARDS: Final = frozenset({"", "0.0.0.0", "::"})


@dataclass(frozen=True)
class Prepared:
    """What the preparation found: where the source connects to, and what both can do."""

    uri: str
    features: Mapping[Side, Features]
    guest_ran: bool


async def prepare(sides: Mapping[Side, Watched], plan: Plan) -> Prepared:
    """Check, set capabilities and parameters, and have the destination listen."""
    both = list(sides.values())
    found = await asyncio.gather(
        *(Features.of(each.session, timeout_s=each.answer_timeout_s) for each in both),
        *(each.ask() for each in both),
    )
    features = {side: each for side, each in zip(sides, found, strict=False) if isinstance(each, Features)}
    source, destination = sides[Side.SOURCE], sides[Side.DESTINATION]
    _ready(source, destination)
    settings = settle(plan, features)
    await _check_credentials(sides, settings)
    listens = destination.info.get("socket-address")
    listen = plan.listen or plan.uri or default_uri(destination)
    if not plan.force:
        await _check_hazards(source, destination, settings, features, plan.uri or listen)
    async with _undone_if_refused(sides, settings, features):
        await _apply(sides, settings)
        if not listens:
            await _listen(destination, features[Side.DESTINATION], listen)
    uri = plan.uri
    if uri is None or uri.endswith(":0"):
        uri = uri_of(destination.info) if destination.info.get("socket-address") else listen
    return Prepared(uri, features, source.running)


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
    )
    known = list(hazards(situation))
    if known:
        raise RefusedError(f"{'; '.join(known)} (--force does it all the same)")


async def _apply(sides: Mapping[Side, Watched], settings: Mapping[Side, Settings]) -> None:
    for side, watched in sides.items():
        wanted = settings[side]
        try:
            if wanted.capabilities:
                await watched.execute("migrate-set-capabilities", _states(wanted.capabilities))
            if wanted.parameters:
                await watched.execute("migrate-set-parameters", dict(wanted.parameters))
        except QmpCommandError as exc:
            raise RefusedError(f"{side}: {exc.message}") from exc


@asynccontextmanager
async def _undone_if_refused(
    sides: Mapping[Side, Watched], settings: Mapping[Side, Settings], features: Mapping[Side, Features]
) -> AsyncGenerator[None]:
    """Capabilities are as before when this ends with a refusal: the next to migrate may be somebody else."""
    try:
        yield
    except RefusedError:
        for side, watched in sides.items():
            before = {name: features[side].capabilities[name] for name in settings[side].capabilities}
            if before:
                with suppress(QmpError):
                    await watched.execute("migrate-set-capabilities", _states(before))
        raise


def _states(capabilities: Mapping[str, bool]) -> dict[str, Any]:
    return {"capabilities": [{"capability": name, "state": state} for name, state in capabilities.items()]}


async def _listen(destination: Watched, features: Features, uri: str) -> None:
    arguments = features.place("migrate-incoming", uri)
    if "exit-on-error" in features.schema.arguments("migrate-incoming"):
        arguments["exit-on-error"] = False  # so that it can say what went wrong
    try:
        await destination.execute("migrate-incoming", arguments)
    except QmpCommandError as exc:
        raise RefusedError(f"destination: {exc.message}") from exc
    if uri.endswith(":0"):
        await destination.ask_status()


def uri_of(info: Mapping[str, Any]) -> str:
    """Where a destination listens, by its own word: the newest address comes first."""
    address = info["socket-address"][0]
    if address.get("type") == "unix":
        return f"unix:{address['path']}"
    if address.get("type") != "inet":
        raise RefusedError(f"destination: it listens at {address}: say with --uri where the source is to connect to")
    host, port = address["host"], address["port"]
    if host in WILDCARDS:
        raise RefusedError(f"destination: it listens at any address, port {port}: say with --uri which to connect to")
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


def default_uri(destination: Watched) -> str:
    """Where it listens; if it does not, beside its QMP socket, where it could make one before."""
    if destination.info.get("socket-address"):
        return uri_of(destination.info)
    path = destination.session.path
    if path is None or len(f"{path}.migration") > UNIX_PATH_LENGTH:
        raise RefusedError("destination: where it shall listen isn't known: say it with --uri")
    return f"unix:{path}.migration"
