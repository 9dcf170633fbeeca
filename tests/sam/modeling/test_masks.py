from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from mobilesam.sam import image_pixels, load_image, resized_size
from mobilesam.sam.modeling import masks
from mobilesam.sam.modeling.head import SamHead, assemble, build_head
from mobilesam.sam.modeling.masks import SAMPLES, mask_chunks, mask_cover, point_logits, point_masks
from mobilesam.sam.teacher import load_head, load_teacher

SIZE = 128
PHOTO = (150, 225)


@pytest.fixture(scope="module")
def head() -> SamHead:
    return build_head(load_head("vit_nano", None), SIZE)


def embedding(seed: int = 0, size: int = SIZE) -> torch.Tensor:
    return torch.randn(1, 256, size // 16, size // 16, generator=torch.Generator().manual_seed(seed))


def points(count: int, original_size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (count, 2)) * np.array(original_size[::-1])


def predicted(
    head: SamHead, emb_1CHW: torch.Tensor, points_P2: np.ndarray, original_size: tuple[int, int]
) -> np.ndarray:
    """Upstream's own predictor with its features set by hand."""
    predictor = SamPredictor(assemble(torch.nn.Identity(), head))
    predictor.features, predictor.is_image_set = emb_1CHW, True
    predictor.original_size = original_size
    predictor.input_size = predictor.transform.get_preprocess_shape(*original_size, head.image_size)
    coords_P12 = torch.as_tensor(
        predictor.transform.apply_coords(points_P2, original_size), dtype=torch.float
    )[:, None]
    found, _, _ = predictor.predict_torch(
        coords_P12, torch.ones(len(points_P2), 1, dtype=torch.int), multimask_output=False
    )
    return found[:, 0].numpy()


@pytest.mark.parametrize("original_size", [PHOTO, (225, 150), (128, 128), (37, 61), (600, 40), (1, 1)])
def test_masks_are_bit_for_bit_the_predictors(head, original_size):
    points_P2 = points(16, original_size)
    found = point_masks(head, embedding(), points_P2, original_size, resized_size(*original_size, SIZE))
    assert (found.dtype, found.shape) == (torch.bool, (16, *original_size))
    groups = np.split(points_P2, 4)  # as many as the decoder is given at once
    wanted = [predicted(head, embedding(), group, original_size) for group in groups]
    assert np.array_equal(found.numpy(), np.concatenate(wanted))


def test_the_masks_of_a_photo_are_neither_all_nor_nothing(head, photos):
    image = load_image(photos["coffee.jpg"], SIZE)
    emb_1CHW = load_teacher("vit_nano", None, image_size=SIZE).embed(image_pixels(image, SIZE))
    sizes = image.original_size, image.resized_size
    share = point_masks(head, emb_1CHW, points(16, image.original_size), *sizes).float().mean()
    assert 0.05 < share < 0.95


@pytest.mark.parametrize("count", [1, 3, 23])
def test_chunks_hold_few_masks_and_change_none(head, count, monkeypatch):
    sizes = PHOTO, resized_size(*PHOTO, SIZE)
    points_P2 = points(count, PHOTO)
    whole = predicted(head, embedding(), points_P2, PHOTO)
    monkeypatch.setattr(masks, "PROMPTS_AT_ONCE", {"cpu": 5})
    monkeypatch.setattr(masks, "PIXELS_AT_ONCE", 2 * PHOTO[0] * PHOTO[1] + 7)
    chunks = list(mask_chunks([(head, embedding())], points_P2, *sizes))
    assert max(len(masks_pHW) for (masks_pHW,) in chunks) <= 2
    # A decoder's batch may move a logit by a rounding error, and with it a pixel on an edge.
    assert (torch.cat([masks_pHW for (masks_pHW,) in chunks]).numpy() != whole).mean() < 1e-3
    monkeypatch.setattr(masks, "PIXELS_AT_ONCE", 1)
    assert all(len(masks_pHW) == 1 for (masks_pHW,) in mask_chunks([(head, embedding())], points_P2, *sizes))


def test_several_embeddings_have_their_masks_side_by_side(head):
    points_P2 = points(4, PHOTO)
    sizes = PHOTO, resized_size(*PHOTO, SIZE)
    ((first, second),) = mask_chunks([(head, embedding(0)), (head, embedding(1))], points_P2, *sizes)
    assert torch.equal(first, point_masks(head, embedding(0), points_P2, *sizes))
    assert torch.equal(second, point_masks(head, embedding(1), points_P2, *sizes))
    assert not torch.equal(first, second)


def test_neither_layout_nor_autocast_moves_a_pixel(head):
    points_P2 = points(9, PHOTO)
    sizes = PHOTO, resized_size(*PHOTO, SIZE)
    wanted = point_masks(head, embedding(), points_P2, *sizes)
    turned = embedding().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(point_masks(head, turned, points_P2, *sizes), wanted)


def test_a_drawn_mask_is_the_share_of_each_pixel_inside_the_finer_mask(head):
    points_P2, drawn = points(5, PHOTO), (40, 60)
    fine, resized = (drawn[0] * SAMPLES, drawn[1] * SAMPLES), resized_size(*PHOTO, SIZE)
    logits_P1hw = point_logits(head, embedding(), points_P2, PHOTO, resized)
    assert logits_P1hw.shape == (5, 1, SIZE // 4, SIZE // 4)
    cover_PHW = mask_cover(logits_P1hw, SIZE, drawn, resized).numpy()
    # A photo of the finer size, asked at the same places, has the finer masks.
    scale_2 = np.array([fine[1] / PHOTO[1], fine[0] / PHOTO[0]])
    masks_PHW = point_masks(head, embedding(), points_P2 * scale_2, fine, resized).numpy()
    wanted_PHW = masks_PHW.reshape(5, drawn[0], SAMPLES, drawn[1], SAMPLES).mean(axis=(2, 4))
    assert np.abs(cover_PHW - wanted_PHW).mean() < 1e-3
    assert len(np.unique(cover_PHW.round(4))) > 2, "edges have shades"


def test_masks_record_no_gradient(head):
    emb_1CHW = embedding().requires_grad_()
    assert not point_masks(head, emb_1CHW, points(2, PHOTO), PHOTO, resized_size(*PHOTO, SIZE)).requires_grad
