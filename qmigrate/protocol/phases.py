"""Which command may come when: the one state table of a destination.

S8 of the postcopy design: ADVISE, (DISCARD,) LISTEN, RUNNING, END, each with its duties.  A command that a row does
not name is refused by name, with what could have come, and changes nothing.  LISTEN and RUN come inside the package
(S5), all others outside; PING may come in both.

PAUSED and RECOVERING are QEMU's postcopy-paused and postcopy-recover (since 3.0).

migration/savevm.c: loadvm_postcopy_handle_*(), migration/postcopy-ram.h: PostcopyState
"""

from collections.abc import Mapping
from enum import Enum
from typing import Final

from qmigrate.errors import SequenceError
from qmigrate.format.command import CommandNumber

__all__ = ["ANY_TIME", "INSIDE", "NEXT", "TURNS", "Fact", "Phase", "after", "allowed", "turned"]


class Phase(Enum):
    """Where a destination is."""

    PRECOPY = "precopy"
    ADVISED = "advised"
    DISCARDING = "discarding"
    LISTENING = "listening"
    RUNNING = "running"
    PAUSED = "paused"
    RECOVERING = "recovering"
    ENDED = "ended"
    FAILED = "failed"


class Fact(Enum):
    """What no command says: it is seen on the connection, or happens here."""

    ALL_LOADED = "all has been loaded"
    LINK_LOST = "the connection broke"
    LINK_CAME = "a new connection came"
    GAVE_UP = "it can't go on"


ADVISE, DISCARD, LISTEN, RUN, PACKAGED = (
    CommandNumber.POSTCOPY_ADVISE,
    CommandNumber.POSTCOPY_RAM_DISCARD,
    CommandNumber.POSTCOPY_LISTEN,
    CommandNumber.POSTCOPY_RUN,
    CommandNumber.PACKAGED,
)
BITMAP, RESUME = CommandNumber.RECV_BITMAP, CommandNumber.POSTCOPY_RESUME

# fmt: off
NEXT: Final[Mapping[Phase, Mapping[CommandNumber, Phase]]] = {
    Phase.PRECOPY:    {ADVISE:   Phase.ADVISED},
    Phase.ADVISED:    {DISCARD:  Phase.DISCARDING,
                       PACKAGED: Phase.ADVISED,
                       LISTEN:   Phase.LISTENING},     # nothing was dirty
    Phase.DISCARDING: {DISCARD:  Phase.DISCARDING,
                       PACKAGED: Phase.DISCARDING,
                       LISTEN:   Phase.LISTENING},
    Phase.LISTENING:  {RUN:      Phase.RUNNING},
    Phase.RUNNING:    {},
    Phase.PAUSED:     {},
    Phase.RECOVERING: {BITMAP:   Phase.RECOVERING,
                       RESUME:   Phase.RUNNING},
    Phase.ENDED:      {},
    Phase.FAILED:     {},
}

# All that a break before RUN takes with it is lost: a destination can only pause once the guest is its own.
TURNS: Final[Mapping[Phase, Mapping[Fact, Phase]]] = {
    Phase.PRECOPY:    {Fact.ALL_LOADED: Phase.ENDED,  Fact.LINK_LOST: Phase.FAILED, Fact.GAVE_UP: Phase.FAILED},
    Phase.ADVISED:    {Fact.ALL_LOADED: Phase.ENDED,  Fact.LINK_LOST: Phase.FAILED, Fact.GAVE_UP: Phase.FAILED},
    Phase.DISCARDING: {                               Fact.LINK_LOST: Phase.FAILED, Fact.GAVE_UP: Phase.FAILED},
    Phase.LISTENING:  {                               Fact.LINK_LOST: Phase.FAILED, Fact.GAVE_UP: Phase.FAILED},
    Phase.RUNNING:    {Fact.ALL_LOADED: Phase.ENDED,  Fact.LINK_LOST: Phase.PAUSED, Fact.GAVE_UP: Phase.FAILED},
    Phase.PAUSED:     {Fact.LINK_CAME:  Phase.RECOVERING,                           Fact.GAVE_UP: Phase.FAILED},
    Phase.RECOVERING: {                               Fact.LINK_LOST: Phase.PAUSED, Fact.GAVE_UP: Phase.FAILED},
    Phase.ENDED:      {},
    Phase.FAILED:     {},
}
# fmt: on

INSIDE: Final = frozenset({LISTEN, RUN})
"""Commands that come only inside a package; of the others in the table none does."""

ANY_TIME: Final = frozenset({CommandNumber.OPEN_RETURN_PATH, CommandNumber.PING, CommandNumber.SWITCHOVER_START})
"""They change no phase.  Only PING comes inside a package too."""

_OVER: Final = frozenset({Phase.ENDED, Phase.FAILED, Phase.PAUSED})  # there is nobody to say anything


def allowed(phase: Phase, *, inside: bool = False) -> frozenset[CommandNumber]:
    """What may come now, inside a package or outside."""
    named = frozenset(number for number in NEXT[phase] if (number in INSIDE) == inside)
    if phase in _OVER:
        return named
    return named | (frozenset({CommandNumber.PING}) if inside else ANY_TIME)


def after(phase: Phase, command: CommandNumber, *, inside: bool = False) -> Phase:
    """The phase in which this command leaves a destination.  Raises ``SequenceError``, and changes nothing."""
    possible = allowed(phase, inside=inside)
    if command not in possible:
        where = " inside a package" if inside else ""
        names = ", ".join(sorted(number.name for number in possible)) or "nothing"
        raise SequenceError(f"{command.name}{where} while {phase.name}; may come now: {names}")
    return NEXT[phase].get(command, phase)


def turned(phase: Phase, fact: Fact) -> Phase:
    """The phase in which this fact leaves a destination.  Raises ``SequenceError`` where it can't be."""
    if fact not in TURNS[phase]:
        raise SequenceError(f"{fact.value} while {phase.name}, which can't be")
    return TURNS[phase][fact]
