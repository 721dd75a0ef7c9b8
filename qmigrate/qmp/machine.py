"""A QEMU process of our own, talked to over QMP, and never left behind.

    async with Machine("qemu-system-x86_64", ["-nodefaults", "-display", "none"]) as machine:
        print(await machine.session.execute("query-status"))

QMP runs over a socket pair that QEMU inherits: there is no path, no port, and nobody else can connect.

QEMU ends at the latest when the thread that started it ends, however it ends: the kernel kills it
(PR_SET_PDEATHSIG).  For a Machine that is the thread of its event loop.  Three things undo that, and whoever
passes them looks after QEMU himself: ``-daemonize``, a change of user (``-runas``), and an executable with
file capabilities.
"""

import asyncio
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from qmigrate.errors import QemuDiedError, QmpConnectError, QmpError, QmpTimeoutError
from qmigrate.qmp.session import Session

__all__ = ["Machine"]

STDERR_KEPT_BYTES: Final = 64 * 1024
START_TIMEOUT_S: Final = 30.0
QUIT_TIMEOUT_S: Final = 10.0
DEATH_TIMEOUT_S: Final = 5.0

_CHARDEV: Final = "qmigrate-qmp"

# Runs in the new process and becomes QEMU.  subprocess's preexec_fn would do without it, but may deadlock
# where there are threads.  The parent may have died before the kernel knew that it matters: so look again.
_SHIM: Final = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started QEMU has gone")
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""


