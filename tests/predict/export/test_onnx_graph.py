from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mobilesam.predict.export.onnx_graph import relative_difference


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.tensor([1.0, float("nan"), 3.0])])
def test_another_shape_or_nan_is_an_infinite_difference(wrong: Tensor) -> None:
    assert relative_difference(wrong, torch.tensor([1.0, 2.0, 3.0])) == float("inf")


def test_the_difference_is_relative_to_the_greatest_value() -> None:
    wanted = torch.tensor([1.0, -4.0])
    assert relative_difference(wanted + torch.tensor([0.5, 0.0]), wanted) == pytest.approx(0.125)
