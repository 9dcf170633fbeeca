"""Log of a run in training: metrics.jsonl and TensorBoard's curves, losses and times, progress for display."""

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
from .checkpoint import TrainState, Window
from .checksummed_json import decode_lines, encode_line
from .data.loader import Loader
from .run_folder import METRICS_FILE


class Recorder:
    """Log of a run: appends lines to metrics.jsonl and points to TensorBoard's event file.

    Args:
        folder: the run's folder.
        keep_bytes: length of metrics.jsonl at the checkpoint being resumed. These lines are kept and their
            checksums verified; lines after them, by a killed session, are removed and will be logged again.
        next_step: first step of this session; TensorBoard discards earlier sessions' points from this step on.

    Raises:
        DistillError: the lines to keep are missing or damaged.
    """

    def __init__(self, folder: Path, *, keep_bytes: int, next_step: int) -> None:
        path = folder / METRICS_FILE
        self._file = open(path, "a+b")  # noqa: SIM115 - closed by close()
        self._file.seek(0)
        kept = self._file.read(keep_bytes)
        try:
            if len(kept) < keep_bytes:
                raise DistillError(
                    f"{path} has {len(kept):,} bytes, {keep_bytes:,} at the checkpoint: put back a whole copy, "
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
        """Append a line; if it has a `step`, its numbers also become points of TensorBoard's curves.

        Args:
            kind: "train", "val", "train_eval" or "result".
            values: JSON values by name, finite; dictionaries may be nested.

        Raises:
            ValueError: a number is not finite.
        """
        self._file.write(encode_line({"kind": kind, **values}))
        self._file.flush()
        if "step" in values:
            self._points(kind, values, values["step"])

    def sync(self) -> int:
        """Make the lines durable; return the file's length in bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def _points(self, prefix: str, values: dict[str, Any], step: int) -> None:
        """Add the numbers of a tree of dictionaries to curves named by its keys."""
        for name, value in values.items():
            if isinstance(value, dict):
                self._points(f"{prefix}/{name}", value, step)
            elif isinstance(value, int | float) and name not in ("step", "epoch", "rows"):
                self._board.add_scalar(f"{prefix}/{name}", value, step)


class Meter:
    """Meter of losses and times without GPU synchronisation: losses stay on the device until `fetch`.

    Args:
        state: progress to update: losses in `log.window`, times in `throughput`.
        loader: loader whose `waited` seconds are counted.

    Attributes:
        last_loss: the newest loss fetched, or None.
        evaluated: images evaluated in this session.
        evaluating: seconds that took.
    """

    def __init__(self, state: TrainState, loader: Loader) -> None:
        self.state, self._loader = state, loader
        self.last_loss: float | None = None
        self.evaluated, self.evaluating = 0, 0.0
        self._unfetched: list[Tensor] = []
        self._elapsed_at = time.perf_counter()
        self.start()

    def start(self) -> None:
        """Start counting time in the training loop, and the wait for data in it."""
        self._clock, self._waited = time.perf_counter(), self._loader.waited

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Record a step without waiting for the device.

        Args:
            loss: the batch's loss, a float32 scalar on the device.
            grad_norm: norm of the gradient before clipping, a float32 scalar on the device.
        """
        self._unfetched.append(torch.stack([loss, grad_norm]))

    def fetch(self) -> None:
        """Wait for the device, and add the recorded losses and the time since the last call to the state.

        Raises:
            DistillError: a loss or a gradient is not finite, so that training can't continue.
        """
        if not self._unfetched:
            return
        values = torch.stack(self._unfetched).tolist()
        self._unfetched.clear()
        now, waited = time.perf_counter(), self._loader.waited
        self.state.throughput.seconds += now - self._clock
        self.state.throughput.waited += waited - self._waited
        self._clock, self._waited = now, waited
        for loss, norm in values:
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise DistillError(
                    f"the loss is {loss} and the gradient norm {norm} by step {self.state.step}: start over with "
                    "a lower --lr"
                )
            self.state.log.window.add(loss, norm)
        self.last_loss = values[-1][0]

    def take_window(self) -> dict[str, float]:
        """Return the means of loss and gradient norm since the last call, and the run's rates so far."""
        self.fetch()
        window = self.state.log.window
        self.state.log.window = Window()
        return {
            "loss": window.loss.value / window.steps,
            "grad_norm": window.grad_norm.value / window.steps,
            "images_per_second": self.images_per_second(),
            "data_wait_share": self.state.throughput.waited / self.state.throughput.seconds,
        }

    def images_per_second(self) -> float:
        """Return images per second in the training loop over all sessions, steps not yet fetched included."""
        unfetched = time.perf_counter() - self._clock if self._unfetched else 0.0
        done = self.state.throughput
        return done.images / (done.seconds + unfetched) if done.images else 0.0

    def seconds_left(self, to_train: int, to_evaluate: int) -> float:
        """Estimate the time left in seconds; before the first evaluation its rate is taken for that of training.

        Args:
            to_train: images left to train on; one counts once per epoch.
            to_evaluate: images left to evaluate; likewise.
        """
        rate = self.images_per_second()
        if not rate:
            return 0.0
        per_image = self.evaluating / self.evaluated if self.evaluated else 1 / rate
        return to_train / rate + to_evaluate * per_image

    def count_elapsed(self) -> None:
        """Add the seconds since the last call, validation included, to `throughput.elapsed`."""
        now = time.perf_counter()
        self.state.throughput.elapsed += now - self._elapsed_at
        self._elapsed_at = now


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a run, for display."""

    phase: str
    """"train"; "validate", after each epoch, the held-out images; "evaluate", after the last one, a sample of those
    trained on; in a sweep also "verify"."""
    epoch: int
    """Number of the current epoch, from 1."""
    epochs: int
    step: int
    """Optimizer steps done."""
    steps: int
    loss: float | None
    """The newest loss fetched from the device, if there is one yet."""
    images_per_second: float
    """Rate in the training loop, over all sessions."""
    eta_seconds: float
    """Estimated time left, evaluations included, in seconds."""
    evaluated: int = 0
    """Images done in the evaluation that `phase` names; 0 in training."""
    to_evaluate: int = 0
    """Images of that evaluation; 0 in training."""
