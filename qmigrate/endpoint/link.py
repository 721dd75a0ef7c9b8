"""Messages between the processes of one destination: JSON, with file descriptors.

Only our own processes speak here; what of a hostile stream goes through (names) is text in a message.
"""

import json
import os
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

__all__ = ["Link", "LinkClosedError", "NoDescriptorError", "Said", "end_with_parent"]

_HEAD: Final = struct.Struct("=II")  # bytes of JSON, descriptors
_AT_ONCE: Final = 200  # descriptors in one message: the kernel takes 253


class LinkClosedError(Exception):
    """The other process has gone: there is nobody to tell."""


class NoDescriptorError(Exception):
    """Descriptors came and could not be taken, as too many files are open: they are lost."""


@dataclass(frozen=True)
class Said:
    """One message; ``descriptors`` belong to whoever received it."""

    kind: str
    values: dict[str, Any]
    descriptors: list[int] = field(default_factory=list)


class Link:
    """One end.  Takes over ``peer``, which blocks.  Several threads may tell, one hears."""

    def __init__(self, peer: socket.socket) -> None:
        self.peer = peer
        self._telling = threading.Lock()

    @classmethod
    def inherited(cls, descriptor: int) -> "Link":
        """The end that our parent has opened for us."""
        return cls(socket.socket(fileno=descriptor))

    def fileno(self) -> int:
        return self.peer.fileno()

    def close(self) -> None:
        self.peer.close()

    def tell(self, kind: str, *, descriptors: Sequence[int] = (), **values: Any) -> None:
        """Send one; the descriptors stay ours too.  Raises ``LinkClosedError``."""
        text = json.dumps([kind, values]).encode("ascii")
        try:
            with self._telling:
                self.peer.sendall(_HEAD.pack(len(text), len(descriptors)) + text)
                for first in range(0, len(descriptors), _AT_ONCE):
                    socket.send_fds(self.peer, [b"."], list(descriptors[first : first + _AT_ONCE]))
        except OSError as exc:
            raise LinkClosedError from exc

    def hear(self) -> Said:
        """The next one; waits for it.  Raises ``LinkClosedError``, ``NoDescriptorError``."""
        length, count = _HEAD.unpack(self._read(_HEAD.size))
        kind, values = json.loads(self._read(length))
        descriptors: list[int] = []
        while len(descriptors) < count:
            descriptors += self._descriptors(min(_AT_ONCE, count - len(descriptors)))
        return Said(kind, values, descriptors)

    def expect(self, *kinds: str) -> Said:
        """The next one, which must be of these."""
        said = self.hear()
        assert said.kind in kinds, f"{said.kind} came, expected {kinds}"
        return said

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                part = self.peer.recv(length - len(data))
            except OSError as exc:
                raise LinkClosedError from exc
            if not part:
                raise LinkClosedError
            data += part
        return bytes(data)

    def _descriptors(self, count: int) -> list[int]:
        data, descriptors, _, _ = socket.recv_fds(self.peer, 1, count)
        if not data:
            raise LinkClosedError
        if len(descriptors) < count:
            for descriptor in descriptors:
                os.close(descriptor)
            raise NoDescriptorError
        return list(descriptors)


def end_with_parent(lifeline: int) -> None:
    """End this process at once when the parent has closed its end of the pipe, however it ended.

    A thread waits for that; it runs only then.
    """

    def wait() -> NoReturn:
        while os.read(lifeline, 1):
            pass
        os._exit(0)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
