"""What live events say, in words; for lines on a terminal and for a page alike.

QEMU's words and names in them are as they came: whoever shows them cleans them.
"""

import json

from qmigrate import events
from qmigrate.events import LiveEvent

__all__ = ["wording"]


def wording(event: LiveEvent) -> str:
    """What happened, without the side that it happened on.  Empty for numbers."""
    match event:
        case events.StatusChanged():
            return event.status
        case events.GuestChanged():
            return f"the guest {'runs' if event.running else 'stopped'}"
        case events.Decided():
            return f"{event.decision}: {event.reason}"
        case events.Recovering():
            limit = "" if event.limit is None else f" of {event.limit}"
            return f"recovery, attempt {event.attempt}{limit}, through {event.uri}"
        case events.Troubled():
            return event.message
        case events.CommandSent():
            return f"is told: {event.command} {json.dumps(dict(event.arguments))}"
        case events.PassBegan():
            return f"MIGRATION_PASS {event.number}"
        case events.QemuSaid():
            return f"{event.qemu_event} {json.dumps(dict(event.data))}"
        case events.SideFound():
            return f"QEMU {event.version or 'of unknown version'}, {event.run_state}, at {event.address}"
        case events.Began():
            return f"{event.operation}, through {event.uri}"
        case events.Finished():
            return f"{event.outcome}: {event.message}"
    return ""
