from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torchvision

from mobilesam.distill.loss.base import MicroBatch
from mobilesam.distill.loss.coupled import batch_objects
from mobilesam.distill.loss.masks import (
    MaskLoss,
    MaskLossWeights,
    PromptedObjects,
    TeacherAnswers,
    dice_loss,
    focal_loss,
    mask_iou,
    prompt_losses,
    token_losses,
)
from mobilesam.sam.modeling.head import SamHead

MakeMicroBatch = Callable[[list[bool]], MicroBatch]


@pytest.fixture
def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = 4 * torch.randn(3, 2, 5, 6, dtype=torch.float64)
    masks = torch.rand(3, 5, 6) < 0.4
    valid = torch.ones(3, 5, 6, dtype=torch.bool)
    valid[1, 3:] = False
    return logits, masks, valid


def test_the_focal_loss_is_torchvisions(sample):
    logits, masks, valid = sample
    found = focal_loss(logits, masks, valid)
    for p in range(3):
        for t in range(2):
            counted = valid[p]
            wanted = torchvision.ops.sigmoid_focal_loss(
                logits[p, t][counted], masks[p][counted].double(), alpha=0.25, gamma=2, reduction="mean"
            )
            torch.testing.assert_close(found[p, t], wanted)


def test_dice_and_iou_are_what_counting_pixel_by_pixel_gives(sample):
    logits, masks, valid = sample
    dice, iou = dice_loss(logits, masks, valid), mask_iou(logits, masks, valid)
    for p in range(3):
        for t in range(2):
            shared = total = both = either = 0.0
            for y in range(5):
                for x in range(6):
                    if valid[p, y, x]:
                        probability = 1 / (1 + math.exp(-float(logits[p, t, y, x])))
                        shared += probability * bool(masks[p, y, x])
                        total += probability + bool(masks[p, y, x])
                        both += bool(logits[p, t, y, x] > 0) and bool(masks[p, y, x])
                        either += bool(logits[p, t, y, x] > 0) or bool(masks[p, y, x])
            assert float(dice[p, t]) == pytest.approx(1 - (2 * shared + 1) / (total + 1))
            assert float(iou[p, t]) == pytest.approx(both / either)


def test_two_empty_masks_have_an_iou_of_1():
    logits, masks, valid = -torch.ones(1, 1, 4, 4), torch.zeros(1, 4, 4).bool(), torch.ones(1, 4, 4).bool()
    assert mask_iou(logits, masks, valid).tolist() == [[1.0]]


def test_only_the_best_of_several_candidate_masks_is_trained(sample):
    logits, masks, valid = sample
    logits = logits.requires_grad_()
    predicted = torch.zeros(3, 2, dtype=torch.float64)
    loss, _ = prompt_losses(logits, predicted, masks, valid, MaskLossWeights(iou=0.0))
    loss.sum().backward()
    each = 20 * focal_loss(logits, masks, valid) + dice_loss(logits, masks, valid)
    torch.testing.assert_close(loss, each.amin(dim=1))
    taught = logits.grad.flatten(2).abs().sum(dim=2) > 0
    assert taught.tolist() == [[bool(row.argmin() == t) for t in range(2)] for row in each]


def test_every_candidates_predicted_iou_is_trained_towards_its_true_one(sample):
    logits, masks, valid = sample
    predicted = torch.full((3, 2), 0.3, dtype=torch.float64, requires_grad=True)
    loss, true = prompt_losses(logits, predicted, masks, valid, MaskLossWeights(focal=0.0, dice=1e-9))
    torch.testing.assert_close(loss, (predicted - true).square().mean(dim=1), rtol=0, atol=1e-8)
    loss.sum().backward()
    torch.testing.assert_close(predicted.grad, predicted.detach() - true)


def test_padding_reaches_neither_mask_losses_nor_their_gradients(sample):
    logits, masks, valid = sample
    spoiled = torch.where(valid[:, None], logits, 50.0).requires_grad_()
    for loss in (focal_loss, dice_loss):
        torch.testing.assert_close(loss(spoiled, masks, valid), loss(logits, masks, valid))
        loss(spoiled, masks, valid).sum().backward()
    assert not spoiled.grad.masked_select(~valid[:, None]).any()


