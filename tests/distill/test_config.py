from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mobilesam.distill import DistillConfig, DistillError
from mobilesam.distill.checksummed_json import digest
from mobilesam.distill.recipe import RECIPES


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("micro_batch", 9),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("clip", float("inf")),
        ("weight_decay", -0.1),
        ("warmup", 1.0),
        ("val_fraction", 0.0),
        ("val_fraction", 1.0),
        ("freeze_norm", 1.5),
        ("seed", -1),
        ("loss_region", "image"),
        ("loss", "l1"),
        ("recipe", "mobilesam-2024"),
        ("precision", "float16"),
        ("workers", 0),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(DistillError, match=option.replace("_", " ")):
        DistillConfig(**{option: value})


def test_paths_and_hardware_are_no_part_of_a_runs_identity() -> None:
    here = DistillConfig(
        store=Path("a"), images=Path("b"), init=Path("d"), out=Path("c"), device="cpu", workers=1
    )
    assert here.identity() == DistillConfig().identity()


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 1e-4},
        {"epochs": 9},
        {"seed": 1},
        {"loss_region": "valid"},
        {"loss": "huber"},
        {"recipe": "edgesam"},
        {"recipe": "mobilesam-2023"},
    ],
)
def test_options_that_change_the_learning_change_the_digest(change: dict[str, object]) -> None:
    changed = DistillConfig(**change)
    assert digest(changed.identity()) != digest(DistillConfig().identity())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objects": 3}, "compares no masks"),
        (
            {"objective": "coupled", "focal_weight": 0.0, "dice_weight": 0.0},
            "nothing trains the masks",
        ),
        ({"objective": "coupled", "boxes": 1.5}, "from 0 to 1"),
        ({"objective": "coupled", "rounds": 0}, "at least 1"),
        ({"objective": "masks"}, "objective must be decoupled"),
        ({"objective": "decoder", "init": "x", "mse_weight": 1.0}, "trains no encoder"),
        ({"objective": "coupled", "loss": "huber"}, "loss is 'huber', but .* without --mse-weight"),
        ({"objective": "decoder", "init": "x", "loss": "huber"}, "compares no embeddings: leave it out"),
        ({"objective": "coupled", "loss_region": "valid"}, "loss region is 'valid', but"),
    ],
)
def test_options_of_masks_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        DistillConfig(**changes)


def test_a_decoupled_runs_identity_says_nothing_about_masks() -> None:
    assert not DistillConfig().identity().keys() & {"objective", "objects", "rounds", "labels"}
    assert DistillConfig(objective="coupled").identity()["rounds"] == 2


def test_a_file_of_labels_needs_no_other_option_and_its_place_is_not_what_the_run_is() -> None:
    config = DistillConfig(objective="coupled", coco=Path("a.json"))
    assert config.learns_from_labels
    assert config.identity() == DistillConfig(objective="coupled", labels="annotations").identity()
    assert not DistillConfig(objective="coupled").learns_from_labels
    for wrong, told in (
        ({"objective": "decoupled"}, "the decoupled objective learns from no labels"),
        ({"objective": "coupled", "labels": "teacher"}, "labels is 'teacher'"),
        ({"objective": "coupled", "label_masks": Path("masks")}, "two sources of labels"),
    ):
        with pytest.raises(DistillError, match=told):
            DistillConfig(coco=Path("a.json"), **wrong)


def test_the_first_recipes_identity_is_that_of_runs_from_before_there_were_recipes() -> None:
    # The identity that 4c4873a wrote for these options.
    assert DistillConfig(recipe="mobilesam-2023", batch_size=8).identity() == {
        "student": "tiny_vit", "epochs": 8, "batch_size": 8, "micro_batch": None, "lr": 1e-3, "weight_decay": 5e-4,
        "warmup": 0.05, "clip": 1.0, "freeze_norm": 0.5, "seed": 0, "val_fraction": 0.05, "loss_region": "all",
        "precision": "auto",
    }  # fmt: skip


def test_an_option_replaces_one_setting_of_the_recipe_and_the_options_are_saved_as_they_apply() -> None:
    config = DistillConfig(recipe="edgesam", lr=2e-3)
    assert config.resolved_recipe == replace(RECIPES["edgesam"], lr=2e-3)
    saved = config.to_json()
    assert (saved["lr"], saved["warmup"], saved["loss_region"]) == (2e-3, 0.5, "valid")
    assert replace(config, recipe="nanosam").resolved_recipe == replace(RECIPES["nanosam"], lr=2e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_configuration_that_can_be_saved_as_json(name: str) -> None:
    json.dumps(DistillConfig(recipe=name).to_json(), allow_nan=False)