class Machine:
    """One QEMU process: ``executable``, ``arguments``, and what it takes to reach it over QMP.

    ``executable`` may be several words, such as a dynamic loader and the program that it loads.  Give
    ``-display none`` yourself.  stdin and stdout are /dev/null; the end of stderr is kept.  File descriptors
    in ``pass_fds`` are inherited under the same numbers, and stay open here.  ``own_group``: a Ctrl-C on our
    terminal does not reach it.
    """

    def __init__(
        self,
        executable: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        arguments: Sequence[str | os.PathLike[str]] = (),
        *,
        name: str = "",
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        own_group: bool = False,
        start_timeout_s: float = START_TIMEOUT_S,
        quit_timeout_s: float = QUIT_TIMEOUT_S,
    ) -> None:
        words = [executable] if isinstance(executable, str | os.PathLike) else list(executable)
        self._command = [os.fspath(word) for word in (*words, *arguments)]
        self.name = name or os.path.basename(self._command[len(words) - 1])  # noqa: PTH119 - it is a string
        self._pass_fds = tuple(pass_fds)
        self._environment = environment
        self._own_group = own_group
        self._start_timeout_s = start_timeout_s
        self._quit_timeout_s = quit_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._session: Session | None = None
        self._exited = asyncio.Event()
        self._stderr = bytearray()
        self._stderr_fd = -1
        self._pidfd = -1

    # ---- what it is ----

    @property
    def command(self) -> str:
        """The command line as a shell would take it, without what is added for QMP."""
        return shlex.join(self._command)

    @property
    def session(self) -> Session:
        """QMP with this machine, from its start to its end."""
        if self._session is None:
            raise QmpError("it has not been started", address=self.name)
        return self._session

    @property
    def pid(self) -> int:
        if self._process is None:
            raise QmpError("it has not been started", address=self.name)
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; the negative number of the signal that killed it."""
        return None if self._process is None else self._process.poll()

    @property
    def stderr(self) -> str:
        """The end of what it said, STDERR_KEPT_BYTES at most."""
        return self._stderr.decode(errors="replace")

    # ---- its life ----

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Start QEMU and wait until it answers over QMP."""
        if self._process is not None:
            raise QmpError("it has been started already", address=self.name)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._spawn(theirs.fileno())
        except BaseException:
            ours.close()
            raise
        try:
            self._session = await Session.open(
                ours, timeout_s=self._start_timeout_s, name=self.name, autopsy=self._autopsy
            )
        except QmpConnectError as exc:
            was_silent = isinstance(exc.__cause__, TimeoutError)
            if await self._has_exited_within(0 if was_silent else DEATH_TIMEOUT_S):
                raise self._died("it did not start") from exc
            if was_silent:
                raise QmpConnectError(
                    f"no QMP greeting within {self._start_timeout_s:g} s of its start: is this a QEMU?",
                    address=self.name,
                ) from exc
            raise
        finally:
            if self._session is None:
                ours.close()
                await self._end(graceful=False)

    def _spawn(self, qmp_fd: int) -> None:
        shim = [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid())]
        qmp = ["-chardev", f"socket,id={_CHARDEV},fd={qmp_fd}", "-qmp", f"chardev:{_CHARDEV}"]
        self._stderr_fd, stderr_of_qemu = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.set_blocking(stderr_of_qemu, True)
            self._process = subprocess.Popen(
                [*shim, *self._command, *qmp],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr_of_qemu,
                pass_fds=(*self._pass_fds, qmp_fd),
                env=self._environment,
                process_group=0 if self._own_group else None,
            )
            self._pidfd = os.pidfd_open(self._process.pid)
        finally:
            os.close(stderr_of_qemu)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._stderr_fd, self._read_stderr)
        loop.add_reader(self._pidfd, self._on_exit)

    async def wait(self, *, timeout_s: float | None = None) -> int:
        """Wait until QEMU has ended by itself, and return its exit status."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._exited.wait()
        except TimeoutError as exc:
            raise QmpTimeoutError(f"it still runs after {timeout_s:g} s", address=self.name) from exc
        status = self.exit_status
        assert status is not None
        return status

    async def quit(self, *, timeout_s: float | None = None) -> int:
        """Have QEMU end by itself, and return its exit status."""
        timeout_s = self._quit_timeout_s if timeout_s is None else timeout_s
        await self.session.quit(timeout_s=timeout_s)
        return await self.wait(timeout_s=timeout_s)

    def kill(self) -> None:
        """SIGKILL, as a host that dies would do.  ``wait()`` says when it is gone."""
        if self._process is not None:
            self._process.kill()

    async def close(self) -> None:
        """End QEMU: ask, then demand, then kill.  When this returns it is gone."""
        await self._end(graceful=True)

    async def _end(self, *, graceful: bool) -> None:
        try:
            if graceful and self._session is not None and self.exit_status is None:
                with suppress(QmpError):
                    await self.quit()
                if self._process is not None and self.exit_status is None:
                    self._process.terminate()
                    await self._has_exited_within(self._quit_timeout_s / 2)
        finally:
            self.kill()
            try:
                if self._process is not None and not await self._has_exited_within(DEATH_TIMEOUT_S):
                    raise QmpTimeoutError(f"process {self.pid} does not end when killed", address=self.name)
                if self._session is not None:
                    await self._session.close()
            finally:
                self._release()

    def _release(self) -> None:
        loop = asyncio.get_running_loop()
        for fd in (self._stderr_fd, self._pidfd):
            if fd != -1:
                loop.remove_reader(fd)
                os.close(fd)
        self._stderr_fd = self._pidfd = -1

    # ---- what the event loop calls ----

    def _read_stderr(self) -> None:
        with suppress(BlockingIOError):
            while piece := os.read(self._stderr_fd, STDERR_KEPT_BYTES):
                self._stderr = (self._stderr + piece)[-STDERR_KEPT_BYTES:]
            asyncio.get_running_loop().remove_reader(self._stderr_fd)

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        assert self._process is not None
        self._process.poll()
        self._read_stderr()  # the end of the pipe may be far off: QEMU's own children have it too
        self._exited.set()

    # ---- its death ----

    async def _has_exited_within(self, timeout_s: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._exited.wait()
        return self._exited.is_set()

    async def _autopsy(self, doing: str) -> QemuDiedError:
        # The connection is closed a moment before the process can be waited for.
        await self._has_exited_within(DEATH_TIMEOUT_S)
        return self._died(doing)

    def _died(self, doing: str) -> QemuDiedError:
        status = self.exit_status
        if status is None:
            how = "QEMU closed the connection, but runs"
        elif status < 0:
            how = f"QEMU was killed by {signal.Signals(-status).name}"
        else:
            how = f"QEMU ended with exit status {status}"
        last_words = [line.strip() for line in self.stderr.splitlines() if line.strip()][-3:]
        return QemuDiedError(
            ": ".join([doing, how, *(["; ".join(last_words)] if last_words else [])]),
            address=self.name,
            exit_status=status,
            stderr=self.stderr,
        )
