"""Migrations with servers that do what no QEMU at hand does: old names, words of the future, nonsense."""

import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from qmigrate import events
from qmigrate.errors import RefusedError
from qmigrate.events import LiveEvent, Side
from qmigrate.operations import course, ending, switchover, watch
from qmigrate.operations.migrate import migrate
from qmigrate.operations.plan import Plan
from qmigrate.operations.policy import AtOnce, IfStuck
from qmigrate.operations.result import MigrationResult, Outcome
from qmigrate.operations.whereabouts import Place
from qmigrate.qmp.session import Session
from tests.qmp.scripted import ScriptedQemu, session_with

pytestmark = pytest.mark.asyncio

SCHEMA = [
    {"name": "migrate", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
    {"name": "migrate-incoming", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
    {"name": "migrate-set-parameters", "meta-type": "command", "arg-type": "2", "ret-type": "0"},
    {"name": "2", "meta-type": "object", "members": [{"name": "max-bandwidth", "type": "int"}]},
    {"name": "int", "meta-type": "builtin", "json-type": "int"},
]
ARGUMENTS = [{"name": name, "type": "str"} for name in ("uri", "channels", "exit-on-error")]
PRECOPY = [("source", "setup"), ("destination", "active"), ("source", "active")]
END = [("destination", "RESUME"), ("destination", "completed"), ("source", "completed")]


class Story:
    """Two QEMUs and what happens between them once `migrate` (and `migrate-start-postcopy`) was told.

    The first ``withholds`` answers of each side are given when as many commands have come.  ``unknown``: arguments
    of `migrate` and `migrate-incoming` that both refuse, and that their schema has not.  ``answers_at_end``: the
    migration's status and the run state that a side answers with when it has said by an event that it is done.
    """

    def __init__(
        self,
        capabilities: Sequence[str],
        *,
        after_migrate: Sequence[tuple[str, str]],
        after_switch: Sequence[tuple[str, str]] = (),
        withholds: int = 0,
        unknown: Sequence[str] = (),
    ) -> None:
        self.capabilities = {side: dict.fromkeys(capabilities, False) for side in ("source", "destination")}
        self.after = {"migrate": after_migrate, "migrate-start-postcopy": after_switch}
        self.status = {"source": "none", "destination": "none"}
        self.run_state = {"source": "running", "destination": "inmigrate"}
        self.heard: list[tuple[str, str]] = []
        self.servers: dict[str, ScriptedQemu] = {}
        self.withholds = withholds
        self.unknown = unknown
        self.answers_at_end: dict[str, tuple[str, str]] = {}
        self.sent: list[dict[str, Any]] = []

    def script(self, side: str) -> Callable[[ScriptedQemu], Any]:
        async def play(qemu: ScriptedQemu) -> None:
            self.servers[side] = qemu
            withheld: list[dict[str, Any]] = []
            while True:
                try:
                    command = await qemu.hear()
                except (EOFError, ConnectionError):
                    return
                name, arguments = command["execute"], command.get("arguments", {})
                self.heard.append((side, name))
                if name in ("migrate", "migrate-incoming"):
                    self.sent.append(arguments)
                    if refused := [each for each in arguments if each in self.unknown]:
                        await qemu.refuse(command, f"Parameter '{refused[0]}' is unexpected")
                        continue
                withheld.append(command)
                if len(self.of(side)) < self.withholds:
                    continue
                for each in withheld:
                    await qemu.answer(each, self._answer(side, each["execute"], each.get("arguments", {})))
                withheld.clear()
                for happening in self.after.get(name, ()):
                    await self._happen(*happening)

        return play

    def of(self, side: str) -> list[str]:
        """What one side has heard."""
        return [name for each, name in self.heard if each == side]

    def _answer(self, side: str, name: str, arguments: dict[str, Any]) -> Any:
        if name == "query-qmp-schema":
            members = [each for each in ARGUMENTS if each["name"] not in self.unknown]
            return [*SCHEMA, {"name": "1", "meta-type": "object", "members": members}]
        if name == "query-status":
            return {"status": self.run_state[side], "running": self.run_state[side] == "running"}
        if name == "query-migrate":
            return {"status": self.status[side], "a-field-of-2031": {"x": [1]}}
        if name == "query-migrate-capabilities":
            return [{"capability": each, "state": state} for each, state in self.capabilities[side].items()]
        if name == "migrate-set-capabilities":
            self.capabilities[side] |= {each["capability"]: each["state"] for each in arguments["capabilities"]}
        return None

    async def _happen(self, side: str, what: str) -> None:
        server = self.servers[side]
        if what in ("STOP", "RESUME"):
            self.run_state[side] = "running" if what == "RESUME" else "postmigrate"
            await server.event(what)
        elif what == "HANG UP":
            server.hang_up()
        elif what == "NONSENSE":
            await server.say_bytes(b"}{ this is no JSON\r\n")
        elif what.isupper():
            await server.event(what, of=2031)
        else:
            self.status[side] = what
            if what == "completed":
                self.status[side], self.run_state[side] = self.answers_at_end.get(side, (what, self.run_state[side]))
            await server.event("MIGRATION", status=what)


@asynccontextmanager
async def sessions(story: Story) -> AsyncGenerator[tuple[Session, Session]]:
    async with AsyncExitStack() as stack:
        source, destination = [
            await stack.enter_async_context(session_with(story.script(side))) for side in ("source", "destination")
        ]
        yield source, destination


async def told(story: Story, plan: Plan) -> tuple[MigrationResult, list[LiveEvent]]:
    heard: list[LiveEvent] = []
    result: MigrationResult | RefusedError
    async with sessions(story) as both:
        try:
            result = await migrate(*both, plan, on_event=heard.append)
        except RefusedError as exc:  # raised in there it would come out as part of a group
            result = exc
    if isinstance(result, RefusedError):
        raise result
    return result, heard


async def test_a_qemu_that_knows_postcopy_by_its_old_name_only() -> None:
    story = Story(
        ["events", "x-postcopy-ram"],
        after_migrate=PRECOPY,
        after_switch=[("source", "postcopy-active"), ("source", "STOP"), ("destination", "postcopy-active"), *END],
    )
    result, _ = await told(story, Plan(uri="tcp:a:1", postcopy=[AtOnce()]))
    assert (result.message, result.exit_code) == ("migrated with postcopy", 0)
    assert story.capabilities["source"] == story.capabilities["destination"] == {"events": True, "x-postcopy-ram": True}


async def test_statuses_events_and_fields_that_nobody_knows_are_passed_on() -> None:
    future = [
        ("source", "preparing-2031"),
        ("source", "TELEPORT"),
        ("source", "STOP"),
        ("destination", "unpacking-2031"),
    ]
    result, heard = await told(Story(["events"], after_migrate=[*PRECOPY, *future, *END]), Plan(uri="tcp:a:1"))
    assert result.exit_code == 0
    statuses = [each.status for each in heard if isinstance(each, events.StatusChanged)]
    assert {"preparing-2031", "unpacking-2031"} < set(statuses)
    said = [each.plain() for each in heard if isinstance(each, events.QemuSaid)]
    assert [(each["qemu_event"], each["data"], each["side"]) for each in said] == [("TELEPORT", {"of": 2031}, "source")]
    assert result.statistics[Side.SOURCE]["a-field-of-2031"] == {"x": [1]}


async def test_a_qemu_without_postcopy_is_refused_with_what_it_has() -> None:
    story = Story(["events", "xbzrle"], after_migrate=())
    with pytest.raises(RefusedError, match="source: it has no capability postcopy-ram; it has events, xbzrle"):
        await told(story, Plan(uri="tcp:a:1", postcopy=[AtOnce()]))
    assert not [name for _, name in story.heard if not name.startswith("query-")]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not come to rest is not waited for, and the clock is looked at often; answers have their time."""
    monkeypatch.setattr(ending, "SETTLES_WITHIN_S", 0.1)
    monkeypatch.setattr(ending, "FOLLOWS_WITHIN_S", 0.1)
    monkeypatch.setattr(switchover, "LOOKS_EVERY_S", 0.05)


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked because time goes by, as it does on a slow machine."""
    monkeypatch.setattr(watch, "FIRST_POLL_S", 600.0)
    monkeypatch.setattr(watch, "LAST_POLL_S", 600.0)
    monkeypatch.setattr(watch.Watched.poll_soon, "__kwdefaults__", {"within_s": 600.0})


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("end", ["HANG UP", "NONSENSE"])
@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_connection_that_ends_or_talks_nonsense_is_one_clear_message(side: str, end: str) -> None:
    story = Story(["events"], after_migrate=[*PRECOPY, (side, end)])
    result, _ = await told(story, Plan(uri="tcp:a:1"))
    assert result.outcome is Outcome.FAILED
    words = "QEMU closed the connection" if end == "HANG UP" else "is not QMP"
    assert result.message.startswith(f"{side}, in precopy: ")
    assert words in result.message
    # These can't be connected to again.  The source, if it can be asked, still runs the guest.
    assert result.place is (Place.SOURCE if side == "destination" else Place.UNKNOWN)
    assert result.exit_code == (3 if side == "destination" else 7)


@pytest.mark.usefixtures("impatient")
async def test_a_migration_that_does_not_move_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it when it is told to cancel, and so long goes by that it should have answered."""
    story = Story(["events"], after_migrate=PRECOPY)

    def monotonic() -> float:
        return time.monotonic() + (1000 if "migrate_cancel" in story.of("source") else 0)

    monkeypatch.setattr(course, "time", SimpleNamespace(monotonic=monotonic))
    result, _ = await told(story, Plan(uri="tcp:a:1", stall_timeout_s=0.1))
    assert result.outcome is Outcome.FAILED
    assert "in precopy: nothing has moved for 0.1 s" in result.message


@pytest.mark.usefixtures("impatient")
async def test_precopy_that_takes_too_long_is_cancelled() -> None:
    story = Story(["events"], after_migrate=PRECOPY)
    story.after["migrate_cancel"] = [("source", "cancelling"), ("source", "cancelled")]
    result, _ = await told(story, Plan(uri="tcp:a:1", timeout_s=0.1))
    assert (result.outcome, result.exit_code) == (Outcome.CANCELLED, 3)
    assert result.message == "in precopy: not done after 0.1 s"


async def test_the_switch_is_told_once_and_nothing_else_is_repeated() -> None:
    story = Story(
        ["events", "postcopy-ram"],
        after_migrate=PRECOPY,
        after_switch=[("source", "postcopy-active"), ("destination", "postcopy-active"), *END],
    )
    await told(story, Plan(uri="tcp:a:1", postcopy=[AtOnce()]))
    commands = [each for each in story.heard if not each[1].startswith("query-")]
    both_set_up = [("destination", "migrate-set-capabilities"), ("source", "migrate-set-capabilities")]
    assert sorted(commands[:2]) == both_set_up  # both at once
    assert commands[2:] == [
        ("destination", "migrate-incoming"),
        ("source", "migrate"),
        ("source", "migrate-start-postcopy"),
    ]


async def test_the_questions_of_the_preparation_are_asked_once_and_without_waiting_for_answers_between() -> None:
    questions = ["query-migrate", "query-migrate-capabilities", "query-status"]
    story = Story(["events"], after_migrate=[*PRECOPY, *END], withholds=len(questions))
    await told(story, Plan(uri="tcp:a:1"))
    for side in ("source", "destination"):
        asked = story.of(side)
        assert sorted(asked[: asked.index("migrate-set-capabilities")]) == questions


ASKED = {"query-migrate-capabilities": 1, "query-migrate": 1, "query-status": 1}
LOOKED = {"query-migrate": 1, "query-status": 1}
SET_UP = {"migrate-set-capabilities": 1}
SCHEMA_TOO = {"query-qmp-schema": 1, "migrate-set-parameters": 1}
SWITCHED = [("source", "STOP"), ("source", "postcopy-active"), ("destination", "postcopy-active"), *END]


def sent(story: Story, side: str) -> Counter[str]:
    return Counter(story.of(side))


def added(*counts: dict[str, int]) -> Counter[str]:
    return sum(map(Counter, counts), Counter())


@pytest.mark.usefixtures("seldom")
@pytest.mark.parametrize(
    ("plan", "more"),
    [
        (Plan(uri="tcp:a:1"), {}),
        (Plan(uri="tcp:a:1", bandwidth=1 << 20), SCHEMA_TOO),
        (Plan(uri="tcp:a:1", postcopy=[AtOnce()]), {"migrate-start-postcopy": 1}),
    ],
)
async def test_no_more_commands_are_sent_than_this(plan: Plan, more: dict[str, int]) -> None:
    """Of a migration that is over at once.  A longer one is asked how far it is, seldom: scripts/bench_drive."""
    story = Story(
        ["events", "postcopy-ram"],
        after_migrate=PRECOPY if plan.postcopy else [*PRECOPY, ("source", "STOP"), *END],
        after_switch=SWITCHED,
    )
    result, _ = await told(story, plan)
    assert result.outcome is Outcome.COMPLETED
    assert result.statistics[Side.DESTINATION] == {"status": "completed"}
    assert sent(story, "source") == added(ASKED, SET_UP, {"migrate": 1}, more, {"query-migrate": 1})
    assert sent(story, "destination") == added(ASKED, SET_UP, {"migrate-incoming": 1})


class Stuck(Story):
    """Whenever its source has told how far it is, the next pass begins, with as much left: an eighth of a second."""

    def __init__(self, downtime_limit_ms: int) -> None:
        super().__init__(["events", "postcopy-ram"], after_migrate=PRECOPY, after_switch=SWITCHED)
        self.after["query-migrate"] = [("source", "PASS")]
        self.after["migrate_cancel"] = [("source", "cancelled")]
        self.downtime_limit_ms = downtime_limit_ms
        self.passes = 0

    def _answer(self, side: str, name: str, arguments: dict[str, Any]) -> Any:
        if name == "query-migrate-parameters":
            return {"downtime-limit": self.downtime_limit_ms}
        if name == "query-migrate" and self.status["source"] == "active":
            ram = {"remaining": 2 << 20, "mbps": 134.2, "normal": 512 * self.passes, "page-size": 4096}
            return {"status": self.status[side], "ram": ram}
        return super()._answer(side, name, arguments)

    async def _happen(self, side: str, what: str) -> None:
        if what != "PASS":
            await super()._happen(side, what)
        elif self.status["source"] == "active":
            self.passes += 1
            await self.servers["source"].event("MIGRATION_PASS", **{"pass": self.passes})


@pytest.mark.parametrize("downtime_limit_ms", [124, 126])
async def test_precopy_is_stuck_when_what_is_left_takes_longer_than_the_source_may_stop(downtime_limit_ms: int) -> None:
    story = Stuck(downtime_limit_ms)
    is_stuck = downtime_limit_ms == 124
    result, _ = await told(story, Plan(uri="tcp:a:1", postcopy=[IfStuck()], timeout_s=60.0 if is_stuck else 0.5))
    assert result.switched is is_stuck, result.message
    assert sent(story, "source")["query-migrate-parameters"] == 1


@pytest.mark.usefixtures("seldom")
@pytest.mark.parametrize(
    ("plan", "on"),
    [
        (Plan(uri="tcp:a:1", postcopy=[AtOnce()], blocktime=True), False),
        (Plan(uri="tcp:a:1", postcopy=[AtOnce()], closely=True), False),
        (Plan(uri="tcp:a:1", postcopy=[AtOnce()]), True),
    ],
)
async def test_a_destination_that_measured_is_asked_what(plan: Plan, on: bool) -> None:
    story = Story(["events", "postcopy-ram", "postcopy-blocktime"], after_migrate=PRECOPY, after_switch=SWITCHED)
    story.capabilities["destination"]["postcopy-blocktime"] = on
    result, _ = await told(story, plan)
    assert result.statistics[Side.DESTINATION] == {"status": "completed", "a-field-of-2031": {"x": [1]}}
    assert sent(story, "destination") == added(ASKED, SET_UP, {"migrate-incoming": 1}, {"query-migrate": 1})


@pytest.mark.parametrize("unheard", [("source", "STOP"), ("destination", "RESUME")])
async def test_where_events_leave_anything_open_both_are_asked(unheard: tuple[str, str]) -> None:
    """As of a guest that was paused: nothing is said of a guest that neither stops nor goes on."""
    happenings = [each for each in (("source", "STOP"), *END) if each != unheard]
    story = Story(["events"], after_migrate=[*PRECOPY, *happenings])
    if unheard == ("source", "STOP"):
        story.run_state["source"] = "paused"
    else:
        story.answers_at_end["destination"] = ("completed", "paused")
    result, _ = await told(story, Plan(uri="tcp:a:1"))
    assert (result.outcome, result.place) == (Outcome.COMPLETED, Place.DESTINATION)
    assert result.guest.running is (unheard[0] == "source")
    for side in ("source", "destination"):
        assert sent(story, side) >= added(ASKED, LOOKED)


async def test_a_source_that_says_something_else_at_the_last_look_is_believed() -> None:
    story = Story(["events"], after_migrate=[*PRECOPY, ("source", "STOP"), *END])
    story.answers_at_end["source"] = ("failed", "running")
    result, _ = await told(story, Plan(uri="tcp:a:1"))
    assert (result.outcome, result.place) == (Outcome.FAILED, Place.BOTH)


@pytest.mark.parametrize(
    ("unknown", "incoming", "outgoing"),
    [
        ([], [{"uri", "exit-on-error"}], [{"uri"}]),
        (["exit-on-error"], [{"uri", "exit-on-error"}, {"uri"}], [{"uri"}]),
        (["uri"], [{"uri", "exit-on-error"}, {"channels", "exit-on-error"}], [{"uri"}, {"channels"}]),
        (
            ["uri", "exit-on-error"],
            [{"uri", "exit-on-error"}, {"exit-on-error", "channels"}, {"channels"}],
            [{"uri"}, {"channels"}],
        ),
    ],
)
async def test_what_a_qemu_does_not_know_is_left_out_or_said_otherwise(
    unknown: list[str], incoming: list[set[str]], outgoing: list[set[str]]
) -> None:
    """The schema is asked only of one that takes no `uri`: no QEMU yet."""
    story = Story(["events"], after_migrate=[*PRECOPY, ("source", "STOP"), *END], unknown=unknown)
    result, _ = await told(story, Plan(uri="tcp:a:1"))
    assert result.outcome is Outcome.COMPLETED
    assert [set(each) for each in story.sent] == [*incoming, *outgoing]
    asked = [name for _, name in story.heard if name == "query-qmp-schema"]
    assert len(asked) == (2 if "uri" in unknown else 0)


async def test_a_qemu_that_can_be_told_neither_way_is_refused_in_its_own_words() -> None:
    story = Story(["events"], after_migrate=(), unknown=["uri", "channels"])
    with pytest.raises(RefusedError, match="destination: migrate-incoming: Parameter 'uri' is unexpected"):
        await told(story, Plan(uri="tcp:a:1"))
