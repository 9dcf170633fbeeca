"""Text tables for a terminal or a Markdown document."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import shown


@dataclass(frozen=True, kw_only=True)
class Table:
    """Table of texts with title, headings and a note.

    Fields:
        title: one line above the headings; "" for none.
        columns: headings, one per column.
        numeric: for each column, True if its cells are numbers, which are aligned to the right.
        rows: texts of each row, one per column.
        note: explanation of the numbers, below the rows; "" for none.
    """

    title: str
    columns: Sequence[str]
    numeric: Sequence[bool]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def lines(self) -> list[str]:
        """Return the table as lines of plain text, as wide as it needs; nothing is cut, wrapped or coloured."""
        from rich.console import Console
        from rich.table import Table as Grid
        from rich.text import Text

        cells = [[shown(cell) for cell in row] for row in (self.columns, *self.rows)]
        grid = Grid(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for number in self.numeric:
            grid.add_column(justify="right" if number else "left", no_wrap=True)
        for row in cells:
            grid.add_row(*map(Text, row))
        # Twice the letters, because a letter can be two cells wide.
        width = sum(2 * max(map(len, column)) + 2 for column in zip(*cells, strict=True))
        console = Console(file=io.StringIO(), width=max(width, 1), color_system=None, legacy_windows=False)
        console.print(grid)
        printed: str = console.file.getvalue()  # type: ignore[attr-defined]
        title, note = ([text] if text else [] for text in (self.title, self.note))
        return [*title, *(line.rstrip() for line in printed.splitlines()), *note]

    def markdown(self) -> list[str]:
        """Return the table for a Markdown document."""
        rule = ["---:" if number else "---" for number in self.numeric]
        rows = [[cell.replace("|", "\\|") for cell in row] for row in (self.columns, rule, *self.rows)]
        title, note = [f"**{self.title}**", ""], ["", self.note]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return [*(title if self.title else []), *lines, *(note if self.note else [])]
