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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.support.figures import by_turns
from benchmarks.support.generated_store import DOCUMENT, compare_students
from benchmarks.support.machine import machine
from benchmarks.table import filled
from mobilesam.common.table import Table
from mobilesam.distill import DistillConfig, build_student, student_info
from mobilesam.distill.students.cost import count_macs
from mobilesam.distill.students.registry import outline_student
from mobilesam.verify.sweep.aggregate import Group, grouped

BATCH = 8


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
    _, runs = compare_students(
        out,
        f"runs-{image_size}",
        DistillConfig(student=student, batch_size=BATCH, micro_batch=micro_batch),
        {"seed": tuple(map(int, seeds.split(","))), "student_size": asked},
        (steps,),
        image_size=image_size,
        pictures=pictures,
        test_pictures=test_pictures,
    )
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
        "runs": runs,
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

    def forward(size: int) -> Callable[[], Tensor]:
        encoder = build_student(student, image_size, 0, size).eval().to(memory_format=torch.channels_last)
        pixels_BCHW = torch.zeros(1, 3, size, size).contiguous(memory_format=torch.channels_last)
        return lambda: encoder(pixels_BCHW)

    seconds = by_turns({str(size): forward(size) for size in sizes}, rounds)
    return {size: 1000 * seconds[str(size)] for size in sizes}


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
    files = sorted(out.glob("sizes-*.json"), key=lambda file: int(file.stem.partition("-")[2]))
    tables = [table(json.loads(file.read_text())) for file in files]
    lines = "\n\n".join("\n".join(table.markdown()) for table in tables)
    try:
        document.write_text(filled(document.read_text(), lines, "sizes"))
    except ValueError as error:
        sys.exit(f"{document}: {error}")


if __name__ == "__main__":  # precompute starts processes, which import this file
    main()
