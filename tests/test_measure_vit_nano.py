"""examples/measure_vit_nano.py: what it says of masks whose IoU is known."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield importlib.import_module("measure_vit_nano")


class KnowsTheObjects:
    """In SamPredictor's place: an answer with nothing, half and all of the object under a point, the half picked."""

    def __init__(self, example: ModuleType) -> None:
        self.example, self.index = example, -1

    def set_image(self, pixels_HWC: np.ndarray) -> None:
        self.index += 1
        self.masks = self.example.generate(self.example.HELD_OUT_SEED, self.index, 64).masks
        assert pixels_HWC.shape[:2] == self.masks[0].shape

    def predict(
        self, point: np.ndarray, label: np.ndarray, multimask_output: bool = True
    ) -> tuple[np.ndarray, np.ndarray, None]:
        ((x, y),) = point.astype(int)
        assert label.tolist() == [1]
        (whole_HW,) = (mask_HW for mask_HW in self.masks if mask_HW[y, x])
        half_HW = whole_HW & (np.cumsum(whole_HW).reshape(whole_HW.shape) <= whole_HW.sum() // 2)
        if not multimask_output:
            return whole_HW[None], np.array([1.0]), None
        return np.stack([np.zeros_like(whole_HW), half_HW, whole_HW]), np.array([0.1, 0.9, 0.5]), None


def test_picked_best_and_single_are_told_apart(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "SamPredictor", lambda _: KnowsTheObjects(example))
    found = example.measure(64, 2)
    objects = sum(len(example.generate(example.HELD_OUT_SEED, index, 64).masks) for index in range(2))
    assert set(found) == {"middle", "random"}
    for measured in found.values():
        assert (measured.pictures, measured.objects) == (2, objects)
        assert measured.best == measured.single == 1
        assert 0.4 < measured.picked <= 0.5
