"""What opened something, and closes it: at the end of a ``with`` block, too."""

from abc import abstractmethod
from types import TracebackType
from typing import Self

__all__ = ["Owner"]


class Owner:
    """Closes what it opened: ``with`` it, or ``close()``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close what was opened for it."""
