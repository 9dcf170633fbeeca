"""last.pt: everything that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..store.durable import write_atomic
from .errors import DistillError

FORMAT = 1


@dataclass(kw_only=True)
class TrainState:
    """Where a run stands. Counts are totals over all sessions of the run.

    `epoch` epochs are complete and validated; of the next one, `batch` batches are done. `micro_steps` counts
    forward passes. `window` holds (loss, gradient norm) of the steps since the last logged line. `seconds`
    and `waited` were spent in the training loop and, of that, waiting for data; `elapsed` includes
    validation. `metrics_bytes` is the length of metrics.jsonl at this point. `mean_sum_CHW` is the float64 sum
    over the `mean_rows` teacher embeddings seen in the first epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    micro_steps: int = 0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    elapsed: float = 0.0
    metrics_bytes: int = 0
    best_epoch: int = 0
    best_mse_valid: float = float("inf")
    mean_sum_CHW: Tensor
    mean_rows: int = 0
    window: list[tuple[float, float]] = field(default_factory=list)


def save_checkpoint(
    path: Path, student: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, device: torch.device
) -> None:
    """Replaces `path` with a file of tensors and plain values, atomically and durably."""
    rng = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    # Not asdict(): it would copy the tensor.
    values = {name: getattr(state, name) for name in state.__dataclass_fields__}
    buffer = io.BytesIO()
    torch.save(
        {
            "format": FORMAT,
            "student": student.state_dict(),
            "optimizer": optimizer.state_dict(),
            "state": values,
            "rng": rng,
        },
        buffer,
    )
    write_atomic(path, buffer.getvalue())


def load_checkpoint(
    path: Path, student: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> TrainState:
    """Puts a checkpoint back into `student` (on `device`), `optimizer` and torch's generators.

    Nothing but tensors and plain values is unpickled. Raises DistillError when the file is damaged or was
    written for another student.
    """
    mend = "give --restart to start over, which keeps the old run beside the new one"
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DistillError(f"{path} can't be read: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise DistillError(f"{path} ({path.stat().st_size:,} bytes) is damaged; {mend}") from error
    try:
        if saved["format"] != FORMAT:
            raise DistillError(f"{path} has format {saved['format']}, this version reads {FORMAT}; {mend}")
        student.load_state_dict(saved["student"])
        optimizer.load_state_dict(saved["optimizer"])
        state = TrainState(**saved["state"])
        torch.set_rng_state(saved["rng"]["cpu"])
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise DistillError(
            f"{path} is not a checkpoint of this run ({_first_line(error)}); {mend}"
        ) from error
    if device.type == "cuda" and "cuda" in saved["rng"]:
        torch.cuda.set_rng_state(saved["rng"]["cuda"], device)
    state.mean_sum_CHW = state.mean_sum_CHW.to(device)
    return state


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
