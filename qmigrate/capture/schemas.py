"""The cache of device schemas: descriptions of one stream's devices, kept to decode another's that has none.

A schema is a file in the user's cache folder: a line of JSON that says what it is for, then the description's text as
QEMU wrote it.  Whatever is not whole there is passed over.  A schema fits a stream when it knows each section in it,
by name, instance and version; whether it decodes them only the bytes tell.
"""

import errno
import hashlib
import json
import math
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeAlias

from qmigrate.capture import cache
from qmigrate.capture.migration import Migration
from qmigrate.errors import QmigrateError, StreamError, about_file
from qmigrate.format.entry import VmDescription
from qmigrate.format.stream import SectionType
from qmigrate.format.tail import Tail
from qmigrate.format.vmdesc import Description, parse_description

__all__ = ["Damaged", "Schema", "SchemaCache", "SchemaError", "cache_folder", "read_schema"]

SectionKey: TypeAlias = tuple[str, int, int]
"""A section's name, instance and version."""

_FORMAT: Final = 1
_SUFFIX: Final = ".schema"
_PART: Final = ".part"
_LONGEST_HEAD: Final = 4 << 20
_LONGEST_TEXT: Final = 256 << 20
_ID_DIGITS: Final = 12
_LONGEST_SAID: Final = 120  # characters of what a schema was made from


class SchemaError(QmigrateError):
    """There is no such schema, or none can be made of this."""


@dataclass(frozen=True)
class Schema:
    """A description with what it is for.  ``qemu`` is the version that wrote it, None where that is not known.

    ``made_from`` is a file's name, or a command line; ``made_at`` in seconds since 1970.
    """

    machine_type: str | None
    qemu: str | None
    sections: tuple[SectionKey, ...]
    made_from: str
    made_at: float
    text: bytes

    @cached_property
    def id(self) -> str:
        """A hash of what it is for and what it says: the same schema made again has the same."""
        known = [self.machine_type, self.qemu, sorted(self.sections), hashlib.sha256(self.text).hexdigest()]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:_ID_DIGITS]

    @cached_property
    def description(self) -> Description:
        """What the text says.  Raises ``StreamError`` where it is no description."""
        return parse_description(self.text)

    @property
    def said_from(self) -> str:
        """What it was made from, cut where it is long."""
        return self.made_from if len(self.made_from) <= _LONGEST_SAID else f"{self.made_from[: _LONGEST_SAID - 1]}…"

    def __str__(self) -> str:
        return f"schema {self.id}, made from {self.said_from}"


def read_schema(migration: Migration, *, made_from: str, qemu: str | None = None) -> Schema:
    """The schema of a stream: its own description.

    Raises ``SchemaError`` where the stream is not whole, has none, or a device is not decoded by it.
    """
    gathering, text = migration.gather(), b""
    for entry in gathering:
        if isinstance(entry.record, VmDescription):
            text = entry.record.text
    contents = gathering.contents
    if contents.errors:
        raise SchemaError(str(contents.errors[0]))
    if contents.description is None:
        raise SchemaError(str(contents.description_fault or "this stream has no description of its devices"))
    full = [section for section in contents.sections if section.kind == SectionType.FULL]
    lost = next((section for section in full if section.state is None), None)
    if lost is not None:
        raise SchemaError(f"its own description does not decode {lost.key}: {lost.reason}")
    sections = tuple((section.name, section.instance_id, section.version_id) for section in full)
    return Schema(contents.machine_type, qemu, sections, made_from, time.time(), text)


def cache_folder() -> Path:
    """Where schemas are kept: see ``cache``."""
    return cache.cache_folder("schemas")


