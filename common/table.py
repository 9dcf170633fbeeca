"""A table of texts, for a terminal, a document, or a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import shown


@dataclass(frozen=True, kw_only=True)
class Table:
    """`numeric` says of each column whether its cells are numbers, which end where the column does."""

    title: str
    columns: Sequence[str]
    numeric: Sequence[bool]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """What the numbers are; "" where the title says it."""

    def lines(self) -> list[str]:
        """For a terminal: the title, a line of headings, a line a row, the note."""
        rows = [[shown(cell) for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        aligned = [self._line(row, widths) for row in rows]
        return [self.title, *aligned, *([self.note] if self.note else [])]

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        cells = zip(row, widths, self.numeric, strict=True)
        return "  ".join(f"{cell:>{w}}" if number else f"{cell:<{w}}" for cell, w, number in cells).rstrip()

    def markdown(self) -> list[str]:
        """For a document."""
        rule = ["---:" if number else "---" for number in self.numeric]
        rows = [[cell.replace("|", "\\|") for cell in row] for row in (self.columns, rule, *self.rows)]
        lines = [f"**{self.title}**", "", *(f"| {' | '.join(row)} |" for row in rows)]
        return [*lines, "", self.note] if self.note else lines
