"""Where indexes are kept, each with the pages that stand in no input as they are: in two files of one name.

The second is there where pages were spilled: compressed, encoded, or cut where a piece of a recording ends.  It is
called after its checksums too, so an index finds the pages that it was kept with or none.  What all of them take is
limited, for it is a cache: what can be made again shall not fill anybody's disk.
"""

import errno
import os
import stat
import time
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from qmigrate.capture.cache import cache_folder, index_name
from qmigrate.capture.kept import KeptError, KeptHeader, Stamp, read_header, read_kept, write_kept
from qmigrate.capture.saved_guest import SavedGuest

__all__ = ["MOST_SPILLED", "KeptIndexes"]

MOST_SPILLED: Final = 1 << 30  # bytes of pages; the indexes themselves are a five-hundredth of their guests
_MOST_KEPT: Final = 64
_SHARE_OF_FREE: Final = 8  # of what is free on the disk not more than one in so many bytes
_INDEX, _PAGES, _PART = ".index", ".pages", ".part"
_AT_ONCE: Final = 1 << 20  # of whole pages, whatever their size
_LEFT_BEHIND_NS: Final = 3600 * 10**9  # nobody writes one file for so long


class KeptIndexes:
    """Those in a folder; by default in the user's cache.  Of more than so many, or of more spilled bytes (by default
    ``MOST_SPILLED``), the oldest go.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, *, most: int = _MOST_KEPT, most_spilled: int | None = None
    ) -> None:
        self.folder = cache_folder("indexes") if folder is None else Path(folder).absolute()
        self._most = most
        self._most_spilled = MOST_SPILLED if most_spilled is None else most_spilled

    def path(self, stamps: Sequence[Stamp]) -> Path:
        """Where that of these files is: one for each, or each row of them, whatever they are called."""
        return self.folder / (index_name([stamp[:2] for stamp in stamps]) + _INDEX)

    # -- having one

    def read(self, files: Sequence[int]) -> SavedGuest:
        """The saved guest in these open files.  Raises ``KeptError`` where there is no index of them."""
        try:
            stamps = [Stamp.of(file) for file in files]
            path = self.path(stamps)
            with _own_file(path) as descriptor:
                header = read_header(descriptor)
                if not header.spilled:
                    return read_kept(descriptor, stamps, files)
                if not header.checks:
                    raise KeptError("what it needs besides was not kept")
                with _own_file(_pages_of(path, header.checks_checksum)) as pages:
                    _check_length(pages, header)
                    return read_kept(descriptor, stamps, files, spill=pages)
        except OSError as exc:
            raise KeptError(exc.strerror) from exc

    # -- keeping one

    def why_not(self, spilled: int) -> str | None:
        """Why an index with so many bytes of spilled pages is not kept; None where it is."""
        if not spilled:
            return None
        if spilled > self._most_spilled:
            most = self._most_spilled
            return (
                f"{_size(spilled)} of pages do not stand in the input as they are, and {_size(most)} at most are kept"
            )
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            disk = os.statvfs(self.folder)
        except OSError as exc:
            return f"{self.folder}: {exc.strerror}"
        free = disk.f_bavail * disk.f_frsize
        if spilled > free // _SHARE_OF_FREE:
            return (
                f"{_size(spilled)} of pages do not stand in the input as they are, and {_size(free)} of disk are free"
            )
        return None

    def keep(self, saved: SavedGuest, stamps: Sequence[Stamp]) -> Path:
        """It appears whole or not at all; an older one of the same files goes.

        Raises ``OSError``, also where another process is keeping the same pages just now.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path, spilled, spill = self.path(stamps), saved.index.spilled, saved.index.spill
        if not spilled or spill is None:
            with self._appearing(path) as descriptor:
                write_kept(saved, stamps, descriptor)
            self._prune(path, None)
            return path
        checks = _checks_of(spill, spilled, saved.page_size)
        pages = _pages_of(path, zlib.crc32(checks))
        self._sweep()
        # So the index appears first: as long as its pages are not there it is as if there were none.
        with self._appearing(pages, by="one") as copy, self._appearing(path) as descriptor:
            _copy(spill, copy, spilled)
            write_kept(saved, stamps, descriptor, spilled=spilled, checks=checks)
        self._prune(path, pages)
        return path

    @contextmanager
    def _appearing(self, path: Path, *, by: str | None = None) -> Iterator[int]:
        """A new file, which has this name once it is written, if it comes to that.

        ``by``: of those that call themselves the same only one writes it, as it takes room; else each process may.
        """
        temporary = self.folder / f".{path.name}.{os.getpid() if by is None else by}{_PART}"
        if by is None:
            temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                yield descriptor
            finally:
                os.close(descriptor)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    # -- room for others

    def _prune(self, newest: Path, its_pages: Path | None) -> None:
        pages = self._pages()
        left_over = [path for path in pages.pop(newest, []) if path != its_pages]  # of what was kept there before
        taken = 0 if its_pages is None else _length(its_pages)
        others = sorted((each for each in self._all(_INDEX) if each[1] != newest), reverse=True)
        for number, (_, index) in enumerate(others, 1):
            here = pages.pop(index, [])
            taken += sum(map(_length, here))
            if number >= self._most or taken > self._most_spilled:
                left_over += [index, *here]
        left_over += [path for of_no_index in pages.values() for path in of_no_index]
        for path in left_over:
            path.unlink(missing_ok=True)
        self._sweep()

    def _sweep(self) -> None:
        """What a process that was killed has left half written."""
        since_ns = time.time_ns() - _LEFT_BEHIND_NS
        for mtime_ns, path in self._all(_PART):
            if mtime_ns < since_ns:
                path.unlink(missing_ok=True)

    def _pages(self) -> dict[Path, list[Path]]:
        """All files of pages by the indexes that they are of."""
        found: dict[Path, list[Path]] = {}
        for _, path in self._all(_PAGES):
            found.setdefault(path.with_name(path.name.rsplit(".", 2)[0] + _INDEX), []).append(path)
        return found

    def _all(self, suffix: str) -> Iterator[tuple[int, Path]]:
        for path in self.folder.glob(f"*{suffix}"):
            with suppress(FileNotFoundError):  # another process was sooner
                yield path.lstat().st_mtime_ns, path


