from __future__ import annotations

import pytest

from mobilesam.common.table import Table


def table(rows: list[list[str]], title: str = "", note: str = "") -> Table:
    return Table(title=title, columns=["model", "mIoU"], numeric=[False, True], rows=rows, note=note)


def test_texts_begin_and_numbers_end_where_their_column_does() -> None:
    lines = table([["tiny_vit", "0.5"], ["deit", "0.7321"]]).lines()
    assert lines == ["model       mIoU", "tiny_vit     0.5", "deit      0.7321"]


def test_letters_of_double_width_are_aligned_as_a_terminal_shows_them() -> None:
    lines = table([["写真", "0.5"], ["abcd", "0.6"]]).lines()
    assert lines[1:] == ["写真    0.5", "abcd    0.6"]


@pytest.mark.parametrize("columns", ["20", "80"])
def test_a_wide_table_is_neither_cut_nor_wrapped(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    long = "a word " * 100
    lines = table([[long + "end", "0.5"]], title=long, note=long).lines()
    assert len(lines) == 4
    assert lines[2] == f"{long}end   0.5"


def test_markup_and_control_characters_are_shown_as_they_are() -> None:
    lines = table([["[bold]a:smile:\n", "\x1b[31m0.5"]]).lines()
    assert lines[1:] == ["[bold]a:smile:\\n  \\x1b[31m0.5"]


def test_a_table_without_rows_has_its_headings() -> None:
    assert table([], title="Cost", note="Nothing.").lines() == ["Cost", "model  mIoU", "Nothing."]


def test_markdown_has_a_rule_that_aligns_and_escaped_bars() -> None:
    assert table([["a|b", "0.5"]], title="Cost", note="A note.").markdown() == [
        "**Cost**",
        "",
        "| model | mIoU |",
        "| --- | ---: |",
        "| a\\|b | 0.5 |",
        "",
        "A note.",
    ]
    assert table([]).markdown() == ["| model | mIoU |", "| --- | ---: |"]
