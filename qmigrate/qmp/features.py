"""What a QEMU can do, found by asking it.

Its version says little: distributions carry patches back, and builds leave things out.  So its capabilities are
asked, and its own schema, once for each session, where somebody wants to know what it says.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final
from weakref import WeakKeyDictionary

from qmigrate.errors import RefusedError
from qmigrate.qmp import migration
from qmigrate.qmp.session import Session

__all__ = ["Features", "NoSuchFeatureError", "Schema"]

POSTCOPY_NAMES: Final = ("postcopy-ram", "x-postcopy-ram")
"""QEMU 2.5 had the second; newer ones have the first."""

_TRUE: Final = frozenset({"on", "yes", "true", "1"})
_FALSE: Final = frozenset({"off", "no", "false", "0"})


class NoSuchFeatureError(RefusedError):
    """This QEMU has no capability, parameter or value of that name.  The message names those that it has."""


class Schema:
    """The answer to ``query-qmp-schema``: commands, their arguments, and the types of those."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self._entries = {entry["name"]: entry for entry in entries}

    @classmethod
    async def of(cls, session: Session, *, timeout_s: float) -> "Schema":
        """Ask, the first time in a session: it is 150 to 250 KB, and takes QEMU some 10 to 60 ms to write."""
        schema = _SCHEMAS.get(session)
        if schema is None:
            schema = _SCHEMAS[session] = cls(await session.execute("query-qmp-schema", timeout_s=timeout_s))
        return schema

    @staticmethod
    def known(session: Session) -> "Schema | None":
        """The schema, if this session was asked for it already."""
        return _SCHEMAS.get(session)

    def has_command(self, command: str) -> bool:
        return self._entries.get(command, {}).get("meta-type") == "command"

    def arguments(self, command: str) -> Mapping[str, Mapping[str, Any]]:
        """The arguments of a command: QEMU's own description of each, by name."""
        entry = self._entries.get(command, {})
        members = self._entries.get(entry.get("arg-type", ""), {}).get("members", [])
        return {member["name"]: member for member in members}

    def kind(self, command: str, argument: str) -> str:
        """``int``, ``bool``, ``str``, ``enum``, ``object``..., of an argument; empty if there is none."""
        return str(self._type(command, argument).get("meta-type", ""))

    def basic(self, command: str, argument: str) -> str:
        """``int``, ``boolean``, ``string``, ``number``, or empty for what is none of these."""
        return str(self._type(command, argument).get("json-type", ""))

    def values(self, command: str, argument: str) -> tuple[str, ...]:
        """What an argument that is an enumeration can be."""
        kind = self._type(command, argument)
        if "members" in kind and kind.get("meta-type") == "enum":
            return tuple(member["name"] for member in kind["members"])
        return tuple(kind.get("values", ())) if kind.get("meta-type") == "enum" else ()

    def enumeration(self, *samples: str) -> tuple[str, ...]:
        """The values of the enumeration that has all these; empty where there is none."""
        for entry in self._entries.values():
            values = entry.get("values", ()) if entry.get("meta-type") == "enum" else ()
            if values and set(samples) <= set(values):
                return tuple(values)
        return ()

    def place(self, command: str, uri: str) -> dict[str, Any]:
        """The argument of ``migrate`` or ``migrate-incoming`` that says where: ``uri``, or ``channels``."""
        arguments = self.arguments(command)
        if "uri" in arguments or "channels" not in arguments:
            return {"uri": uri}
        return {"channels": [{"channel-type": "main", "addr": address(uri)}]}

    def _type(self, command: str, argument: str) -> Mapping[str, Any]:
        member = self.arguments(command).get(argument, {})
        kind: Mapping[str, Any] = self._entries.get(member.get("type", ""), {})
        return kind


UNASKED: Final = Schema([])
"""Nothing is known of this QEMU's commands."""


@dataclass
class Features:
    """One QEMU's features.  ``of()`` asks; what does not change is asked for once a session."""

    schema: Schema
    capabilities: dict[str, bool] = field(default_factory=dict)

    @classmethod
    async def of(cls, session: Session, *, timeout_s: float, with_schema: bool = True) -> "Features":
        """Ask.  The states of the capabilities are those of now.

        Without the schema it can only be said what capabilities there are.
        """
        if not with_schema:
            states = await migration.capabilities(session, timeout_s=timeout_s)
            return cls(Schema.known(session) or UNASKED, states)
        schema, states = await asyncio.gather(
            Schema.of(session, timeout_s=timeout_s), migration.capabilities(session, timeout_s=timeout_s)
        )
        return cls(schema, states)

    @property
    def postcopy(self) -> str | None:
        """What this QEMU calls the capability; None if it can't."""
        return next((name for name in POSTCOPY_NAMES if name in self.capabilities), None)

    @cached_property
    def statuses(self) -> frozenset[str]:
        """The statuses that a migration can have here."""
        return frozenset(self.schema.enumeration("postcopy-active", "cancelling"))

    def has(self, name: str) -> bool:
        """Is there a capability of this name?"""
        return name in self.capabilities or (name in POSTCOPY_NAMES and self.postcopy is not None)

    def capability(self, name: str) -> str:
        """The capability of this name, as this QEMU has it."""
        if name in POSTCOPY_NAMES and self.postcopy is not None:
            return self.postcopy
        if name not in self.capabilities:
            raise NoSuchFeatureError(f"it has no capability {name}; it has {_list(self.capabilities)}")
        return name

    def parameter(self, name: str, value: str | int | bool) -> Any:
        """A value for ``migrate-set-parameters``, of the type that this QEMU wants.

        A parameter whose type is a structure is given as the JSON that it is, and not looked into.
        """
        command = "migrate-set-parameters"
        known = self.schema.arguments(command)
        if name not in known:
            raise NoSuchFeatureError(f"it has no parameter {name}; it has {_list(known)}")
        values = self.schema.values(command, name)
        if values and value not in values:
            raise NoSuchFeatureError(f"its parameter {name} can't be {value}; it can be {_list(values)}")
        basic = self.schema.basic(command, name)
        if basic == "boolean":
            return _boolean(name, value)
        if basic == "int":
            return _integer(name, value)
        return value


_SCHEMAS: WeakKeyDictionary[Session, Schema] = WeakKeyDictionary()


def address(uri: str) -> dict[str, Any]:
    """What QEMU's ``channels`` want in place of a URI."""
    scheme, _, rest = uri.partition(":")
    if scheme == "unix":
        return {"transport": "socket", "type": "unix", "path": rest}
    if scheme == "fd":
        return {"transport": "socket", "type": "fd", "str": rest}
    if scheme == "exec":
        return {"transport": "exec", "args": ["/bin/sh", "-c", rest]}
    if scheme == "file":
        path, _, offset = rest.partition(",offset=")
        return {"transport": "file", "filename": path, "offset": int(offset or "0", 0)}
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and port:
        return {"transport": "socket", "type": "inet", "host": host.strip("[]"), "port": port}
    raise NoSuchFeatureError(f"{uri!r} can't be said in `channels`, and it takes no `uri`")


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"


def _boolean(name: str, value: str | int | bool) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if word not in _TRUE | _FALSE:
        raise NoSuchFeatureError(f"its parameter {name} is on or off, not {value}")
    return word in _TRUE


def _integer(name: str, value: str | int | bool) -> int:
    try:
        return int(value, 0) if isinstance(value, str) else int(value)
    except ValueError:
        raise NoSuchFeatureError(f"its parameter {name} is a number, not {value}") from None
