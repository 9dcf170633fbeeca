"""Cost of students against counts by hand."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn

from mobilesam.distill import STUDENTS, DistillError, students_lines, students_table
from mobilesam.distill.loss.coupled import MaskOptions
from mobilesam.distill.loss.masks import MaskLoss
from mobilesam.distill.students.cost import (
    count_macs,
    default_micro_batch,
    measure_mask_bytes,
    measure_training_bytes,
)
from mobilesam.distill.students.registry import StudentInfo, outline_student, student_info
from mobilesam.sam import SamError


def test_multiplications_of_a_small_network_are_those_counted_by_hand() -> None:
    with torch.device("meta"):
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 16 x 16 cells, 8 * 3 * 9 each
            nn.Conv2d(8, 8, 3, padding=1, groups=8),  # 16 x 16 cells, 8 * 9 each
            nn.Flatten(2),
            nn.Linear(256, 10),  # 8 rows, 256 * 10 each
        )
    assert count_macs(network, 32) == 256 * (8 * 3 * 9) + 256 * (8 * 9) + 8 * 256 * 10


def test_tiny_vit_at_1024_takes_the_published_multiplications() -> None:
    student = outline_student(student_info("tiny_vit"), 1024)
    assert count_macs(student, 1024) == pytest.approx(38.8e9, rel=0.005)


def test_deits_attention_is_counted() -> None:
    pytest.importorskip("timm")
    macs = count_macs(outline_student(student_info("deit_tiny"), 256), 256)
    tokens, width = 256, 192
    block = tokens * width * (3 * width + width + 8 * width) + 2 * tokens * tokens * width
    neck = tokens * (width * 256 + 9 * 256 * 256)
    assert macs == 12 * block + tokens * width * 3 * 256 + neck


def test_the_table_has_a_row_for_each_student() -> None:
    pytest.importorskip("timm")
    rows = students_table(["tiny_vit", "deit_tiny", "timm:resnet18"], 64)
    assert json.loads(json.dumps(rows)) == rows
    assert [row["name"] for row in rows] == ["tiny_vit", "deit_tiny", "timm:resnet18"]
    for row in rows:
        assert row["error"] is None
        assert row["milliseconds"] > 0
        assert row["macs"] > 0
    assert rows[0]["parameters"] == 5_743_892
    lines = students_lines(rows)
    assert len(lines) == 4
    assert "5,743,892" in lines[1]
    assert "38" not in lines[0]


def test_all_fixed_students_are_listed_where_none_is_named() -> None:
    assert [row["name"] for row in students_table(image_size=64)] == list(STUDENTS)


def test_a_student_that_cannot_be_built_has_an_error_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    rows = students_table(["tiny_vit", "deit_tiny", "nobody"], 64)
    assert rows[0]["error"] is None
    assert "mobilesam[students]" in rows[1]["error"]
    assert rows[1]["parameters"] is rows[1]["macs"] is rows[1]["milliseconds"] is None
    assert "unknown student" in rows[2]["error"]
    assert "mobilesam[students]" in students_lines(rows)[2]


@pytest.mark.parametrize("image_size", [0, -64, 100])
def test_an_image_size_that_is_no_multiple_of_16_is_refused(image_size: int) -> None:
    with pytest.raises(DistillError, match=str(image_size)):
        students_table(["tiny_vit"], image_size)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(SamError, match="abacus"):
        students_table(["tiny_vit"], 64, device="abacus")


def test_measured_memory_is_that_measured_by_hand_for_tiny_vit() -> None:
    info = STUDENTS["tiny_vit"]
    assert info.training_bytes is not None
    found = measure_training_bytes(info, 1024, "float32")
    assert 0.5 < found / info.training_bytes["float32"] < 2


def test_measured_memory_is_that_counted_by_hand_for_one_convolution() -> None:
    def build(*_: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))

    info = StudentInfo(name="small", summary="", build=build)
    # Kept: the pixels, and what ReLU gives, which the second convolution keeps too.
    assert measure_training_bytes(info, 1024, "float32") == 4 * 1024 * 1024 * (3 + 8)


def test_on_a_gpu_the_measured_memory_decides_the_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilesam.distill.students.cost.measure_training_bytes", lambda *_: 1_000_000_000)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (10_000_000_000, 0))
    info = student_info("tiny_vit_11m")
    assert default_micro_batch(info, 64, 1024, "float32", torch.device("cuda")) == 8
    assert default_micro_batch(info, 64, 512, "float32", torch.device("cuda")) == 32


def test_masks_take_memory_by_objects_and_rounds() -> None:
    def masks(objects: int, rounds: int) -> MaskOptions:
        return MaskOptions(mask_loss=MaskLoss(rounds=rounds), objects=objects, mse_weight=0.0, region="all")

    one, more, rounds = (measure_mask_bytes(masks(*asked), 64) for asked in ((2, 1), (4, 1), (2, 2)))
    assert 1.5 * one < more < 2.5 * one
    assert 1.5 * one < rounds < 2.5 * one


def test_masks_make_a_gpus_micro_batch_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilesam.distill.students.cost.measure_mask_bytes", lambda *_: 1_600_000_000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10_500_000_000, 0))
    asked = (student_info("tiny_vit"), 64, 1024, "float32", torch.device("cuda"))
    masks = MaskOptions(mask_loss=MaskLoss(), objects=2, mse_weight=0.0, region="all")
    assert default_micro_batch(*asked) == 3
    assert default_micro_batch(*asked, masks=masks) == 2


@pytest.mark.parametrize(("free_gb", "expected"), [(16, 2), (8, 1), (1, 1)])
def test_masks_leave_a_cpu_one_image_where_its_memory_holds_no_two(
    monkeypatch: pytest.MonkeyPatch, free_gb: int, expected: int
) -> None:
    monkeypatch.setattr("mobilesam.distill.students.cost.measure_mask_bytes", lambda *_: 2_000_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free_gb * 10**9))
    masks = MaskOptions(mask_loss=MaskLoss(), objects=8, mse_weight=0.0, region="all")
    asked = (student_info("tiny_vit"), 8, 1024, "float32", torch.device("cpu"))
    assert default_micro_batch(*asked, masks=masks) == expected


@pytest.mark.parametrize(
    ("free_gb", "batch_size", "image_size", "precision", "expected"),
    [
        (64, 8, 1024, "bfloat16", 8),
        (16, 8, 1024, "bfloat16", 4),
        (16, 8, 1024, "float32", 2),
        (16, 8, 256, "float32", 8),
        (16, 1, 256, "float32", 1),
        (1, 8, 1024, "float32", 1),
    ],
)
def test_a_cpus_micro_batch_is_what_a_part_of_its_free_memory_holds(
    monkeypatch: pytest.MonkeyPatch,
    free_gb: int,
    batch_size: int,
    image_size: int,
    precision: str,
    expected: int,
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free_gb * 10**9))
    asked = (STUDENTS["tiny_vit"], batch_size, image_size, precision, torch.device("cpu"))
    assert default_micro_batch(*asked) == expected


@pytest.mark.parametrize(
    ("free_gb", "image_size", "precision", "expected"),
    [
        (80, 1024, "bfloat16", 42),
        (8, 1024, "bfloat16", 4),
        (8, 1024, "float32", 2),
        (1, 1024, "float32", 1),
        (8, 256, "float32", 39),
    ],
)
def test_a_gpus_micro_batch_is_what_its_free_memory_holds(
    monkeypatch: pytest.MonkeyPatch, free_gb: int, image_size: int, precision: str, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gb * 10**9, 80 * 10**9))
    found = default_micro_batch(STUDENTS["tiny_vit"], 64, image_size, precision, torch.device("cuda"))
    assert found == expected


def test_the_table_shows_the_students_with_half_of_the_image_size_too() -> None:
    (row,) = students_table(["tiny_vit"], 128)
    small = row["small"]
    assert (row["student_size"], small["student_size"]) == (128, 64)
    assert small["parameters"] == row["parameters"] + 128 * 256
    assert (
        small["macs"] == count_macs(outline_student(student_info("tiny_vit"), 128, 64), 64) < row["macs"] / 2
    )
    heading, line = students_lines([row])
    assert "MACs at 128" in heading
    assert "ms at 64" in heading
    assert f"{small['macs'] / 1e9:.3g} G" in line
    (other,) = students_table(["tiny_vit"], 128, student_size=32)
    assert other["small"]["student_size"] == 32


def test_a_smaller_input_takes_less_memory() -> None:
    info = STUDENTS["tiny_vit"]
    whole, half = (measure_training_bytes(info, 256, "float32", student_size=size) for size in (256, 128))
    assert 0.2 * whole < half < 0.5 * whole


def test_the_known_memory_is_not_that_of_a_smaller_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilesam.distill.students.cost.measure_training_bytes", lambda *_: 500_000_000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10_000_000_000, 0))
    asked = (STUDENTS["tiny_vit"], 64, 1024, "float32", torch.device("cuda"))
    assert default_micro_batch(*asked, student_size=512) == 16
    assert default_micro_batch(*asked, student_size=1024) == 3
