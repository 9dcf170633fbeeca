from __future__ import annotations

import numpy as np
import pytest
import torch

from mobilesam.distill.data.sampler import split_batches
from mobilesam.distill.loss.base import BatchTotals
from mobilesam.distill.loss.decoupled import decoupled_loss, loss_elements
from mobilesam.distill.recipe import LOSSES


@pytest.fixture
def embeddings() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 8, 4, 4, dtype=torch.float64).float()
    valid = torch.zeros(5, 4, 4, dtype=torch.bool)
    for image, rows in enumerate([4, 1, 3, 2, 4]):
        valid[image, :rows] = True
    return student, teacher, valid


def totals(valid: torch.Tensor, region: str) -> BatchTotals:
    return BatchTotals(elements=loss_elements(valid, 8, region), images=len(valid))


def test_the_loss_over_all_cells_is_torchs_mse(embeddings: tuple[torch.Tensor, ...]) -> None:
    student, teacher, valid = embeddings
    loss = decoupled_loss(student, teacher, valid, totals(valid, "all"), region="all")
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(student, teacher))


def test_the_loss_over_valid_cells_is_torchs_mse_without_padding(
    embeddings: tuple[torch.Tensor, ...],
) -> None:
    student, teacher, valid = embeddings
    loss = decoupled_loss(student, teacher, valid, totals(valid, "valid"), region="valid")
    chosen = valid[:, None].expand_as(student)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(student[chosen], teacher[chosen]))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("region", ["all", "valid"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 5])
def test_losses_of_micro_batches_add_up_to_the_batchs_with_a_short_last_one(
    embeddings: tuple[torch.Tensor, ...], kind: str, region: str, micro_batch: int
) -> None:
    student, teacher, valid = embeddings
    whole_input, parts_input = (student.clone().requires_grad_() for _ in range(2))
    of_batch = totals(valid, region)
    whole = decoupled_loss(whole_input, teacher, valid, of_batch, region=region, kind=kind)
    whole.backward()
    total = torch.zeros(())
    for places in split_batches(range(5), micro_batch):
        part = decoupled_loss(
            parts_input[places], teacher[places], valid[places], of_batch, region=region, kind=kind
        )
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(parts_input.grad, whole_input.grad)


@pytest.mark.parametrize("region", ["all", "valid"])
@pytest.mark.parametrize("kind", LOSSES)
def test_each_loss_is_its_formula_cell_by_cell(
    embeddings: tuple[torch.Tensor, ...], kind: str, region: str
) -> None:
    student, teacher, valid = embeddings
    per_image = []
    for image in range(5):
        cells = []
        for y in range(4):
            for x in range(4):
                if region == "valid" and not valid[image, y, x]:
                    continue
                s, t = (
                    student[image, :, y, x].numpy().astype(float),
                    teacher[image, :, y, x].numpy().astype(float),
                )
                error = s - t
                cells.append(
                    {
                        "mse": np.mean(error**2),
                        "huber": np.mean(np.where(abs(error) < 1, error**2 / 2, abs(error) - 0.5)),
                        "mse_cosine": error @ error + 1 - s @ t / np.sqrt((s @ s) * (t @ t)),
                        "root": error @ error,
                    }[kind]
                )
        per_image.append(np.array(cells))
    wanted = (
        np.mean([np.sqrt(c.mean()) for c in per_image])
        if kind == "root"
        else np.concatenate(per_image).mean()
    )
    loss = decoupled_loss(student, teacher, valid, totals(valid, region), region=region, kind=kind)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_values_in_padding_reach_neither_the_valid_loss_nor_its_gradient(
    embeddings: tuple[torch.Tensor, ...], kind: str
) -> None:
    student, teacher, valid = embeddings
    spoiled = student.masked_fill(~valid[:, None], float("inf")).requires_grad_()
    loss = decoupled_loss(spoiled, teacher, valid, totals(valid, "valid"), region="valid", kind=kind)
    loss.backward()
    assert torch.isfinite(loss)
    assert spoiled.grad is not None
    assert not spoiled.grad.masked_select(~valid[:, None]).any()
