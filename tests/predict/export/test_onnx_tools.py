"""Trial of onnxruntime's tools: what they do to a good file, and the sentence for each thing that doesn't work."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mobilesam.predict.export import onnx_tools
from mobilesam.predict.export.onnx_graph import to_onnx
from mobilesam.predict.export.onnx_tools import tool_limits


class Net(nn.Module):
    """A linear layer whose result is multiplied and divided by a factor, which half precision may not hold."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(16, 8), factor

    def forward(self, x_BC: Tensor) -> Tensor:
        return torch.relu(self.linear(x_BC) * self.factor) / self.factor


def _limits(factor: float) -> list[str]:
    x_BC = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    proto = to_onnx(Net(factor).eval(), {"x": x_BC}, ["y"], {"x": {0: "batch"}}, "a network")
    return tool_limits(proto.SerializeToString(), {"x": x_BC})


def test_a_plain_network_has_no_limits_and_the_root_logger_keeps_its_handlers() -> None:
    before = list(logging.getLogger().handlers), logging.getLogger().manager.disable
    assert _limits(2.0) == []
    assert (list(logging.getLogger().handlers), logging.getLogger().manager.disable) == before


def test_values_beyond_half_precision_are_told() -> None:
    (limit,) = _limits(1e6)
    assert re.fullmatch(
        r"onnxruntime's convert_float_to_float16: a value inside reaches [\d.]+e\+06, beyond half precision's 65504",
        limit,
    )


def test_symbolic_shape_inference_that_stops_is_told_with_the_way_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from onnxruntime.quantization import shape_inference

    right = shape_inference.quant_pre_process

    def stopping(*args: Any, skip_symbolic_shape: bool = False, **kwargs: Any) -> None:
        if not skip_symbolic_shape:
            raise TypeError("'NoneType' object is not iterable")
        right(*args, skip_symbolic_shape=True, **kwargs)

    monkeypatch.setattr(shape_inference, "quant_pre_process", stopping)
    assert _limits(2.0) == [
        "onnxruntime's quant_pre_process: give it skip_symbolic_shape=True, since it can't follow this file's shapes"
    ]


def test_a_tool_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> str | None:
        raise RuntimeError("no kernel\nfor this operator " + "x" * 500)

    monkeypatch.setattr(onnx_tools, "_quantise", failing)
    (limit,) = _limits(2.0)
    assert limit.startswith(
        "onnxruntime's quantize_dynamic: it stops with RuntimeError: no kernel for this operator"
    )
    assert len(limit) < 250
    assert "\n" not in limit


def test_8_bit_weights_that_lose_the_direction_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_tools, "QUANTISED_COSINE", 1.1)
    (limit,) = _limits(2.0)
    assert "quantize_dynamic: the result loads, but its outputs differ much: the cosine" in limit
