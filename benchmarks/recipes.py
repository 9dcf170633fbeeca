"""Recipes of distillation side by side: ours, our former default, and those of other projects.

    python -m benchmarks.recipes

trains tiny_vit on generated pictures that vit_nano has embedded, with every recipe of `mobilesam distill --recipe`,
equal batches, steps and seeds, and judges the students by pictures of another seed. It prints skill, mIoU, and the
seconds of a step, which are measured in turn in one process. A rerun resumes. `make recipes` also writes the tables
into docs/RECIPE.md, with those of

    python -m benchmarks.recipes --parts

which changes one part of our recipe at a time (PARTS below).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks.support.generated_store import DOCUMENT, compare_students
from benchmarks.support.machine import machine
from benchmarks.support.training_step import recipe_step_seconds
from benchmarks.table import filled
from mobilesam.common.table import Table
from mobilesam.distill import DistillConfig
from mobilesam.distill.recipe import DEFAULT_RECIPE, RECIPES, Recipe
from mobilesam.verify.sweep.aggregate import Group, grouped

BATCH = 4
"""Images of a step, all in one forward pass; the paper's Table 4 begins with as many."""
DEFAULT = RECIPES[DEFAULT_RECIPE]

PARTS: Mapping[str, Recipe] = {
    "without neck start": replace(DEFAULT, neck_start=None),
    "AdamW at 1e-3 in place of Muon": replace(DEFAULT, optimizer="adamw", lr=1e-3),
    "AdamW at 3e-3 in place of Muon": replace(DEFAULT, optimizer="adamw", lr=3e-3),
    "a third of the rate": replace(DEFAULT, lr=DEFAULT.lr / 3),
    "three times the rate": replace(DEFAULT, lr=3 * DEFAULT.lr),
    "half a cosine in place of linear": replace(DEFAULT, schedule="cosine"),
    "constant rate": replace(DEFAULT, schedule="constant"),
    "batch norms never frozen": replace(DEFAULT, freeze_norm=1.0),
    "one rate for Muon and AdamW": replace(DEFAULT, adamw_lr_share=1.0),
    "no weight decay": replace(DEFAULT, weight_decay=0.0),
    "weight decay 0.05": replace(DEFAULT, weight_decay=0.05),
    "loss without padding": replace(DEFAULT, loss_region="valid"),
    "squared error and cosine": replace(DEFAULT, loss="mse_cosine"),
    "Huber's loss": replace(DEFAULT, loss="huber"),
    "root of the squared error": replace(DEFAULT, loss="root"),
}
"""Our recipe with one part changed, by the words of the table."""


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("recipes"), show_default=True)
@click.option("--steps", default="500,2000", show_default=True, help="Numbers of optimizer steps.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--pictures", default=2000, show_default=True, help="Pictures to train on.")
@click.option("--test-pictures", default=200, show_default=True)
@click.option("--image-size", default=256, show_default=True)
@click.option("--student", default=DistillConfig().student, show_default=True)
@click.option("--recipes", help="Recipes to compare, or with --parts changes of ours [default: all].")
@click.option("--parts", is_flag=True, help="Compare our recipe with itself but for one part.")
@click.option("--rounds", default=5, show_default=True, help="Timed steps of each recipe; 0: none.")
@click.option("--write-docs", is_flag=True, help="Write the tables into docs/RECIPE.md; train nothing.")
@click.option("--json", "as_json", is_flag=True)
def main(
    out: Path,
    steps: str,
    seeds: str,
    pictures: int,
    test_pictures: int,
    image_size: int,
    student: str,
    recipes: str | None,
    parts: bool,
    rounds: int,
    write_docs: bool,
    as_json: bool,
) -> None:
    """Compare recipes, or the parts of ours."""
    name = "parts" if parts else "recipes"
    if write_docs:
        _write_docs(out)
        return
    names = tuple(recipes.split(",")) if recipes else (DEFAULT_RECIPE, *PARTS) if parts else tuple(RECIPES)
    RECIPES.update(PARTS)  # for the names of the sweep's runs
    train, runs = compare_students(
        out,
        name,
        DistillConfig(student=student, batch_size=BATCH, micro_batch=BATCH),
        {"seed": _numbers(seeds), "recipe": names},
        _numbers(steps),
        image_size=image_size,
        pictures=pictures,
        test_pictures=test_pictures,
    )
    found = {
        "machine": machine(),
        "pictures": pictures,
        "test_pictures": test_pictures,
        "image_size": image_size,
        "student": student,
        "runs": runs,
        "step_seconds": recipe_step_seconds(names, train, student, BATCH, rounds),
    }
    (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    if as_json:
        print(json.dumps(found))
        return
    for table in tables(found):
        print("\n".join([*table.lines(), ""]))


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Return a table for each number of steps: the recipes by mIoU, with the difference to ours."""
    groups = grouped(found["runs"])
    made = []
    for steps in sorted({_steps(group) for group in groups}):
        these = sorted(
            (group for group in groups if _steps(group) == steps), key=lambda group: -_mean(group, "miou")
        )
        ours = next((g for g in these if g.options["recipe"] == DEFAULT_RECIPE), None)
        made.append(
            Table(
                title=f"{steps:,} steps of batch {BATCH}, {counted_seeds(these)}",
                columns=("recipe", "mIoU", "to ours", "skill", "step"),
                numeric=(False, True, True, True, True),
                rows=[_row(group, ours, found["step_seconds"]) for group in these],
            )
        )
    return made


def counted_seeds(groups: Sequence[Group]) -> str:
    """Return the number of seeds of the groups' runs as words."""
    count = max(len(group.outcomes) for group in groups)
    return f"{count} seed{'s' if count > 1 else ''}"


def _row(group: Group, ours: Group | None, seconds: Mapping[str, float]) -> list[str]:
    name = group.options["recipe"]
    miou, skill = group.verified("miou"), group.verified("skill_valid")
    assert miou is not None
    assert skill is not None
    difference = "" if ours is None or group is ours else f"{miou.mean - _mean(ours, 'miou'):+.3f}"
    step = ""
    if seconds:
        relative = f" ({seconds[name] / seconds[DEFAULT_RECIPE]:.2f})" if DEFAULT_RECIPE in seconds else ""
        step = f"{seconds[name]:.2f} s{relative}"
    return [name, miou.text(".3f"), difference, skill.text(".3f"), step]


def _mean(group: Group, name: str) -> float:
    spread = group.verified(name)
    assert spread is not None, "every run is judged by the test pictures"
    return spread.mean


def _steps(group: Group) -> int:
    steps: int = group.outcomes[0]["steps"]
    return steps


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _write_docs(out: Path) -> None:
    """Put the tables of what has been measured between the document's markers."""
    text = DOCUMENT.read_text()
    for name in ("recipes", "parts"):
        file = out / f"{name}.json"
        if file.exists():
            found = tables(json.loads(file.read_text()))
            text = filled(text, "\n\n".join("\n".join(table.markdown()) for table in found), name)
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
