"""What the events of a stand-in destination say, in words; for lines on a terminal and for a page alike.

Names and reasons in them are as they came: whoever shows them cleans them.
"""

from typing import Final

from qmigrate import events
from qmigrate.events import LiveEvent
from qmigrate.report.units import plural, size
from qmigrate.report.wording import wording

__all__ = ["moment_words"]

_CHANNELS: Final = {
    "main": "the source has connected",
    "resumed": "the source resumes on a new connection",
    "multifd": "a multifd channel has come",
    "pages": "a channel for requested pages has come (preempt)",
}


def moment_words(event: LiveEvent) -> str:
    """What happened; empty for numbers."""
    match event:
        case events.Listening():
            return f"listening at {event.uri}; control socket {event.control}"
        case events.ChannelCame():
            return _CHANNELS.get(event.kind, event.kind)
        case events.BlocksCame():
            total = sum(length for _, length, _ in event.blocks)
            return f"{plural(len(event.blocks), 'block')} of RAM, {size(total)}"
        case events.Paused():
            return (
                f"the connection broke: {event.reason}. The guest's memory is kept here: have the source resume after "
                f"qmigrate receive --recover URI --control {event.control}"
            )
        case events.NotSaved():
            return (
                "this memory is the only copy of the guest. Save it elsewhere: qmigrate receive --save FILE --control "
                f"{event.control}"
            )
    return wording(event)
