from __future__ import annotations

import pytest
import torch

from mobilesam.distill.data.sampler import split_batches
from mobilesam.distill.loss.decoupled import decoupled_loss, loss_elements


@pytest.fixture
def embeddings() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 8, 4, 4, dtype=torch.float64).float()
    valid = torch.zeros(5, 4, 4, dtype=torch.bool)
    for image, rows in enumerate([4, 1, 3, 2, 4]):
        valid[image, :rows] = True
    return student, teacher, valid


def test_the_loss_over_all_cells_is_torchs_mse(embeddings: tuple[torch.Tensor, ...]) -> None:
    student, teacher, valid = embeddings
    loss = decoupled_loss(student, teacher, valid, loss_elements(valid, 8, "all"), "all")
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(student, teacher))


def test_the_loss_over_valid_cells_is_torchs_mse_without_padding(
    embeddings: tuple[torch.Tensor, ...],
) -> None:
    student, teacher, valid = embeddings
    loss = decoupled_loss(student, teacher, valid, loss_elements(valid, 8, "valid"), "valid")
    chosen = valid[:, None].expand_as(student)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(student[chosen], teacher[chosen]))


@pytest.mark.parametrize("region", ["all", "valid"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 5])
def test_losses_of_micro_batches_add_up_to_the_batchs_with_a_short_last_one(
    embeddings: tuple[torch.Tensor, ...], region: str, micro_batch: int
) -> None:
    student, teacher, valid = embeddings
    elements = loss_elements(valid, 8, region)
    whole_input, parts_input = (student.clone().requires_grad_() for _ in range(2))
    whole = decoupled_loss(whole_input, teacher, valid, elements, region)
    whole.backward()
    total = torch.zeros(())
    for places in split_batches(range(5), micro_batch):
        part = decoupled_loss(parts_input[places], teacher[places], valid[places], elements, region)
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(parts_input.grad, whole_input.grad)


def test_values_in_padding_reach_neither_the_valid_loss_nor_its_gradient(
    embeddings: tuple[torch.Tensor, ...],
) -> None:
    student, teacher, valid = embeddings
    spoiled = student.masked_fill(~valid[:, None], float("inf")).requires_grad_()
    loss = decoupled_loss(spoiled, teacher, valid, loss_elements(valid, 8, "valid"), "valid")
    loss.backward()
    assert torch.isfinite(loss)
    assert spoiled.grad is not None
    assert not spoiled.grad.masked_select(~valid[:, None]).any()
