"""When a pause could lose the guest."""

from qmigrate.operations import attached
from qmigrate.operations.whereabouts import INCOMING


def test_the_race_of_too_early_a_pause() -> None:
    new = frozenset({"postcopy-active", "postcopy-device"})
    old = frozenset({"postcopy-active"})
    assert attached.race("postcopy-active", old, 100, "running") == ""
    assert attached.race("postcopy-active", old, 100, INCOMING) == "the destination has not taken over yet"
    assert "give the destination's address" in attached.race("postcopy-active", old, 100, None)
    assert "give the destination's address" in attached.race("postcopy-active", new, 0, None)
    assert attached.race("postcopy-active", new, 1, None) == ""
    assert "has not taken over" in attached.race("postcopy-device", new, 100, "running")


def test_the_race_of_too_late_a_pause() -> None:
    """Seen with 11.1 and huge pages: the source failed and ran its guest, which ran on the destination."""
    for statuses in (frozenset({"postcopy-active", "postcopy-device"}), frozenset({"postcopy-active"})):
        assert attached.race("postcopy-active", statuses, 100, "running", 4096) == ""
        assert attached.race("postcopy-active", statuses, 100, "running", 0).startswith("all has been sent: ")
