"""qmigrate opens up QEMU live migration.

``open()`` dissects a migration stream: its sections, RAM blocks, devices and commands, every byte named.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmigrate.capture.migration import Migration

__all__ = ["__version__", "open"]
__version__ = "0.1.0"


def open(path: str | os.PathLike[str], **options: Any) -> "Migration":
    """The migration stream in a file (or ``-``, standard input): ``with qmigrate.open(path) as migration``.

    ``options`` are those of ``capture.migration.Migration``.  Raises ``OSError`` where the input can't be
    opened, ``NoStreamError`` where it is a directory; a fault in the stream is found in its ``errors``.
    """
    from qmigrate.capture.migration import (
        Migration,
    )

    return Migration(path, **options)
