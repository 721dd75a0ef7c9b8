"""Two sockets joined: what comes from one goes to the other, and is recorded on its way.

A thread for each direction, which blocks where its peer does not take more: so the pressure that holds a fast
source back is kept, and we hold no more than one piece.  Forward, where the pages go, bytes stay inside the kernel:
from the socket into a pipe, from there into the file, then on into the other socket.  Where the file is mapped they
are copied into it before, out of the socket, which keeps them: out of a pipe it is page by page, and costs more.

Who closes what is as QEMU needs it.  A source that ends has said all: the destination is told, and may still answer
(SHUT).  A destination that ends has died, or was satisfied: then both are closed, for a source that has no
return path to read would not notice before it is stuck with full buffers.
"""

import ctypes
import errno
import fcntl
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from qmigrate.capture.frames import LONGEST_PIECE, Direction
from qmigrate.capture.recorder import Recorder
from qmigrate.endpoint.way_back import WayBack
from qmigrate.format.channel import Channel, classify
from qmigrate.format.feed import Feed

__all__ = ["Joined"]

_BACK_PIECE: Final = 1 << 16
_HEAD: Final = 512  # bytes that are looked at to tell what it is
_SNDBUFFORCE: Final = 32  # SO_SNDBUFFORCE of asm-generic/socket.h, which Python lacks
_ON_ITS_WAY: Final = 1 << 20  # bytes
_WORTH_WAITING: Final = 1 << 15  # bytes: less is a page that somebody waits for
_LONG_NS: Final = 1_000_000  # a source fills its socket in a tenth of that
_UNTIL_NEXT_TRY: Final = 1000  # pieces
_NO_WAIT: Final = os.SPLICE_F_NONBLOCK  # of the pipe: tcp would wait all the same
_PEEK: Final = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
_yield = ctypes.CDLL(None).sched_yield  # that of os keeps the interpreter's lock, in Python 3.11
_tee = ctypes.CDLL(None, use_errno=True).tee
_tee.restype = ctypes.c_ssize_t
_tee.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint]


