"""What is told of a migration that comes in: events, from what each of the destination's processes says.

Each process counts for itself, and each count is told as the sum of all.
"""

import time
from collections.abc import Mapping
from typing import Any, Final

from qmigrate.events import BlocksCame, Latency, LiveEvent, OnEvent, Received, Side, StatusChanged, Troubled
from qmigrate.protocol.phases import Phase

__all__ = ["ReceiveEvents"]

_COUNTED: Final = ("received_bytes", "normal", "zero", "duplicates", "discarded")
_POSTCOPY: Final = frozenset(phase.value for phase in (Phase.LISTENING, Phase.RUNNING, Phase.PAUSED, Phase.RECOVERING))


class ReceiveEvents:
    """All that was told; it goes to ``on_event`` as it comes.  ``phases``: the name of each, and its begin in µs."""

    def __init__(self, on_event: OnEvent | None) -> None:
        self.events: list[LiveEvent] = []
        """Of a histogram that grows, the last."""
        self.phases: list[tuple[str, int]] = []
        self._on_event = on_event
        self._numbers: dict[str, dict[str, int]] = {}  # by the process that counts

    @property
    def is_postcopy(self) -> bool:
        return any(phase in _POSTCOPY for phase, _ in self.phases)

    def tell(self, event: LiveEvent) -> None:
        if isinstance(event, Latency):
            self.events = [each for each in self.events if not _is_older(each, event)]
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)

    def trouble(self, message: str) -> None:
        self.tell(Troubled(side=Side.DESTINATION, message=message))

    def phase_began(self, phase: str, at_us: int | None = None) -> None:
        at_us = time.time_ns() // 1000 if at_us is None else at_us
        self.phases.append((phase, at_us))
        self.tell(StatusChanged(side=Side.DESTINATION, time_us=at_us, status=phase))
        if phase == Phase.RECOVERING.value:  # what comes from now on did not come in the pause
            self.tell_numbers()

    def blocks_came(self, values: Mapping[str, Any]) -> None:
        blocks = [(str(name), int(length), int(size)) for name, length, size in values["blocks"]]
        self.tell(BlocksCame(side=Side.DESTINATION, time_us=values.get("time_us", 0), blocks=blocks))

    # -- numbers

    def totals(self) -> dict[str, int]:
        """What all processes have counted."""
        totals: dict[str, int] = {}
        for counted in self._numbers.values():
            for name, count in counted.items():
                totals[name] = totals.get(name, 0) + count
        return totals

    def tell_numbers(self) -> None:
        self.tell(Received(side=Side.DESTINATION, **self.totals()))

    def counted(self, values: Mapping[str, Any]) -> None:
        """By the listener."""
        self._numbers["listener"] = {name: int(values[name]) for name in _COUNTED}
        self.tell_numbers()

    def paged(self, values: Mapping[str, Any]) -> None:
        """By the pager: what it asked for, and what came over the preempt channel."""
        counts = values["counts"]
        others = {name: values[name] for name in ("faults", "requested", "received_bytes")}
        self._numbers["pager"] = {**counts, **others, "preempt": counts["normal"] + counts["zero"]}
        self.measured("preempt", values["waited"])

    def touched(self, values: Mapping[str, Any]) -> None:
        """By the guest's process."""
        self._numbers["guest"] = {"touches": values["touches"], "writes": values["writes"]}
        self.measured("touchers", values["latency"])
        self.measured("package", values["in_package"])

    def measured(self, where: str, measured: Mapping[str, Any]) -> None:
        """A histogram as it came from its process; nothing where nothing was counted."""
        if count := sum(measured["counts"]):
            self.tell(
                Latency(
                    side=Side.DESTINATION,
                    where=where,
                    counts=measured["counts"],
                    mean_us=round(measured["total_ns"] / count / 1000, 1),
                    longest_us=round(measured["longest_ns"] / 1000, 1),
                )
            )


def _is_older(told: LiveEvent, event: Latency) -> bool:
    return isinstance(told, Latency) and told.where == event.where
