"""Students of smaller inputs: masks lost for multiply-accumulates and milliseconds saved.

    python -m benchmarks.student_size
    python -m benchmarks.student_size --image-size 1024 --micro-batch 2 --write-docs

trains a student on generated pictures that vit_nano has embedded at the image size, once for each size of its input
(the whole one and half of it), with equal steps and seeds, and judges the students by pictures of another seed. It
prints the input's size, multiply-accumulates, milliseconds (all sizes timed in turn in one process), skill, and mIoU
with vit_nano's masks. A rerun resumes. `--write-docs` puts the tables of all image sizes in `--out` between the
markers of docs/RECIPE.md.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from benchmarks.support.generated_store import make_generated_store
from benchmarks.support.machine import machine
from mobilesam.common.table import Table
from mobilesam.distill import DistillConfig, build_student, student_info
from mobilesam.distill.students.cost import count_macs
from mobilesam.distill.students.registry import outline_student
from mobilesam.verify import SweepConfig, sweep
from mobilesam.verify.sweep.aggregate import Group, grouped

BATCH = 8
TRAIN_SEED, TEST_SEED = 301, 302
DOCUMENT = Path(__file__).parents[1] / "docs" / "RECIPE.md"
BEGIN, END = "<!-- sizes -->", "<!-- /sizes -->"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("student-size"), show_default=True)
@click.option("--image-size", default=256, show_default=True, help="Side of SAM's square in pixels.")
@click.option("--sizes", help="Sides of the student's input [default: the image size and half of it].")
@click.option("--steps", default=500, show_default=True, help="Optimizer steps of each run.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--pictures", default=2000, show_default=True, help="Pictures to train on.")
@click.option("--test-pictures", default=200, show_default=True)
@click.option("--student", default=DistillConfig().student, show_default=True)
@click.option("--micro-batch", default=BATCH, show_default=True, help="Images in memory at once.")
@click.option("--rounds", default=9, show_default=True, help="Timed forward passes of each size.")
@click.option("--write-docs", is_flag=True, help="Also write the tables in --out into docs/RECIPE.md.")
@click.option("--json", "as_json", is_flag=True)
def main(
    out: Path,
    image_size: int,
    sizes: str | None,
    steps: int,
    seeds: str,
    pictures: int,
    test_pictures: int,
    student: str,
    micro_batch: int,
    rounds: int,
    write_docs: bool,
    as_json: bool,
) -> None:
    """Compare students of the same network with inputs of several sizes."""
    asked = tuple(map(int, sizes.split(","))) if sizes else (image_size, image_size // 2)
    # One picture is held out, as distill needs; the students are judged by the test pictures.
    train, test = (
        make_generated_store(out, f"{name}-{image_size}", count=count, seed=seed, image_size=image_size)
        for name, count, seed in (("train", pictures + 1, TRAIN_SEED), ("test", test_pictures, TEST_SEED))
    )
    base = DistillConfig(
        store=train,
        student=student,
        batch_size=BATCH,
        micro_batch=micro_batch,
        val_fraction=0.5 / pictures,
    )
    result = sweep(
        SweepConfig(
            out=out / f"runs-{image_size}",
            base=base,
            axes={"seed": tuple(map(int, seeds.split(","))), "student_size": asked},
            iterations=(steps,),
            test_store=test,
        ),
        message=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if result["failed"]:
        sys.exit(f"{result['failed']} runs failed; the lines above say why")
    milliseconds = interleaved_milliseconds(student, image_size, asked, rounds)
    found = {
        "machine": machine(),
        "student": student,
        "image_size": image_size,
        "pictures": pictures,
        "test_pictures": test_pictures,
        "sizes": [
            {
                "student_size": size,
                "macs": count_macs(outline_student(student_info(student), image_size, size), size),
                "milliseconds": milliseconds[size],
            }
            for size in asked
        ],
        "runs": result["runs"],
    }
    (out / f"sizes-{image_size}.json").write_text(json.dumps(found, indent=1) + "\n")
    if write_docs:
        write_tables(out, DOCUMENT)
    print(json.dumps(found) if as_json else "\n".join(table(found).lines()))


@torch.no_grad()
def interleaved_milliseconds(
    student: str, image_size: int, sizes: Sequence[int], rounds: int
) -> dict[int, float]:
    """Time an image's forward pass in float32 on the CPU, all sizes in turn, after an untimed one of each.

    Args:
        student: name in the registry.
        image_size: side of SAM's square in pixels.
        sizes: sides of the student's input in pixels.
        rounds: number of timed passes of each size.

    Returns:
        Medians by size.
    """
    students = {
        size: build_student(student, image_size, 0, size).eval().to(memory_format=torch.channels_last)
        for size in sizes
    }
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(1 + rounds):
        for size, encoder in students.items():
            pixels_BCHW = torch.zeros(1, 3, size, size).contiguous(memory_format=torch.channels_last)
            start = time.perf_counter()
            encoder(pixels_BCHW)
            seconds[size].append(time.perf_counter() - start)
    return {size: 1000 * median(taken[1:]) for size, taken in seconds.items()}


def table(found: Mapping[str, Any]) -> Table:
    """Return the table of an image size.

    Args:
        found: content of its JSON file.
    """
    groups: dict[int, Group] = {group.options["student_size"]: group for group in grouped(found["runs"])}
    outcomes = [outcome for group in groups.values() for outcome in group.outcomes]
    seeds = sorted({outcome["options"]["seed"] for outcome in outcomes})
    return Table(
        title=f"{found['student']} at image size {found['image_size']}, {outcomes[0]['steps']:,} steps of {BATCH}",
        columns=("input", "MACs", "ms", "skill", *(f"mIoU, seed {seed}" for seed in seeds), "mIoU, mean"),
        numeric=(True, True, True, True, *[True] * len(seeds), True),
        rows=[_row(one, groups[one["student_size"]], seeds) for one in found["sizes"]],
        note=f"{found['pictures']:,} generated pictures to train on, {found['test_pictures']:,} of another seed to "
        f"judge by; milliseconds of one image on "
        f"{found['machine']['processor']}",
    )


def _row(one: Mapping[str, Any], group: Group, seeds: Sequence[int]) -> list[str]:
    by_seed = {outcome["options"]["seed"]: outcome["test"] for outcome in group.outcomes}
    skill, miou = group.verified("skill_valid"), group.verified("miou")
    assert skill is not None
    assert miou is not None
    return [
        str(one["student_size"]),
        f"{one['macs'] / 1e9:.3g} G",
        f"{one['milliseconds']:,.1f}",
        skill.text(".3f"),
        *(f"{by_seed[seed]['miou']:.3f}" if seed in by_seed else "" for seed in seeds),
        miou.text(".3f"),
    ]


def write_tables(out: Path, document: Path) -> None:
    """Put the tables of all image sizes between the document's markers.

    Args:
        out: folder with the JSON files.
        document: Markdown file with the markers.
    """
    text = document.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"{document} lacks the markers {BEGIN} and {END}")
    files = sorted(out.glob("sizes-*.json"), key=lambda file: int(file.stem.partition("-")[2]))
    lines = [line for file in files for line in [*table(json.loads(file.read_text())).markdown(), ""]]
    before, _, rest = text.partition(BEGIN)
    document.write_text("\n".join([before + BEGIN, "", *lines, END + rest.partition(END)[2]]))


if __name__ == "__main__":  # precompute starts processes, which import this file
    main()
