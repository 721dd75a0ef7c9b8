"""Where the guest is, from what both sides say: row by row, and over all that they can say."""

import itertools
from typing import Any

import pytest

from qmigrate.operations.whereabouts import EXIT_CODES, Place, Reach, View, locate

STATUSES = ["none", "active", "postcopy-active", "postcopy-paused", "completed", "failed", "cancelled", "of-2031"]


def says(run_state: str, status: str) -> View:
    return View(Reach.ANSWERS, run_state=run_state, running=run_state == "running", status=status)


DEAD = View(Reach.DEAD, error="killed")
SILENT = View(Reach.SILENT, error="no answer")
UNREACHABLE = View(Reach.UNREACHABLE, error="connection closed")
WAITS = says("inmigrate", "active")


@pytest.mark.parametrize(
    ("source", "destination", "place"),
    [
        # precopy
        (says("running", "active"), WAITS, Place.SOURCE),
        (says("running", "failed"), DEAD, Place.SOURCE),
        (says("running", "cancelled"), says("inmigrate", "failed"), Place.SOURCE),
        (says("running", "active"), SILENT, Place.SOURCE),
        (says("paused", "cancelled"), WAITS, Place.SOURCE),
        (says("postmigrate", "completed"), says("running", "completed"), Place.DESTINATION),
        (says("postmigrate", "completed"), says("paused", "completed"), Place.DESTINATION),
        (DEAD, says("running", "completed"), Place.DESTINATION),
        (says("postmigrate", "completed"), says("inmigrate", "failed"), Place.SOURCE),
        (says("postmigrate", "completed"), DEAD, Place.SOURCE),
        (says("postmigrate", "completed"), SILENT, Place.UNKNOWN),
        (DEAD, says("inmigrate", "failed"), Place.LOST),
        (DEAD, DEAD, Place.LOST),
        (DEAD, SILENT, Place.UNKNOWN),
        (SILENT, WAITS, Place.UNKNOWN),
        (SILENT, SILENT, Place.UNKNOWN),
        # postcopy
        (says("finish-migrate", "postcopy-active"), says("running", "postcopy-active"), Place.DESTINATION),
        (says("finish-migrate", "postcopy-paused"), says("running", "postcopy-paused"), Place.PAUSED),
        (says("finish-migrate", "postcopy-active"), says("running", "postcopy-paused"), Place.PAUSED),
        (says("finish-migrate", "postcopy-paused"), says("running", "postcopy-active"), Place.PAUSED),
        (DEAD, says("running", "postcopy-paused"), Place.LOST),
        (DEAD, says("running", "setup"), Place.LOST),
        (DEAD, says("running", "active"), Place.LOST),
        (DEAD, says("running", "failed"), Place.LOST),
        (says("postmigrate", "active"), says("running", "active"), Place.DESTINATION),
        (SILENT, says("running", "postcopy-active"), Place.DESTINATION),
        (says("finish-migrate", "postcopy-paused"), DEAD, Place.LOST),
        (says("finish-migrate", "postcopy-active"), SILENT, Place.UNKNOWN),
        (says("finish-migrate", "postcopy-paused"), SILENT, Place.PAUSED),
        (says("finish-migrate", "postcopy-paused"), UNREACHABLE, Place.UNKNOWN),
        (says("postmigrate", "postcopy-active"), says("inmigrate", "failed"), Place.LOST),
        (says("postmigrate", "failed"), says("running", "postcopy-paused"), Place.LOST),
        # hazard 2: the source went back to running it
        (says("running", "failed"), says("running", "postcopy-paused"), Place.BOTH),
    ],
)
def test_row_by_row(source: View, destination: View, place: Place) -> None:
    found = locate(source, destination)
    assert found.place is place
    assert found.sentence.endswith(".")


ALL = [
    DEAD,
    SILENT,
    UNREACHABLE,
    *(says(run, status) for run in ("running", "paused", "inmigrate") for status in STATUSES),
]


@pytest.mark.parametrize(("source", "destination"), list(itertools.product(ALL, ALL)))
def test_nothing_is_claimed_that_nobody_said(source: View, destination: View) -> None:
    found = locate(source, destination)
    assert found.place in EXIT_CODES
    if source.running and destination.running:
        assert found.place is Place.BOTH
    elif source.running:
        assert found.place is Place.SOURCE
    if found.place is Place.LOST:
        assert not source.running
        assert not (source.answers and source.status in ("none", "active", "cancelled") and not destination.took_over)
    if found.place is Place.DESTINATION:
        assert destination.took_over
    if found.running and found.place is Place.SOURCE:
        assert source.running
    if not source.answers and not destination.answers:
        assert found.place in (Place.LOST, Place.UNKNOWN)


def test_nobody_is_told_to_cancel_a_postcopy() -> None:
    told = [source for source, there in itertools.product(ALL, ALL) if "cancel" in locate(source, there).advice]
    assert {source.status for source in told} == {"active", "of-2031"}
    assert locate(says("running", "postcopy-active"), WAITS).sentence.endswith("about to leave it (postcopy-active).")


@pytest.mark.parametrize(
    ("run_state", "status", "info", "is_destination"),
    [
        ("inmigrate", "none", {}, True),
        ("inmigrate", "active", {"socket-address": []}, True),
        ("running", "postcopy-active", {"socket-address": []}, True),
        ("running", "postcopy-paused", {"socket-address": []}, True),
        # 5.2 tells where it once listened for ever, also when it is a source next.
        ("running", "completed", {"socket-address": []}, False),
        ("finish-migrate", "postcopy-paused", {"socket-address": [], "ram": {}}, False),
        ("finish-migrate", "postcopy-paused", {"ram": {}}, False),
        ("running", "none", {}, False),
    ],
)
def test_a_destination_is_known_by_what_it_says(
    run_state: str, status: str, info: dict[str, Any], is_destination: bool
) -> None:
    assert View(Reach.ANSWERS, run_state, run_state == "running", status, info=info).receives == is_destination
