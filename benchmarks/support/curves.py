"""Curve of a soak test: memory, descriptors and time as a table, with a verdict on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.support.flatness import Judgement, judge

MEMORY_FLOOR = 0.02
TIME_FLOOR = 0.05
"""Rises up to this share of the first value count as flat, with however little noise."""

DESCRIPTORS_FLOOR = 8
"""Rise of open descriptors that counts as flat; a leak of one in a hundred images would open 200."""

STEEPEST = 100
"""Bytes per image by which memory may still grow in the second half: 1.1 GB over 11 million images."""

WHOLE_SET = 11_000_000
"""Images of SA-1B, rounded."""


def judge_curve(points: Sequence[dict[str, Any]]) -> dict[str, Judgement]:
    """Judge the memory and descriptors of each process, and the wall and processor time, by name.

    Memory is judged by its peaks: after a step the allocator keeps more or less of the freed memory, in plateaus that
    differ by 200 MiB from step to step, while allocated memory and the peaks stay level.
    """
    images = [point["images"] for point in points]
    found = {}
    for name in points[0]["resident"]:
        memory = [point["resident"][name] for point in points]
        found[f"peak memory of {name}, MiB"] = judge(images, memory, MEMORY_FLOOR * memory[0], STEEPEST)
        descriptors = [point["descriptors"][name] for point in points]
        found[f"descriptors of {name}"] = judge(images, descriptors, DESCRIPTORS_FLOOR)
    allocated = [point["allocated"] for point in points]
    if None not in allocated:
        floor = MEMORY_FLOOR * allocated[0]
        found["allocated memory, MiB"] = judge(images, allocated, floor, STEEPEST)
    for name in ("wall", "processor"):
        times = [point[name] for point in points]
        # The first point includes all start-up time.
        found[f"{name} time, ms per image"] = judge(images[1:], times[1:], TIME_FLOOR * times[1])
    return found


def table(points: Sequence[dict[str, Any]]) -> list[str]:
    """Return the curve as text, one line for each point."""
    names = list(points[0]["resident"])
    heads = [f"{name} MiB / fds" for name in names]
    columns = [*(f"{head:>24}" for head in heads), "allocated MiB", "wall ms/image", "CPU ms/image"]
    lines = ["  ".join(["    images", *columns])]
    for point in points:
        processes = [f"{point['resident'][n] / 2**20:17.1f} / {point['descriptors'][n]:4d}" for n in names]
        lines.append(
            f"{point['images']:10,}  {'  '.join(processes)}  {_mib(point['allocated']):>13}  "
            f"{point['wall'] * 1e3:13.2f}  "
            f"{point['processor'] * 1e3:12.2f}"
        )
    return lines


def _mib(size: float | None) -> str:
    return "?" if size is None else f"{size / 2**20:.1f}"


def verdict(judgements: dict[str, Judgement]) -> list[str]:
    """Return one line for each judgement: first and last fifth, the rise allowed, and the late growth of memory."""
    lines = []
    for name, found in judgements.items():
        unit = 2**-20 if "MiB" in name else 1e3 if "ms" in name else 1
        line = (
            f"{'flat' if found.flat else 'RISES':5}  {name}: {found.first * unit:.2f} -> {found.last * unit:.2f}, "
            f"{(found.last - found.first) * unit:+.2f} of {found.allowed * unit:.2f} allowed "
            f"(noise {found.noise * unit:.2f})"
        )
        if "MiB" in name:
            line += (
                f"; second half {found.late_slope:+.0f} +- {found.late_slope_error:.0f} bytes per image, or "
                f"{found.late_slope * WHOLE_SET / 2**20:.0f} MiB over {WHOLE_SET // 10**6} million"
            )
        lines.append(line)
    return lines


def judgements_json(judgements: dict[str, Judgement]) -> dict[str, Any]:
    """Return the judgements as JSON values."""
    return {name: asdict(found) for name, found in judgements.items()}
