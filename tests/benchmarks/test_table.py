"""Figures as JSON become tables between a document's markers, and nothing else of it changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.table import filled, main, markdown

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"

FIGURES = [
    {"what": "ours / theirs", "value": 2.6543, "target": 2.6, "at_least": True, "sides": "5.3 / 2 images/s"},
    {"what": "bytes", "value": 0.52, "target": 0.51, "at_least": False, "sides": "52 / 100 MiB"},
    {"what": "bfloat16", "value": None, "target": 8.0, "at_least": True, "sides": "only emulated"},
]
REACHED = [True, False, None]


def _result(processor: str = "a fast one", notes: tuple[str, ...] = ()) -> dict[str, object]:
    lines = [figure | {"reached": reached} for figure, reached in zip(FIGURES, REACHED, strict=True)]
    return {"machine": {"processor": processor, "torch": "2.6"}, "figures": lines, "notes": list(notes)}


def test_a_figure_is_a_line_with_value_target_verdict_and_both_sides() -> None:
    lines = markdown({"student": _result()}).splitlines()
    assert lines[0] == "processor a fast one; torch 2.6."
    assert "| ours / theirs | 2.65 | >= 2.6 | reached | 5.3 / 2 images/s |" in lines
    assert "| bytes | 0.52 | <= 0.51 | **missed** | 52 / 100 MiB |" in lines
    assert "| bfloat16 |  | >= 8 | not measured | only emulated |" in lines


def test_the_machine_is_told_once_where_all_ran_on_it_and_anew_where_not() -> None:
    same = markdown({"a": _result(), "b": _result()})
    assert same.count("processor") == 1
    other = markdown({"a": _result(), "b": _result("another")})
    assert other.index("a fast one") < other.index("benchmarks.a") < other.index("another")


def test_notes_are_a_list_that_markdown_leaves_as_it_is() -> None:
    text = markdown({"a": _result(notes=("", "read_only: a|b", "  GELU: 10%"))})
    assert text.splitlines()[-2:] == ["- read\\_only: a\\|b", "- GELU: 10%"]


def test_what_is_outside_the_markers_stays() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = filled(text, "new")
    assert once == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert filled(once, "new") == once


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{END}{END}"])
def test_a_document_without_one_pair_of_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="put them in"):
        filled(text, "new")


def test_the_command_fills_the_document_and_refuses_what_is_missing(tmp_path: Path) -> None:
    document, results = tmp_path / "page.md", tmp_path / "results"
    results.mkdir()
    options = ["--results", str(results), "--document", str(document)]
    refused = CliRunner().invoke(main, options)
    assert (refused.exit_code, "make bench" in refused.output) == (3, True)
    (results / "store.json").write_text(json.dumps(_result()))
    refused = CliRunner().invoke(main, options)
    assert (refused.exit_code, str(document) in refused.output) == (3, True)
    document.write_text(f"text {BEGIN}{END}")
    assert CliRunner().invoke(main, options).exit_code == 0
    assert "benchmarks.store" in document.read_text()