class Joined:
    """A connection through us.  Closes both sockets, which are blocking ones, when both directions have ended.

    ``opened_ns``: when the source's was accepted, of the monotonic clock; without it, now.

    The counts are of bytes passed on; ``error`` is what broke it, empty where nothing did; ``back`` tells what the
    destination said.  ``on_told(channel)`` is called when its first bytes say what it is, ``on_said_all()`` when the
    source has closed its side and all that it sent is passed on, ``on_closed()`` at the end; each from a thread of
    the connection.
    """

    def __init__(
        self,
        number: int,
        source: socket.socket,
        destination: socket.socket,
        *,
        opened_ns: int | None = None,
        recorder: Recorder | None = None,
        on_told: Callable[[Channel], None] | None = None,
        on_said_all: Callable[[], None] | None = None,
        on_closed: Callable[[], None] | None = None,
    ) -> None:
        self.number = number
        self.forward_bytes = 0
        self.return_bytes = 0
        self.error = ""
        self.back = WayBack()
        self.opened_ns = time.monotonic_ns() if opened_ns is None else opened_ns
        self.closed_ns: int | None = None
        self.has_said_all = False
        self._source, self._destination = source, destination
        self._recorder = recorder
        self._on_told, self._on_said_all, self._on_closed = on_told, on_said_all, on_closed
        self._lock = threading.Lock()
        self._running = 2
        self._is_ending = False
        self._more = select.poll()
        self._more.register(source, select.POLLIN)
        self._stays = 0  # for so many pieces

    @property
    def is_open(self) -> bool:
        return self.closed_ns is None

    def start(self) -> None:
        """Pass on, in the background.  Where there is no thread for that, it is broken, and closes."""
        self._hurry()
        for work in (self._pass_forward, self._pass_back):
            thread = threading.Thread(target=self._run, args=(work,), name=f"connection {self.number}", daemon=True)
            try:
                thread.start()
            except RuntimeError as exc:  # of memory or processes, a limit is reached
                self.cut(str(exc))
                self._ended()

    def cut(self, why: str = "") -> None:
        """End it now, both ways; ``why`` becomes its error, unless it has one, or ends already."""
        with self._lock:
            if not self._is_ending and not self.error:
                self.error = why
            self._is_ending = True
        for peer in (self._source, self._destination):
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)

    # -- each direction in its thread

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as exc:
            self._broke(exc)
        self._ended()

    def _ended(self) -> None:
        """One direction did; the last of them closes."""
        with self._lock:
            self._running -= 1
            if self._running:
                return
        self._close()

    def _broke(self, exc: OSError) -> None:
        """Where one direction breaks, the other ends too; only the first of them says why."""
        self.cut(exc.strerror or str(exc))

    def _close(self) -> None:
        self._source.close()
        self._destination.close()
        if self._recorder is not None:
            self._recorder.closed(
                self.number, forward_bytes=self.forward_bytes, return_bytes=self.return_bytes, error=self.error
            )
        self.closed_ns = time.monotonic_ns()
        if self._on_closed is not None:
            self._on_closed()

    def _pass_forward(self) -> None:
        self._widen()
        self._look()
        with _Pipe() as through, _Pipe() as beside:
            while self._pass_piece(through, beside):
                pass
        with suppress(OSError):  # it is gone already: the other thread finds that out
            self._destination.shutdown(socket.SHUT_WR)
        self.has_said_all = not self._is_ending
        if self.has_said_all and self._on_said_all is not None:
            self._on_said_all()

    def _pass_piece(self, through: "_Pipe", beside: "_Pipe") -> int:
        """Wait for bytes of the source, record them, and pass them on; how many, 0 at its end."""
        if self._recorder is not None and self._recorder.has_room:
            self._more.poll()
            if count := self._recorder.data_by(self.number, Direction.FORWARD, self._peek):
                self._pass_recorded(through, count)
                return count
        count = left = self._take_into(through)
        while left:
            step = self._record_forward(through, beside, left)
            self._send_from(through, step)
            left -= step
        return count

    def _peek(self, room: memoryview) -> int:
        """Copy what waits in the source's socket, and leave it there; how much, 0 at the end."""
        with suppress(BlockingIOError):
            return self._source.recv_into(room, flags=_PEEK)
        return 0

    def _pass_recorded(self, through: "_Pipe", count: int) -> None:
        """Pass on so much of what waits in the source's socket."""
        source, left = self._source.fileno(), count
        while left:
            held = os.splice(source, through.into, left)
            with suppress(BlockingIOError):  # the pipe is full
                while 0 < held < left and (more := os.splice(source, through.into, left - held, flags=_NO_WAIT)):
                    held += more
            if not held:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            if count >= _WORTH_WAITING:
                self._give_way()
            self._send_from(through, held)
            left -= held

    def _take_into(self, through: "_Pipe") -> int:
        """Wait for bytes of the source, and take all that is there, as far as one piece goes; 0 at its end.

        To take some makes room, and a source that waited for it fills it meanwhile.  So fewer pieces, and larger:
        each costs a call or two for each peer, and wakes the destination once.
        """
        source = self._source.fileno()
        count = os.splice(source, through.into, LONGEST_PIECE)
        waited = False
        with suppress(OSError):  # the pipe is full; or it was cut, and what came before is still passed on
            while 0 < count < LONGEST_PIECE:
                if not self._more.poll(0):
                    if waited or count < _WORTH_WAITING:
                        break
                    waited = True
                    self._give_way()
                    continue
                more = os.splice(source, through.into, LONGEST_PIECE - count, flags=_NO_WAIT)
                if not more:  # its end, which the next call meets again
                    break
                count += more
        return count

    def _give_way(self) -> None:
        """Let a source that waits for the very CPU that we have fill its socket again.

        Others may wait for it too.  Where one kept it for a whole time slice, many pieces go before the next try.
        """
        if self._stays:
            self._stays -= 1
            return
        began = time.monotonic_ns()
        _yield()
        if time.monotonic_ns() - began > _LONG_NS:
            self._stays = _UNTIL_NEXT_TRY

    def _widen(self) -> None:
        """Room for what is on its way, so that the destination has work while we record what comes next.

        No more than a requested page can wait behind for a millisecond or so.
        """
        for option in (_SNDBUFFORCE, socket.SO_SNDBUF):  # the first needs CAP_NET_ADMIN, the second has a limit
            with suppress(OSError):
                self._destination.setsockopt(socket.SOL_SOCKET, option, _ON_ITS_WAY)
                return

    def _hurry(self) -> None:
        """No page and no request waits in tcp until the one before it is acknowledged, as they don't without us."""
        for peer in (self._source, self._destination):
            if peer.family in (socket.AF_INET, socket.AF_INET6):
                with suppress(OSError):
                    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _record_forward(self, through: "_Pipe", beside: "_Pipe", count: int) -> int:
        """Record the front of what is in the pipe; how much that was."""
        if self._recorder is None or self._recorder.stopped is not None:
            return count
        doubled: int = _tee(through.out, beside.into, count, 0)
        if doubled <= 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._recorder.data_from(self.number, Direction.FORWARD, beside.out, doubled)
        return doubled

    def _send_from(self, through: "_Pipe", count: int) -> None:
        while count:
            sent = os.splice(through.out, self._destination.fileno(), count)
            self.forward_bytes += sent
            count -= sent

    def _pass_back(self) -> None:
        buffer = memoryview(bytearray(_BACK_PIECE))
        # Who waits in recv() on a unix socket is woken whenever the peer has read something, which it does
        # thousands of times a second; who waits in poll() is not.
        ready = select.poll()
        ready.register(self._destination, select.POLLIN)
        while ready.poll() and (count := self._destination.recv_into(buffer)):
            piece = buffer[:count]
            if self._recorder is not None:
                self._recorder.data(self.number, Direction.RETURN, piece)
            self._source.sendall(piece)
            self.return_bytes += count
            self.back.take(piece)
        self.cut()

    def _look(self) -> None:
        """What do its first bytes say?  They are left where they are."""
        head = self._source.recv(_HEAD, socket.MSG_PEEK)
        if self._on_told is None or not head:
            return
        feed = Feed(window=_HEAD)
        feed.receive(head)
        feed.end()
        try:
            next(classify(feed))
        except StopIteration as end:
            self._on_told(end.value)


class _Pipe:
    """Room for a piece inside the kernel."""

    def __init__(self) -> None:
        self.out, self.into = os.pipe()
        with suppress(OSError):  # it may be less for a user who has many
            fcntl.fcntl(self.into, fcntl.F_SETPIPE_SZ, LONGEST_PIECE)

    def __enter__(self) -> "_Pipe":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.out)
        os.close(self.into)