@contextmanager
def _own_file(path: Path) -> Iterator[int]:
    """Open it for reading.  Raises ``OSError``, ``KeptError`` where it is no file, or somebody else's."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise KeptError("it is no file of this user")
        yield descriptor
    finally:
        os.close(descriptor)


def _pages_of(index: Path, checksum: int) -> Path:
    """The pages that are kept with this index, by the checksum of their checksums."""
    return index.with_name(f"{index.name.removesuffix(_INDEX)}.{checksum:08x}{_PAGES}")


def _check_length(pages: int, header: KeptHeader) -> None:
    length = os.fstat(pages).st_size
    if length != header.spilled:
        raise KeptError(f"its pages have {length} bytes, expected {header.spilled}")


def _checks_of(spill: int, length: int, page_size: int) -> "array[int]":
    """The CRC-32 of each page in it.  Raises ``OSError``."""
    checks, buffer, at = array("I"), bytearray(_AT_ONCE), 0
    while at < length:
        piece = memoryview(buffer)[: min(len(buffer), length - at)]
        if os.preadv(spill, [piece], at) != len(piece):
            raise OSError(errno.EIO, "the spilled pages became shorter")
        checks.extend([zlib.crc32(piece[begin : begin + page_size]) for begin in range(0, len(piece), page_size)])
        at += len(piece)
    return checks


def _copy(spill: int, descriptor: int, length: int) -> None:
    at = 0
    while at < length:
        count = os.sendfile(descriptor, spill, at, length - at)
        if not count:
            raise OSError(errno.EIO, "the spilled pages became shorter")
        at += count


def _length(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count} bytes"