def test_a_place_without_an_object_has_neither_loss_nor_gradient(head: SamHead):
    emb_BCHW = torch.randn(1, 256, 4, 4, requires_grad=True)
    objects = PromptedObjects(
        masks_PMM=torch.zeros(2, 32, 32, dtype=torch.bool),
        image_P=torch.zeros(2, dtype=torch.long),
        valid_BMM=torch.ones(1, 32, 32, dtype=torch.bool),
        weight_P=torch.zeros(2),
    )
    loss, _ = MaskLoss(rounds=3, boxes=0.5)(head, emb_BCHW, objects, torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.item() == 0
    assert not emb_BCHW.grad.any()


def test_a_later_round_prompts_where_the_round_before_was_wrong(
    random_micro_batch: MakeMicroBatch, head: SamHead, monkeypatch: pytest.MonkeyPatch
):
    """Watch the prompts that reach the decoder."""
    import mobilesam.distill.loss.masks as module

    seen = []
    real = module.decode_prompts

    def watched(head, emb, prompts):
        seen.append(prompts)
        return real(head, emb, prompts)

    monkeypatch.setattr(module, "decode_prompts", watched)
    micro_batch = random_micro_batch([True, True])
    objects = batch_objects(head, micro_batch, 2)
    mask_loss = MaskLoss(rounds=3, boxes=0.0)
    mask_loss(head, micro_batch.student_BCHW, objects, torch.Generator().manual_seed(0))
    assert [prompts.points_PN2.shape[1] for prompts in seen] == [1, 2, 3]
    assert [prompts.masks_P1hw is None for prompts in seen] == [True, False, False]
    masks = objects.masks_PMM
    for p in (0, 2):
        x, y = ((seen[0].points_PN2[p, 0] + 0.5) / 2 - 0.5).long().tolist()
        assert bool(masks[p, y, x])
        large = torch.nn.functional.interpolate(
            seen[1].masks_P1hw, (32, 32), mode="bilinear", align_corners=False
        )
        answer = large[p, 0] > 0
        x, y = ((seen[1].points_PN2[p, 1] + 0.5) / 2 - 0.5).long().tolist()
        assert bool(answer[y, x]) != bool(masks[p, y, x])
        assert bool(seen[1].labels_PN[p, 1]) == bool(masks[p, y, x])


def test_training_by_the_mask_loss_makes_a_head_segment_the_prompted_object():
    """Train the embedding itself, without an encoder, on two objects side by side."""
    torch.manual_seed(0)
    head, emb_1CHW = SamHead(64), torch.nn.Parameter(torch.randn(1, 256, 4, 4))
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, :, :12] = masks[1, 8:, 16:] = True
    objects = PromptedObjects(
        masks_PMM=masks.repeat(4, 1, 1),
        image_P=torch.zeros(8, dtype=torch.long),
        valid_BMM=torch.ones(1, 32, 32, dtype=torch.bool),
        weight_P=torch.ones(8),
    )
    optimizer = torch.optim.Adam([emb_1CHW, *head.parameters()], lr=5e-4)
    generator, mask_loss = torch.Generator().manual_seed(0), MaskLoss(rounds=1, boxes=0.0)
    picked = []
    for _ in range(60):
        loss, found = mask_loss(head, emb_1CHW, objects, generator)
        optimizer.zero_grad()
        (loss / 8).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        picked.append(found.item() / 8)
    assert sum(picked[:5]) / 5 < 0.5
    assert sum(picked[-5:]) / 5 > 0.9


def test_the_loss_against_a_teachers_masks_is_what_counting_pixel_by_pixel_gives(sample):
    logits, _, valid = sample
    torch.manual_seed(1)
    teacher, iou, teacher_iou = 4 * torch.randn_like(logits), torch.rand(3, 2), torch.rand(3, 2)
    weights = MaskLossWeights(focal=20.0, dice=1.0, iou=0.5)
    found = token_losses(logits, iou.double(), teacher, teacher_iou.double(), valid, weights)
    for p in range(3):
        wanted = 0.0
        for t in range(2):
            focal = shared = squares = count = 0.0
            for y in range(5):
                for x in range(6):
                    if valid[p, y, x]:
                        q = 1 / (1 + math.exp(-float(teacher[p, t, y, x])))
                        s = 1 / (1 + math.exp(-float(logits[p, t, y, x])))
                        focal -= (s - q) ** 2 * (q * math.log(s) + (1 - q) * math.log(1 - s))
                        shared, squares, count = shared + s * q, squares + s * s + q * q, count + 1
            error = float(iou[p, t]) - float(teacher_iou[p, t])
            wanted += 20 * focal / count + 1 - (2 * shared + 1) / (squares + 1) + 0.5 * error**2
        assert float(found[p]) == pytest.approx(wanted / 2)


def _drawn(head: SamHead, micro_batch: MicroBatch, teacher: TeacherAnswers | None) -> torch.Tensor:
    """Return the loss of the teacher's own embedding, for two objects of an image."""
    emb_BCHW = micro_batch.teacher_BCHW.clone().requires_grad_(True)
    objects = batch_objects(head, micro_batch, 2)
    loss, _ = MaskLoss(rounds=3, boxes=0.5)(
        head, emb_BCHW, objects, torch.Generator().manual_seed(0), teacher
    )
    loss.backward()
    assert emb_BCHW.grad is not None
    return torch.stack((loss.detach(), emb_BCHW.grad.abs().max()))


def test_the_teachers_own_embedding_has_no_loss_and_no_gradient_where_it_answers_the_prompts(
    random_micro_batch: MakeMicroBatch, head: SamHead
):
    micro_batch = random_micro_batch([False, False, False])
    teacher = TeacherAnswers(head=head, emb_BCHW=micro_batch.teacher_BCHW)
    assert _drawn(head, micro_batch, teacher).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert float(_drawn(head, micro_batch, None)[0]) > 0.1, "its masks for two points of an object differ"


def test_annotated_objects_are_compared_with_their_masks_though_the_teacher_answers_for_others(
    random_micro_batch: MakeMicroBatch, head: SamHead
):
    annotated, mixed = random_micro_batch([True, True, True]), random_micro_batch([True, False, True])
    teacher = TeacherAnswers(head=head, emb_BCHW=annotated.teacher_BCHW)
    assert torch.equal(_drawn(head, annotated, teacher), _drawn(head, annotated, None))
    assert 0 < float(_drawn(head, mixed, teacher)[0]) < float(_drawn(head, mixed, None)[0])
