"""Cost of students: parameters, multiply-accumulates, milliseconds on this machine, and memory in training.

Shape suffixes: B images, C channels, H and W rows and columns of an image or of the embedding's grid, 1 one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...common.errors import DistillError
from ...common.table import Table
from ...sam.device import resolve_device, resolve_precision
from ...sam.modeling.head import SamHead
from ...sam.modeling.neck import EMBEDDING_CHANNELS
from ...sam.photos.preprocess import PATCH
from ..data.labels import mask_side
from ..loss.coupled import MaskOptions
from ..loss.masks import PromptedObjects
from .registry import (
    STUDENTS,
    StudentInfo,
    build_student,
    check_student_size,
    outline_student,
    student_info,
)

FORWARDS = 5
"""Number of timed calls, whose median is reported; one untimed call comes before them."""

MEASURED_SIZE = 256
"""Largest image size in pixels at which memory is measured; the result is scaled by the area."""

MEMORY_SHARE = 0.8
"""Share of the free memory for the default micro-batch; the rest is for weights, AdamW's moments (70 MB for TinyViT)
and fragmentation."""

CPU_MEMORY_SHARE = 0.4
"""The same on a CPU, whose memory other programs use, too."""


def students_table(
    names: Sequence[str] = (),
    image_size: int = 1024,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    student_size: int | None = None,
) -> list[dict[str, Any]]:
    """Measure students, one row for each, with images of two sizes as their input.

    Args:
        names: registry names or `timm:NAME`; all of `STUDENTS` if empty.
        image_size: side of SAM's square in pixels, and of the larger input.
        device: device of the timing, as for `--device`.
        precision: "float32", "bfloat16" (autocast) or "auto".
        student_size: side of the smaller input in pixels; None: half of `image_size`, rounded down to a multiple of
            16.

    Returns:
        Rows with the keys `name`, `summary`, `student_size` (side of the input in pixels), `parameters`, `macs`
        (multiply-accumulates of convolutions, matrix products and attention for one image), `milliseconds` (one image
        in evaluation mode on `device`: the median of five after an untimed one), `error`; and `small` with these
        keys, from `student_size` on, for the smaller input. If a student can't be built, `error` says why and the
        numbers are None.

    Raises:
        DistillError: a size isn't allowed (`check_student_size`).
        SamError: an unknown device or precision.
    """
    small = check_student_size(student_size or max(PATCH, image_size // 2 // PATCH * PATCH), image_size)
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    return [
        {
            "name": name,
            "summary": _summary(name),
            **_costs(name, image_size, image_size, device, precision),
            "small": _costs(name, image_size, small, device, precision),
        }
        for name in names or STUDENTS
    ]


def students_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format the rows of `students_table` for the terminal: a table, then a line for each student without numbers."""
    sizes = (rows[0]["student_size"], rows[0]["small"]["student_size"])
    table = Table(
        title="",
        columns=(
            "name",
            "parameters",
            *(f"{what} at {size}" for size in sizes for what in ("MACs", "ms")),
            "",
        ),
        numeric=(False, *[True] * 5, False),
        rows=[
            [
                row["name"],
                f"{row['parameters']:,}",
                *_cells(row),
                *_cells(row["small"]),
                row["summary"],
            ]
            for row in rows
            if row["error"] is None
        ],
    )
    errors = [f"{row['name']}: {row['error']}" for row in rows if row["error"] is not None]
    return [*(table.lines() if table.rows else []), *errors]


def _cells(costs: Mapping[str, Any]) -> list[str]:
    if costs["error"] is not None:
        return ["", ""]
    return [f"{costs['macs'] / 1e9:.3g} G", f"{costs['milliseconds']:,.1f}"]


