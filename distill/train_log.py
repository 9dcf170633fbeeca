"""What a run writes while it trains: lines of metrics and TensorBoard's curves."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..common.errors import DistillError
from .checkpoint import TrainState
from .checksummed_json import decode_lines, encode_line
from .data.loader import Loader
from .run_folder import METRICS_FILE


class Recorder:
    """Appends to metrics.jsonl and to TensorBoard's event file.

    `keep_bytes` of metrics.jsonl are kept, their checksums verified, and the rest cut off: what a killed session
    logged beyond the checkpoint that is gone on from will be logged again. TensorBoard hides its own such points from
    `next_step` on.
    """

    def __init__(self, folder: Path, *, keep_bytes: int, next_step: int) -> None:
        path = folder / METRICS_FILE
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by close()
        self._file.seek(0)
        kept = self._file.read(keep_bytes)
        try:
            if len(kept) < keep_bytes:
                raise DistillError(
                    f"{path} has {len(kept):,} bytes, {keep_bytes:,} at the checkpoint: put a whole copy back, "
                    "or give --restart to start over"
                )
            decode_lines(path, kept.removesuffix(b"\n").split(b"\n") if kept else [])
        except DistillError:
            self._file.close()
            raise
        self._file.truncate(keep_bytes)
        self._board = SummaryWriter(str(folder), purge_step=next_step)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._board.close()
        self._file.close()

    def line(self, kind: str, values: dict[str, Any]) -> None:
        """Appends one JSON object; a step's numbers also become points of curves."""
        self._file.write(encode_line({"kind": kind, **values}))
        self._file.flush()
        if "step" in values:
            self._points(kind, values, values["step"])

    def sync(self) -> int:
        """Makes the lines durable; the file's length in bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def _points(self, prefix: str, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                self._points(f"{prefix}/{name}", value, step)
            elif isinstance(value, int | float) and name not in ("step", "epoch", "rows"):
                self._board.add_scalar(f"{prefix}/{name}", value, step)


# --- Losses and time, measured without making a GPU wait.


class Meter:
    """Keeps steps' losses on the device until they are asked for, and adds up the time in `state`.

    `last_loss` is the newest loss that was fetched, or None.
    """

    def __init__(self, state: TrainState, loader: Loader) -> None:
        self.state, self._loader = state, loader
        self.last_loss: float | None = None
        self._unfetched: list[Tensor] = []
        self._elapsed_at = time.perf_counter()
        self.start()

    def start(self) -> None:
        """Begins to count training time and, of it, the wait for data."""
        self._clock, self._waited = time.perf_counter(), self._loader.waited

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Takes over a step's scalars without looking at them."""
        self._unfetched.append(torch.stack([loss, grad_norm]))

    def fetch(self) -> None:
        """Waits for the device, and takes over losses and time until now.

        Raises DistillError when a loss or gradient isn't finite: nothing sensible can follow.
        """
        if not self._unfetched:
            return
        values = torch.stack(self._unfetched).tolist()
        self._unfetched.clear()
        now, waited = time.perf_counter(), self._loader.waited
        self.state.seconds += now - self._clock
        self.state.waited += waited - self._waited
        self._clock, self._waited = now, waited
        for loss, norm in values:
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise DistillError(
                    f"the loss is {loss} and the gradient's norm {norm} by step {self.state.step}: start over with "
                    "a lower --lr"
                )
            self.state.window.append((loss, norm))
        self.last_loss = values[-1][0]

    def take_window(self) -> dict[str, float]:
        """Means of loss and gradient norm since the last call, and the run's rates so far."""
        self.fetch()
        losses, norms = zip(*self.state.window, strict=True)
        self.state.window.clear()
        return {
            "loss": math.fsum(losses) / len(losses),
            "grad_norm": math.fsum(norms) / len(norms),
            "images_per_second": self.images_per_second(),
            "data_wait_share": self.state.waited / self.state.seconds,
        }

    def images_per_second(self) -> float:
        """Images trained per second of training, over all sessions; steps not yet fetched count as done."""
        unfetched = time.perf_counter() - self._clock if self._unfetched else 0.0
        return self.state.images / (self.state.seconds + unfetched) if self.state.images else 0.0

    def count_elapsed(self) -> None:
        """Adds all time since the last call, validation included."""
        now = time.perf_counter()
        self.state.elapsed += now - self._elapsed_at
        self._elapsed_at = now


# --- How far a run is, for whoever displays it.


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the run stands, for display. `epoch` counts from 1; `loss` is the last one fetched, if any yet;
    `eta_seconds` covers training alone; `phase` is "train", "validate" or "evaluate"."""

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float | None
    images_per_second: float
    eta_seconds: float
