"""What this room's commands have come to, as lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..sam import shown

ROWS = 20
"""Masks that are listed; everything may find hundreds."""


def segment_lines(result: Mapping[str, Any]) -> list[str]:
    """The result of `segment`: what made the masks, how long it took, each mask, and where they are."""
    height, width = result["original_size"]
    masks = result["masks"]
    name = result["student"] or result["teacher"]
    lines = [
        f"{result['image']}: {width} x {height} pixels, {name} at {result['image_size']} on {result['device']}",
    ]
    lines += [f"note: {note}" for note in result["notes"]]
    lines.append(
        f"embedding {result['embedding_seconds']:.2f} s, {len(masks):,} mask{'' if len(masks) == 1 else 's'} "
        f"{result['mask_seconds']:.2f} s"
    )
    if masks:
        lines.append(
            f"{'mask':>4}{'area':>12}{'share':>8}  {'x, y, width, height':<26}{'IoU':>6}{'stability':>11}"
        )
    for index, mask in enumerate(masks[:ROWS]):
        box = ", ".join(map(str, mask["bbox"]))
        numbers = f"{_number(mask['predicted_iou']):>6}{_number(mask['stability_score']):>11}"
        lines.append(
            f"{index:>4}{mask['area']:>12,}{mask['area'] / (height * width):>8.1%}  {box:<26}{numbers}"
        )
    if len(masks) > ROWS:
        lines.append(f"and {len(masks) - ROWS:,} more")
    places = {"overlay": result["out"], "masks": result["masks_dir"], "RLE": result["rle"]}
    lines += [f"{kind:<8}{place}" for kind, place in places.items() if place is not None]
    return [shown(line) for line in lines]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
