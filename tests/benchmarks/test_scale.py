from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def _benchmark(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m benchmarks.scale` as people do, or some code that imports benchmarks, from the root."""
    command = ["-c", code] if code else ["-m", "benchmarks.scale"]
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything at a tiny size, where whether a curve is flat is chance: exit code 0 or 1."""
    out = tmp_path_factory.mktemp("scale")
    sizes = ["--rows", "92", "--manifest-rows", "2000", "--start-rows", "200", "--student", "light"]
    done = _benchmark(*sizes, "--out", str(out), "--json")
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


def test_a_curve_that_grows_by_more_than_its_noise_is_told_from_a_flat_one() -> None:
    code = """
from benchmarks.support.flatness import judge, line, neighbour_noise
x = list(range(1000, 21000, 1000))
wiggle = [(-1) ** n * (n % 3) for n in range(20)]
noise = neighbour_noise(wiggle)
assert 0.5 < noise < 3, noise
assert judge(x, wiggle, floor=0).flat
assert not judge(x, [w + n for n, w in enumerate(wiggle)], floor=0).flat
assert judge(x, [5.0 - n for n in range(20)], floor=0).flat  # falling is no fault
# Within the floor, but rising all the time.
rising = [0.001 * n for n in x]
assert judge(x, rising, floor=100).flat
assert not judge(x, rising, floor=100, steepest=0.0005).flat
# A rise that has ended.
assert judge(x, [min(n, 5) for n in range(20)], floor=10, steepest=0.0005).flat
slope, error = line(x, [3 * n + 7 for n in x])
assert abs(slope - 3) < 1e-9 and error < 1e-9
"""
    done = _benchmark(code=code)
    assert done.returncode == 0, done.stderr


def test_a_point_takes_the_median_of_memory_the_most_descriptors_and_the_time_of_its_stretch() -> None:
    code = """
from benchmarks.support.sampling import Sample, curve
samples = [Sample(n, 100 + 2 * n, n / 2, {"p": n * n}, {"p": 7 if n == 3 else 5}, n) for n in range(1, 9)]
points = curve(samples, rows=8, points=2)
assert [(p.images, p.resident["p"], p.descriptors["p"]) for p in points] == [(4, 6.5, 7), (8, 42.5, 5)], points
assert [(p.wall, p.processor) for p in points] == [(2.0, 0.5)] * 2, points
assert [p.allocated for p in points] == [2.5, 6.5], points
"""
    done = _benchmark(code=code)
    assert done.returncode == 0, done.stderr


def test_the_most_memory_is_told_anew_after_each_look_and_what_is_allocated_at_any_time() -> None:
    code = """
import numpy as np
from benchmarks.support.memory import allocated, forget_peak, peak_resident
mib = 2**20
before = allocated()
block = np.ones(50 * mib, np.uint8)
assert 49 * mib < allocated() - before < 51 * mib
high = peak_resident()
del block
assert abs(allocated() - before) < mib
assert abs(peak_resident() - high) < mib
forget_peak()
assert 45 * mib < high - peak_resident() < 55 * mib
"""
    done = _benchmark(code=code)
    assert done.returncode == 0, done.stderr
