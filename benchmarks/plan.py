"""Computed costs of 1%, 10% and all of SA-1B: bytes, files, hours, bandwidth, cores, money. Pure arithmetic.

    python -m benchmarks.plan --gpus 8

prints the tables of docs/SCALE.md. That page explains the formulas and gives the sources of the inputs; every input
is an option.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import click

from mobilesam.store import array_layouts, shard_count

SA_1B = 11_185_362
"""Images in all of SA-1B (arXiv 2304.02643)."""

PARTS = {"1% (10 tars)": 111_854, "10%": 1_118_536, "all": SA_1B}
LARGER_SHARDS = 256


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Inputs of the plan: rates of one GPU, milliseconds of one core, bytes of one image, prices in one currency."""

    gpus: int = 8
    teacher_rate: float = 83.0
    slow_student_rate: float = 200.0
    fast_student_rate: float = 850.0
    epochs: int = 8
    photo_bytes: float = 0.98e6
    kept_bytes: float = 0.7e6
    decode_ms: float = 44.0
    keep_ms: float = 75.0
    kept_decode_ms: float = 15.0
    manifest_bytes: float = 150.0
    list_bytes: float = 60.0
    gpu_hour: float = 2.5
    terabyte_month: float = 20.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of a store of `images` images, in bytes and files."""

    images: int
    dtype: str
    shard_size: int

    @property
    def shards(self) -> int:
        """Shards, each one file for every array."""
        return shard_count(self.images, self.shard_size)

    @property
    def bytes(self) -> int:
        """Exact bytes of all shard files at 1024 pixels, with checksums, alignment and indexes."""
        layouts = array_layouts(self.dtype, 1024, self.shard_size)
        last = self.images - (self.shards - 1) * self.shard_size
        return sum(
            (self.shards - 1) * layout.file_bytes(self.shard_size) + layout.file_bytes(last)
            for layout in layouts
        )

    @property
    def bytes_an_image(self) -> float:
        """Average bytes of the shard files an image."""
        return self.bytes / self.images


def hours(images: int, rate: float, gpus: int) -> float:
    """Return the hours of `images` passes at `rate` a second on each of `gpus`."""
    return images / (rate * gpus) / 3600


def cores(rate: float, milliseconds: float) -> float:
    """Return the cores kept busy by `milliseconds` of work `rate` times a second."""
    return rate * milliseconds / 1000


def on_disk(costs: Costs) -> list[list[str]]:
    """Return the table of bytes and files on disk, and of the memory that goes with them."""
    rows = [
        [
            "",
            "float16",
            "int8",
            "kept images",
            "files of 64 rows",
            f"files of {LARGER_SHARDS} rows",
            "manifest",
            "trainer's list",
        ]
    ]
    for name, images in PARTS.items():
        half, small = (Size(images=images, dtype=dtype, shard_size=64) for dtype in ("float16", "int8"))
        larger = Size(images=images, dtype="float16", shard_size=LARGER_SHARDS)
        sizes = [half.bytes, small.bytes, images * costs.kept_bytes]
        lists = [images * costs.manifest_bytes, images * costs.list_bytes]
        rows.append(
            [name, *map(amount, sizes), f"{half.shards:,}", f"{larger.shards:,}", *map(amount, lists)]
        )
    return rows


def teaching(costs: Costs) -> list[list[str]]:
    """Return the table of the teacher's run on all GPUs."""
    rows = [["", "1 GPU, hours", f"{costs.gpus} GPUs, hours", "GPU cost", "disk cost per month, float16"]]
    for name, images in PARTS.items():
        alone = hours(images, costs.teacher_rate, 1)
        stored = Size(images=images, dtype="float16", shard_size=64).bytes / 1e12
        rows.append(
            [
                name,
                f"{alone:.1f}",
                f"{hours(images, costs.teacher_rate, costs.gpus):.1f}",
                f"{alone * costs.gpu_hour:,.0f}",
                f"{stored * costs.terabyte_month:,.0f}",
            ]
        )
    return rows


def learning(costs: Costs) -> list[list[str]]:
    """Return the table of the student's training on one GPU, at the slower and the faster step."""
    rows = [["", "hours", "GPU cost"]]
    for name, images in PARTS.items():
        spent = [
            hours(images * costs.epochs, rate, 1)
            for rate in (costs.slow_student_rate, costs.fast_student_rate)
        ]
        rows.append([name, *(" to ".join(f"{value:,.1f}" for value in values) for values in (
            spent, [value * costs.gpu_hour for value in spent]
        ))])  # fmt: skip
    return rows


def feeding(costs: Costs) -> list[list[str]]:
    """Return the table of disk bandwidth and cores that one GPU needs while it embeds or trains."""
    size = Size(images=SA_1B, dtype="float16", shard_size=64).bytes_an_image
    small = Size(images=SA_1B, dtype="int8", shard_size=64).bytes_an_image
    rows = [["work of one GPU", "images/s", "reads, MB/s", "writes, MB/s", "cores for decoding"]]
    teacher = costs.teacher_rate
    for what, further, ms in (
        ("teacher", 0.0, costs.decode_ms),
        ("teacher with --keep-images", costs.kept_bytes, costs.decode_ms + costs.keep_ms),
    ):
        written = teacher * (size + further) / 1e6
        rows.append(
            [what, f"{teacher:g}", f"{teacher * costs.photo_bytes / 1e6:.0f}", f"{written:.0f}",
             f"{cores(teacher, ms):.1f}"]
        )  # fmt: skip
    for rate in (costs.slow_student_rate, costs.fast_student_rate):
        for what, stored, image, ms in (
            ("student: float16, photos", size, costs.photo_bytes, costs.decode_ms),
            ("student: float16, kept images", size, costs.kept_bytes, costs.kept_decode_ms),
            ("student: int8, kept images", small, costs.kept_bytes, costs.kept_decode_ms),
        ):
            read = rate * (stored + image) / 1e6
            rows.append([what, f"{rate:g}", f"{read:,.0f}", "0", f"{cores(rate, ms):.1f}"])
    return rows


def amount(count: float) -> str:
    """Return bytes in a suitable unit, as text."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def markdown(rows: Iterable[list[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(costs: Costs) -> dict[str, str]:
    """Return title -> Markdown table."""
    made = {
        "On disk": on_disk(costs),
        "The teacher": teaching(costs),
        f"The student, {costs.epochs} epochs on one GPU": learning(costs),
        "Disk and cores for one GPU": feeding(costs),
    }
    return {title: markdown(rows) for title, rows in made.items()}


def _option(field: Any) -> Any:
    return click.option(
        f"--{field.name.replace('_', '-')}",
        type=type(field.default),
        show_default=True,
        default=field.default,
    )


@click.command()
def main(**given: Any) -> None:
    """Print the costs."""
    print(
        "\n\n".join(f"### {title}\n\n{table}" for title, table in tables(replace(Costs(), **given)).items())
    )


for _field in reversed(fields(Costs)):
    main = _option(_field)(main)

if __name__ == "__main__":
    main()
