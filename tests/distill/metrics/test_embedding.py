from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mobilesam.distill import Metrics
from mobilesam.distill.metrics.embedding import merge


def brute_force(
    student: np.ndarray, teacher: np.ndarray, mean: np.ndarray, valid: np.ndarray
) -> dict[str, Any]:
    """Compute every definition over all images at once, on the cells that `valid` (B, H, W) chooses."""
    s = np.moveaxis(student.astype(np.float64), 1, -1)
    t = np.moveaxis(teacher.astype(np.float64), 1, -1)
    m = np.broadcast_to(np.moveaxis(mean.astype(np.float64), 0, -1), t.shape)
    error, spread = (s - t)[valid], t[valid] - t[valid].mean(axis=0)
    cosine = (s * t).sum(-1) / np.sqrt((s**2).sum(-1) * (t**2).sum(-1))
    by_image = np.array([image[cells].mean() for image, cells in zip(cosine, valid, strict=True)])
    return {
        "mse": (error**2).mean(),
        "relative_mse": (error**2).sum() / ((spread**2).sum() or np.nan),
        "cosine": {"mean": by_image.mean(), "p5": np.percentile(by_image, 5), "min": by_image.min()},
        "skill": 1 - (error**2).mean() / ((m - t)[valid] ** 2).mean(),
    }


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    # A mean far from 0 and a different scale for each image: what a careless sum of squares gets wrong.
    teacher = rng.normal(100, np.arange(1, 8).reshape(7, 1, 1, 1), (7, 16, 5, 5)).astype(np.float32)
    valid = np.zeros((7, 5, 5), bool)
    for image, (height, width) in enumerate([(5, 5), (1, 5), (5, 2), (1, 1), (3, 5), (5, 4), (2, 5)]):
        valid[image, :height, :width] = True
    return {
        "student": (teacher + rng.normal(0, 0.7, teacher.shape)).astype(np.float32),
        "teacher": teacher,
        "mean": rng.normal(100, 1, teacher.shape[1:]).astype(np.float32),
        "valid": valid,
    }


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_streamed_metrics_equal_a_brute_force_recomputation(
    arrays: dict[str, np.ndarray], batch: int
) -> None:
    metrics = Metrics(torch.from_numpy(arrays["mean"]))
    for start in range(0, 7, batch):
        part = [
            torch.from_numpy(arrays[name][start : start + batch]) for name in ("student", "teacher", "valid")
        ]
        metrics.update(*part)
    everywhere = brute_force(**{**arrays, "valid": np.ones_like(arrays["valid"])})
    wanted = {**everywhere, **{f"{name}_valid": value for name, value in brute_force(**arrays).items()}}
    result = metrics.result()
    assert result.keys() == wanted.keys()
    for name, value in wanted.items():
        assert result[name] == pytest.approx(value, rel=1e-10), name


def test_each_images_own_numbers_are_those_of_a_set_of_one(arrays: dict[str, np.ndarray]) -> None:
    metrics = Metrics(None)
    metrics.update(*(torch.from_numpy(arrays[name]) for name in ("student", "teacher", "valid")))
    for place, image in enumerate(metrics.per_image):
        alone = {name: arrays[name][place : place + 1] for name in ("student", "teacher", "valid")}
        valid = brute_force(**alone, mean=arrays["mean"])
        full = brute_force(**{**alone, "valid": np.ones_like(alone["valid"])}, mean=arrays["mean"])
        assert (image.mse, image.mse_valid) == pytest.approx((full["mse"], valid["mse"]))
        wanted = (full["cosine"]["mean"], valid["cosine"]["mean"])
        assert (image.cosine, image.cosine_valid) == pytest.approx(wanted)


def test_the_teacher_itself_is_perfect_and_the_mean_has_no_skill(arrays: dict[str, np.ndarray]) -> None:
    teacher, valid = torch.from_numpy(arrays["teacher"]), torch.from_numpy(arrays["valid"])
    mean = teacher.double().mean(dim=0).float()
    perfect, constant = Metrics(mean), Metrics(mean)
    perfect.update(teacher, teacher, valid)
    constant.update(mean.expand_as(teacher), teacher, valid)
    found = perfect.result()
    assert (found["mse"], found["relative_mse"], found["skill"]) == (0, 0, 1)
    assert found["cosine_valid"]["min"] == pytest.approx(1)
    assert constant.result()["skill"] == 0
    assert constant.result()["skill_valid"] == 0


def test_metrics_are_undefined_without_images_and_skill_without_a_mean() -> None:
    metrics = Metrics(None)
    assert metrics.result()["mse"] is None
    assert metrics.result()["cosine"] == {"mean": None, "p5": None, "min": None}
    metrics.update(torch.zeros(1, 2, 1, 1), torch.ones(1, 2, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool))
    assert metrics.result()["mse"] == 1
    assert metrics.result()["skill"] is None
    # One cell has no spread around its own mean, and a zero vector points nowhere.
    assert metrics.result()["relative_mse"] is None
    assert metrics.result()["cosine"]["mean"] == 0


def test_skill_is_undefined_where_the_mean_is_exact() -> None:
    teacher = torch.randn(1, 4, 2, 2)
    metrics = Metrics(teacher[0])
    metrics.update(teacher + 1, teacher, torch.ones(1, 2, 2, dtype=torch.bool))
    assert metrics.result()["skill"] is None


def test_merged_metrics_are_those_of_all_images_at_once() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mean, student, teacher = normal(8, 3, 3), normal(5, 8, 3, 3), 2 + normal(5, 8, 3, 3)
    valid = torch.rand(5, 3, 3, generator=generator) < 0.6
    valid[:, 0, 0] = True
    whole = Metrics(mean)
    whole.update(student, teacher, valid)
    parts = []
    for rows in (slice(0, 2), slice(2, 2), slice(2, 5)):
        part = Metrics(mean)
        part.update(student[rows], teacher[rows], valid[rows])
        parts.append(part.on_cpu())
    merged, expected = merge(parts).result(), whole.result()
    assert merged["cosine"] == pytest.approx(expected["cosine"], rel=1e-14)
    for name in ("mse", "relative_mse", "skill", "mse_valid", "relative_mse_valid", "skill_valid"):
        assert merged[name] == pytest.approx(expected[name], rel=1e-12), name
    assert len(merge(parts).per_image) == 5
    assert merge([]).result()["mse"] is None
