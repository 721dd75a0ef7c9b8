"""What a migration shall be like, and what of it these two QEMUs can do.

A plan says what is wanted; ``settle()`` makes of it what each side is told, or refuses before anything begins.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Final, TypeAlias

from qmigrate.errors import RefusedError
from qmigrate.events import Side
from qmigrate.operations.policy import Policy
from qmigrate.qmp.features import Features, NoSuchFeatureError

__all__ = ["Plan", "Settings", "Value", "measures_blocktime", "settle"]

Value: TypeAlias = str | int | bool
Hook: TypeAlias = Callable[[], Awaitable[None]]

SOURCE, DESTINATION = Side.SOURCE, Side.DESTINATION
BOTH: Final = (SOURCE, DESTINATION)

BLOCKTIME: Final = "postcopy-blocktime"

# Which side a capability means something to.  All others: both.
ONLY_AT: Final[Mapping[str, tuple[Side, ...]]] = {
    "xbzrle": (SOURCE,),
    "pause-before-switchover": (SOURCE,),
    BLOCKTIME: (DESTINATION,),
}

# What a plan turns off where it does not ask for it: left on by an earlier migration, it would change this one.
GOVERNED: Final = ("postcopy-ram", "postcopy-preempt", "multifd", "xbzrle", "pause-before-switchover")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to migrate.  Sizes are bytes, rates bytes a second; None leaves a parameter as it is.

    ``uri`` is where the source connects to, ``listen`` where the destination listens (None: the same); a
    destination that listens already is taken as it is.  ``postcopy``: when to switch; none: never.
    ``capabilities`` and ``parameters`` are set by name on both sides, or on one with the side as prefix:
    ``{"destination:max-postcopy-bandwidth": 0}``.

    ``before_switchover`` is awaited while the guest is stopped and nothing of its devices is sent yet.

    ``recoveries``: how often a broken postcopy is brought back; None: without limit.  ``recover_uri`` and
    ``recover_listen`` are where (None: as before).

    ``closely``: for a report, ask for numbers often, and have the destination of a postcopy measure how long pages
    took, where it can.

    ``answer_timeout_s``: for every command.  ``connect_timeout_s``: for a source that resumes; QEMU 5.2 and 7.2 do
    not say that they could not connect.  ``stall_timeout_s``: for a migration that shows no sign of life.
    ``timeout_s``: for precopy as a whole.
    """

    uri: str | None = None
    listen: str | None = None
    postcopy: Sequence[Policy] = ()
    preempt: bool = False
    multifd: int | None = None
    compression: str | None = None
    xbzrle: bool = False
    blocktime: bool = False
    closely: bool = False
    bandwidth: int | None = None
    postcopy_bandwidth: int | None = None
    downtime_limit_ms: int | None = None
    tls_creds: str | None = None
    destination_tls_creds: str | None = None
    tls_hostname: str | None = None
    capabilities: Mapping[str, bool] = field(default_factory=dict)
    parameters: Mapping[str, Value] = field(default_factory=dict)
    pause_before_switchover: bool = False
    before_switchover: Hook | None = None
    recoveries: int | None = 0
    recover_uri: str | None = None
    recover_listen: str | None = None
    force: bool = False
    answer_timeout_s: float = 30.0
    stall_timeout_s: float = 120.0
    connect_timeout_s: float = 10.0
    hook_timeout_s: float = 60.0
    timeout_s: float | None = None

    @property
    def wants_postcopy(self) -> bool:
        return bool(self.postcopy) or self.preempt or "postcopy-ram" in self._turned_on

    @property
    def measures(self) -> bool:
        """Does somebody want to know what the destination of a postcopy measured?"""
        return self.closely or self.blocktime or BLOCKTIME in self._turned_on

    def plain(self) -> dict[str, Any]:
        """As JSON has it: what is not as by default.  A policy is its name and its numbers; of a hook, that it is."""
        default = Plan()
        values = {each.name: (getattr(self, each.name), getattr(default, each.name)) for each in fields(self)}
        return {name: _plain(ours) for name, (ours, usual) in values.items() if ours != usual and (ours or usual)}

    @property
    def _turned_on(self) -> set[str]:
        return {name.rpartition(":")[2].removeprefix("x-") for name, state in self.capabilities.items() if state}

    def wanted_capabilities(self) -> dict[str, bool]:
        """By name, with or without a side as prefix.  What is governed and not asked for is off."""
        wanted = dict.fromkeys(GOVERNED, False)
        wanted |= {"events": True}
        if self.wants_postcopy:
            wanted["postcopy-ram"] = True
        if self.preempt:
            wanted["postcopy-preempt"] = True
        if self.multifd is not None:
            wanted["multifd"] = True
        if self.xbzrle:
            wanted["xbzrle"] = True
        if self.blocktime:
            wanted[BLOCKTIME] = True
        if self.pause_before_switchover or self.before_switchover is not None:
            wanted["pause-before-switchover"] = True
        return wanted | dict(self.capabilities)

    def wanted_parameters(self) -> dict[str, Value]:
        """By name, with or without a side as prefix."""
        named: dict[str, Value | None] = {
            "source:max-bandwidth": self.bandwidth,
            "source:max-postcopy-bandwidth": self.postcopy_bandwidth,
            "source:downtime-limit": self.downtime_limit_ms,
            "multifd-channels": self.multifd,
            "multifd-compression": self.compression,
            "source:tls-creds": self.tls_creds,
            "destination:tls-creds": self.destination_tls_creds or self.tls_creds,
            "source:tls-hostname": self.tls_hostname,
        }
        return {name: value for name, value in named.items() if value is not None} | dict(self.parameters)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, Sequence):
        return [_plain(each) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {"policy": type(value).__name__, **asdict(value)}
    return True


@dataclass(frozen=True)
class Settings:
    """What one side is told: only what differs from what it is."""

    capabilities: Mapping[str, bool]
    parameters: Mapping[str, Any]


def settle(plan: Plan, features: Mapping[Side, Features]) -> dict[Side, Settings]:
    """What each side is told for this plan.  Raises RefusedError where a QEMU can't do it."""
    if plan.compression not in (None, "none") and plan.multifd is None:
        raise RefusedError("--compression is of multifd's pages: it goes with --multifd")
    return {
        side: Settings(_capabilities(plan, side, features[side]), _parameters(plan, side, features[side]))
        for side in BOTH
    }


def _capabilities(plan: Plan, side: Side, features: Features) -> dict[str, bool]:
    states: dict[str, bool] = {}
    for name, state in _of_side(plan.wanted_capabilities(), side):
        if not state and not features.has(name):
            continue
        if side not in ONLY_AT.get(name, BOTH) and name not in plan.capabilities:
            continue
        try:
            states[features.capability(name)] = state
        except NoSuchFeatureError as exc:
            raise RefusedError(f"{side}: {exc}") from None
    if side is DESTINATION and measures_blocktime(plan, features):
        states.setdefault(BLOCKTIME, True)
    return {name: state for name, state in states.items() if features.capabilities[name] != state}


def measures_blocktime(plan: Plan, destination: Features) -> bool:
    """Is the destination to measure how long pages took, though nobody asked for it by name?

    Done on 5.2, 7.2, 10.0 and 11.1 (with recoveries, and with preempt) and never seen to do harm: it costs a look at
    the clock for each page that is requested.
    """
    return plan.closely and plan.wants_postcopy and destination.has(BLOCKTIME)


def needs_schema(plan: Plan, side: Side) -> bool:
    """Is this side to be told parameters?  Then its schema says whether it has them, and of what type."""
    return bool(_of_side(plan.wanted_parameters(), side))


def _parameters(plan: Plan, side: Side, features: Features) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in _of_side(plan.wanted_parameters(), side):
        try:
            values[name] = features.parameter(name, value)
        except NoSuchFeatureError as exc:
            raise RefusedError(f"{side}: {exc}") from None
    return values


def _of_side(wanted: Mapping[str, Any], side: Side) -> list[tuple[str, Any]]:
    """What is for this side, the prefix taken off; what is for this side alone comes last and wins."""
    general = {name: value for name, value in wanted.items() if ":" not in name}
    special = {name.removeprefix(f"{side}:"): value for name, value in wanted.items() if name.startswith(f"{side}:")}
    strange = [name for name in wanted if ":" in name and name.partition(":")[0] not in (SOURCE, DESTINATION)]
    if strange:
        raise RefusedError(f"{strange[0]!r} is of no side: expected source:NAME or destination:NAME")
    return list((general | special).items())
