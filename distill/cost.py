"""What students cost: parameters, multiplications, and time on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..sam.precision import resolve_device, resolve_precision
from .errors import DistillError
from .students import STUDENTS, build_student, outline_student, student_info

FORWARDS = 5


def students_table(
    names: Sequence[str] = (),
    image_size: int = 1024,
    device: str | torch.device = "cpu",
    precision: str = "float32",
) -> list[dict[str, Any]]:
    """One row for each name, all of `STUDENTS` where there are none.

    Keys: `name`, `summary`, `parameters`, `macs` (multiply-accumulates of convolutions, matrix products and
    attention for one image), `milliseconds` (one image in evaluation mode on `device`: the median of five after
    one that isn't counted), `error`. Where a student can't be built, `error` says why and the numbers are None.

    Raises DistillError when `image_size` isn't a positive multiple of 16, SamError for an unknown device or
    precision.
    """
    if image_size < 16 or image_size % 16:
        raise DistillError(f"image size must be a positive multiple of 16; it is {image_size}")
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    return [_row(name, image_size, device, precision) for name in names or STUDENTS]


def students_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """`students_table`'s rows for the terminal."""
    rows = list(rows)
    width = max((len(row["name"]) for row in rows), default=4)
    lines = [f"{'name':{width}}  {'parameters':>11}  {'MACs':>8}  {'ms/image':>9}"]
    for row in rows:
        if row["error"] is not None:
            lines.append(f"{row['name']:{width}}  {row['error']}")
            continue
        numbers = f"{row['parameters']:>11,}  {_giga(row['macs']):>8}  {row['milliseconds']:>9,.1f}"
        lines.append(f"{row['name']:{width}}  {numbers}  {row['summary']}")
    return lines


def count_macs(student: nn.Module, image_size: int) -> int:
    """Multiply-accumulates of one image in a student on the meta device."""
    pixels_BCHW = torch.empty(1, 3, image_size, image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student.eval()(pixels_BCHW)
    return counter.get_total_flops() // 2


def median_seconds(call: Callable[[], object], device: torch.device, limit: float = math.inf) -> float:
    """How long a call takes: the median of five after one that isn't counted; of fewer, at least one, where those
    together would take longer than `limit` seconds."""
    seconds: list[float] = []
    while len(seconds) < 1 + FORWARDS and (len(seconds) < 2 or sum(seconds) < limit):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def _row(name: str, image_size: int, device: torch.device, precision: str) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "summary": None, "parameters": None, "macs": None}
    row |= {"milliseconds": None, "error": None}
    try:
        info = student_info(name)
        row["summary"] = info.summary
        outline = outline_student(info, image_size)
        student = build_student(name, image_size, seed=0).to(device).eval()
    except DistillError as error:
        return {**row, "error": str(error)}
    return {
        **row,
        "parameters": sum(parameter.numel() for parameter in outline.parameters()),
        "macs": count_macs(outline, image_size),
        "milliseconds": 1000 * _seconds(student, image_size, device, precision),
    }


@torch.no_grad()
def _seconds(student: nn.Module, image_size: int, device: torch.device, precision: str) -> float:
    student = student.to(memory_format=torch.channels_last)
    pixels_BCHW = torch.zeros(1, 3, image_size, image_size, device=device)
    pixels_BCHW = pixels_BCHW.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return median_seconds(lambda: student(pixels_BCHW), device)


def _giga(macs: int) -> str:
    return f"{macs / 1e9:.3g} G"
