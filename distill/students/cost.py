"""What students cost: parameters, multiplications, and time on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...common.errors import DistillError
from ...sam.device import resolve_device, resolve_precision
from ...sam.modeling.head import SamHead
from ...sam.modeling.neck import EMBEDDING_CHANNELS
from ..loss.masks import Objects, mask_side
from ..loss.objectives import MaskOptions
from .registry import STUDENTS, build_student, outline_student, student_info

if TYPE_CHECKING:
    from .registry import StudentInfo

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


# --- The memory that training a student takes, measured.

MEASURED_SIZE = 256

# What of the free memory the default micro-batch may fill: the rest is for weights, AdamW's moments (70 MB
# for TinyViT) and fragmentation.
MEMORY_SHARE = 0.8


def default_micro_batch(
    info: StudentInfo,
    batch_size: int,
    image_size: int,
    precision: str,
    device: torch.device,
    masks: MaskOptions | None = None,
) -> int:
    """Images in a forward pass: 2 on a CPU, or 1 where masks leave no memory for more; on a GPU as many as its free
    memory holds; at most `batch_size`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    elif masks is None:
        return min(2, batch_size)
    else:
        free, batch_size = psutil.virtual_memory().available, min(2, batch_size)
    known = info.training_bytes
    at_1024 = known[precision] if known else measure_training_bytes(info, image_size, precision, device)
    if masks is not None:
        at_1024 += measure_mask_bytes(masks, image_size)
    an_image = at_1024 * (image_size / 1024) ** 2
    return max(1, min(batch_size, int(MEMORY_SHARE * free / an_image)))


def measure_training_bytes(
    info: StudentInfo, image_size: int, precision: str, device: torch.device | str = "cpu"
) -> int:
    """Bytes that one training image takes at 1024 x 1024 pixels beside the weights, at least 1.

    What autograd keeps for the backward pass, by two and by three images of at most 256 x 256 pixels: the
    difference is without weights and their casts. It is scaled by the area. For tiny_vit this gives what the
    process's peak memory does, within 10%.
    """
    size = min(image_size, MEASURED_SIZE)
    with torch.random.fork_rng():
        student = info.build(size).to(device).train()
        two, three = (_saved_bytes(student, count, size, precision, device) for count in (2, 3))
    return max(1, round((three - two) * (1024 / size) ** 2))


def measure_mask_bytes(options: MaskOptions, image_size: int) -> int:
    """Bytes that the masks of one training image take at 1024 x 1024 pixels beside the head, at least 1; measured and
    scaled as above, by twice the objects and once."""
    size = min(image_size, MEASURED_SIZE)
    with torch.random.fork_rng(devices=[]):
        head = SamHead(size)
    emb_1CHW = torch.zeros(1, EMBEDDING_CHANNELS, size // 16, size // 16, requires_grad=True)

    def look(count: int) -> None:
        side = mask_side(size)
        objects = Objects(
            masks_PMM=torch.ones(count, side, side, dtype=torch.bool),
            image_P=torch.zeros(count, dtype=torch.long),
            inside_BMM=torch.ones(1, side, side, dtype=torch.bool),
            weight_P=torch.ones(count),
        )
        options.training.loss(head, emb_1CHW, objects, torch.Generator().manual_seed(0))

    once, twice = (_kept_bytes(partial(look, count * options.objects)) for count in (1, 2))
    return max(1, round((twice - once) * (1024 / size) ** 2))


def _saved_bytes(
    student: nn.Module, images: int, size: int, precision: str, device: torch.device | str
) -> int:
    """What a student's forward pass keeps."""
    pixels_BCHW = torch.zeros(images, 3, size, size, device=device)

    def look() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            student(pixels_BCHW)

    return _kept_bytes(look)


def _kept_bytes(forward: Callable[[], None]) -> int:
    """Bytes of the storages, each counted once, that a forward pass keeps for the backward pass."""
    storages: dict[int, torch.UntypedStorage] = {}
    nothing = torch.empty(0)

    def keep(saved: Tensor) -> Tensor:
        # Held, so that no other storage gets its address.
        storage = saved.untyped_storage()
        storages[storage.data_ptr()] = storage
        return nothing

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        forward()
    return sum(storage.nbytes() for storage in storages.values())
