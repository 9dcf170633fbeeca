"""Batch norms in training: statistics of the micro-batch, or running ones; their momentum."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from mobilesam.distill.batch_norm import BatchNorms, momentum, single_value_norms
from mobilesam.distill.students.registry import STUDENTS, StudentInfo
from mobilesam.sam.modeling.tiny_vit import TinyViT


def test_early_batch_norm_statistics_are_plain_averages_then_moving_ones() -> None:
    student, reference = nn.Sequential(nn.BatchNorm2d(3)), nn.BatchNorm2d(3)
    norms = BatchNorms(student, "tiny_vit", 64, 5)
    batches = torch.randn(14, 5, 3, 4, 4) * 4 + 2
    for count, batch in enumerate(batches, start=1):
        norms.prepare(count, frozen=False, images=5)
        student(batch).sum().backward()
        norms.settle()
        reference.momentum = momentum(count)
        reference(batch)
        torch.testing.assert_close(student[0].running_mean, reference.running_mean)
        torch.testing.assert_close(student[0].running_var, reference.running_var)
        if count == 7:
            torch.testing.assert_close(student[0].running_mean, batches[:7].mean(dim=(0, 1, 3, 4)))
    assert momentum(10) == momentum(10_000) == 0.1
    assert student[0].momentum == 0.1


def test_frozen_statistics_stay_as_they_are() -> None:
    student = nn.Sequential(nn.BatchNorm2d(3))
    norms = BatchNorms(student, "tiny_vit", 64, 5)
    norms.prepare(1, frozen=True, images=5)
    student(torch.randn(5, 3, 4, 4)).sum().backward()
    norms.settle()
    assert torch.equal(student[0].running_mean, torch.zeros(3))
    assert torch.equal(student[0].running_var, torch.ones(3))


class Squeezed(nn.Module):
    """Convolution, batch norm over the map, gate with a batch norm over one pooled value."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Sequential(nn.Conv2d(3, 256, 16, 16), nn.BatchNorm2d(256))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(256), nn.Sigmoid())

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        map_BCHW = self.map(pixels_BCHW)
        return map_BCHW * self.gate(map_BCHW)


@pytest.fixture
def squeezed(monkeypatch: pytest.MonkeyPatch) -> str:
    info = StudentInfo(name="squeezed", summary="", build=lambda *_: Squeezed())
    monkeypatch.setitem(STUDENTS, "squeezed", info)
    return "squeezed"


def test_the_norms_over_one_value_per_image_are_found(squeezed: str) -> None:
    assert single_value_norms(squeezed, 64) == {"gate.1"}
    assert single_value_norms(squeezed, 16) == {"gate.1", "map.1"}
    assert single_value_norms("tiny_vit", 64) == set()


@pytest.mark.parametrize(
    ("images", "frozen", "training"),
    [(2, False, {"map.1", "gate.1"}), (1, False, {"map.1"}), (2, True, set()), (1, True, set())],
)
def test_one_image_is_normalised_by_running_statistics_where_it_has_one_value(
    squeezed: str, images: int, frozen: bool, training: set[str]
) -> None:
    student = Squeezed().train()
    before = student.gate[1].running_mean.clone()
    BatchNorms(student, squeezed, 64, 2).prepare(3, frozen=frozen, images=images)
    norms = {path: m for path, m in student.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {path for path, norm in norms.items() if norm.training} == training
    student(torch.randn(images, 3, 64, 64)).sum().backward()
    assert torch.equal(before, student.gate[1].running_mean) == ("gate.1" not in training)


def test_norms_that_never_see_two_values_are_told_once_with_the_mend(
    squeezed: str, caplog: pytest.LogCaptureFixture
) -> None:
    for micro_batch, told in ((1, 1), (2, 0)):
        caplog.clear()
        norms = BatchNorms(Squeezed(), squeezed, 64, micro_batch)
        with caplog.at_level(logging.WARNING):
            for step in (1, 2):
                norms.prepare(step, frozen=False, images=1)
        assert len(caplog.messages) == told
    norms = BatchNorms(Squeezed(), squeezed, 64, 1)
    norms.prepare(1, frozen=False, images=1)
    assert "squeezed has 1 batch norm over one value" in caplog.text
    assert "--batch-size 2" in caplog.text


def test_a_map_of_one_value_is_found_by_the_size_of_the_students_own_input() -> None:
    pytest.importorskip("timm")
    assert single_value_norms("timm:resnet18", 64) == set()
    assert "backbone.layer4.0.bn1" in single_value_norms("timm:resnet18", 64, 32)


def test_a_student_is_compiled_once_for_all_steps_of_training() -> None:
    student, counter = TinyViT(64), CompileCounter()
    norms = BatchNorms(student, "tiny_vit", 64, 2)
    student.compile(backend=counter)
    for step in range(1, 13):
        norms.prepare(step, frozen=False, images=2)
        student(torch.randn(2, 3, 64, 64)).sum().backward()
        norms.settle()
    assert counter.frame_count == 1
