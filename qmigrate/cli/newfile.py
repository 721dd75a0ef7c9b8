"""A file that appears whole, or not at all."""

import os
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from qmigrate.errors import RefusedError

__all__ = ["NewFile"]

_USUAL_MODE: Final = 0o666


class NewFile:
    """A file to be.  That it can be made is found out at once: OSError, which names ``path``, where it can't.

    What is written stands beside it under a temporary name until ``finish()``; a ``with`` block that ends without
    that leaves nothing behind, and an older file as it was.  What is no file (a terminal, a pipe) is written as it is.
    ``RefusedError`` where it is one of the ``inputs``.
    """

    def __init__(self, path: str, *, inputs: Iterable[str] = ()) -> None:
        self.path = path
        self._temporary: Path | None = None
        for each in inputs:
            with suppress(OSError):
                there, status = os.stat(path), os.stat(0 if each == "-" else each)  # noqa: PTH116 - names of any kind
                if os.path.samestat(there, status) and stat.S_ISREG(there.st_mode):
                    raise RefusedError(f"{path}: an input, which would be overwritten")
        try:
            self._target = Path(path).resolve()
            self._prepare()
        except OSError as exc:
            raise type(exc)(exc.errno, exc.strerror, path) from exc

    def _prepare(self) -> None:
        if self._target.exists() and not self._target.is_file() and not self._target.is_dir():
            return
        descriptor = os.open(self._target, os.O_WRONLY) if self._target.exists() else None
        mode = _USUAL_MODE & ~_umask() if descriptor is None else stat.S_IMODE(os.fstat(descriptor).st_mode)
        if descriptor is not None:  # it may be written: then it may be replaced, too
            os.close(descriptor)
        made, name = tempfile.mkstemp(prefix=f".{self._target.name[:100]}.", dir=self._target.parent)
        self._temporary = Path(name)
        os.fchmod(made, mode)
        os.close(made)

    def finish(self, text: str) -> None:
        """Write it, and give it its name.  Raises OSError, which names ``path``."""
        try:
            (self._temporary or self._target).write_text(text, "utf-8")
            if self._temporary is not None:
                self._temporary.replace(self._target)
                self._temporary = None
        except OSError as exc:
            raise type(exc)(exc.errno, exc.strerror, self.path) from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._temporary is not None:
            with suppress(OSError):
                self._temporary.unlink()


def _umask() -> int:
    """It can't be asked for without setting it; no other thread makes files yet."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