@dataclass(frozen=True)
class Damaged:
    """A file in the cache that is no schema, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class SchemaCache:
    """The schemas in a folder.  ``tell`` hears of each file that is damaged; it can be pickled where that can."""

    folder: Path
    tell: Callable[[Damaged], None] | None = None

    def add(self, schema: Schema) -> Path:
        """Keep a schema.  It appears whole or not at all; the same one made again takes its place.

        Raises ``OSError``, whose ``filename`` is below the folder or the folder.
        """
        import tempfile  # most only read

        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError as exc:  # so it says of what is no folder
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.folder)) from exc
        path = self.folder / f"{schema.id}{_SUFFIX}"
        # Not by the process's number: those that share the folder may each have one of the same (containers).
        try:
            descriptor, name = tempfile.mkstemp(_PART, f".{schema.id}.", self.folder)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, str(self.folder)) from exc
        temporary = Path(name)
        try:
            with about_file(path), os.fdopen(descriptor, "wb") as file:
                file.write(_head(schema) + b"\n" + schema.text)
            temporary.replace(path)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, exc.filename or str(path)) from exc
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def schemas(self) -> list[Schema]:
        """All that are whole, the newest first.  Raises ``OSError`` where the folder can't be read."""
        found = []
        for each in self.files():
            if isinstance(each, Schema):
                found.append(each)
            elif self.tell is not None:
                self.tell(each)
        return sorted(found, key=lambda schema: (schema.made_at, schema.id), reverse=True)

    def files(self) -> Iterator[Schema | Damaged]:
        """Each file that has a schema's name.  Raises ``OSError`` where the folder is there and can't be read."""
        try:
            names = sorted(os.listdir(self.folder))  # noqa: PTH208 - a folder that is not there is no error
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in names:
            if name.endswith(_SUFFIX) and not name.startswith("."):
                path = self.folder / name
                try:
                    yield _read(path)
                except (SchemaError, OSError) as exc:
                    yield Damaged(path, exc.strerror or str(exc) if isinstance(exc, OSError) else str(exc))

    def named(self, beginning: str) -> Schema:
        """The one whose id begins so.  Raises ``SchemaError`` where there is none, or there are several."""
        found = [schema for schema in self.schemas() if schema.id.startswith(beginning)]
        if len(found) != 1:
            raise SchemaError(f"{len(found) or 'no'} schemas in {self.folder} begin with {beginning}")
        return found[0]

    def _at_hand(self) -> list[Schema]:
        try:
            return self.schemas()
        except OSError as exc:
            if self.tell is not None:
                self.tell(Damaged(self.folder, exc.strerror or str(exc)))
            return []

    def choose(self, read: Callable[[Description | None], Tail], machine_type: str | None) -> Tail:
        """The reading in which most sections decode, of those by the schemas that know each section there is.

        Of several that decode all, that of the same machine type goes first, then the newest.  A folder that can't be
        read is told as a damaged file is, and the stream is read without.
        """
        best = plain = read(None)
        found = {key for item in plain.items if (key := _key(item)) is not None}
        if not found:
            return plain
        candidates = [schema for schema in self._at_hand() if found <= set(schema.sections)]
        candidates.sort(key=lambda schema: schema.machine_type != machine_type)
        best_decoded = 0
        for schema in candidates:
            tail = _read_by(schema, read)
            if tail is None or (tail.error is not None and plain.error is None):
                continue
            decoded = sum(item.state is not None for item in tail.items)
            if decoded > best_decoded:
                best, best_decoded = _signed(tail, schema), decoded
            if decoded == sum(item.header is not None for item in tail.items):
                break
        return best


def _key(item: Any) -> SectionKey | None:
    header = item.header
    return None if header is None else (header.idstr, header.instance_id, header.version_id)


def _read_by(schema: Schema, read: Callable[[Description | None], Tail]) -> Tail | None:
    try:
        return read(schema.description)
    except StreamError:  # its text is no description: whoever made the file wrote it so
        return None


def _signed(tail: Tail, schema: Schema) -> Tail:
    """Each section that was decoded says by what; one that was not, by what not."""
    signed = []
    for item in tail.items:
        if item.state is not None:
            item = item._replace(schema=str(schema))  # noqa: PLW2901
        elif item.reason is not None and item.header is not None:
            item = item._replace(reason=f"{schema}: {item.reason}")  # noqa: PLW2901
        signed.append(item)
    return Tail(signed, tail.end, tail.error)


# -- the file


def _head(schema: Schema) -> bytes:
    said = {
        "qmigrate_schema": _FORMAT,
        "machine_type": schema.machine_type,
        "qemu": schema.qemu,
        "made_from": schema.made_from,
        "made_at": schema.made_at,
        "sections": schema.sections,
        "length": len(schema.text),
        "sha256": hashlib.sha256(schema.text).hexdigest(),
    }
    return json.dumps(said, separators=(",", ":")).encode()


def _read(path: Path) -> Schema:
    """Raises ``SchemaError`` where the file is not what ``add`` wrote."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SchemaError("no regular file")
        if status.st_size > _LONGEST_HEAD + _LONGEST_TEXT:
            raise SchemaError(f"{status.st_size} bytes, a schema has less")
        head = _parse_head(file.readline(_LONGEST_HEAD))
        text = file.read(_LONGEST_TEXT + 1)
    if len(text) != head["length"] or hashlib.sha256(text).hexdigest() != head["sha256"]:
        raise SchemaError("its description is not what was written there")
    schema = Schema(
        machine_type=head["machine_type"],
        qemu=head["qemu"],
        sections=tuple((name, instance, version) for name, instance, version in head["sections"]),
        made_from=head["made_from"],
        made_at=head["made_at"],
        text=text,
    )
    if path.name != f"{schema.id}{_SUFFIX}":
        raise SchemaError(f"it holds {schema.id}")
    return schema


def _parse_head(line: bytes) -> dict[str, Any]:
    try:
        head = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise SchemaError("it does not begin with a line of JSON") from exc
    if not isinstance(head, dict) or head.get("qmigrate_schema") != _FORMAT:
        raise SchemaError(f"no schema of version {_FORMAT}")
    kinds: dict[str, type | tuple[type, ...]] = {
        "machine_type": (str, type(None)),
        "qemu": (str, type(None)),
        "made_from": str,
        "made_at": (int, float),
        "sections": list,
        "length": int,
        "sha256": str,
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(head.get(name), kind) or name not in head]
    if "made_at" not in wrong and not abs(head["made_at"]) < math.inf:  # JSON as Python reads it has such
        wrong.append("made_at")
    if wrong or not all(map(_is_key, head["sections"])):
        raise SchemaError(f"its first line has no good {', '.join(wrong) or 'sections'}")
    return head


def _is_key(value: Any) -> bool:
    kinds = (str, int, int)
    return (
        isinstance(value, list)
        and len(value) == len(kinds)
        and all(type(part) is kind for part, kind in zip(value, kinds, strict=True))
    )
