#!/usr/bin/env python3
"""Move a guest with postcopy: python scripts/examples/postcopy.py SRC DST

SRC and DST are the QMP sockets of two running QEMUs; DST was started with -incoming defer.  Precopy gets one pass
over memory; if it is not done by then, the guest switches over and fetches the rest as it needs it.
"""

import asyncio
import sys

from qmigrate.errors import QmigrateError
from qmigrate.events import Decided, GuestChanged, LiveEvent, StatusChanged
from qmigrate.operations.migrate import migrate
from qmigrate.operations.plan import Plan
from qmigrate.operations.policy import AfterPass
from qmigrate.qmp.session import Session


def tell(event: LiveEvent) -> None:
    """What happens, as it happens."""
    match event:
        case StatusChanged():
            print(f"{event.side}: {event.status}")
        case GuestChanged():
            print(f"{event.side}: the guest {'runs' if event.running else 'stopped'}")
        case Decided():
            print(f"{event.decision}: {event.reason}")


async def main(source: str, destination: str) -> int:
    """The exit code says where the guest is: 0 on the destination, as asked."""
    async with Session.connect(source) as one, Session.connect(destination) as two:
        result = await migrate(one, two, Plan(postcopy=[AfterPass(1)]), on_event=tell)
    print(result.message)
    print(result.guest.sentence, result.guest.advice)
    return result.exit_code


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        sys.exit(asyncio.run(main(*sys.argv[1:])))
    except QmigrateError as error:
        sys.exit(f"{error}")
