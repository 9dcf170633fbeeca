"""The student's benchmark runs on images too small for MobileSAM's code, and says so."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from benchmarks.student import main


# Each step, the store and the run start a Python with torch.
@pytest.mark.long
def test_it_measures_our_step_and_the_wait_for_data_and_tells_why_the_rest_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the processes that it starts
    small = ["--image-size", "64", "--rounds", "1", "--epochs", "1", "--device", "cpu", "--profile", "--json"]
    result = CliRunner().invoke(main, small)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    *speeds, wait = found["figures"]
    assert [figure["value"] for figure in speeds] == [None, None]
    assert "takes only 1024 pixels" in speeds[0]["sides"]
    assert 0 <= wait["value"] <= 1
    assert wait["target"] == 0.01
    assert any(note.startswith("ours float32: ") for note in found["notes"])
    assert any(note.startswith("  convolution backward: ") for note in found["notes"])
