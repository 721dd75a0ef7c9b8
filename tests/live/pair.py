"""Two real QEMUs for one migration: a source with a guest that runs, and a destination that waits for it."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qmigrate.errors import QmpError
from qmigrate.operations.policy import AtOnce
from qmigrate.qmp import migration
from qmigrate.qmp.machine import Machine
from qmigrate.qmp.session import Session
from tests.guests import console
from tests.guests.build import Guest
from tests.live.versions import Qemu

# A pass over what it walks takes a twentieth of a second, so that it goes on visibly.  It never asks for the rest.
SMALL: Final = Guest("walker", memory_mib=16, still_mib=8)

# Precopy with so little bandwidth does not converge; raise it, or switch.
SLOW: Final = 4 << 20

# So is this, and of what the guest never looks at next to nothing has gone before the switch.  After it the guest
# has what it asks for without a limit (of 5.2 and 7.2 within it); the rest takes most of a minute, so that a postcopy
# can't be over before it was paused, broken or asked about.  Then hurry().
HELD: Final = 128 << 10

# Of a plan: postcopy before precopy can have completed, as else it may with a small guest.
AT_ONCE: Final[Mapping[str, Any]] = {"postcopy": [AtOnce()], "bandwidth": SLOW, "downtime_limit_ms": 1}


@dataclass(frozen=True)
class Pair:
    """The two, and where their guest speaks."""

    source: Machine
    destination: Machine
    source_console: Path
    console: Path
    uri: str
    folder: Path

    @property
    def addresses(self) -> tuple[str, str]:
        """More monitors of the two, for those who come from outside."""
        return str(self.folder / "source.qmp"), str(self.folder / "destination.qmp")

    @property
    def sessions(self) -> tuple[Session, Session]:
        return self.source.session, self.destination.session

    async def hurry(self) -> None:
        """Lift what slows the rest of a postcopy down: what is tested of it is over."""
        with suppress(QmpError):
            await self.source.session.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})

    async def hurry_once_asked(self, *, times: int = 1) -> None:
        """Once the guest, on the destination, has asked for so many pages."""
        async with asyncio.timeout(60):
            while (await migration.query(self.source.session)).get("ram", {}).get("postcopy-requests", 0) < times:  # noqa: ASYNC110 - it does not tell
                await asyncio.sleep(0.02)
        await self.hurry()

    async def hurry_once_walked(self, *, times: int = 1) -> None:
        """Once the guest has asked for all that it walks, and been through it so often on the destination."""
        await console.wait_for_passes(self.console, times)
        await self.hurry()

    def kill(self) -> None:
        """Both: a QEMU whose postcopy is paused does not end when asked."""
        self.source.kill()
        self.destination.kill()

    async def assert_guest_goes_on(self) -> None:
        """On the destination."""
        await console.assert_goes_on(self.console)

    async def assert_guest_stayed(self) -> None:
        """On the source."""
        await console.assert_goes_on(self.source_console)


@asynccontextmanager
async def pair(
    source: Qemu,
    folder: Path,
    *,
    destination: Qemu | None = None,
    machine: str = "pc",
    guest: Guest = SMALL,
    more: Sequence[str] = (),
    source_more: Sequence[str] = (),
    destination_more: Sequence[str] = (),
) -> AsyncGenerator[Pair]:
    """Both started, the guest on its way.  ``more``: arguments for both."""
    taker = destination or source
    before, after = folder / "source-console", folder / "destination-console"
    one = [*guest.arguments(console=before, machine=machine), *_monitor(folder / "source.qmp"), *more, *source_more]
    two = [*guest.arguments(console=after, machine=machine), *_monitor(folder / "destination.qmp"), *more]
    two += [*destination_more, "-incoming", "defer"]
    async with (
        Machine(source.path, one, name=f"source {source.name}") as sender,
        Machine(taker.path, two, name=f"destination {taker.name}") as receiver,
    ):
        await console.wait_for_passes(before, 1)
        yield Pair(sender, receiver, before, after, f"unix:{folder / 'migration'}", folder)


def _monitor(path: Path) -> list[str]:
    return ["-qmp", f"unix:{path},server=on,wait=off"]
