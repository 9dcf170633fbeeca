"""Masks against those of upstream's code, mobile_sam and segment_anything, on the same file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.utils.amg import calculate_stability_score

from mobilesam.predict import SegmentConfig, load_model, segment
from mobilesam.predict.predictor import stability_score

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
PHOTO = PHOTOS / "coffee.jpg"
TOLERATED = 1e-4
"""Share of pixels whose logits lie so near to zero that rounding decides."""


def _upstream(mobile_sam_pt: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mobile_sam

    return mobile_sam, mobile_sam.sam_model_registry["vit_t"](checkpoint=str(mobile_sam_pt)).eval()


def _masks(
    student: Path, photo: Path = PHOTO, **prompts: Any
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    result = segment(
        SegmentConfig(image=photo, student=student, masks=Path("masks"), device="cpu", **prompts)
    )
    return result["masks"], [np.asarray(Image.open(mask["file"])) == 255 for mask in result["masks"]]


def _assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert 0.001 < theirs.mean() < 0.999, "a mask that says something"
    assert (ours != theirs).mean() <= TOLERATED


def test_one_point_gives_upstreams_best_mask(mobile_sam_pt: Path) -> None:
    mobile_sam, sam = _upstream(mobile_sam_pt)
    predictor = mobile_sam.SamPredictor(sam)
    predictor.set_image(np.asarray(Image.open(PHOTO)))
    masks, iou, _ = predictor.predict(np.array([[450, 120]]), np.array([1]), multimask_output=True)
    best = int(iou.argmax())
    assert best == 1, "not the first, which would be the best by accident"
    known, (ours,) = _masks(mobile_sam_pt, points=[(450, 120)])
    _assert_same(ours, masks[best])
    assert known[0]["predicted_iou"] == pytest.approx(iou[best], abs=1e-4)


@pytest.mark.long
def test_points_and_boxes_give_upstreams_single_mask(mobile_sam_pt: Path, tmp_path: Path) -> None:
    mobile_sam, sam = _upstream(mobile_sam_pt)
    predictor = mobile_sam.SamPredictor(sam)
    predictor.set_image(np.asarray(Image.open(PHOTO)))
    points, labels = np.array([[200, 150], [420, 300], [50, 50]]), np.array([1, 1, 0])
    box, other = np.array([80, 20, 480, 390]), np.array([300, 200, 600, 400])
    for upstream, prompts in (
        ({"point_coords": points, "point_labels": labels}, {}),
        ({"point_coords": points, "point_labels": labels, "box": box}, {"boxes": [tuple(box)]}),
    ):
        (theirs,), (iou,), _ = predictor.predict(**upstream, multimask_output=False)
        known, (ours,) = _masks(
            mobile_sam_pt, points=[(200, 150), (420, 300)], negative_points=[(50, 50)], **prompts
        )
        _assert_same(ours, theirs)
        assert known[0]["predicted_iou"] == pytest.approx(iou, abs=1e-4)
    _, ours = _masks(mobile_sam_pt, boxes=[tuple(box), tuple(other)])
    for mask, one in zip(ours, (box, other), strict=True):
        _assert_same(mask, predictor.predict(box=one, multimask_output=False)[0][0])


@pytest.mark.long
def test_everything_gives_upstreams_masks(mobile_sam_pt: Path, small_photo: Path) -> None:
    mobile_sam, sam = _upstream(mobile_sam_pt)
    theirs = mobile_sam.SamAutomaticMaskGenerator(sam).generate(np.asarray(Image.open(small_photo)))
    _compare_everything(*_masks(mobile_sam_pt, small_photo, everything=True), theirs)


def test_everything_at_64_pixels_gives_the_masks_of_segment_anythings_generator(
    mobile_sam_pt: Path, small_photo: Path
) -> None:
    sam = load_model(mobile_sam_pt, image_size=64).sam
    theirs = SamAutomaticMaskGenerator(sam).generate(np.asarray(Image.open(small_photo)))
    known, ours = _masks(mobile_sam_pt, small_photo, everything=True, image_size=64)
    _compare_everything(known, ours, theirs)


def _compare_everything(
    known: list[dict[str, Any]], ours: list[np.ndarray], theirs: list[dict[str, Any]]
) -> None:
    """In any order of masks of the same area."""
    assert len(ours) == len(theirs) >= 3
    areas = [mask["area"] for mask in known]
    assert areas == sorted(areas, reverse=True)
    left = list(theirs)
    for mask, told in zip(ours, known, strict=True):
        match = min(left, key=lambda record: (record["segmentation"] != mask).mean())
        left = [record for record in left if record is not match]
        assert (match["segmentation"] != mask).mean() <= TOLERATED
        assert told["predicted_iou"] == pytest.approx(match["predicted_iou"], abs=1e-4)
        assert told["stability_score"] == pytest.approx(match["stability_score"], abs=5e-3)


def test_a_mobile_sam_file_computes_in_float32_whatever_it_was_saved_in(
    mobile_sam_pt: Path, tmp_path: Path, small_photo: Path
) -> None:
    state = torch.load(mobile_sam_pt, weights_only=True)
    half = {key: value.half().float() for key, value in state.items()}
    torch.save({key: value.half() for key, value in half.items()}, tmp_path / "half.pt")
    torch.save(half, tmp_path / "whole.pt")
    found = [
        _masks(tmp_path / name, small_photo, points=[(40, 30)], image_size=64)[1][0]
        for name in ("half.pt", "whole.pt")
    ]
    np.testing.assert_array_equal(*found)


def test_a_stability_score_is_segment_anythings() -> None:
    logits = torch.randn(5, 30, 40, generator=torch.Generator().manual_seed(0)) * 3
    for logits_HW, theirs in zip(logits, calculate_stability_score(logits, 0.0, 1.0), strict=True):
        assert stability_score(logits_HW.numpy()) == pytest.approx(theirs.item(), abs=1e-6)
    assert stability_score(np.full((3, 3), -7.0)) is None
