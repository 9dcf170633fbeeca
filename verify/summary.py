"""Answer to "is it good?" in words: the facts behind them, counted from the images, and the sentences.

A student follows its teacher on a photo if the mean IoU of both models' masks there is at least FOLLOWS_IOU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..common.errors import counted
from ..distill import ImageMetrics
from .inputs import Inputs

FOLLOWS_IOU = 0.5
"""Mean IoU of a photo's masks from which the student counts as following its teacher: the masks share at least as
many pixels as only one of them has. PASCAL VOC counts an object as found from the same IoU on."""

PLACES = ("best", "median", "worst")

_PHOTOS = {"val": ("held-out photo", "held-out photos"), "all": ("photo", "photos")}
_TRAINED = ("photo that it was trained on", "photos that it was trained on")


def ranked(scores: Sequence[float | None]) -> list[int]:
    """Return the indices of scores, the lowest first, without the undefined ones (None, NaN)."""
    defined = [i for i, score in enumerate(scores) if score is not None and not math.isnan(score)]
    return sorted(defined, key=lambda i: (scores[i], i))


def example_positions(scores: Sequence[float | None]) -> dict[str, int]:
    """Return the index of the best, the median and the worst score, by name; empty if no score is defined.

    Of an even number of scores, the median is the lower of the two in the middle.
    """
    order = ranked(scores)
    return (
        dict(zip(PLACES, (order[-1], order[(len(order) - 1) // 2], order[0]), strict=True)) if order else {}
    )


def scores_of(per_image: Sequence[ImageMetrics], ious: Sequence[float] | None) -> Sequence[float]:
    """Return the score by which images are ranked: mean IoU of their masks, or without masks cosine over valid cells.

    Args:
        per_image: metrics of each image.
        ious: mean IoU of each image's masks, NaN where undefined; None if no masks were compared.
    """
    return [image.cosine_valid for image in per_image] if ious is None else ious


def summary_facts(
    inputs: Inputs, split: str, per_image: Sequence[ImageMetrics], ious: Sequence[float] | None
) -> dict[str, Any]:
    """Count the facts behind the words.

    Args:
        inputs: inputs of the verification, still open.
        split: "val", "train" or "all".
        per_image: metrics of each image, in the order of the inputs' rows.
        ious: mean IoU of each image's masks, in the same order; None if no masks were compared.

    Returns:
        As in the result of `verify`: `follows` (only with masks), `examples`, `held_out`, `trained_on`.
    """
    examples = {
        place: {
            "key": inputs.records[inputs.rows[i]].key,
            "cosine_valid": _plain(per_image[i].cosine_valid),
            **({} if ious is None else {"miou": _plain(ious[i])}),
        }
        for place, i in example_positions(scores_of(per_image, ious)).items()
    }
    trained = _trained_rows(inputs) if split == "all" else frozenset()
    seen = [i for i, row in enumerate(inputs.rows) if row in trained]
    unseen = [i for i, row in enumerate(inputs.rows) if row not in trained]
    parts = bool(seen and unseen)
    return {
        **({} if ious is None else {"follows": _follows(ious)}),
        "examples": examples or None,
        "held_out": _part(unseen, per_image, ious) if parts else None,
        "trained_on": _part(seen, per_image, ious) if parts else None,
    }


def _trained_rows(inputs: Inputs) -> frozenset[int]:
    """Return the rows of the store that the student was trained on, where they are known."""
    run = inputs.student.run
    own_store = run is not None and run.description.data.store_id == inputs.store.spec.store_id
    return frozenset(run.split.train) if run is not None and own_store else frozenset()


def _follows(ious: Sequence[float]) -> dict[str, Any]:
    # An undefined IoU is not followed: a comparison with NaN is False.
    return {"photos": sum(iou >= FOLLOWS_IOU for iou in ious), "of": len(ious), "threshold": FOLLOWS_IOU}


def _part(
    positions: Sequence[int], per_image: Sequence[ImageMetrics], ious: Sequence[float] | None
) -> dict[str, Any]:
    part = {"images": len(positions), "cosine_valid": _mean([per_image[i].cosine_valid for i in positions])}
    if ious is not None:
        some = [ious[i] for i in positions]
        part |= {"miou": _mean(some), "follows": _follows(some)["photos"]}
    return part


def _mean(values: Sequence[float]) -> float | None:
    return _plain(math.fsum(values) / len(values))


def _plain(value: float) -> float | None:
    """Return a number that JSON has."""
    return float(value) if math.isfinite(value) else None


def headline(result: Mapping[str, Any]) -> str:
    """Return the answer in one sentence: on how many photos the student follows its teacher, or its skill.

    Args:
        result: result of `verify`.
    """
    split, constant = result["subject"]["split"], result.get("no_better_than_constant")
    if (follows := result.get("follows")) is not None:
        words = _follows_words(follows["photos"], follows["of"], split)
        if (held_out := result.get("held_out")) is not None:
            words = f"{words} ({held_out['follows']:,} of {held_out['images']:,} held out)"
        if constant:
            return f"The student is no better than a constant; it {words}."
        return f"The student {words}."
    skill = result["skill_valid"]
    photos = counted_photos(result["images"], split)
    if constant:
        return "The student is no better than a constant."
    if skill is None or math.isnan(skill):
        return f"The student can't be judged: its skill on {photos} is undefined."
    if skill <= 0:
        return f"The student is no better than a constant on {photos}."
    return f"The student comes {_percent(skill)} of the way from a constant to its teacher on {photos}."


def counted_photos(count: int, split: str) -> str:
    """Return a number of photos in words, such as "10 held-out photos".

    Args:
        count: number of photos.
        split: "val", "train" or "all".
    """
    return counted(count, *_PHOTOS.get(split, _TRAINED))


def _follows_words(photos: int, of: int, split: str) -> str:
    one, many = _PHOTOS.get(split, _TRAINED)
    if of == 1:
        return f"{'follows' if photos else 'does not follow'} the teacher on the one {one}"
    if photos in (0, of):
        return f"follows the teacher on {'all' if photos else 'none of the'} {of:,} {many}"
    return f"follows the teacher on {photos:,} of {of:,} {many}"


def figures(result: Mapping[str, Any]) -> list[str]:
    """Return the figures behind the headline, in sentences: masks, held-out against trained photos, embeddings.

    Args:
        result: result of `verify`.
    """
    return [
        sentence
        for sentence in (_masks_words(result), _parts_words(result), _embeddings_words(result))
        if sentence is not None
    ]


def _masks_words(result: Mapping[str, Any]) -> str | None:
    follows = result.get("follows")
    if follows is None:
        return None
    if result["miou"] is None:
        return "The mean IoU of the masks is undefined, since an embedding is not finite."
    constant = result["miou_constant"]
    beside = "" if constant is None else f", those of a constant embedding {constant:.2f}"
    return (
        f"Both models' masks for the same points have a mean IoU of {result['miou']:.2f}{beside}; "
        f"a photo counts as followed from {follows['threshold']:g}."
    )


def _parts_words(result: Mapping[str, Any]) -> str | None:
    held_out, trained_on = result.get("held_out"), result.get("trained_on")
    if held_out is None or trained_on is None:
        return None
    texts = []
    for part, split in ((held_out, "val"), (trained_on, "train")):
        photos = counted_photos(part["images"], split)
        if "follows" not in part:
            texts.append(f"cosine {_number(part['cosine_valid'])} on {photos}")
        else:
            texts.append(f"{part['follows']:,} of {photos} (mean IoU {_number(part['miou'])})")
    if "follows" in held_out:
        return f"It follows the teacher on {texts[0]} and on {texts[1]}."
    return f"{texts[0].capitalize()}, {texts[1]}."


def _embeddings_words(result: Mapping[str, Any]) -> str:
    skill, cosine = _number(result["skill_valid"]), _number(result["cosine_valid"]["mean"])
    trained = result.get("train_skill_valid")
    other = (
        f"; on the photos that it was trained on, skill is {trained:.2f}"
        if trained is not None and result["subject"]["split"] == "val"
        else ""
    )
    return f"Its embeddings have skill {skill} (0 is a constant, 1 the teacher) and cosine {cosine}{other}."


def _percent(share: float) -> str:
    return "less than 1%" if share < 0.01 else f"{math.floor(100 * share)}%"


def _number(value: float | None) -> str:
    return "undefined" if value is None or math.isnan(value) else f"{value:.2f}"
