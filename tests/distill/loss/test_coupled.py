"""Objectives that compare masks: the objects that they take, and their loss."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mobilesam.distill.loss.base import BatchTotals, MicroBatch
from mobilesam.distill.loss.coupled import (
    MaskOptions,
    SemiCoupled,
    batch_objects,
    teacher_masks,
    valid_pixels,
)
from mobilesam.distill.loss.mask_prompts import pixels_to_square, uniform_pixel
from mobilesam.distill.loss.masks import MaskLoss, MaskLossWeights
from mobilesam.sam import valid_cells
from mobilesam.sam.modeling.head import SamHead

MakeMicroBatch = Callable[[list[bool]], MicroBatch]


def test_the_teachers_masks_are_those_of_upstreams_decoder():
    # As torch draws it: vit_nano's head makes a tenth of a logit of how a processor rounds several images at once.
    torch.manual_seed(0)
    head = SamHead(64).eval()
    emb_PCHW = torch.randn(4, 256, 4, 4, generator=torch.Generator().manual_seed(0))
    inside = valid_pixels(torch.tensor([[64, 64], [64, 40], [20, 64], [64, 64]]), 64, 32)
    found = teacher_masks(head, emb_PCHW, inside, torch.Generator().manual_seed(5))
    points = pixels_to_square(uniform_pixel(inside, torch.Generator().manual_seed(5)), 64, 32)
    for p in range(4):
        with torch.no_grad():
            sparse, dense = head.prompt_encoder(
                points=(points[p][None, None], torch.ones(1, 1)), boxes=None, masks=None
            )
            logits, iou = head.mask_decoder(
                emb_PCHW[p][None], head.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=True
            )
        large = torch.nn.functional.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)
        assert torch.equal(found[p], (large[0, iou[0].argmax()] > 0) & inside[p])


def test_valid_pixels_are_the_images_part_of_the_square():
    inside = valid_pixels(torch.tensor([[64, 32], [1, 64]]), 64, 32)
    assert inside[0].sum() == 32 * 16
    assert bool(inside[0, :, :16].all())
    assert inside[1].sum() == 32  # never nothing


@pytest.mark.parametrize("size", [(64, 64), (1, 64), (64, 7), (8, 9), (40, 63)])
def test_valid_pixels_at_the_grids_side_are_the_valid_cells(size: tuple[int, int]):
    assert np.array_equal(valid_pixels(torch.tensor([size]), 64, 4)[0].numpy(), valid_cells(size, 64))


def test_annotations_count_where_an_image_has_them_and_the_teachers_masks_elsewhere(
    random_micro_batch: MakeMicroBatch, head: SamHead
):
    mixed = batch_objects(head, random_micro_batch([True, False, True]), 2)
    assert mixed.image_P.tolist() == [0, 0, 1, 1, 2, 2]
    assert mixed.weight_P[[0, 1, 4, 5]].tolist() == [1, 0, 1, 0]
    assert torch.equal(mixed.masks_PMM[0], random_micro_batch([True]).objects.masks_BQMM[0, 0])
    teachers = batch_objects(head, random_micro_batch([False, False, False]), 2)
    assert torch.equal(mixed.masks_PMM[2:4], teachers.masks_PMM[2:4])
    own = batch_objects(head, random_micro_batch([True, True, True]), 2)
    assert own.weight_P.tolist() == [1, 0, 1, 0, 1, 0]


def test_an_images_loss_is_the_mean_over_the_objects_that_it_has(
    random_micro_batch: MakeMicroBatch, head: SamHead
):
    micro_batch = random_micro_batch([True, True])
    micro_batch.objects.known_BQ[1] = True
    micro_batch.objects.masks_BQMM[1, 1, 8:] = True
    assert batch_objects(head, micro_batch, 2).weight_P.tolist() == [1, 0, 0.5, 0.5]


def test_an_object_outside_the_image_does_not_count(random_micro_batch: MakeMicroBatch, head: SamHead):
    micro_batch = dataclasses.replace(random_micro_batch([True]), sizes_B2=torch.tensor([[16, 64]]))
    micro_batch.objects.masks_BQMM[0, 0] = False
    micro_batch.objects.masks_BQMM[0, 0, 20:] = True  # below the 8 rows that are image
    objects = batch_objects(head, micro_batch, 2)
    assert not objects.masks_PMM.any()
    assert objects.weight_P.tolist() == [0, 0]


def test_the_mixed_loss_is_the_sum_of_its_parts(random_micro_batch: MakeMicroBatch, head: SamHead):
    mask_loss = MaskLoss(rounds=1, weights=MaskLossWeights())
    totals = BatchTotals(elements=3 * 256 * 16, images=3)

    def loss(mse: float) -> Tensor:
        options = MaskOptions(mask_loss=mask_loss, objects=2, mse_weight=mse, region="all")
        return SemiCoupled(head, options).loss(random_micro_batch([True, False, True]), totals)

    micro_batch = random_micro_batch([True, False, True])
    wanted = torch.nn.functional.mse_loss(micro_batch.student_BCHW, micro_batch.teacher_BCHW)
    torch.testing.assert_close(loss(0.5) - loss(0.0), 0.5 * wanted)


@pytest.mark.cuda
@pytest.mark.parametrize("annotated", [[True, True], [True, False]])
def test_a_loss_of_masks_never_waits_for_a_gpu(
    random_micro_batch: MakeMicroBatch, head: SamHead, annotated: list[bool]
):
    options = MaskOptions(
        mask_loss=MaskLoss(rounds=2, boxes=0.5, weights=MaskLossWeights()),
        objects=2,
        mse_weight=1.0,
        region="all",
    )
    objective = SemiCoupled(copy.deepcopy(head).cuda(), options)
    micro_batch = random_micro_batch(annotated)
    assert micro_batch.objects is not None
    micro_batch = dataclasses.replace(
        micro_batch,
        student_BCHW=micro_batch.student_BCHW.cuda().requires_grad_(True),
        teacher_BCHW=micro_batch.teacher_BCHW.cuda(),
        valid_BHW=micro_batch.valid_BHW.cuda(),
        objects=micro_batch.objects.to(torch.device("cuda")),
    )
    totals = BatchTotals(elements=2 * 256 * 16, images=2)
    objective.loss(micro_batch, totals).backward()  # cuDNN sets itself up
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective.loss(micro_batch, totals).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert micro_batch.student_BCHW.grad is not None
    assert bool(micro_batch.student_BCHW.grad.isfinite().all())
