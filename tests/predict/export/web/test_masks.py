"""The page's masks against segment_anything's upscaling, our choice of masks, and pycocotools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco
from segment_anything.modeling import Sam

from mobilesam.predict.predictor import stability_score
from mobilesam.sam import resized_size

Node = Callable[[str], Any]


def _upscaled(low: torch.Tensor, square: int, height: int, width: int) -> np.ndarray:
    """Logits as SamPredictor returns them."""
    sam = Sam.__new__(Sam)
    torch.nn.Module.__init__(sam)
    sam.image_encoder = torch.nn.Identity()
    sam.image_encoder.img_size = square
    resized = resized_size(height, width, square)
    return sam.postprocess_masks(low[None, None], resized, (height, width))[0, 0].numpy()


@pytest.mark.parametrize(
    ("square", "height", "width"),
    [(256, 300, 451), (64, 41, 64), (64, 640, 6), (1024, 700, 500), (512, 90, 60), (256, 1200, 1201)],
)
def test_masks_are_upscaled_as_segment_anything_does(
    square: int, height: int, width: int, node: Node, tmp_path: Path
) -> None:
    low = square // 4
    generator = torch.Generator().manual_seed(square)
    coarse = torch.randn(1, 1, 6, 6, generator=generator) * 6
    smooth = torch.nn.functional.interpolate(coarse, size=(low, low), mode="bicubic")[0, 0]
    smooth.numpy().tofile(tmp_path / "low")
    found = node(f"""
        const logits = new Float32Array(new Uint8Array(fs.readFileSync("low")).buffer);
        const frame = {{ low: {low}, square: {square}, resized: {list(resized_size(height, width, square))} }};
        const rows = new Float32Array({height * width});
        masks.upscaledRows(logits, frame, {width}, {height}, (y, row) => rows.set(row, y * {width}));
        fs.writeFileSync("rows", new Uint8Array(rows.buffer));
        const {{ mask, area, stability }} = masks.fullMask(logits, frame, {width}, {height});
        fs.writeFileSync("mask", mask);
        const [counts, box] = [masks.rle(mask, {width}, {height}), masks.bounds(mask, {width}, {height})];
        result = {{ area, stability, counts, box }};
    """)
    wanted = _upscaled(smooth, square, height, width)
    rows = np.fromfile(tmp_path / "rows", np.float32).reshape(height, width)
    assert np.abs(rows - wanted).max() < 2e-4
    mask = np.fromfile(tmp_path / "mask", np.uint8).reshape(height, width)
    clear = np.abs(wanted) > 2e-4
    assert np.array_equal(mask[clear] > 0, wanted[clear] > 0)
    assert found["area"] == mask.sum()
    assert found["stability"] == pytest.approx(stability_score(wanted), abs=1e-3)
    runs = coco.encode(np.asfortranarray(mask))
    assert found["counts"] == runs["counts"].decode()
    assert found["box"] == coco.toBbox(runs).tolist()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_run_lengths_are_those_of_pycocotools(share: float, node: Node, tmp_path: Path) -> None:
    mask = (np.random.default_rng(0).random((70, 3001)) < share).astype(np.uint8)
    mask.tofile(tmp_path / "mask")
    found = node("""
        const mask = new Uint8Array(fs.readFileSync("mask"));
        result = [masks.rle(mask, 3001, 70), masks.bounds(mask, 3001, 70)];
    """)
    runs = coco.encode(np.asfortranarray(mask))
    assert found == [runs["counts"].decode(), coco.toBbox(runs).tolist()]


def test_a_single_point_is_ambiguous_and_everything_else_is_not(node: Node) -> None:
    found = node("""
        const ious = [0.9, 0.1, 0.8, 0.3];
        const point = [4, 5, 1];
        result = [
            masks.chosenMask(ious, { points: [point], box: null }),
            masks.chosenMask(ious, { points: [point, point], box: null }),
            masks.chosenMask(ious, { points: [point], box: [0, 0, 9, 9] }),
            masks.chosenMask(ious, { points: [], box: [0, 0, 9, 9] }),
        ];
    """)
    assert found == [2, 0, 0, 0]


def test_points_get_one_point_of_padding_and_boxes_none(node: Node) -> None:
    found = node("""
        const plain = ({ coords, labels }) => [[...coords], [...labels]];
        result = [
            plain(masks.promptInputs({ points: [[4, 6, 1], [8, 2, 0]], box: null }, 0.5, 2)),
            plain(masks.promptInputs({ points: [[4, 6, 1]], box: [2, 3, 10, 20] }, 0.5, 2)),
        ];
    """)
    assert found == [
        [[2, 12, 4, 4, 0, 0], [1, 0, -1]],
        [[2, 12, 1, 6, 5, 40], [1, 2, 3]],
    ]


def test_the_picture_over_the_photo_is_tinted_inside_and_has_an_outline(node: Node) -> None:
    found = node("""
        const low = 16, square = 64;
        const logits = Float32Array.from({ length: low * low }, (_, i) => (i % low < 8 ? 5 : -5));
        const { pixels, share } = masks.overlay(logits, { low, square, resized: [64, 64] }, 64, 64, [1, 2, 3], 90);
        const at = (x, y) => [...pixels.slice(4 * (64 * y + x), 4 * (64 * y + x) + 4)];
        result = [share, at(5, 30), at(31, 30), at(60, 30)];
    """)
    assert found == [0.5, [1, 2, 3, 90], [1, 2, 3, 255], [0, 0, 0, 0]]
