"""What a report is written on: a terminal, or anything else.

A terminal has a width, at which long lines go on below, and colours.  Anywhere else lines are plain and as
long as they are, so that nothing is lost to whoever reads on.  Layout is done here rather than by rich's
tables: those cut or pad what they put out.
"""

from collections.abc import Iterable, Sequence
from shutil import get_terminal_size
from typing import Final, TextIO, TypeAlias

from rich.console import Console
from rich.text import Text

__all__ = ["BAD", "DIM", "GOOD", "HEAD", "KIND", "ODD", "Paper", "Part", "text"]

HEAD: Final = "bold"
DIM: Final = "dim"
KIND: Final = "cyan"
GOOD: Final = "green"
ODD: Final = "yellow"
BAD: Final = "bold red"

Part: TypeAlias = str | tuple[str, str] | Text
_NARROWEST: Final = 20
_LEAST_BODY: Final = 16  # columns; with less beside its lead, a line's body goes below it
_GAP: Final = 2
# What stands for our own few signs where the output can't hold them.
_PLAINER: Final = str.maketrans({"×": "x", "–": "-", "·": "-", "…": "...", "→": ">", "←": "<", "█": "#", "µ": "u"})


def text(*parts: Part) -> Text:
    """Parts with their styles, put together.  None of them is read as markup."""
    return Text.assemble(*parts, no_wrap=False, end="")


class Paper:
    """Writes lines, tables and columns to ``out``, which it leaves open."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._console = Console(file=out, markup=False, highlight=False, emoji=False, soft_wrap=True)
        width = self._console.width
        if self._console.is_dumb_terminal:  # of which rich says that it has 80 columns
            width = get_terminal_size((width, 25)).columns
        self.width = max(width, _NARROWEST) if self._console.is_terminal else None
        """In columns, of a terminal; else None."""
        self._is_plain = not (out.encoding or "utf-8").lower().replace("-", "").startswith("utf")

    def line(self, body: Text | str = "", *, lead: Text | str = "") -> None:
        """One line.  On a terminal that is too narrow the body goes on below itself, to the right of ``lead``."""
        body = text(body) if isinstance(body, str) else body
        lead = text(lead) if isinstance(lead, str) else lead
        if self.width is None:
            self._write(f"{lead.plain}{body.plain}".rstrip() + "\n")
            return
        hang = lead.cell_len
        if hang + body.cell_len <= self.width:
            self._print(lead + body)
            return
        if self.width - hang < _LEAST_BODY:
            if lead.plain.strip():
                self._print(lead)
            hang = min(len(lead.plain) - len(lead.plain.lstrip()) + 4, self.width - _LEAST_BODY)
            lead = text(" " * hang)
        for wrapped in body.wrap(self._console, self.width - hang, overflow="fold"):
            wrapped.rstrip()
            self._print(lead + wrapped)
            lead = text(" " * hang)

    def verbatim(self, line: str) -> None:
        """As it is, for scripts: never wrapped."""
        self._out.write(line + "\n")

    def _write(self, line: str) -> None:
        self._out.write(line.translate(_PLAINER) if self._is_plain else line)

    def _print(self, line: Text) -> None:
        line = line.copy()
        line.rstrip()
        line.no_wrap = True
        line.end = "\n"
        if self._is_plain:
            line.plain = line.plain.translate(_PLAINER)
        self._console.print(line)

    def heading(self, title: str, *rest: Part) -> None:
        """A blank line, then a section's title with what there is to say of all of it."""
        self.line()
        self.line(text(*rest), lead=text((title, HEAD), "  " if rest else ""))

    def facts(self, rows: Iterable[tuple[str, Text | str]], *, indent: int = 0) -> None:
        """Names and values, the values below each other."""
        rows = list(rows)
        width = max((len(name) for name, _ in rows), default=0) + _GAP
        for name, value in rows:
            self.line(value, lead=text(" " * indent, (f"{name:<{width}}", HEAD)))

    def table(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[Text | str]],
        *,
        left: int = 1,
        indent: int = 2,
    ) -> None:
        """Rows below a head, the first ``left`` columns aligned left, the others right.

        Where they are too wide for the terminal, the first column takes a line of its own, then the next too.
        """
        cells = [[text((name, DIM)) for name in head]]
        cells += [[text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
        widths = [max(row[column].cell_len for row in cells) for column in range(len(head))]
        alone = 0
        while self.width is not None and alone < max(left, 1) and alone < len(head) - 1:
            if indent + 2 * alone + sum(widths[alone:]) + _GAP * (len(widths) - alone - 1) <= self.width:
                break
            alone += 1
        for row in cells:
            for depth, cell in enumerate(row[:alone]):
                self.line(cell, lead=" " * (indent + 2 * depth))
            self.line(_row(row[alone:], widths[alone:], left - alone), lead=" " * (indent + 2 * alone))

    def columns(self, cells: Sequence[tuple[str, str, str]], *, indent: int = 2) -> None:
        """Names with a number each (name, number, style): as many beside each other as fit, read downwards.

        Not on a terminal, it is one a line.
        """
        count = 1
        if self.width is not None:
            count = next(
                count
                for count in range(min(len(cells), 12) or 1, 0, -1)
                if count == 1 or indent + sum(_column_widths(cells, count)) <= self.width
            )
        height = -(-len(cells) // count)
        for at in range(height):
            line = text(" " * indent)
            for first in range(at, len(cells), height):
                name, number, style = cells[first]
                column = cells[first - at : first - at + height]
                line.append(name, style)
                room = _width(column) - Text(name).cell_len
                if self.width is not None and count == 1:
                    room = min(room, max(self.width - indent - Text(name).cell_len, len(number) + 1))
                line.append(f"{number:>{room}}", DIM)
                line.append(" " * 3)
            self.line(line)


def _row(row: Sequence[Text], widths: Sequence[int], left: int) -> Text:
    line = text()
    for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
        room = text(" " * (width - cell.cell_len))
        line = line + (cell + room if index < left else room + cell) + text(" " * _GAP)
    return line


def _width(column: Sequence[tuple[str, str, str]]) -> int:
    """Of the names and the numbers of one column, with a gap between."""
    names = max(Text(name).cell_len for name, _, _ in column)
    return names + 2 + max(len(number) for _, number, _ in column)


def _column_widths(cells: Sequence[tuple[str, str, str]], count: int) -> list[int]:
    height = -(-len(cells) // count)
    return [_width(cells[first : first + height]) + 3 for first in range(0, len(cells), height)]
