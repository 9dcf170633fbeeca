from __future__ import annotations

from benchmarks.support.profiler import OTHER, group_of


def test_an_operator_belongs_to_one_group() -> None:
    assert group_of("aten::convolution_backward") == "convolution backward"
    assert group_of("aten::mkldnn_convolution") == "convolution forward"
    assert group_of("aten::native_batch_norm_backward") == "batch norm"
    assert group_of("aten::gelu_backward") == "GELU"
    assert group_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert group_of("aten::addmm") == "matrix products"
    assert group_of("Optimizer.step#AdamW.step") == "optimizer and clipping"
    assert group_of("aten::erfinv") == OTHER
