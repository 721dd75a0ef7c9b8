"""Answers of the library, whole or not at all."""

import json
from pathlib import Path
from typing import Any, Final

import jsonschema

import qmigrate
from qmigrate.analysis.summary import summarize
from qmigrate.capture.migration import Contents
from qmigrate.format.feed import Feed
from qmigrate.format.return_path import Message, read_return_path

_SCHEMA: Final = json.loads((Path(qmigrate.__file__).parent / "report" / "dissect.schema.json").read_text())
_VALIDATOR: Final = jsonschema.Draft202012Validator(_SCHEMA)


def summary_of(contents: Contents) -> dict[str, Any]:
    """As ``dissect --json`` prints it, by its schema."""
    summary: dict[str, Any] = json.loads(json.dumps(summarize(contents)))
    _VALIDATOR.validate(_each_once(summary))
    return summary


def _each_once(value: Any) -> Any:
    """The same to a schema that counts no items, but for the time that it takes: an item that came before is left out.

    Half a guest's devices are bytes in a list, and each CPU has them all.
    """
    if isinstance(value, dict):
        return {name: _each_once(each) for name, each in value.items()}
    if isinstance(value, list):
        if all(type(each) is int for each in value):
            return list(dict.fromkeys(value))
        return list({json.dumps(each): each for each in map(_each_once, value)}.values())
    return value


def messages_in(data: bytes) -> list[Message]:
    """All messages of a return path."""
    feed = Feed()
    feed.receive(data)
    feed.end()
    return [entry.message for entry in read_return_path(feed) if entry is not None]
