"""userfaultfd: who touches a page that is not there sleeps until somebody puts it in place.

S9 of the postcopy design: RAM becomes sensitive to faults by ``register``.  A descriptor sees one address space,
that of the process that opened it; but any process that was handed the descriptor may place pages, out of its
own memory.
"""

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from qmigrate.errors import QmigrateError
from qmigrate.uffd import _abi

__all__ = ["Fault", "Placed", "UserfaultError", "Userfaultfd"]

DEVICE: Final = Path("/dev/userfaultfd")
SYSCTL: Final = "vm.unprivileged_userfaultfd"
_MESSAGES_AT_ONCE: Final = 64
_GONE: Final = frozenset({errno.ESRCH, errno.ENOENT})  # the process ended; its mapping is no more


class UserfaultError(QmigrateError):
    """The kernel will not give us userfaultfd, or not for this memory."""


class Placed(Enum):
    """What became of a page we asked the kernel to put in place."""

    DONE = auto()
    ALREADY = auto()  # EEXIST: it was there
    LATER = auto()  # EAGAIN: the mappings are changing; read the events, then try again
    GONE = auto()  # the process whose memory it was has ended


class Fault(NamedTuple):
    """A thread sleeps because of this address, in the address space of whoever opened the descriptor."""

    address: int
    is_write: bool


class Userfaultfd:
    """One userfaultfd.  Closes its descriptor when it is left, also one that was handed to it."""

    def __init__(self, descriptor: int) -> None:
        """Take over a descriptor of another process.  ``open()`` makes one of our own."""
        self._descriptor = descriptor

    @classmethod
    def open(cls) -> Self:
        """By the device, by the system call, by the system call for user mode only: what the kernel allows first.

        In user mode only a system call that reads guest memory (``os.write``) fails with EFAULT; touching works.
        Raises ``UserfaultError``.
        """
        refusals = []
        for name, way in (("device", _by_device), ("system call", _by_call), ("user mode only", _by_user_mode_call)):
            try:
                opened = cls(way())
            except OSError as exc:
                refusals.append(f"{name}: {exc.strerror}")
                continue
            opened._agree()
            return opened
        raise UserfaultError(
            f"userfaultfd is refused ({'; '.join(refusals)}): allow this user to read and write {DEVICE}, "
            f"or set {SYSCTL}=1 (sysctl), or run with the capability CAP_SYS_PTRACE; in a container its seccomp "
            "profile must allow userfaultfd"
        )

    def _agree(self) -> None:
        """UFFDIO_API, once a descriptor."""
        buffer = bytearray(_abi.API.pack(_abi.UFFD_API, 0, 0))
        fcntl.ioctl(self._descriptor, _abi.UFFDIO_API, buffer)
        _, features, _ = _abi.API.unpack(buffer)
        if not features & _abi.UFFD_FEATURE_MISSING_SHMEM:
            self.close()
            raise UserfaultError("this kernel has no userfaultfd for shared memory: 4.11 or newer has")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let it go.  Once the last holder has, sleepers wake up and find zeros: place all pages before."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def fileno(self) -> int:
        return self._descriptor

    def register(self, address: int, length: int) -> None:
        """Make a mapping of this process sensitive: MISSING.  Raises ``UserfaultError``."""
        buffer = bytearray(_abi.REGISTER.pack(address, length, _abi.UFFDIO_REGISTER_MODE_MISSING, 0))
        try:
            fcntl.ioctl(self._descriptor, _abi.UFFDIO_REGISTER, buffer)
        except OSError as exc:
            raise UserfaultError(
                f"{length} bytes at {address:#x} can't be registered with userfaultfd: {exc.strerror}"
            ) from exc

    def unregister(self, address: int, length: int) -> None:
        """What is missing reads as zeros from now on; sleepers are woken."""
        fcntl.ioctl(self._descriptor, _abi.UFFDIO_UNREGISTER, bytearray(_abi.RANGE.pack(address, length)))

    def copy(self, address: int, source: int, length: int) -> tuple[Placed, int]:
        """Place pages from ``source``, an address of this process, and wake who sleeps there.

        Also gives how many bytes were placed: fewer than ``length`` where a page among them was there already
        (ALREADY) or the mappings are changing (LATER).  Raises ``UserfaultError``.
        """
        buffer = bytearray(_abi.COPY.pack(address, source, length, 0, 0))
        return self._place(_abi.UFFDIO_COPY, buffer, length)

    def zero(self, address: int, length: int) -> tuple[Placed, int]:
        """The same with zeros.  Not for huge pages, which the kernel refuses: copy zeros there."""
        buffer = bytearray(_abi.ZEROPAGE.pack(address, length, 0, 0))
        return self._place(_abi.UFFDIO_ZEROPAGE, buffer, length)

    def _place(self, request: int, buffer: bytearray, length: int) -> tuple[Placed, int]:
        """The last word of the structure says how many bytes were placed, or is a negative errno."""
        try:
            fcntl.ioctl(self._descriptor, request, buffer)
        except OSError as exc:
            done = int.from_bytes(buffer[-8:], "little" if _IS_LITTLE else "big", signed=True)
            if exc.errno == errno.EEXIST:
                return Placed.ALREADY, 0
            if exc.errno in _GONE:
                return Placed.GONE, 0
            if exc.errno == errno.EAGAIN:
                return Placed.LATER, max(done, 0)
            raise UserfaultError(f"{length} bytes can't be placed: {exc.strerror}") from exc
        return Placed.DONE, length

    def wake(self, address: int, length: int) -> None:
        """Wake who sleeps there: the page came by another way."""
        with suppress(ProcessLookupError):  # nobody is left to be woken
            fcntl.ioctl(self._descriptor, _abi.UFFDIO_WAKE, bytearray(_abi.RANGE.pack(address, length)))

    def faults(self) -> Iterator[Fault]:
        """Those that wait to be read, up to 64; none where nothing has happened: it does not wait."""
        data = self._messages()
        for event, _, _, _, flags, address, _, _ in _abi.MESSAGE.iter_unpack(data):
            if event == _abi.UFFD_EVENT_PAGEFAULT:
                yield Fault(address, bool(flags & _abi.UFFD_PAGEFAULT_FLAG_WRITE))

    def addresses(self) -> list[int]:
        """Of the same faults, for who must be fast."""
        unpacked = _abi.MESSAGE_ADDRESS.iter_unpack(self._messages())
        return [address for event, address in unpacked if event == _abi.UFFD_EVENT_PAGEFAULT]

    def _messages(self) -> bytes:
        try:
            return os.read(self._descriptor, _MESSAGES_AT_ONCE * _abi.MESSAGE.size)
        except BlockingIOError:
            return b""


_IS_LITTLE: Final = int.from_bytes(_abi.RANGE.pack(1, 0)[:8], "little") == 1
_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK  # without O_NONBLOCK the kernel does not let us poll it


def _by_device() -> int:
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, _abi.USERFAULTFD_IOC_NEW, _FLAGS)
    finally:
        os.close(device)


def _by_call() -> int:
    return _call(_FLAGS)


def _by_user_mode_call() -> int:
    return _call(_FLAGS | _abi.UFFD_USER_MODE_ONLY)


def _call(flags: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.syscall(ctypes.c_long(_abi.SYS_USERFAULTFD), ctypes.c_int(flags)))
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return descriptor
