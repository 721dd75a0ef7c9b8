#!/usr/bin/env python3
"""A postcopy that survives its network: python scripts/examples/recovery.py SRC DST URI

SRC and DST are the QMP sockets of two running QEMUs; DST was started with -incoming defer, and listens at URI.
As soon as it is safe the connection is paused on purpose, as a network that fails would do it; then it is
brought back, and the guest goes on as if nothing had been.  This is the way without asyncio of one's own.
"""

import sys

from qmigrate.errors import QmigrateError
from qmigrate.events import Recovering
from qmigrate.operations import attached
from qmigrate.operations.migrate import migrate, recover
from qmigrate.operations.plan import Plan
from qmigrate.operations.policy import AtOnce
from qmigrate.operations.result import MigrationResult, Outcome
from qmigrate.qmp.blocking import Blocking
from qmigrate.qmp.session import Session

SLOW = 2 << 20  # bytes a second, so that there is something left to pause


async def break_it(source: Session, destination: Session, uri: str) -> MigrationResult:
    """Migrate, and pause when both sides are past the point before which that would lose the guest."""
    import asyncio

    plan = Plan(uri=uri, postcopy=[AtOnce()], bandwidth=SLOW, postcopy_bandwidth=SLOW, downtime_limit_ms=1)
    migrating = asyncio.ensure_future(migrate(source, destination, plan))
    await asyncio.sleep(0)
    while not migrating.done():
        try:
            done = await attached.pause(source, destination)
            print(done.message)
            break
        except QmigrateError:  # not in postcopy yet: it is refused
            await asyncio.sleep(0.01)
    return await migrating


def main(source: str, destination: str, uri: str) -> int:
    """0 when the guest is on the destination in the end."""
    with Blocking() as qmp:
        one, two = [qmp.enter(Session.connect(address)) for address in (source, destination)]
        broken = qmp.run(break_it(one, two, uri))
        print(broken.message, broken.guest.sentence, sep="\n")
        if broken.outcome is not Outcome.PAUSED:
            return broken.exit_code
        qmp.run(one.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0}))  # without a limit
        plan = Plan(uri=uri, recoveries=3)
        result = qmp.run(
            recover(one, two, plan, on_event=lambda e: print(e.name) if isinstance(e, Recovering) else None)
        )
        print(result.message, result.guest.sentence, sep="\n")
        return result.exit_code


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        sys.exit(main(*sys.argv[1:]))
    except QmigrateError as error:
        sys.exit(f"{error}")
