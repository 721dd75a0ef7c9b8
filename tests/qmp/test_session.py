"""The session against a server that misbehaves as told."""

import asyncio
import logging
import socket
from pathlib import Path

import pytest

from qmigrate.errors import QemuDiedError, QmpCommandError, QmpConnectError, QmpError, QmpTimeoutError
from qmigrate.qmp import session as session_module
from qmigrate.qmp.session import Event, Listener, Session
from tests.qmp.scripted import GREETING, ScriptedQemu, playing, session_with

pytestmark = pytest.mark.asyncio


async def greets(qemu: ScriptedQemu) -> None:
    await qemu.greet()
    await qemu.until_left()


async def answers_all(qemu: ScriptedQemu) -> None:
    while True:
        try:
            command = await qemu.hear()
        except (EOFError, ConnectionError):
            return
        await qemu.answer(command, {"executed": command})


async def hangs_up(_: ScriptedQemu) -> None:
    pass


async def names(listener: Listener, count: int) -> list[str]:
    return [(await listener.get(timeout_s=10)).name for _ in range(count)]


# ---- connecting ----


async def test_a_session_says_which_qemu_it_talks_to() -> None:
    async with session_with(ScriptedQemu.until_left) as session:
        assert session.connected
        assert session.greeting == GREETING["QMP"]


