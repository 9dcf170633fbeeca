"""The script that trains vit_nano: that it runs, goes on where it was, and writes what the package reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

from examples.vit_nano import muon, pictures, train
from mobilesam.sam.registry import TEACHERS
from mobilesam.sam.teacher import state_shapes


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """examples/vit_nano/train.py with few pictures, two steps of the first stage and two of the second."""
    monkeypatch.setitem(pictures.PICTURES, 128, 3)
    monkeypatch.setitem(train.BATCHES, 128, (2, 2))
    monkeypatch.setattr(pictures, "VALIDATION_PICTURES", 1)
    monkeypatch.setattr(train, "ENCODER_STEPS", 2)
    monkeypatch.setattr(train, "HEAD_STEPS", 2)
    yield train
    pictures.held_out_pictures.cache_clear()


def test_a_training_goes_through_its_stages_and_is_resumed(training: ModuleType, tmp_path: Path) -> None:
    run = training.Run(tmp_path)
    fresh = {key: value.clone() for key, value in run.sam.state_dict().items()}
    training.train(run, 2, [128], training.LR)
    moved = {key for key, value in run.sam.state_dict().items() if not torch.equal(value, fresh[key])}
    assert moved
    assert all(key.startswith("image_encoder.") for key in moved)

    run = training.Run(tmp_path)
    assert run.step == 2
    training.train(run, 6, [128], 0.0)
    last = (tmp_path / "log.jsonl").read_text().splitlines()[-1]
    assert '"stage": "coupled"' in last
    assert "held_out_picked_iou_128" in last

    training.save(run, tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        saved = {key: file.get_tensor(key) for key in state_shapes(TEACHERS["vit_nano"])}
        assert file.metadata()["step"] == "6"
    assert {key: value.shape for key, value in saved.items()} == state_shapes(TEACHERS["vit_nano"])
    assert all(bool(value.isfinite().all()) for value in saved.values())
    begun = training.Run(tmp_path / "another", tmp_path / "weights.safetensors")
    assert begun.step == 6


@pytest.mark.parametrize("shape", [(3, 64, 32), (3, 32, 64)])
def test_muon_makes_singular_values_alike(training: ModuleType, shape: tuple[int, ...]) -> None:
    matrices_NRC = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(muon._orthogonal(matrices_NRC))
    assert values.min() > 0.5
    assert values.max() < 1.3
