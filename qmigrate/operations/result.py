"""What became of a migration, and where the guest is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from qmigrate import exit_codes
from qmigrate.events import Finished, LiveEvent, Side
from qmigrate.operations.whereabouts import EXIT_CODES, Place, View, Whereabouts

__all__ = ["MigrationResult", "Outcome"]


class Outcome(StrEnum):
    """How it ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    PAUSED = "paused"
    LEFT = "left"  # it goes on without us
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class MigrationResult:
    """The end of a migration.  ``message`` is one clear sentence, or more where a QEMU had more to say.

    ``switched``: it went into postcopy; ``recoveries``: how often it was brought back.  ``statistics``: the last
    answers of both sides to ``query-migrate``; of a destination that measured nothing, and is done, the status alone.
    ``events``: all that was reported, in order.
    """

    outcome: Outcome
    guest: Whereabouts
    message: str
    switched: bool
    recoveries: int = 0
    total_s: float = 0.0
    views: Mapping[Side, View]
    events: Sequence[LiveEvent] = field(default=(), repr=False)

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    @property
    def place(self) -> Place:
        return self.guest.place

    @property
    def exit_code(self) -> int:
        """As design.md has it: 0 as asked, else by where the guest is."""
        return exit_codes.DONE if self.outcome is Outcome.COMPLETED else EXIT_CODES[self.guest.place]

    @property
    def statistics(self) -> dict[Side, Mapping[str, Any]]:
        return {side: view.info or {} for side, view in self.views.items()}

    def finished(self) -> Finished:
        """The last event."""
        return Finished(
            outcome=self.outcome,
            place=self.guest.place,
            running=self.guest.running,
            message=self.message,
            advice=self.guest.advice,
            exit_code=self.exit_code,
            sentence=self.guest.sentence,
            switched=self.switched,
            recoveries=self.recoveries,
        )
