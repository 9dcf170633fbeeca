"""Second stages of distillation: what training through SAM's mask decoder adds to a decoupled student, and when.

    python -m benchmarks.two_stages

trains a decoupled student on generated pictures that vit_nano has embedded, continues it in several ways (decoupled
again, semi-coupled, coupled, decoder alone), and judges all students by pictures of another seed. To continue
decoupled is the control: once for as many steps, and with `--same-time` for about as many seconds. It prints mIoU,
what the second stage added, and its seconds of training. A rerun resumes. `--write-docs` also writes the tables of
all runs in `--out` between the markers of docs/TWO_STAGES.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks.support.generated_store import compare_students
from benchmarks.support.machine import machine
from benchmarks.table import filled
from mobilesam.common.table import Table
from mobilesam.distill import DistillConfig
from mobilesam.verify.sweep.aggregate import Spread

DOCUMENT = Path(__file__).parents[1] / "docs" / "TWO_STAGES.md"
BATCH = 4
WAYS: Mapping[str, Mapping[str, Any]] = {
    "decoupled": {"objective": "decoupled"},
    "semi_coupled, MSE 1": {"objective": "semi_coupled", "mse_weight": 1.0},
    "semi_coupled, MSE 10": {"objective": "semi_coupled", "mse_weight": 10.0},
    "semi_coupled": {"objective": "semi_coupled"},
    "coupled, MSE 10": {"objective": "coupled", "mse_weight": 10.0},
    "decoder": {"objective": "decoder"},
}
"""Options of distill by the words of the table."""


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("two-stages"), show_default=True)
@click.option("--first", default=500, show_default=True, help="Steps of the first stage.")
@click.option("--second", default=500, show_default=True, help="Steps of the second stage.")
@click.option("--same-time", default=0, help="Steps of a further decoupled second stage; 0: none.")
@click.option("--ways", help=f"Second stages, separated by semicolons [default: {'; '.join(WAYS)}]")
@click.option("--lr", type=float, help="Peak learning rate of the second stage [default: the recipe's]")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--pictures", default=2000, show_default=True, help="Pictures to train on.")
@click.option("--test-pictures", default=200, show_default=True)
@click.option("--image-size", default=256, show_default=True)
@click.option("--student", default=DistillConfig().student, show_default=True)
@click.option("--write-docs", is_flag=True, help="Also write the tables in --out into docs/TWO_STAGES.md.")
@click.option("--json", "as_json", is_flag=True)
def main(
    out: Path,
    first: int,
    second: int,
    same_time: int,
    ways: str | None,
    lr: float | None,
    seeds: str,
    pictures: int,
    test_pictures: int,
    image_size: int,
    student: str,
    write_docs: bool,
    as_json: bool,
) -> None:
    """Compare second stages."""
    counts = {"image_size": image_size, "pictures": pictures, "test_pictures": test_pictures}
    base = DistillConfig(student=student, batch_size=BATCH, micro_batch=BATCH)
    chosen = [way.strip() for way in ways.split(";")] if ways else list(WAYS)
    found: dict[str, Any] = {"machine": machine(), "first": first, "lr": lr, **counts, "runs": []}
    for seed in map(int, seeds.split(",")):
        _, (begun,) = compare_students(out, "first", base, {"seed": (seed,)}, (first,), **counts)
        found["runs"].append(_figures("first stage", begun, begun))
        for way in chosen:
            lengths = (second, same_time) if way == "decoupled" and same_time else (second,)
            continued = replace(base, init=Path(begun["run"]), lr=lr)
            axes = {"seed": (seed,), **{name: (value,) for name, value in WAYS[way].items()}}
            _, runs = compare_students(out, "second", continued, axes, lengths, **counts)
            found["runs"] += [_figures(way, run, begun) for run in runs]
    rate = "" if lr is None else f"-{lr:g}"
    (out / f"two-stages-{first}-{second}{rate}.json").write_text(json.dumps(found, indent=1) + "\n")
    if write_docs:
        write_tables(out, DOCUMENT)
    print(json.dumps(found) if as_json else "\n".join(table(found).lines()))


def _figures(way: str, run: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "way": way,
        "seed": run["options"]["seed"],
        "steps": run["steps"],
        "miou": run["test"]["miou"],
        "gain": run["test"]["miou"] - first["test"]["miou"],
        "skill": run["test"]["skill_valid"],
        "seconds": run["seconds"],
    }


def table(found: Mapping[str, Any]) -> Table:
    """Return the table of a JSON file: a row for each way and number of steps, the mean of its seeds.

    Args:
        found: content of the file.
    """
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for run in found["runs"]:
        groups.setdefault((run["way"], run["steps"]), []).append(run)
    seeds = len({run["seed"] for run in found["runs"]})
    rate = "the recipe's" if found["lr"] is None else f"{found['lr']:g}"
    return Table(
        title=f"After {found['first']:,} decoupled steps of batch {BATCH}, rate {rate}, "
        f"{seeds} seed{'s' if seeds > 1 else ''}",
        columns=("second stage", "steps", "mIoU", "gain", "skill", "training"),
        numeric=(False, True, True, True, True, True),
        rows=[_row(way, steps, runs) for (way, steps), runs in groups.items()],
    )


def _row(way: str, steps: int, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    spreads = {name: Spread.of(run[name] for run in runs) for name in ("miou", "gain", "skill", "seconds")}
    miou, gain, skill, seconds = (spread for spread in spreads.values() if spread is not None)
    gained = "" if way == "first stage" else f"{'+' if gain.mean >= 0 else ''}{gain.text('.3f')}"
    return [way, f"{steps:,}", miou.text(".3f"), gained, skill.text(".3f"), f"{seconds.mean:.0f} s"]


def write_tables(out: Path, document: Path) -> None:
    """Put the tables of all JSON files between the document's markers.

    Args:
        out: folder with the JSON files.
        document: Markdown file with the markers.
    """
    tables = [table(json.loads(file.read_text())) for file in sorted(out.glob("two-stages-*.json"))]
    lines = "\n\n".join("\n".join(table.markdown()) for table in tables)
    document.write_text(filled(document.read_text(), lines, "two-stages"))


if __name__ == "__main__":  # precompute starts processes, which import this file
    main()
