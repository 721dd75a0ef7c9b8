"""A pair whose migration goes through a relay, which breaks it where the test says."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmigrate import events
from qmigrate.endpoint.relay import Channel, Relay
from qmigrate.events import LiveEvent, Side
from qmigrate.operations.plan import Plan
from qmigrate.operations.policy import AtOnce
from tests.live.pair import Pair, pair
from tests.live.versions import Qemu

# Requested pages pass whatever the limit; the rest takes some seconds, time enough to break it.  A test that must
# not fail for a machine's sake asks for pair.HELD instead.
POSTCOPY_SLOW = 4 << 20


@dataclass
class Cutter:
    """Cuts every channel when ``after_bytes`` have passed since both sides were in postcopy, or back in it.

    Before that nothing is ever cut: it would lose the guest.  The destination's RESUME is not enough: a source of
    11.1 that has not come from postcopy-device to postcopy-active yet goes back to running the guest.

    ``after_last`` is awaited when the last cut is made.  ``guest_is_held``: the destination never tells that its guest
    runs; then so many bytes have to be enough for it to have loaded what it needs.
    """

    after_bytes: Sequence[int]
    after_last: Callable[[], Coroutine[Any, Any, None]] | None = None
    relay: Relay | None = None
    cuts: int = 0
    guest_is_held: bool = False
    _last: asyncio.Task[None] | None = None
    _base: int | None = None
    _took_over: bool = False
    _statuses: dict[Side, str] = field(default_factory=dict)

    def heard(self, event: LiveEvent) -> None:
        """An event of the driver."""
        if isinstance(event, events.GuestChanged) and event.side is Side.DESTINATION:
            self._took_over = event.running
        elif isinstance(event, events.StatusChanged) and event.side is not None:
            self._statuses[event.side] = event.status
        else:
            return
        both = {self._statuses.get(side) for side in Side}
        if (self._took_over or self.guest_is_held) and both == {"postcopy-active"}:
            self._base = self._passed if self._base is None else self._base
        else:
            self._base = None

    def passed(self, _channel: Channel) -> None:
        """The relay has passed something on."""
        if self._base is None or self.cuts >= len(self.after_bytes):
            return
        if self._passed - self._base >= self.after_bytes[self.cuts]:
            self.cut()

    def cut(self) -> None:
        """All channels, as when a cable is pulled."""
        self.cuts += 1
        self._base = None
        assert self.relay is not None
        for channel in self.relay.channels:
            channel.cut()
        if self.cuts == len(self.after_bytes) and self.after_last is not None:
            self._last = asyncio.ensure_future(self.after_last())

    @property
    def _passed(self) -> int:
        assert self.relay is not None
        return sum(channel.forward_bytes for channel in self.relay.channels)


@asynccontextmanager
async def broken_pair(
    qemu: Qemu, folder: Path, after_bytes: Sequence[int], *, destination: Qemu | None = None, **more: Any
) -> AsyncGenerator[tuple[Pair, Cutter]]:
    """A pair with a relay between.  Hand ``cutter.heard`` the driver's events.

    After the last cut what is left may come as fast as it can.
    """
    cutter = Cutter(after_bytes)
    listens, forward = f"unix:{folder / 'relay'}", f"unix:{folder / 'migration'}"
    async with (
        pair(qemu, folder, destination=destination, **more) as two,
        Relay(listens, forward, folder / "relayed", on_bytes=cutter.passed) as relay,
    ):
        cutter.relay, cutter.after_last = relay, two.hurry
        yield two, cutter


def broken_plan(two: Pair, **wishes: Any) -> Plan:
    """Postcopy at once, through the relay, slow enough to be cut."""
    return Plan(
        **{
            "uri": f"unix:{two.folder / 'relay'}",
            "listen": two.uri,
            "postcopy": [AtOnce()],
            "bandwidth": POSTCOPY_SLOW,
            "postcopy_bandwidth": POSTCOPY_SLOW,
            "downtime_limit_ms": 1,
            "recoveries": 5,
            "answer_timeout_s": 60.0,
            **wishes,
        }
    )
