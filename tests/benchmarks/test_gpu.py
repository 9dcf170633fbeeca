"""benchmarks.gpu: one line without a GPU, and the same code on a CPU, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_ends_in_one_line() -> None:
    done = _run("--write-docs")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("no GPU that torch ")


@pytest.mark.long
def test_each_part_runs_on_a_cpu_in_small() -> None:
    parts = ("vit_b", "student", "precompute", "distill")
    done = _run("--device", "cpu", "--json", *(word for part in parts for word in ("--only", part)))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    names = [figure["what"] for figure in found["figures"]]
    assert len(names) == 6
    assert all(figure["value"] is not None for figure in found["figures"])
    (near,) = [note for note in found["notes"] if note.startswith("vit_b float32: cosine ")]
    assert float(near.split()[3].rstrip(",")) > 0.99999


def test_what_the_time_does_not_suffice_for_is_said() -> None:
    done = _run("--device", "cpu", "--json", "--only", "vit_b", "--minutes", "-1")
    assert json.loads(done.stdout)["notes"] == ["vit_b: not begun, 0.0 minutes were gone"]
