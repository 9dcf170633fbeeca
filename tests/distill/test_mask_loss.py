from __future__ import annotations

import math

import pytest
import torch
import torchvision

from mobilesam.distill.loss.masks import MaskLossWeights, dice_loss, focal_loss, mask_iou, prompt_losses


@pytest.fixture
def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = 4 * torch.randn(3, 2, 5, 6, dtype=torch.float64)
    masks = torch.rand(3, 5, 6) < 0.4
    inside = torch.ones(3, 5, 6, dtype=torch.bool)
    inside[1, 3:] = False
    return logits, masks, inside


def test_the_focal_loss_is_torchvisions(sample):
    logits, masks, inside = sample
    found = focal_loss(logits, masks, inside)
    for p in range(3):
        for t in range(2):
            counted = inside[p]
            wanted = torchvision.ops.sigmoid_focal_loss(
                logits[p, t][counted], masks[p][counted].double(), alpha=0.25, gamma=2, reduction="mean"
            )
            torch.testing.assert_close(found[p, t], wanted)


def test_dice_and_iou_are_what_counting_pixel_by_pixel_gives(sample):
    logits, masks, inside = sample
    dice, iou = dice_loss(logits, masks, inside), mask_iou(logits, masks, inside)
    for p in range(3):
        for t in range(2):
            shared = total = both = either = 0.0
            for y in range(5):
                for x in range(6):
                    if inside[p, y, x]:
                        probability = 1 / (1 + math.exp(-float(logits[p, t, y, x])))
                        shared += probability * bool(masks[p, y, x])
                        total += probability + bool(masks[p, y, x])
                        both += bool(logits[p, t, y, x] > 0) and bool(masks[p, y, x])
                        either += bool(logits[p, t, y, x] > 0) or bool(masks[p, y, x])
            assert float(dice[p, t]) == pytest.approx(1 - (2 * shared + 1) / (total + 1))
            assert float(iou[p, t]) == pytest.approx(both / either)


def test_two_empty_masks_agree():
    logits, masks, inside = -torch.ones(1, 1, 4, 4), torch.zeros(1, 4, 4).bool(), torch.ones(1, 4, 4).bool()
    assert mask_iou(logits, masks, inside).tolist() == [[1.0]]


def test_of_several_candidates_the_best_one_alone_is_taught(sample):
    logits, masks, inside = sample
    logits = logits.requires_grad_()
    predicted = torch.zeros(3, 2, dtype=torch.float64)
    loss, _ = prompt_losses(logits, predicted, masks, inside, MaskLossWeights(iou=0.0))
    loss.sum().backward()
    each = 20 * focal_loss(logits, masks, inside) + dice_loss(logits, masks, inside)
    torch.testing.assert_close(loss, each.amin(dim=1))
    taught = logits.grad.flatten(2).abs().sum(dim=2) > 0
    assert taught.tolist() == [[bool(row.argmin() == t) for t in range(2)] for row in each]


def test_every_candidates_predicted_iou_is_taught_its_true_one(sample):
    logits, masks, inside = sample
    predicted = torch.full((3, 2), 0.3, dtype=torch.float64, requires_grad=True)
    loss, true = prompt_losses(logits, predicted, masks, inside, MaskLossWeights(focal=0.0, dice=1e-9))
    torch.testing.assert_close(loss, (predicted - true).square().mean(dim=1), rtol=0, atol=1e-8)
    loss.sum().backward()
    torch.testing.assert_close(predicted.grad, predicted.detach() - true)


def test_padding_reaches_neither_losses_nor_gradients(sample):
    logits, masks, inside = sample
    spoiled = torch.where(inside[:, None], logits, 50.0).requires_grad_()
    for loss in (focal_loss, dice_loss):
        torch.testing.assert_close(loss(spoiled, masks, inside), loss(logits, masks, inside))
        loss(spoiled, masks, inside).sum().backward()
    assert not spoiled.grad.masked_select(~inside[:, None]).any()
