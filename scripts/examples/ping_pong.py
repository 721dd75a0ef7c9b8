#!/usr/bin/env python3
"""One guest, there and back, many times: python scripts/examples/ping_pong.py HOPS SECONDS COMMAND...

COMMAND starts a QEMU with a guest; each hop goes to a new one, started by the same command and -incoming defer, by
precopy and postcopy in turn.  The guest stays SECONDS at each.  For example:

    python scripts/examples/ping_pong.py 10 0.5 qemu-system-x86_64 -nodefaults -display none -m 64 -kernel guest.bin
"""

import asyncio
import sys
import tempfile

from qmigrate.errors import QmigrateError
from qmigrate.operations.migrate import migrate
from qmigrate.operations.plan import Plan
from qmigrate.operations.policy import AtOnce
from qmigrate.qmp.machine import Machine


async def main(hops: int, stay_s: float, command: list[str]) -> int:
    """0 when the guest arrived after the last hop, else where it is now."""
    here = Machine(command, name="hop 0")
    await here.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for hop in range(1, hops + 1):
                await asyncio.sleep(stay_s)
                there = Machine(command, ["-incoming", "defer"], name=f"hop {hop}")
                await there.start()
                gone, here = here, there
                try:
                    plan = Plan(uri=f"unix:{folder}/hop", postcopy=[AtOnce()] if hop % 2 else [])
                    result = await migrate(gone.session, here.session, plan)
                finally:
                    await gone.close()
                print(f"hop {hop}: {result.message}")
                if not result.ok:
                    print(result.guest.sentence, result.guest.advice)
                    return result.exit_code
            await asyncio.sleep(stay_s)
    finally:
        await here.close()
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 4 or not sys.argv[1].isdecimal():
        sys.exit(__doc__)
    try:
        sys.exit(asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])))
    except QmigrateError as error:
        sys.exit(f"{error}")
