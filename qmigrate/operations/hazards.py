"""What is known to kill a QEMU or to lose its guest, though the QEMU itself would accept it.

A feature is asked for; a bug can't be.  So here, and only here, releases are named: those in which it was seen.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qmigrate.events import Side

__all__ = ["Situation", "danger_of_another_resume", "hazards", "release_of"]

_NO_SOCKET: Final = ("exec:", "file:")


@dataclass(frozen=True)
class Situation:
    """What is about to be done.  Capabilities that will be on; releases as (major, minor).

    ``recovers``: where it breaks it is to be brought back.
    """

    uri: str
    capabilities: frozenset[str]
    releases: Mapping[Side, tuple[int, int]]
    guest_runs: bool
    block_devices: tuple[str, ...] = ()
    recovers: bool = False

    @property
    def postcopy(self) -> bool:
        return bool(self.capabilities & {"postcopy-ram", "x-postcopy-ram"})

    def has(self, *releases: tuple[int, int]) -> bool:
        return any(release in releases for release in self.releases.values())


def release_of(greeting: Mapping[str, Any]) -> tuple[int, int]:
    """Major and minor, from QMP's greeting; zeros where it has none."""
    version = greeting.get("version", {}).get("qemu", {})
    return version.get("major", 0), version.get("minor", 0)


def _multifd_with_postcopy(it: Situation) -> bool:
    return it.postcopy and "multifd" in it.capabilities and it.releases[Side.DESTINATION] == (7, 2)


def _multifd_with_preempt(it: Situation) -> bool:
    return {"multifd", "postcopy-preempt"} <= it.capabilities and it.has((7, 2))


def _multifd_brought_back(it: Situation) -> bool:
    wanted = it.recovers and it.postcopy and "multifd" in it.capabilities
    return wanted and it.releases[Side.SOURCE] == (5, 2)


def _bitmaps_with_postcopy(it: Situation) -> bool:
    return it.postcopy and "dirty-bitmaps" in it.capabilities and it.releases[Side.DESTINATION] in ((7, 2), (10, 0))


def _postcopy_without_a_socket(it: Situation) -> bool:
    return it.postcopy and it.uri.startswith(_NO_SOCKET)


def _postcopy_of_a_paused_guest(it: Situation) -> bool:
    return it.postcopy and not it.guest_runs


def _unnamed_block_migration(it: Situation) -> bool:
    return "block" in it.capabilities and "" in it.block_devices


_KNOWN: Final[tuple[tuple[Callable[[Situation], bool], str], ...]] = (
    (_multifd_with_postcopy, "multifd with postcopy: a destination of QEMU 7.2 aborts at the very end"),
    (_multifd_with_preempt, "multifd with preempt: QEMU 7.2 hangs in postcopy"),
    (
        _multifd_brought_back,
        "multifd with postcopy: from a source of QEMU 5.2 it never completes once it broke and was brought back",
    ),
    (
        _bitmaps_with_postcopy,
        "dirty-bitmaps with postcopy: a destination of QEMU 7.2 or 10.0 aborts when a bitmap is not sent at the switch",
    ),
    (_postcopy_without_a_socket, "postcopy needs a way back: through exec: or file: it never completes"),
    (
        _postcopy_of_a_paused_guest,
        "the guest is paused, and after postcopy it would run: that it was paused is not sent",
    ),
    (_unnamed_block_migration, "block migration of a -blockdev node sends no name: the destination refuses the stream"),
)


def hazards(situation: Situation) -> Iterator[str]:
    """What is known to go wrong here, one sentence each."""
    for applies, sentence in _KNOWN:
        if applies(situation):
            yield sentence


def danger_of_another_resume(source: tuple[int, int]) -> str:
    """What may come of resuming again after a resume that could not connect; empty if nothing bad."""
    if source == (5, 2):
        return "a source of QEMU 5.2 aborts when it resumes again after it could not connect once"
    return ""