@pytest.mark.parametrize("kind", ["a path", "host:port", "a pair"])
async def test_an_address_may_be(kind: str, tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greets(ScriptedQemu(reader, writer))
        writer.close()

    address: session_module.Address
    if kind == "a path":
        server = await asyncio.start_unix_server(serve, tmp_path / "qmp:1")
        address = tmp_path / "qmp:1"
    else:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        address = (host, port) if kind == "a pair" else f"{host}:{port}"
    async with server:
        async with Session.connect(address) as session:
            assert session.connected
        server.close()
        await server.wait_closed()


async def test_a_path_where_nobody_listens_is_named(tmp_path: Path) -> None:
    with pytest.raises(QmpConnectError, match=r"qmp\.sock: No such file or directory"):
        await Session.open(tmp_path / "qmp.sock")


async def test_a_port_where_nobody_listens_is_refused_in_plain_words() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        with pytest.raises(QmpConnectError, match=f"^127.0.0.1:{port}: Connection refused$"):
            await Session.open(f"127.0.0.1:{port}")
    with pytest.raises(QmpConnectError, match="a port is a number from 0 to 65535"):
        await Session.open("127.0.0.1:65536")


async def test_messages_are_spelled_out_only_for_a_log_that_wants_them(caplog: pytest.LogCaptureFixture) -> None:
    async def answer(qemu: ScriptedQemu) -> None:
        await qemu.answer(await qemu.hear(), {"a": 2031})

    logger = logging.getLogger("qemu.qmp")
    for level, wanted in ((logging.INFO, False), (logging.DEBUG, True)):
        with caplog.at_level(level, logger=logger.name):
            async with session_with(answer) as session:
                assert await session.execute("query-x") == {"a": 2031}
        assert ("2031" in caplog.text) == wanted


async def test_a_silent_peer_is_given_up() -> None:
    async with playing(ScriptedQemu.until_left) as sock:
        with pytest.raises(QmpConnectError, match=r"no QMP greeting within 0\.05 s"):
            await Session.open(sock, timeout_s=0.05)


async def test_a_human_monitor_is_no_qmp() -> None:
    async def human_monitor(qemu: ScriptedQemu) -> None:
        await qemu.say_bytes(b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ")
        await qemu.until_left()

    async with playing(human_monitor) as sock:
        with pytest.raises(QmpConnectError, match="this is not QMP: Did not understand Greeting"):
            await Session.open(sock)


async def test_a_peer_that_hangs_up_at_once_is_a_failed_connect() -> None:
    async with playing(hangs_up) as sock:
        with pytest.raises(QmpConnectError, match="closed before the QMP greeting was complete"):
            await Session.open(sock)


async def test_an_event_before_the_reply_to_qmp_capabilities_is_heard() -> None:
    async def event_first(qemu: ScriptedQemu) -> None:
        await qemu.say(GREETING)
        command = await qemu.hear()
        await qemu.event("MIGRATION", status="active")
        await qemu.event("STOP")
        await qemu.answer(command)
        await answers_all(qemu)

    async with playing(event_first) as sock, Session.connect(sock) as session:
        await session.execute("query-status")
        assert await names(session.events(), 2) == ["MIGRATION", "STOP"]


async def test_no_task_and_no_socket_is_left_when_a_session_closes() -> None:
    before = asyncio.all_tasks()
    async with session_with(ScriptedQemu.until_left) as session:
        pass
    assert not session.connected
    assert asyncio.all_tasks() == before


async def test_a_session_closes_although_its_peer_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "CLOSE_TIMEOUT_S", 0.05)
    closed = asyncio.Event()

    async def deaf(_: ScriptedQemu) -> None:
        await closed.wait()

    async with session_with(deaf) as session:
        with pytest.raises(QmpTimeoutError):
            await session.execute("guest-file-write", {"data": "x" * 4_000_000}, timeout_s=0.05)
        await session.close()
        closed.set()


# ---- commands ----


async def test_a_command_goes_out_as_it_was_given() -> None:
    async with session_with(answers_all) as session:
        plain = await session.execute("migrate", {"uri": "unix:x"})
        at_once = await session.execute("migrate-pause", oob=True)
    assert plain["executed"]["execute"] == "migrate"
    assert plain["executed"]["arguments"] == {"uri": "unix:x"}
    assert at_once["executed"]["exec-oob"] == "migrate-pause"


async def test_a_refusal_keeps_qemus_words() -> None:
    async def refuse(qemu: ScriptedQemu) -> None:
        await qemu.refuse(await qemu.hear(), "Device 'x' not found", "DeviceNotFound")
        await qemu.until_left()

    async with session_with(refuse) as session:
        with pytest.raises(QmpCommandError, match="device_del: Device 'x' not found") as caught:
            await session.execute("device_del", {"id": "x"})
    assert caught.value.command == "device_del"
    assert caught.value.error_class == "DeviceNotFound"


async def test_an_answer_that_comes_too_late_is_not_taken_for_the_next() -> None:
    asked_again = asyncio.Event()

    async def late(qemu: ScriptedQemu) -> None:
        first = await qemu.hear()
        await asked_again.wait()
        await qemu.answer(first, "first")
        await qemu.answer(await qemu.hear(), "second")
        await qemu.until_left()

    async with session_with(late) as session:
        with pytest.raises(QmpTimeoutError, match=r"query-block: no answer within 0\.05 s"):
            await session.execute("query-block", timeout_s=0.05)
        asked_again.set()
        assert await session.execute("query-name") == "second"


async def test_arguments_that_are_no_json_do_not_end_the_session() -> None:
    async with session_with(answers_all) as session:
        with pytest.raises(TypeError, match="not JSON serializable"):
            await session.execute("migrate", {"uri": Path("x")})
        await session.execute("query-status")


async def test_an_answer_of_neither_kind_is_named() -> None:
    async def neither(qemu: ScriptedQemu) -> None:
        await qemu.say({"id": (await qemu.hear())["id"]})
        await qemu.until_left()

    async with session_with(neither) as session:
        with pytest.raises(QmpError, match="query-status: the answer is not QMP"):
            await session.execute("query-status")


# ---- the end ----


async def test_death_in_the_middle_of_commands_fails_them_all() -> None:
    async def die(qemu: ScriptedQemu) -> None:
        for _ in range(3):
            await qemu.hear()

    async with session_with(die) as session:
        commands = [session.execute("query-status") for _ in range(3)]
        outcomes = await asyncio.gather(*commands, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [QemuDiedError] * 3
        assert str(outcomes[0]).endswith("query-status: QEMU closed the connection")
        with pytest.raises(QemuDiedError, match="cont: QEMU closed the connection"):
            await session.execute("cont")


async def test_iteration_ends_after_the_last_event_of_a_qemu_that_died() -> None:
    async def die(qemu: ScriptedQemu) -> None:
        await qemu.event("STOP")
        await qemu.event("SHUTDOWN")

    async with session_with(die) as session:
        assert [event.name async for event in session.events()] == ["STOP", "SHUTDOWN"]
        assert [event.name async for event in session.events()] == []


async def test_waiting_for_an_event_of_a_qemu_that_died_fails() -> None:
    async def die(qemu: ScriptedQemu) -> None:
        await qemu.event("STOP")

    async with session_with(die) as session:
        with pytest.raises(QemuDiedError, match="waiting for RESUME: QEMU closed the connection"):
            await session.events().wait_for("RESUME", timeout_s=10)


async def test_a_listener_opened_after_death_has_ended() -> None:
    async with session_with(hangs_up) as session:
        assert [event async for event in session.events()] == []
        with session.listen("STOP") as stops:
            assert [event async for event in stops] == []


async def test_garbage_ends_a_session_and_is_no_death() -> None:
    async def garbage(qemu: ScriptedQemu) -> None:
        await qemu.hear()
        await qemu.say_bytes(b"\x00\xff{{{\r\n")
        await qemu.until_left()

    async with session_with(garbage) as session:
        with pytest.raises(QmpError, match="cont: what came is not QMP") as caught:
            await session.execute("cont")
        assert not isinstance(caught.value, QemuDiedError)


async def test_a_closed_session_says_so() -> None:
    async with session_with(ScriptedQemu.until_left) as session:
        await session.close()
        with pytest.raises(QmpError, match="cont: the session is closed"):
            await session.execute("cont")
        await session.close()


@pytest.mark.parametrize("replies", [True, False], ids=["with a reply", "without a reply"])
async def test_quit_is_done_when_qemu_goes(replies: bool) -> None:
    async def leave(qemu: ScriptedQemu) -> None:
        command = await qemu.hear()
        heard.append(command["execute"])
        if replies:
            await qemu.answer(command)

    heard: list[str] = []
    async with session_with(leave) as session:
        await session.quit(timeout_s=10)
        with pytest.raises(QmpError):
            await session.execute("query-status")
    assert heard == ["quit"]


# ---- events ----


async def test_an_event_keeps_its_time_and_its_data() -> None:
    async def tell(qemu: ScriptedQemu) -> None:
        await qemu.event("MIGRATION", status="active")
        await qemu.say({"event": "STOP", "timestamp": {"seconds": -1, "microseconds": -1}})
        await qemu.until_left()

    async with session_with(tell) as session:
        first = await session.events().get(timeout_s=10)
        second = await session.events().get(timeout_s=10)
    assert first == Event(name="MIGRATION", data={"status": "active"}, timestamp_us=5_000_007)
    assert second == Event(name="STOP", data={}, timestamp_us=0)


async def test_an_event_that_came_before_the_wait_is_not_lost() -> None:
    async def stop(qemu: ScriptedQemu) -> None:
        command = await qemu.hear()
        await qemu.event("STOP")
        await qemu.answer(command)
        await qemu.until_left()

    async with session_with(stop) as session:
        with session.listen("STOP") as stops, session.listen() as everything:
            await session.execute("stop")
            assert (await stops.get(timeout_s=10)).name == "STOP"
            assert (await everything.wait_for("STOP", timeout_s=10)).name == "STOP"
        assert (await session.events().get(timeout_s=10)).name == "STOP"


async def test_waiting_skips_what_the_predicate_refuses() -> None:
    async def tell(qemu: ScriptedQemu) -> None:
        for status in ("setup", "active", "completed"):
            await qemu.event("MIGRATION", status=status)
            await qemu.event("MIGRATION_PASS")
        await qemu.until_left()

    async with session_with(tell) as session:
        event = await session.events().wait_for(
            "MIGRATION", predicate=lambda event: event.data["status"] == "completed", timeout_s=10
        )
    assert event.data == {"status": "completed"}


async def test_an_event_that_does_not_come_is_a_time_out() -> None:
    async with session_with(ScriptedQemu.until_left) as session:
        with session.listen("STOP", "RESUME") as listener, pytest.raises(QmpTimeoutError) as caught:
            await listener.get(timeout_s=0.05)
    assert caught.value.message == "no RESUME or STOP within 0.05 s"


async def test_a_listener_hears_nothing_after_its_block() -> None:
    async with session_with(answers_all) as session:
        with session.listen("STOP") as stops:
            pass
        assert [event async for event in stops] == []


COUNT = 100_000


async def flood(qemu: ScriptedQemu) -> None:
    command = await qemu.hear()
    for first in range(0, COUNT, 1000):
        lines = [b'{"event": "E", "data": {"n": %d}}\r\n' % n for n in range(first, first + 1000)]
        await qemu.say_bytes(b"".join(lines))
    await qemu.answer(command)
    await qemu.until_left()


async def test_a_hundred_thousand_events_reach_a_reader_in_order() -> None:
    async with session_with(flood) as session:
        with session.listen("E", capacity=1024) as listener:
            command = asyncio.create_task(session.execute("query-status"))
            numbers = [(await listener.get(timeout_s=30)).data["n"] for _ in range(COUNT)]
            await command
        assert listener.dropped == 0
    assert numbers == list(range(COUNT))


async def test_a_listener_that_nobody_reads_keeps_the_newest_and_counts_the_rest() -> None:
    async with session_with(flood) as session:
        with session.listen("E", capacity=10) as few:
            await session.execute("query-status")
            assert few.dropped == COUNT - 10
            assert [(await few.get(timeout_s=10)).data["n"] for _ in range(10)] == list(range(COUNT - 10, COUNT))
        assert session.events().dropped == COUNT - session_module.EVENTS_KEPT


async def test_a_socket_that_was_handed_over_is_closed_with_the_session() -> None:
    ours, theirs = socket.socketpair()
    qemu = await ScriptedQemu.at(theirs)
    server = asyncio.create_task(greets(qemu))
    async with Session.connect(ours):
        pass
    await server
    assert ours.fileno() == -1
    qemu.hang_up()
