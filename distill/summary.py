"""What a run has come to, as lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """The result of `distill`; the metrics are those of the image part of the held-out rows."""
    val = result["val"]
    lines = [
        f"{result['run']}: {result['epochs']} epochs, {result['steps']:,} steps, {result['seconds']:.0f} s",
        f"{result['images_per_second']:.3g} images/s, {result['data_wait_share']:.1%} of the time waiting for data",
        f"held out: cosine {val['cosine_valid']['mean']:.4f}, skill {val['skill_valid']:.4f}",
    ]
    if "labels" in result:
        labels = result["labels"]
        fact = f"annotations beside {labels['annotated']:,} of {labels['images']:,} images"
        unused = [f"{labels[kind]:,} {kind}" for kind in ("empty", "broken") if labels[kind]]
        lines.append(f"{fact}, {', '.join(unused)}" if unused else fact)
    if "miou" in val:
        miou = "undefined" if val["miou"] is None else f"{val['miou']:.4f}"
        lines.append(f"held out: mIoU {miou} with the teacher's masks")
    return lines
