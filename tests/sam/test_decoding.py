from __future__ import annotations

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
def test_no_shape_depends_on_what_is_asked_so_that_a_gpu_is_not_waited_for(kind: str):
    with FakeTensorMode():
        logits_PThw, _ = decode_prompts(SamHead(64), torch.randn(3, 256, 4, 4), prompts(kind))
    assert logits_PThw.shape == (3, 4, 16, 16)
