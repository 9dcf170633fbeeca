"""The student's benchmark runs on images too small for MobileSAM's code, and says so."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from benchmarks.support.profiler import OTHER, group_of
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
    assert "1024 pixels alone" in speeds[0]["sides"]
    assert 0 <= wait["value"] <= 1
    assert wait["target"] == 0.01
    assert any(note.startswith("ours float32: ") for note in found["notes"])
    assert any(note.startswith("  convolution backward: ") for note in found["notes"])


def test_an_operator_belongs_to_one_group() -> None:
    assert group_of("aten::convolution_backward") == "convolution backward"
    assert group_of("aten::mkldnn_convolution") == "convolution forward"
    assert group_of("aten::native_batch_norm_backward") == "batch norm"
    assert group_of("aten::gelu_backward") == "GELU"
    assert group_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert group_of("aten::addmm") == "matrix products"
    assert group_of("Optimizer.step#AdamW.step") == "optimizer and clipping"
    assert group_of("aten::erfinv") == OTHER
