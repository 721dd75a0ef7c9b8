"""What a command ends with.  Of one that moves a guest the code says where that is.

1 is not used by those: elsewhere it says that the answer is no, or that the input is damaged.
"""

from typing import Final

DONE: Final = 0
AT_SOURCE: Final = 3
"""The guest is where it was: on the source, or in its file."""
AT_DESTINATION: Final = 4
"""It runs there, though something failed."""
PAUSED: Final = 5
"""Its memory is on both sides; it can be recovered."""
LOST: Final = 6
UNKNOWN: Final = 7
"""Or it runs on both sides."""
INTERRUPTED: Final = 130
"""128 + SIGINT, as a shell reports it."""
BROKEN_PIPE: Final = 141
"""128 + SIGPIPE: what a tool that does not catch it ends with."""
