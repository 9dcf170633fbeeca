"""How good vit_nano's masks are on generated pictures that it never saw, through segment_anything's own predictor.

    python examples/measure_vit_nano.py --sizes 256 1024 --pictures 100

One point is given inside each object: its middle, or one drawn at random. *picked* is the IoU of the mask with the
highest predicted IoU, of the three that SAM gives; *best* that of the best of the three; *single* that of SAM's
single mask.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from generate_pictures import generate
from segment_anything import SamPredictor

from mobilesam.predict import load_teacher_model

HELD_OUT_SEED = 2
"""Pictures of this seed are trained on by nobody; examples/train_vit_nano.py looks at some of them."""


POINTS = ("middle", "random")


@dataclass(frozen=True)
class Measured:
    """Means over `objects` objects in `pictures` pictures."""

    pictures: int
    objects: int
    picked: float
    best: float
    single: float


def measure(image_size: int, pictures: int) -> dict[str, Measured]:
    """vit_nano at an image size, on pictures whose longer side is as long, by kind of point."""
    predictor = SamPredictor(load_teacher_model("vit_nano", image_size=image_size).sam)
    rng = np.random.default_rng(HELD_OUT_SEED)
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in POINTS}
    for index in range(pictures):
        picture = generate(HELD_OUT_SEED, index, image_size)
        predictor.set_image(picture.pixels_HWC)
        for mask_HW in picture.masks:
            places = np.argwhere(mask_HW)
            middle = places[np.abs(places - np.median(places, axis=0)).sum(axis=1).argmin()]
            for kind, place in zip(POINTS, (middle, rng.choice(places)), strict=True):
                found[kind].append(_ask(predictor, place, mask_HW))
    return {
        kind: Measured(pictures, len(ious), *np.mean(ious, axis=0).tolist()) for kind, ious in found.items()
    }


def _ask(predictor: SamPredictor, place: np.ndarray, mask_HW: np.ndarray) -> tuple[float, float, float]:
    """The IoU of the picked mask, of the best, and of the single one, for a point at (y, x)."""
    point, label = place[None, ::-1].astype(np.float64), np.array([1])
    three, predicted, _ = predictor.predict(point, label)
    ious = [_iou(answer_HW, mask_HW) for answer_HW in three]
    one, _, _ = predictor.predict(point, label, multimask_output=False)
    return ious[int(predicted.argmax())], max(ious), _iou(one[0], mask_HW)


def _iou(answer_HW: np.ndarray, mask_HW: np.ndarray) -> float:
    return float((answer_HW & mask_HW).sum() / (answer_HW | mask_HW).sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024], metavar="PX")
    parser.add_argument("--pictures", type=int, default=100, metavar="N")
    options = parser.parse_args()
    print("| image size | point | pictures | objects | picked | best of three | single mask |")
    print("|---|---|---|---|---|---|---|")
    for side in options.sizes:
        for kind, found in measure(side, options.pictures).items():
            counts = f"{found.pictures} | {found.objects}"
            ious = f"{found.picked:.3f} | {found.best:.3f} | {found.single:.3f}"
            print(f"| {side} | {kind} | {counts} | {ious} |", flush=True)


if __name__ == "__main__":
    main()
