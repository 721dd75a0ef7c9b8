"""Imports point one way, as `../shared/design.md` draws it; the drawing is repeated here as a table."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qmigrate"

# Which rooms a room may import from, besides itself; `errors`, `events` and `value` are for all.
MAY_IMPORT = {
    "errors": set(),
    "value": set(),
    "events": set(),
    "exit_codes": set(),
    "format": set(),
    "uffd": set(),
    "qmp": set(),
    "protocol": {"format"},
    "capture": {"format"},
    "analysis": {"capture", "format"},
    "report": {"analysis", "capture", "format"},
    "endpoint": {"protocol", "capture", "uffd", "format"},
    "operations": {"endpoint", "qmp", "analysis", "capture", "protocol", "format", "exit_codes"},
    "cli": {"operations", "report", "analysis", "capture", "endpoint", "qmp", "format", "exit_codes"},
}
FOR_ALL = {"errors", "events", "value"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """The rooms that a file imports from, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names = [node.module or ""]
            if node.module == "qmigrate":
                names = [f"qmigrate.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("qmigrate."):
                yield getattr(node, "lineno", 0), name.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        allowed = set(MAY_IMPORT) | {"__version__"}
    else:
        allowed = MAY_IMPORT[room] | FOR_ALL | {room, "__version__"}
    wrong = [f"line {line}: {other}" for line, other in imported_rooms(path) if other not in allowed]
    assert not wrong, f"{room} may not import: {', '.join(wrong)}"


def test_every_room_is_in_the_table() -> None:
    assert {room_of(path) for path in FILES} - {"__init__", "__main__"} <= set(MAY_IMPORT)


@pytest.mark.parametrize("room", ["format", "protocol", "analysis"])
def test_a_room_that_opens_nothing_imports_no_input_or_output(room: str) -> None:
    live = {"socket", "asyncio", "subprocess", "select", "time", "threading", "rich"}
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            if isinstance(node, ast.ImportFrom):
                modules = {node.module or ""}
            assert not {module.split(".")[0] for module in modules} & live, str(path)
