"""A page for a browser: one file, complete in itself, that asks nobody for anything.

Style and script stand in it; a policy in its head lets no other script run and nothing be fetched, so that what a
stream or a QEMU says can't become more than text.  Without the script all is there, but what hovering tells.
"""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any, Final

from qmigrate import __version__
from qmigrate.report.names import clean

__all__ = ["data", "document", "escaped", "facts", "section", "table", "tiles"]

_GENERATOR: Final = f"qmigrate {__version__}"


def escaped(text: object) -> str:
    """Text for anywhere in the page, attributes too: nothing of it is markup, and nothing of it controls."""
    return html.escape(clean(str(text)))


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page."""
    style, script = (files("qmigrate.report").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta name="generator" content="{_GENERATOR}">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<footer>Made by {_GENERATOR}.</footer>\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str, lead: str = "", kind: str = "") -> str:
    """A part under a heading; nothing where it has no contents.  ``lead`` is a sentence, and is escaped."""
    body = "\n".join(part for part in parts if part)
    if not body:
        return ""
    introduction = f'<p class="lead">{escaped(lead)}</p>\n' if lead else ""
    return f'<section class="card {kind}">\n<h2>{escaped(title)}</h2>\n{introduction}{body}\n</section>'


def tiles(figures: Sequence[tuple[str, str, str]]) -> str:
    """Large numbers side by side: what it is, the number, a remark."""
    cells = (
        f'<div class="tile"><dt>{escaped(name)}</dt><dd>{escaped(figure)}<small>{escaped(remark)}</small></dd></div>'
        for name, figure, remark in figures
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Names and what they are; nothing where there are none."""
    cells = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in rows)
    return cells and f'<dl class="facts">{cells}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    """Rows of cells.  The class of a cell is the name of its column, so that style can tell them apart."""
    names = [escaped(name) for name in head]
    title = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{name}">{escaped(cell)}</td>' for name, cell in zip(names, row, strict=True))
        + "</tr>\n"
        for row in rows
    )
    return f'<table class="{kind}"><thead><tr>{title}</tr></thead><tbody>\n{body}</tbody></table>'


def data(name: str, value: Any) -> str:
    """A value for the page's own script.  It can't end the element that it stands in."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")
    return f'<script type="application/json" id="{escaped(name)}">{text}</script>'
