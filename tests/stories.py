"""Migrations told as events, for what is made of them afterwards: no QEMU is asked."""

from typing import Any, Final

from qmigrate import events
from qmigrate.events import LiveEvent, Side

__all__ = ["HOSTILE", "ZERO_US", "Story", "failed", "postcopy", "precopy"]

ZERO_US: Final = 1_800_000_000_000_000
MIB: Final = 1 << 20
SOURCE, DESTINATION = Side.SOURCE, Side.DESTINATION

HOSTILE: Final = "</script><script>alert(1)</script>\"'>&<b onclick=x>[red]\x1b[31m\x00\u202e\ud800\r\n"


class Story:
    """Events at times in microseconds from the beginning.  A side's clock may be off: its stamps are then, too.

    ``delay_us``: how long after an event of QEMU we hear of it.
    """

    def __init__(self, *, off_us: dict[Side, int] | None = None, delay_us: int = 300) -> None:
        self.events: list[LiveEvent] = []
        self._off_us = {SOURCE: 0, DESTINATION: 0, **(off_us or {})}
        self._delay_us = delay_us

    def _heard(self, at_us: int, side: Side) -> dict[str, Any]:
        now_us = ZERO_US + at_us
        return {"side": side, "time_us": now_us + self._delay_us, "qemu_us": now_us + self._off_us[side]}

    def begins(
        self, plan: dict[str, Any] | None = None, *, operation: str = "migrate", version: str = "11.1.3"
    ) -> None:
        for side, state in ((SOURCE, "running"), (DESTINATION, "inmigrate")):
            self.events.append(
                events.SideFound(
                    side=side,
                    time_us=ZERO_US - 9,
                    address=f"/run/{side}",
                    version=version,
                    run_state=state,
                    status="none",
                )
            )
        self.events.append(events.Began(time_us=ZERO_US, operation=operation, uri="tcp:there:4444", plan=plan or {}))

    def status(self, at_us: int, side: Side, status: str) -> None:
        self.events.append(events.StatusChanged(**self._heard(at_us, side), status=status))

    def guest(self, at_us: int, side: Side, *, running: bool) -> None:
        self.events.append(events.GuestChanged(**self._heard(at_us, side), running=running))

    def passes(self, at_us: int, number: int) -> None:
        self.events.append(events.PassBegan(**self._heard(at_us, SOURCE), number=number, completed=0))

    def trouble(self, at_us: int, side: Side, message: str) -> None:
        self.events.append(events.Troubled(side=side, time_us=ZERO_US + at_us, message=message))

    def numbers(self, at_us: int, side: Side = SOURCE, status: str = "active", **numbers: Any) -> None:
        self.events.append(
            events.Progressed(side=side, time_us=ZERO_US + at_us, status=status, round_trip_us=400, **numbers)
        )

    def ends(self, at_us: int, outcome: str = "completed", **more: Any) -> None:
        told = {
            "place": "destination",
            "running": True,
            "message": "migrated",
            "advice": "",
            "exit_code": 0,
            "sentence": "The guest runs on the destination.",
            **more,
        }
        self.events.append(events.Finished(time_us=ZERO_US + at_us, outcome=outcome, **told))


def precopy(**clocks: Any) -> Story:
    """Two seconds: three passes, a stop of 5 ms."""
    story = Story(**clocks)
    story.begins({"uri": "tcp:there:4444", "bandwidth": 16 * MIB})
    story.status(1_000, SOURCE, "setup")
    story.status(2_000, DESTINATION, "active")
    story.status(3_000, SOURCE, "active")
    for number, at_us in enumerate((3_500, 1_000_000, 1_800_000), 1):
        story.passes(at_us, number)
    for step in range(1, 20):
        story.numbers(
            step * 100_000,
            remaining_bytes=(20 - step) * MIB,
            transferred_bytes=2 * step * MIB,
            total_bytes=64 * MIB,
            dirty_bytes_per_s=4 * MIB,
            sent_bytes_per_s=20 * MIB,
            expected_downtime_ms=300,
        )
    story.numbers(1_500_000, DESTINATION)
    story.guest(1_990_000, SOURCE, running=False)
    story.guest(1_995_000, DESTINATION, running=True)
    story.status(1_996_000, DESTINATION, "completed")
    story.status(1_997_000, SOURCE, "completed")
    last: dict[str, Any] = {
        "remaining_bytes": 0,
        "transferred_bytes": 40 * MIB,
        "total_bytes": 64 * MIB,
        "downtime_ms": 6,
    }
    story.numbers(1_999_000, status="completed", **last, data={"status": "completed", "downtime": 6})
    story.ends(2_000_000)
    return story


def postcopy(answer: dict[str, Any] | None = None, **clocks: Any) -> Story:
    """A switch after 1 s, a pause at 2 s that is mended, the end after 3 s.  ``answer``: the destination's last."""
    story = Story(**clocks)
    story.begins({"postcopy": [{"policy": "AfterPass", "count": 1}], "recoveries": 1})
    story.status(1_000, SOURCE, "setup")
    story.status(2_000, SOURCE, "active")
    story.status(2_500, DESTINATION, "active")
    story.numbers(500_000, remaining_bytes=32 * MIB, transferred_bytes=8 * MIB, total_bytes=64 * MIB)
    story.guest(1_000_000, SOURCE, running=False)
    story.status(1_001_000, SOURCE, "device")
    story.status(1_004_000, DESTINATION, "postcopy-active")
    story.guest(1_008_000, DESTINATION, running=True)
    story.status(1_009_000, SOURCE, "postcopy-active")
    for step in range(1, 10):
        story.numbers(
            1_000_000 + step * 200_000,
            status="postcopy-active",
            remaining_bytes=(10 - step) * MIB,
            transferred_bytes=(8 + step) * MIB,
            total_bytes=64 * MIB,
            dirty_bytes_per_s=77,
            page_requests=step * 10,
        )
    for side in Side:
        story.status(2_000_000, side, "postcopy-paused")
        story.status(2_100_000, side, "postcopy-recover")
        story.status(2_110_000, side, "postcopy-active")
        story.status(2_990_000, side, "completed")
    story.numbers(2_999_000, DESTINATION, "completed", data=answer or {})
    story.ends(3_000_000, switched=True, recoveries=1)
    return story


def failed(words: str = "No such device", **clocks: Any) -> Story:
    """The destination refuses after a twentieth of a second."""
    story = Story(**clocks)
    story.begins()
    story.status(1_000, SOURCE, "active")
    story.status(50_000, DESTINATION, "failed")
    story.trouble(60_000, DESTINATION, words)
    story.status(70_000, SOURCE, "failed")
    story.numbers(90_000, SOURCE, "failed", data={"status": "failed", "error-desc": words})
    story.ends(
        100_000,
        "failed",
        place="source",
        message=f"destination: {words}",
        exit_code=3,
        sentence="The guest runs on the source.",
        advice="Look at it.",
    )
    return story