def count_macs(student: nn.Module, student_size: int, device: torch.device | str = "meta") -> int:
    """Return the multiply-accumulates of one image.

    Args:
        student: encoder on the device (`outline_student`).
        student_size: side of the encoder's input in pixels.
        device: the meta device, where nothing is computed, or the one where the encoder is.
    """
    pixels_BCHW = torch.zeros(1, 3, student_size, student_size, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student.eval()(pixels_BCHW)
    return counter.get_total_flops() // 2


def median_seconds(call: Callable[[], object], device: torch.device, limit: float = math.inf) -> float:
    """Return the time of a call in seconds: the median of five calls after an untimed one.

    Args:
        call: function to time.
        device: device that it computes on; a GPU is synchronised with after each call.
        limit: seconds after which no further call is made; at least two are made.
    """
    seconds: list[float] = []
    while len(seconds) < 1 + FORWARDS and (len(seconds) < 2 or sum(seconds) < limit):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def default_micro_batch(
    info: StudentInfo,
    batch_size: int,
    image_size: int,
    precision: str,
    device: torch.device,
    masks: MaskOptions | None = None,
    student_size: int | None = None,
) -> int:
    """Return the default number of images in a forward pass of training.

    As many as fit the free memory, since batch norms learn more from more images; with masks on a CPU at most 2.

    Args:
        info: the student's registry entry.
        batch_size: largest result; this process's share of the batch.
        image_size: side of SAM's square in pixels.
        precision: "float32" or "bfloat16".
        device: device of the training.
        masks: options of an objective that compares masks, else None.
        student_size: side of the student's input in pixels; None: `image_size`.
    """
    if device.type == "cuda":
        free = MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    elif masks is None:
        free = CPU_MEMORY_SHARE * psutil.virtual_memory().available
    else:
        free, batch_size = MEMORY_SHARE * psutil.virtual_memory().available, min(2, batch_size)
    known = info.training_bytes if student_size in (None, image_size) else None
    at_1024 = (
        known[precision]
        if known
        else measure_training_bytes(info, image_size, precision, device, student_size)
    )
    if masks is not None:
        at_1024 += measure_mask_bytes(masks, image_size)
    bytes_per_image = at_1024 * (image_size / 1024) ** 2
    return max(1, min(batch_size, int(free / bytes_per_image)))


def measure_training_bytes(
    info: StudentInfo,
    image_size: int,
    precision: str,
    device: torch.device | str = "cpu",
    student_size: int | None = None,
) -> int:
    """Measure the memory of activations for one training image if SAM's square has 1024 x 1024 pixels.

    It is the memory that autograd keeps for the backward pass of three images minus that of two, which leaves out
    weights and their casts. Images of at most 256 x 256 pixels are measured, and the result is scaled by the area.
    For tiny_vit this agrees with the process's peak memory within 10%.

    Args:
        info: the student's registry entry.
        image_size: side of SAM's square in pixels.
        precision: "float32" or "bfloat16".
        device: device to measure on.
        student_size: side of the student's input in pixels; None: `image_size`.

    Returns:
        Bytes, at least 1.
    """
    size = min(image_size, MEASURED_SIZE)
    # Scaled alike, to the nearest size that is allowed.
    small = PATCH * math.ceil((student_size or image_size) * size / image_size / PATCH)
    where = torch.device(device)
    # Without a list, torch opens a context on every GPU of the machine.
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        student = info.build(size, small).to(device).train()
        two, three = (_saved_bytes(student, count, small, precision, device) for count in (2, 3))
    return max(1, round((three - two) * (1024 / size) ** 2))


def measure_mask_bytes(options: MaskOptions, image_size: int) -> int:
    """Measure the memory of the mask loss for one training image at 1024 x 1024 pixels, without the head's weights.

    Measured and scaled as in `measure_training_bytes`, as the difference of twice the objects and once.

    Args:
        options: options of the objective; `objects` are prompted.
        image_size: side of the encoder's square in pixels.

    Returns:
        Bytes, at least 1.
    """
    size = min(image_size, MEASURED_SIZE)
    with torch.random.fork_rng(devices=[]):
        head = SamHead(size)
    emb_1CHW = torch.zeros(1, EMBEDDING_CHANNELS, size // 16, size // 16, requires_grad=True)

    def forward(count: int) -> None:
        side = mask_side(size)
        objects = PromptedObjects(
            masks_PMM=torch.ones(count, side, side, dtype=torch.bool),
            image_P=torch.zeros(count, dtype=torch.long),
            valid_BMM=torch.ones(1, side, side, dtype=torch.bool),
            weight_P=torch.ones(count),
        )
        options.mask_loss(head, emb_1CHW, objects, torch.Generator().manual_seed(0))

    once, twice = (_kept_bytes(partial(forward, count * options.objects)) for count in (1, 2))
    return max(1, round((twice - once) * (1024 / size) ** 2))


def _summary(name: str) -> str | None:
    try:
        return student_info(name).summary
    except DistillError:  # the row's error says why
        return None


def _costs(
    name: str, image_size: int, student_size: int, device: torch.device, precision: str
) -> dict[str, Any]:
    """Measure a student with inputs of one size; if it can't be built, all numbers are None."""
    costs: dict[str, Any] = {"student_size": student_size, "parameters": None, "macs": None}
    costs |= {"milliseconds": None, "error": None}
    try:
        outline = outline_student(student_info(name), image_size, student_size)
        student = build_student(name, image_size, 0, student_size).to(device).eval()
    except DistillError as error:
        return {**costs, "error": str(error)}
    return {
        **costs,
        "parameters": sum(parameter.numel() for parameter in outline.parameters()),
        "macs": count_macs(outline, student_size),
        "milliseconds": 1000 * _seconds(student, student_size, device, precision),
    }


@torch.no_grad()
def _seconds(student: nn.Module, student_size: int, device: torch.device, precision: str) -> float:
    student = student.to(memory_format=torch.channels_last)
    pixels_BCHW = torch.zeros(1, 3, student_size, student_size, device=device)
    pixels_BCHW = pixels_BCHW.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return median_seconds(lambda: student(pixels_BCHW), device)


def _saved_bytes(
    student: nn.Module, images: int, size: int, precision: str, device: torch.device | str
) -> int:
    pixels_BCHW = torch.zeros(images, 3, size, size, device=device)

    def forward() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            student(pixels_BCHW)

    return _kept_bytes(forward)


def _kept_bytes(forward: Callable[[], None]) -> int:
    """Return the bytes of the storages, each counted once, that a forward pass keeps for the backward pass."""
    storages: dict[int, torch.UntypedStorage] = {}
    nothing = torch.empty(0)

    def keep(saved: Tensor) -> Tensor:
        # A reference is held, so that no other storage gets the same address.
        storage = saved.untyped_storage()
        storages[storage.data_ptr()] = storage
        return nothing

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        forward()
    return sum(storage.nbytes() for storage in storages.values())
