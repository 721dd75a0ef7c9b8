"""What the return direction of a connection has said so far: as much as tells whether a migration ended there.

Read beside ``format.return_path``, by lengths alone, for it is done while pages are waited for.
"""

from typing import Final

from qmigrate.format.return_path import MessageType

__all__ = ["WayBack"]

_HEADER: Final = 4
_WORD: Final = 8
_MOST_HELD: Final = 1 << 10  # bytes of a message that is not whole; a bitmap is not held

# migration/savevm.c: the first PING opens the return path; the others stand around the package and in it.
_FIRST_PING: Final = 1
_OF_POSTCOPY: Final = frozenset(
    {MessageType.REQ_PAGES_ID, MessageType.REQ_PAGES, MessageType.RECV_BITMAP, MessageType.RESUME_ACK}
)

_TLS_HANDSHAKE: Final = 22
_TLS_DATA: Final = 23
_TLS_TYPES: Final = range(20, 25)
_TLS_HEADER: Final = 5
# RFC 8446, RFC 5246: what encryption adds to the eight bytes of a PONG, which comes first, of RESUME_ACK and SHUT:
# type and tag; the tag alone (ChaCha20); nonce and tag.
_TLS_SHORT: Final = frozenset(_WORD + added for added in (17, 16, 24))
_TLS_ALERT: Final = 2 + 17  # since TLS 1.3 it looks like data


class WayBack:
    """Told the bytes as they come.

    Inside TLS only lengths are seen: a message as short as SHUT that stands last is taken for it, for where a
    postcopy breaks a request for a page stands there, which is longer.
    """

    def __init__(self) -> None:
        self.is_used = False
        """Did a message come?"""
        self.is_shut = False
        """Was the last one SHUT?"""
        self.is_postcopy = False
        """Did the destination speak of postcopy?"""
        self._held = bytearray()
        self._skip = 0
        self._is_tls: bool | None = None
        self._short = _TLS_SHORT
        self._is_known = True

    @property
    def is_broken(self) -> bool:
        """Had it come to a postcopy, and does it end without SHUT?  Then it may be resumed on another connection."""
        return self.is_postcopy and not self.is_shut

    def take(self, piece: bytes | memoryview) -> None:
        """More of it."""
        if not self._is_known:
            return
        skipped = min(self._skip, len(piece))
        self._skip -= skipped
        self._held += piece[skipped:]
        if self._is_tls is None and self._held:
            self._is_tls = self._held[0] == _TLS_HANDSHAKE
        at = 0
        while self._is_known and (length := (self._record if self._is_tls else self._message)(at)):
            at += length
        self._skip += max(at - len(self._held), 0)
        del self._held[:at]
        if len(self._held) > _MOST_HELD:
            self._is_known = False

    def _message(self, at: int) -> int:
        """How long the message is that begins there; 0 where that can't be told yet."""
        held = self._held
        if len(held) < at + _HEADER:
            return 0
        kind, length = int.from_bytes(held[at : at + 2]), int.from_bytes(held[at + 2 : at + _HEADER])
        if not MessageType.SHUT <= kind <= MessageType.SWITCHOVER_ACK or self.is_shut:
            self._is_known = self.is_shut = False  # no return path
            return 0
        end = at + _HEADER + length
        if len(held) < end:
            return 0
        if kind == MessageType.RECV_BITMAP:
            if len(held) < end + _WORD:
                return 0
            end += _WORD + int.from_bytes(held[end : end + _WORD]) + _WORD  # its size, the bitmap, the end mark
        self.is_used = True
        self.is_shut = kind == MessageType.SHUT
        if kind in _OF_POSTCOPY or (kind == MessageType.PONG and held[at + _HEADER : end] != _FIRST_PING.to_bytes(4)):
            self.is_postcopy = True
        return end - at

    def _record(self, at: int) -> int:
        """The same for a record of TLS.  The destination's part of the handshake has none as short as a message."""
        held = self._held
        if len(held) < at + _TLS_HEADER:
            return 0
        kind, length = held[at], int.from_bytes(held[at + 3 : at + _TLS_HEADER])
        if kind not in _TLS_TYPES:
            self._is_known = self.is_shut = False
            return 0
        if kind == _TLS_DATA and length != _TLS_ALERT:
            self.is_shut = length in self._short
            if self.is_shut:
                self.is_used, self._short = True, frozenset({length})
            else:
                self.is_postcopy = self.is_used
        return _TLS_HEADER + length
