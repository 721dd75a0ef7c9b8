"""A plan becomes what each side is told, or is refused with what that QEMU has."""

from typing import Any

import pytest

from qmigrate.errors import RefusedError
from qmigrate.events import Side
from qmigrate.operations.hazards import Situation, hazards
from qmigrate.operations.plan import Plan, settle
from qmigrate.operations.policy import AtOnce
from qmigrate.qmp.features import Features, Schema

CAPABILITIES = ["events", "postcopy-ram", "multifd", "xbzrle", "pause-before-switchover", "auto-converge"]


def schema(*, migrate: tuple[str, ...] = ("uri",)) -> Schema:
    """As QEMU answers: types by number, arguments as members of an object."""
    members = [
        ("max-bandwidth", "int"),
        ("multifd-channels", "int"),
        ("multifd-compression", "7"),
        ("tls-creds", "str"),
    ]
    members += [("downtime-limit", "int"), ("x-flag", "bool"), ("max-postcopy-bandwidth", "int")]
    return Schema(
        [
            {"name": "migrate-set-parameters", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
            {"name": "1", "meta-type": "object", "members": [{"name": name, "type": kind} for name, kind in members]},
            {"name": "migrate", "meta-type": "command", "arg-type": "2", "ret-type": "0"},
            {"name": "2", "meta-type": "object", "members": [{"name": name, "type": "str"} for name in migrate]},
            {"name": "int", "meta-type": "builtin", "json-type": "int"},
            {"name": "str", "meta-type": "builtin", "json-type": "string"},
            {"name": "bool", "meta-type": "builtin", "json-type": "boolean"},
            {"name": "7", "meta-type": "enum", "values": ["none", "zlib"]},
            {"name": "8", "meta-type": "enum", "values": ["none", "postcopy-active", "cancelling", "of-2031"]},
        ]
    )


def features(*capabilities: str, on: tuple[str, ...] = ()) -> Features:
    return Features(schema(), {name: name in on for name in capabilities or CAPABILITIES})


def settled(plan: Plan, source: Features | None = None, destination: Features | None = None) -> tuple[Any, Any]:
    found = settle(plan, {Side.SOURCE: source or features(), Side.DESTINATION: destination or features()})
    return found[Side.SOURCE], found[Side.DESTINATION]


def test_a_plain_plan_wants_events_only() -> None:
    source, destination = settled(Plan())
    assert source.capabilities == destination.capabilities == {"events": True}
    assert source.parameters == destination.parameters == {}


def test_what_is_so_already_is_not_told_again() -> None:
    source, _ = settled(Plan(), features(*CAPABILITIES, on=("events",)))
    assert source.capabilities == {}


def test_what_an_earlier_migration_left_on_is_turned_off() -> None:
    source, _ = settled(Plan(), features(*CAPABILITIES, on=("events", "postcopy-ram", "auto-converge")))
    assert source.capabilities == {"postcopy-ram": False}


def test_postcopy_is_for_both_and_by_the_name_that_each_has() -> None:
    old = features("events", "x-postcopy-ram")
    source, destination = settled(Plan(postcopy=[AtOnce()]), old, features())
    assert source.capabilities == {"events": True, "x-postcopy-ram": True}
    assert destination.capabilities == {"events": True, "postcopy-ram": True}


def test_xbzrle_is_for_the_source() -> None:
    source, destination = settled(Plan(xbzrle=True))
    assert source.capabilities["xbzrle"]
    assert "xbzrle" not in destination.capabilities


def test_a_capability_that_one_side_lacks_is_refused_with_what_it_has() -> None:
    with pytest.raises(RefusedError, match=r"^source: it has no capability postcopy-preempt; it has auto-converge, ev"):
        settled(Plan(preempt=True, postcopy=[AtOnce()]))
    with pytest.raises(RefusedError, match=r"^destination: it has no capability multifd; it has events$"):
        settled(Plan(multifd=2), None, features("events"))


def test_a_capability_that_is_not_there_may_be_turned_off() -> None:
    source, _ = settled(Plan(capabilities={"compress": False}))
    assert "compress" not in source.capabilities


def test_a_parameter_that_is_not_there_is_refused_with_what_there_is() -> None:
    with pytest.raises(RefusedError, match=r"^source: it has no parameter x-of-2031; it has downtime-limit, max-band"):
        settled(Plan(parameters={"x-of-2031": "1"}))


def test_a_value_that_is_not_there_is_refused_with_what_there_is() -> None:
    with pytest.raises(RefusedError, match="its parameter multifd-compression can't be zstd; it can be none, zlib"):
        settled(Plan(multifd=2, compression="zstd"))


def test_compression_goes_with_multifd() -> None:
    with pytest.raises(RefusedError, match="goes with --multifd"):
        settled(Plan(compression="zlib"))


def test_values_get_the_type_that_qemu_wants() -> None:
    plan = Plan(parameters={"max-bandwidth": "0x10", "x-flag": "on", "tls-creds": "tls0"})
    source, _ = settled(plan)
    assert source.parameters == {"max-bandwidth": 16, "x-flag": True, "tls-creds": "tls0"}
    with pytest.raises(RefusedError, match="max-bandwidth is a number, not fast"):
        settled(Plan(parameters={"max-bandwidth": "fast"}))
    with pytest.raises(RefusedError, match="x-flag is on or off, not perhaps"):
        settled(Plan(parameters={"x-flag": "perhaps"}))


def test_a_side_may_be_named() -> None:
    plan = Plan(bandwidth=5, parameters={"destination:max-bandwidth": 7}, capabilities={"source:auto-converge": True})
    source, destination = settled(plan)
    assert (source.parameters, destination.parameters) == ({"max-bandwidth": 5}, {"max-bandwidth": 7})
    assert source.capabilities["auto-converge"]
    assert "auto-converge" not in destination.capabilities
    with pytest.raises(RefusedError, match="'middle:x' is of no side"):
        settled(Plan(parameters={"middle:x": 1}))


def test_credentials_may_be_called_otherwise_on_the_destination() -> None:
    source, destination = settled(Plan(tls_creds="a", destination_tls_creds="b"))
    assert (source.parameters, destination.parameters) == ({"tls-creds": "a"}, {"tls-creds": "b"})


@pytest.mark.parametrize(
    ("arguments", "uri", "said"),
    [
        (("uri",), "tcp:a:1", {"uri": "tcp:a:1"}),
        (("uri", "channels"), "tcp:a:1", {"uri": "tcp:a:1"}),
        (
            ("channels",),
            "tcp:[::1]:1",
            {
                "channels": [
                    {
                        "channel-type": "main",
                        "addr": {"transport": "socket", "type": "inet", "host": "::1", "port": "1"},
                    }
                ]
            },
        ),
        (
            ("channels",),
            "unix:/a",
            {"channels": [{"channel-type": "main", "addr": {"transport": "socket", "type": "unix", "path": "/a"}}]},
        ),
    ],
)
def test_where_is_said_as_this_qemu_wants_it(arguments: tuple[str, ...], uri: str, said: dict[str, Any]) -> None:
    assert schema(migrate=arguments).place("migrate", uri) == said


def test_statuses_are_found_in_the_schema() -> None:
    assert features().statuses == {"none", "postcopy-active", "cancelling", "of-2031"}


def situation(
    *capabilities: str,
    source: tuple[int, int] = (11, 1),
    destination: tuple[int, int] = (11, 1),
    uri: str = "tcp:a:1",
    guest_runs: bool = True,
    recovers: bool = False,
) -> Situation:
    releases = {Side.SOURCE: source, Side.DESTINATION: destination}
    return Situation(uri, frozenset(capabilities), releases, guest_runs, ("disk", ""), recovers)


@pytest.mark.parametrize(
    ("dangerous", "sentence"),
    [
        (situation("multifd", "postcopy-ram", destination=(7, 2)), "aborts at the very end"),
        (situation("multifd", "postcopy-ram", "postcopy-preempt", source=(7, 2)), "hangs in postcopy"),
        (situation("multifd", "postcopy-ram", source=(5, 2), recovers=True), "never completes once it broke"),
        (situation("dirty-bitmaps", "postcopy-ram", destination=(10, 0)), "when a bitmap is not sent"),
        (situation("postcopy-ram", uri="exec:cat"), "never completes"),
        (situation("x-postcopy-ram", guest_runs=False), "after postcopy it would run"),
        (situation("block", source=(7, 2), destination=(7, 2)), "sends no name"),
    ],
)
def test_what_is_known_to_end_badly_is_named(dangerous: Situation, sentence: str) -> None:
    assert [each for each in hazards(dangerous) if sentence in each]


@pytest.mark.parametrize(
    "harmless",
    [
        situation(),
        situation("multifd", "postcopy-ram"),
        situation("multifd", "postcopy-ram", source=(7, 2)),
        situation("multifd", destination=(7, 2)),
        situation("multifd", "postcopy-ram", source=(5, 2)),
        situation("multifd", source=(5, 2), recovers=True),
        situation("dirty-bitmaps", "postcopy-ram"),
        situation(uri="exec:cat", guest_runs=False),
        situation("postcopy-ram", "postcopy-preempt", source=(7, 2), destination=(7, 2)),
    ],
)
def test_what_works_is_not_refused(harmless: Situation) -> None:
    assert list(hazards(harmless)) == []
