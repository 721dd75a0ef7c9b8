"""The front for code without asyncio, with real QEMUs."""

import asyncio
import signal
import threading
from pathlib import Path

import pytest

from qmigrate import events
from qmigrate.errors import RefusedError
from qmigrate.events import LiveEvent
from qmigrate.operations.migrate import migrate_blocking
from qmigrate.operations.plan import Plan
from qmigrate.qmp import migration
from qmigrate.qmp.blocking import Blocking
from tests.live.pair import AT_ONCE, SLOW, pair
from tests.live.some import only_newest
from tests.live.versions import Qemu

pytestmark = pytest.mark.live


@only_newest
def test_a_migration_without_asyncio(qemu: Qemu, tmp_path: Path) -> None:
    with Blocking() as qmp:
        two = qmp.enter(pair(qemu, tmp_path))
        with pytest.raises(RefusedError, match="source: it waits for a guest itself"):
            migrate_blocking(two.addresses[1], two.addresses[0], Plan(uri=two.uri))
        heard: list[LiveEvent] = []
        result = migrate_blocking(*two.addresses, Plan(uri=two.uri, **AT_ONCE), on_event=heard.append)
        assert (result.exit_code, result.message) == (0, "migrated with postcopy")
        assert heard == result.events
        qmp.run(two.assert_guest_goes_on())


@only_newest
def test_ctrl_c_in_a_program_without_asyncio_leaves_the_guest_on_the_source(qemu: Qemu, tmp_path: Path) -> None:
    main = threading.main_thread().ident
    assert main is not None
    sent: list[LiveEvent] = []

    def heard(event: LiveEvent) -> None:
        if isinstance(event, events.Progressed) and event.transferred_bytes and not sent:
            sent.append(event)
            signal.pthread_kill(main, signal.SIGINT)

    with Blocking() as qmp:
        two = qmp.enter(pair(qemu, tmp_path))
        plan = Plan(uri=two.uri, bandwidth=SLOW, downtime_limit_ms=1)
        with pytest.raises(KeyboardInterrupt):
            migrate_blocking(*two.addresses, plan, on_event=heard)
        assert qmp.run(migration.wait_until(two.source.session, "cancelled", timeout_s=60)) == "cancelled"
        qmp.run(two.assert_guest_stayed())


def test_inside_a_running_loop_it_says_what_to_do_instead() -> None:
    async def use() -> None:
        migrate_blocking("/nobody/a", "/nobody/b")

    with pytest.raises(RuntimeError, match="await the coroutine instead"):
        asyncio.run(use())
