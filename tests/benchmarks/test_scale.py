from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Result of all sections at a tiny size, where it is chance if a curve is flat: exit code 0 or 1."""
    out = tmp_path_factory.mktemp("scale")
    sizes = ["--rows", "92", "--manifest-rows", "2000", "--start-rows", "200", "--student", "light"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", *sizes, "--out", str(out), "--json"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout, done.stderr
    return {**json.loads(done.stdout), "text": done.stderr}


@pytest.mark.long
def test_every_soak_gives_a_curve_of_all_its_images(measured: dict[str, Any]) -> None:
    assert measured["precompute"]["result"]["done"] == 276
    assert measured["precompute"]["points"][-1]["images"] == 276
    assert set(measured["precompute"]["points"][0]["resident"]) == {"coordinator", "worker 0"}
    assert measured["distill"]["images"] >= 92
    for what in ("precompute", "distill"):
        for point in measured[what]["points"]:
            assert min(point["resident"].values()) > 50 * 2**20
            assert min(point["descriptors"].values()) >= 3
            assert point["wall"] > 0


@pytest.mark.long
def test_the_large_store_is_counted_inspected_and_resumed(measured: dict[str, Any]) -> None:
    lines = measured["manifest"]["lines"]
    assert lines[0]["found"] == {"done": 1408, "failed": 0, "pending": 592}
    assert lines[2]["found"] == {"rows": {"done": 1408, "pending": 592, "failed": 0}, "problems": 0}
    assert lines[4]["found"] == {"pending_shards": 10, "records": 64}
    assert lines[6]["found"] == lines[2]["found"]["rows"]


@pytest.mark.long
def test_starting_is_measured_for_a_new_store_a_resumed_one_and_a_student(measured: dict[str, Any]) -> None:
    assert [line["what"] for line in measured["start"]["lines"]] == [
        "precompute, new",
        "precompute, resumed",
        "distill",
    ]


@pytest.mark.long
def test_the_figures_are_printed_with_what_they_were_measured_on(measured: dict[str, Any]) -> None:
    for word in ("processor:", "torch:", "distributed:", "manifest of 2,000 rows", "s of 3"):
        assert word in measured["text"]
