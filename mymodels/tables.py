"""Tables for a terminal of any width: where the columns do not fit, each row is printed on lines of its own.

A tensor's name or a path that is broken in two cannot be searched for or copied, so no word is ever broken.
"""

import re

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_INDENT = 4
_UNLIMITED = 100_000  # characters


def print_text(text: str | Text, console: Console) -> None:
    """Print text in lines of unbroken words; a path that is longer than a line stays in one piece."""
    for line in _lines(Text(text) if isinstance(text, str) else text, console.width):
        console.print(line, soft_wrap=True)


def print_table(table: Table, console: Console) -> None:
    """Print `table` in columns that break no word, or row by row if the console is too narrow for them."""
    if table.title:
        print_text(_text(table.title, str(table.title_style or "italic"), console), console)
        table.title = None
    columns = [[_text(cell, "", console) for cell in (column.header, *column.cells)] for column in table.columns]
    widths = _widths(table, columns, console)
    if widths is None:
        _print_rows(columns, str(table.header_style), console)
        return
    for column, width in zip(table.columns, widths):
        column.width = width
    console.print(table)


def _lines(text: Text, width: int) -> list[Text]:
    """Lines of whole words; rich's own wrapping breaks those that are longer than a line."""
    lines: list[Text] = []
    for paragraph in text.split("\n", allow_blank=True):
        breaks, used = [], 0
        for word in re.finditer(r"\S+\s*", paragraph.plain):
            if used and used + cell_len(word[0].rstrip()) > width:
                breaks.append(word.start())
                used = 0
            used += cell_len(word[0])
        lines += paragraph.divide(breaks)
    for line in lines:
        line.rstrip()
    return lines


def _text(cell: object, style: str, console: Console) -> Text:
    text = cell.copy() if isinstance(cell, Text) else console.render_str(str(cell), highlight=False)
    text.stylize(style)
    return text


def _widths(table: Table, columns: list[list[Text]], console: Console) -> list[int] | None:
    """A width for each column in which its longest word fits; None if the console is too narrow for that."""
    options = console.options.update(width=_UNLIMITED)
    lengths = [[Measurement.get(console, options, cell) for cell in cells] for cells in columns]
    widths = [max(1, *(length.minimum for length in column)) for column in lengths]
    wanted = [max(1, *(length.maximum for length in column)) for column in lengths]
    for column, width in zip(table.columns, widths):
        column.width = width
    room = console.width - Measurement.get(console, options, table).maximum
    if room < 0:
        return None
    while room > 0 and (short := [i for i, width in enumerate(widths) if width < wanted[i]]):
        for i in short:
            grown = min(max(1, room // len(short)), wanted[i] - widths[i], room)
            widths[i] += grown
            room -= grown
    return widths


def _print_rows(columns: list[list[Text]], header_style: str, console: Console) -> None:
    """Each row: its first cell, and under it each other one behind its header, as many in a line as fit."""
    headers = [cells[0] for cells in columns]
    for first, *others in zip(*(cells[1:] for cells in columns)):
        pieces = []
        for header, cell in zip(headers[1:], others):
            if cell:
                label = Text(header.plain, style=header_style).append(" ", style="not bold") if header else Text()
                pieces.append(Text().append_text(label).append_text(cell))
        row = Text("  ").join([Text().append_text(first), *pieces])
        lines = [row] if row.cell_len <= console.width else [first, *_packed(pieces, console.width - _INDENT)]
        for number, line in enumerate(lines):
            console.print(Text(" " * _INDENT if number else "").append_text(line), soft_wrap=True)


def _packed(pieces: list[Text], width: int) -> list[Text]:
    """Lines of as many pieces as fit; a longer piece has lines of its own, all but the first indented."""
    lines: list[Text] = []
    for piece in pieces:
        if lines and lines[-1].cell_len + 2 + piece.cell_len <= width:
            lines[-1].append("  ").append_text(piece)
        else:
            parts = _lines(piece, max(width - 2, 20))
            lines += [parts[0], *(Text("  ").append_text(part) for part in parts[1:])]
    return lines
