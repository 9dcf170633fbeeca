"""The table of students of smaller inputs, from a run of a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.student_size import main, write_tables


@pytest.mark.long
def test_it_compares_the_whole_input_with_half_of_it_and_resumes(tmp_path: Path) -> None:
    small = [
        "--out", str(tmp_path), "--image-size", "64", "--pictures", "8", "--test-pictures", "2", "--steps", "2",
        "--seeds", "0,1", "--rounds", "1", "--student", "timm:test_resnet", "--json",
    ]  # fmt: skip
    first, again = (CliRunner().invoke(main, small) for _ in range(2))
    assert first.exit_code == again.exit_code == 0, first.output + again.output
    found, kept = (json.loads(result.stdout.splitlines()[-1]) for result in (first, again))
    assert [one["student_size"] for one in found["sizes"]] == [64, 32]
    assert found["sizes"][0]["macs"] > 1.5 * found["sizes"][1]["macs"]
    assert len(found["runs"]) == 4
    assert found["runs"] == kept["runs"]
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- sizes -->\nold\n<!-- /sizes -->\nafter\n")
    write_tables(tmp_path, document)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- /sizes -->\nafter\n")
    assert "old" not in text
    assert text.count("\n| 64 |") == text.count("\n| 32 |") == 1
