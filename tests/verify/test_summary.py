from __future__ import annotations

import json
import math

import pytest

from mobilesam.verify import VerifyConfig, table_lines, verify
from mobilesam.verify.summary import FOLLOWS_IOU, example_positions, figures, headline


def judged(split: str = "val", photos: int = 8, of: int = 10, **changes: object) -> dict:
    return {
        "images": of,
        "follows": {"photos": photos, "of": of, "threshold": 0.5},
        "miou": 0.612,
        "miou_constant": 0.214,
        "skill_valid": 0.578,
        "cosine_valid": {"mean": 0.881, "p5": 0.7, "min": 0.6},
        "no_better_than_constant": False,
        "train_skill_valid": 0.71,
        "subject": {"split": split},
    } | changes


@pytest.mark.parametrize(
    ("split", "photos", "of", "sentence"),
    [
        ("val", 8, 10, "The student follows the teacher on 8 of 10 held-out photos."),
        ("all", 8, 1200, "The student follows the teacher on 8 of 1,200 photos."),
        ("train", 1, 2, "The student follows the teacher on 1 of 2 photos that it was trained on."),
        ("val", 10, 10, "The student follows the teacher on all 10 held-out photos."),
        ("val", 0, 10, "The student follows the teacher on none of the 10 held-out photos."),
        ("val", 1, 1, "The student follows the teacher on the one held-out photo."),
        ("all", 0, 1, "The student does not follow the teacher on the one photo."),
    ],
)
def test_the_answer_counts_the_photos_on_which_the_student_follows(split, photos, of, sentence):
    assert headline(judged(split, photos, of)) == sentence


def test_a_student_no_better_than_a_constant_is_told_first():
    sentence = "The student is no better than a constant; it follows the teacher on 1 of 10 held-out photos."
    assert headline(judged(photos=1, no_better_than_constant=True)) == sentence


@pytest.mark.parametrize(
    ("skill", "constant", "sentence"),
    [
        (
            0.579,
            False,
            "The student comes 57% of the way from a constant to its teacher on 3 held-out photos.",
        ),
        (0.004, False, "less than 1% of the way"),
        (-0.2, False, "The student is no better than a constant on 3 held-out photos."),
        (-0.2, True, "The student is no better than a constant."),
        (None, None, "The student can't be judged: its skill on 3 held-out photos is undefined."),
    ],
)
def test_without_masks_the_answer_is_in_terms_of_skill(skill, constant, sentence):
    result = judged(images=3, skill_valid=skill, no_better_than_constant=constant)
    del result["follows"], result["miou"]
    assert sentence in headline(result)
    assert not any("IoU" in line for line in figures(result))


def test_the_figures_name_the_threshold_and_tell_held_out_from_trained_photos():
    masks, embeddings = figures(judged())
    assert (
        "mean IoU of 0.61, those of a constant embedding 0.21; a photo counts as followed from 0.5." in masks
    )
    assert "skill 0.58 (0 is a constant, 1 the teacher) and cosine 0.88; on the photos that it" in embeddings
    parts = {
        "held_out": {"images": 1, "cosine_valid": 0.8, "miou": 0.44, "follows": 0},
        "trained_on": {"images": 9, "cosine_valid": 0.9, "miou": 0.66, "follows": 8},
    }
    _, told, _ = figures(judged("all", **parts))
    assert headline(judged("all", **parts)).endswith("on 8 of 10 photos (0 of 1 held out).")
    assert told == (
        "It follows the teacher on 0 of 1 held-out photo (mean IoU 0.44) and on 8 of 9 photos that it was trained on "
        "(mean IoU 0.66)."
    )


def test_an_undefined_iou_is_called_so():
    result = judged(miou=None, skill_valid=None, cosine_valid={"mean": None, "p5": None, "min": None})
    assert "undefined" in figures(result)[0]
    assert "skill undefined" in figures(result)[-1]


@pytest.mark.parametrize(
    ("scores", "places"),
    [
        ([], {}),
        ([None, math.nan], {}),
        ([0.5], {"best": 0, "median": 0, "worst": 0}),
        ([0.5, 0.2], {"best": 0, "median": 1, "worst": 1}),
        ([0.5, math.nan, 0.2, 0.4], {"best": 0, "median": 3, "worst": 2}),
        ([0.1, 0.4, 0.3, 0.2], {"best": 1, "median": 3, "worst": 0}),
    ],
)
def test_the_examples_are_the_best_the_median_and_the_worst(scores, places):
    assert example_positions(scores) == places


def test_the_facts_of_a_verification_are_counted_from_its_images(world):
    result = verify(VerifyConfig(split="all"))
    run = world.run
    assert result["follows"]["of"] == result["images"] == 6
    assert result["follows"]["threshold"] == FOLLOWS_IOU
    held_out, trained_on = result["held_out"], result["trained_on"]
    assert (held_out["images"], trained_on["images"]) == (len(run.split.val), len(run.split.train))
    assert held_out["follows"] + trained_on["follows"] == result["follows"]["photos"]
    mean = (held_out["images"] * held_out["miou"] + trained_on["images"] * trained_on["miou"]) / 6
    assert mean == pytest.approx(result["miou"])
    examples = result["examples"]
    assert examples["worst"]["miou"] == pytest.approx(result["miou_min"])
    assert examples["worst"]["miou"] <= examples["median"]["miou"] <= examples["best"]["miou"]
    assert result["train_skill_valid"] == pytest.approx(run.last("train_eval")["skill_valid"])
    assert table_lines(result)[-1] == result["summary"] == headline(result)
    json.dumps(result, allow_nan=False)
    # The held-out photos alone have the figures that they have among all.
    alone = verify(VerifyConfig(split="val"))
    assert (alone["held_out"], alone["trained_on"]) == (None, None)
    assert alone["follows"]["photos"] == held_out["follows"]
    assert alone["miou"] == pytest.approx(held_out["miou"], abs=2e-3)
