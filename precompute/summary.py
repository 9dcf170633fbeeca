"""What a run, or the plan of one, has come to, as lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

_GIGABYTE = 1e9


def summary_lines(out: Path, result: Mapping[str, Any]) -> list[str]:
    """The result of `precompute`."""
    line = f"{out}: {result['done']:,} of {result['images']:,} images done ({result['done_before']:,} before)"
    if result["failed"]:
        line += f", {result['failed']:,} failed (try them again with --retry-failed)"
    lines = [line]
    if result["images_per_second"]:
        lines.append(
            f"{result['images_per_second']:.3g} images/s; the teacher was busy {result['teacher_share']:.0%} of "
            f"that time; decoding took {result['decode_seconds']:.1f} s of CPU; {_time(result['seconds'])} in all"
        )
    return lines


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """The result of `dry_run`."""
    needed, free = plan["bytes_needed"], plan["bytes_free"]
    time = "not measured" if plan["pending"] else "none"
    if plan["pending"] and plan["seconds"] is not None:
        time = f"about {_time(plan['seconds'])} (one image took {plan['seconds_per_image']:.3g} s here)"
    lines = [
        f"images        {plan['images']:,}, of which {plan['pending']:,} to compute",
        f"shards        {plan['shards']:,} of {plan['shard_size']} images",
        f"bytes needed  {needed:,} ({needed / _GIGABYTE:.2f} GB)",
        f"bytes free    {free:,} ({free / _GIGABYTE:.2f} GB)",
        f"time          {time}",
    ]
    if needed > free:
        lines.append(f"There is too little room: {needed - free:,} bytes are missing.")
    return lines


def _time(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))
