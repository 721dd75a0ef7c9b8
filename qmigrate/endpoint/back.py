"""The return path as three processes write it: S1's one lock around each message.

The lock is a POSIX record lock, which is a process's own and ends with it: one that dies in the middle does not keep
the others waiting.  Only one thread of each process writes.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from qmigrate.capture.owner import Owner

__all__ = ["ReturnPath", "new_lock"]

SEND_TIMEOUT_S: Final = 30.0  # a source that does not read what it is told holds nobody for ever


def new_lock() -> int:
    """A descriptor whose lock all who are handed it share."""
    return os.memfd_create("qmigrate-return-path-lock", os.MFD_CLOEXEC)


class ReturnPath(Owner):
    """The way back of one connection.  Closes its own copies of both descriptors."""

    def __init__(self, descriptor: int, lock: int) -> None:
        self._descriptor = os.dup(descriptor)
        self._lock = os.dup(lock)
        self.is_stuck = False
        """Nobody has read it for ``SEND_TIMEOUT_S``."""

    def send(self, data: bytes) -> bool:
        """All of one message, or several; False where nobody hears it any more.

        A source that does not read it breaks the connection: half a message may have been written, and each further
        one would wait as long again.
        """
        try:
            with self._locked():
                while data:
                    data = data[os.write(self._descriptor, data) :]
        except BlockingIOError:
            self.is_stuck = True
            self._break()
            return False
        except OSError:
            return False
        return True

    def _break(self) -> None:
        """Whoever reads from it finds it ended."""
        with suppress(OSError), socket.socket(fileno=os.dup(self._descriptor)) as peer:
            peer.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._descriptor)
        os.close(self._lock)


def limit_sending(peer: socket.socket) -> None:
    """No write to this socket waits longer than ``SEND_TIMEOUT_S``."""
    import struct

    seconds, fraction = divmod(SEND_TIMEOUT_S, 1)
    waits = struct.pack("ll", int(seconds), int(fraction * 1_000_000))
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, waits)
