from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mobilesam.sam.modeling.decode_prompts import Prompts, decode_prompts, embed_prompts
from mobilesam.sam.modeling.head import SamHead


@pytest.fixture(scope="module")
def head() -> SamHead:
    torch.manual_seed(0)
    return SamHead(64)


def prompts(kind: str) -> Prompts:
    points_PN2 = torch.rand(3, 0 if kind == "box" else 2, 2, generator=torch.Generator().manual_seed(1)) * 64
    boxes_P4 = torch.tensor([[3.0, 5.0, 30.0, 40.0]]).repeat(3, 1) if "box" in kind else None
    masks_P1hw = torch.randn(3, 1, 16, 16) if "mask" in kind else None
    return Prompts(
        points_PN2=points_PN2,
        labels_PN=torch.tensor([[1, 0]]).repeat(3, 1)[:, : points_PN2.shape[1]],
        boxes_P4=boxes_P4,
        masks_P1hw=masks_P1hw,
    )


@pytest.mark.parametrize("kind", ["points", "box", "box and points", "points and mask"])
def test_prompts_of_several_images_give_what_the_decoder_gives_for_each_image(head: SamHead, kind: str):
    emb_PCHW = torch.randn(3, 256, 4, 4)
    asked = prompts(kind)
    logits_PThw, iou_PT = decode_prompts(head, emb_PCHW, asked)
    for p in range(3):
        here = slice(p, p + 1)
        sparse, dense = head.prompt_encoder(
            points=(asked.points_PN2[here], asked.labels_PN[here]) if asked.points_PN2.shape[1] else None,
            boxes=None if asked.boxes_P4 is None else asked.boxes_P4[here],
            masks=None if asked.masks_P1hw is None else asked.masks_P1hw[here],
        )
        for multimask, tokens in ((False, slice(0, 1)), (True, slice(1, 4))):
            wanted_logits, wanted_iou = head.mask_decoder(
                emb_PCHW[here], head.prompt_encoder.get_dense_pe(), sparse, dense, multimask
            )
            torch.testing.assert_close(logits_PThw[here, tokens], wanted_logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(iou_PT[here, tokens], wanted_iou, rtol=1e-4, atol=1e-5)


def test_gradients_reach_embedding_and_head(head: SamHead):
    emb_PCHW = torch.randn(3, 256, 4, 4, requires_grad=True)
    logits_PThw, iou_PT = decode_prompts(head, emb_PCHW, prompts("points"))
    (logits_PThw.square().mean() + iou_PT.square().mean()).backward()
    assert emb_PCHW.grad is not None
    assert emb_PCHW.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    assert head.mask_decoder.mask_tokens.weight.grad.abs().sum() > 0
    assert head.prompt_encoder.point_embeddings[1].weight.grad.abs().sum() > 0
    head.zero_grad()


@pytest.mark.parametrize("kind", ["points", "box", "box and points", "points and mask"])
def test_prompts_are_embedded_as_sams_prompt_encoder_does(head: SamHead, kind: str):
    asked = prompts(kind)
    points = (asked.points_PN2, asked.labels_PN) if asked.points_PN2.shape[1] else None
    sparse_PNC, dense_PCHW = head.prompt_encoder(points=points, boxes=asked.boxes_P4, masks=asked.masks_P1hw)
    ours_PNC, ours_PCHW = embed_prompts(head, asked)
    assert torch.equal(ours_PNC, sparse_PNC)
    assert torch.equal(ours_PCHW, dense_PCHW)


@pytest.mark.parametrize("kind", ["points", "box", "box and points", "points and mask"])
def test_no_shape_depends_on_values_so_that_a_gpu_is_not_waited_for(kind: str):
    with FakeTensorMode():
        logits_PThw, _ = decode_prompts(SamHead(64), torch.randn(3, 256, 4, 4), prompts(kind))
    assert logits_PThw.shape == (3, 4, 16, 16)


def test_parts_of_prompts_are_all_of_them_in_order():
    boxes_P4 = np.arange(28.0).reshape(7, 4)
    parts = list(Prompts.of_boxes(boxes_P4).parts(3))
    assert [len(part) for _, part in parts] == [3, 3, 1]
    assert [place for place, _ in parts] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert torch.equal(torch.cat([part.boxes_P4 for _, part in parts]), torch.from_numpy(boxes_P4))
    assert all(part.points_PN2.shape == (len(part), 0, 2) for _, part in parts)


def test_a_part_of_prompts_has_their_points_labels_boxes_and_masks():
    asked = prompts("box, points and mask")
    part = asked.take(slice(1, 3))
    for name in ("points_PN2", "labels_PN", "boxes_P4", "masks_P1hw"):
        assert torch.equal(getattr(part, name), getattr(asked, name)[1:])


def test_points_keep_their_dtype_and_are_on_the_object():
    points_P2 = np.array([[0.25, 3.0], [7.5, 1.0]])
    asked = Prompts.of_points(points_P2)
    assert asked.points_PN2.dtype == torch.float64
    assert asked.points_PN2.numpy()[:, 0].tolist() == points_P2.tolist()
    assert asked.labels_PN.tolist() == [[1], [1]]
    assert asked.labels_PN.dtype == torch.int64
