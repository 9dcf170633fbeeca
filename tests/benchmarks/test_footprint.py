"""The footprint benchmark runs, and compares whole processes."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from benchmarks.footprint import main


@pytest.mark.long
def test_it_prints_both_peaks_of_both_commands() -> None:
    result = CliRunner().invoke(main, ["--few", "32", "--many", "48", "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)["figures"]
    assert [figure["what"].split(":")[0] for figure in figures] == [
        "peak memory of precompute",
        "peak memory of distill",
    ]
    # A few rows more are nothing beside what a process needs at all: the two can't be far apart.
    assert all(0.8 < figure["value"] < 1.25 for figure in figures)
