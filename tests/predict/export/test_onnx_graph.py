from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, nn

from mobilesam.predict import PredictError
from mobilesam.predict.export.onnx_graph import (
    IR_VERSION,
    OPSET,
    Session,
    relative_difference,
    to_onnx,
    unusual_parts,
)


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.tensor([1.0, float("nan"), 3.0])])
def test_another_shape_or_nan_is_an_infinite_difference(wrong: Tensor) -> None:
    assert relative_difference(wrong, torch.tensor([1.0, 2.0, 3.0])) == float("inf")


def test_the_difference_is_relative_to_the_greatest_value() -> None:
    wanted = torch.tensor([1.0, -4.0])
    assert relative_difference(wanted + torch.tensor([0.5, 0.0]), wanted) == pytest.approx(0.125)


class _Attention(nn.Module):
    """Attention of an image with itself, its keys shut or biased by a mask."""

    def __init__(self, mask: Tensor | None, **options: object) -> None:
        super().__init__()
        self.mask, self.options = mask, options

    def forward(self, x_BKND: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            x_BKND, x_BKND * 2, x_BKND - 1, attn_mask=self.mask, **self.options
        )


@pytest.mark.parametrize("mask", [None, torch.randn(6, 6), torch.rand(6, 6) > 0.4])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}])
def test_attention_is_torchs_with_any_mask_and_scale(mask: Tensor | None, options: dict[str, float]) -> None:
    if mask is not None and mask.dtype == torch.bool:
        mask[:, 0] = True  # no row without keys
    network = _Attention(mask, **options)
    x_BKND = torch.randn(3, 2, 6, 8)
    proto = to_onnx(network, {"x": x_BKND}, ["y"], {"x": {0: "batch"}}, "attention")
    assert (proto.ir_version, proto.opset_import[0].version) == (IR_VERSION, OPSET)
    (found,) = Session(proto.SerializeToString()).run({"x": x_BKND})
    assert relative_difference(found, network(x_BKND)) < 1e-6


def test_causal_attention_is_refused_rather_than_translated_wrongly() -> None:
    with pytest.raises(PredictError, match="torch can't export a network to ONNX"):
        to_onnx(_Attention(None, is_causal=True), {"x": torch.randn(3, 2, 6, 8)}, ["y"], {}, "a network")


class _Divided(nn.Module):
    def forward(self, x_N: Tensor, y_N: Tensor) -> Tensor:
        return torch.div(x_N, y_N, rounding_mode="trunc")


def test_integers_are_divided_exactly() -> None:
    x_N, y_N = torch.tensor([2**31 - 1, -7, 7, 2**40 + 1]), torch.tensor([2, 2, -2, 3])
    proto = to_onnx(_Divided(), {"x": x_N, "y": y_N}, ["z"], {}, "a division")
    (found,) = Session(proto.SerializeToString()).run({"x": x_N, "y": y_N})
    assert found.tolist() == [(2**31 - 1) // 2, -3, -3, (2**40 + 1) // 3]


def _graph(nodes: list[onnx.NodeProto], **options: object) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    )


def test_what_other_runtimes_may_lack_is_named() -> None:
    plain = _graph([helper.make_node("Relu", ["x"], ["y"])])
    assert unusual_parts(plain) == []
    double = _graph(
        [
            helper.make_node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE),
            helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT),
        ]
    )
    assert unusual_parts(double) == ["values of type DOUBLE"]
    own = _graph([helper.make_node("Special", ["x"], ["y"], domain="own")])
    assert unusual_parts(own) == ["operators of own"]
    outside = _graph([helper.make_node("Add", ["x", "w"], ["y"])])
    outside.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "w"))
    outside.graph.initializer[0].data_location = TensorProto.EXTERNAL
    assert unusual_parts(outside) == ["weights in another file"]
