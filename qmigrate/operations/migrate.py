"""Migrate a guest from one running QEMU to another, and bring it back when its postcopy broke.

    async with Session.connect("/run/a.qmp") as source, Session.connect("/run/b.qmp") as destination:
        result = await migrate(source, destination, Plan(postcopy=[AtOnce()]), on_event=print)
    print(result.message, result.guest.sentence)

The destination was started with ``-incoming defer``, or listens already.
"""

from qmigrate.events import OnEvent
from qmigrate.operations.drive import Driver
from qmigrate.operations.plan import Plan
from qmigrate.operations.result import MigrationResult
from qmigrate.qmp.blocking import Blocking
from qmigrate.qmp.session import Address, Session

__all__ = ["migrate", "migrate_blocking", "recover"]


async def migrate(
    source: Session, destination: Session, plan: Plan | None = None, *, on_event: OnEvent | None = None
) -> MigrationResult:
    """Migrate, and say what became of it.

    Raises RefusedError when nothing was begun.  After that nothing is raised that QEMU may do: the result says
    what failed, and where the guest is.  When the task is cancelled, precopy is, too; postcopy goes on.
    """
    return await Driver(source, destination, plan or Plan(), on_event).migrate()


async def recover(
    source: Session, destination: Session, plan: Plan | None = None, *, on_event: OnEvent | None = None
) -> MigrationResult:
    """Bring back a postcopy that is paused, whoever began it.  Of the plan, ``recoveries`` and the addresses count."""
    return await Driver(source, destination, plan or Plan(recoveries=1), on_event).recover()


def migrate_blocking(
    source: Address, destination: Address, plan: Plan | None = None, *, on_event: OnEvent | None = None
) -> MigrationResult:
    """``migrate()`` for code without asyncio.  ``on_event`` is called in another thread.

    Ctrl-C (KeyboardInterrupt) cancels precopy; postcopy goes on.  Raises RuntimeError inside a running event loop.
    """
    with Blocking() as qmp:
        sessions = [qmp.enter(Session.connect(address)) for address in (source, destination)]
        return qmp.run(migrate(sessions[0], sessions[1], plan, on_event=on_event))
