"""A process of its own that makes the index of a saved guest: ``operations.reading`` starts it, and says why.

It writes the index as one that is kept (``capture.kept``) into a file without a name, what does not stand in the input
into another, and one line of JSON into a pipe: whether it is all there.  Then it keeps a copy, where it shall.
"""

import gc
import json
import os
import sys
from typing import NoReturn

from qmigrate.errors import NoStreamError, RefusedError, StreamError

__all__ = ["make_index"]

KEPT_NOWHERE = "-"


def make_index(path: str, channels: list[str], *, index: int, spill: int, answer: int, folder: str) -> None:
    """Into these descriptors, which it closes.  ``folder``: where to keep it, empty for the user's cache."""
    from qmigrate.capture.kept import KeptIndexes, Stamp, write_kept
    from qmigrate.capture.migration import Migration
    from qmigrate.capture.saved import read_saved

    said: dict[str, str] = {}
    with Migration(path, channels=channels) as migration, open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor is wanted
        stamp = Stamp.of(file.fileno())
        try:
            saved = read_saved(migration, spill=os.fdopen(spill, "w+b"))
        except (StreamError, NoStreamError, RefusedError) as exc:
            said["error"] = str(exc)
        else:
            with saved:
                if Stamp.of(file.fileno()) != stamp:
                    said["error"] = "it was changed while it was read"
                else:
                    write_kept(saved, stamp, index, spilled=saved.index.spilled)
                os.write(answer, json.dumps(said).encode())
                os.close(answer)
                if not said and not saved.index.spilled and not channels and folder != KEPT_NOWHERE:
                    KeptIndexes(folder or None).keep(saved, stamp)
                return
    os.write(answer, json.dumps(said).encode())
    os.close(answer)


def main(argv: list[str]) -> NoReturn:
    gc.disable()  # to import so much makes much and frees nothing, and afterwards there is little to be freed
    index, spill, answer = map(int, argv[:3])
    folder, path, *channels = argv[3:]
    try:
        make_index(path, channels, index=index, spill=spill, answer=answer, folder=folder)
    except (OSError, MemoryError):  # no room, mostly: that it was not kept is no harm, and else the pipe has no answer
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
