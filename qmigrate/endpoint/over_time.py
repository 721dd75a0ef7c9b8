"""What was asked for and sent over time: counts in slices, which get longer as time goes by, so that they stay few."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["OverTime", "Slice"]

_MOST: Final = 1024  # slices; then two become one
_FIRST_US: Final = 1000


@dataclass
class Slice:
    """``requests`` that came, ``pages`` (target pages) and bytes that were sent."""

    requests: int = 0
    pages: int = 0
    sent_bytes: int = 0


@dataclass
class OverTime:
    """``slices[i]`` begins ``i * slice_us`` microseconds after the beginning, by the clock (ns) that is given."""

    clock: Callable[[], int]
    began_ns: int = 0
    slice_us: int = _FIRST_US
    slices: list[Slice] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began_ns = self.began_ns or self.clock()

    def now(self) -> Slice:
        """The slice of this moment, to be added to."""
        index = (self.clock() - self.began_ns) // (1000 * self.slice_us)
        if index < len(self.slices):
            return self.slices[index]
        while index >= _MOST:
            self._halve()
            index //= 2
        self.slices.extend(Slice() for _ in range(index + 1 - len(self.slices)))
        return self.slices[index]

    def _halve(self) -> None:
        self.slice_us *= 2
        odd = [*self.slices[1::2], Slice()]  # the last may have no other half
        self.slices = [
            Slice(one.requests + two.requests, one.pages + two.pages, one.sent_bytes + two.sent_bytes)
            for one, two in zip(self.slices[::2], odd, strict=False)
        ]

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "slice_us": self.slice_us,
            "requests": [each.requests for each in self.slices],
            "pages": [each.pages for each in self.slices],
            "sent_bytes": [each.sent_bytes for each in self.slices],
        }
