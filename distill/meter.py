"""Losses and time, measured without making a GPU wait."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from .checkpoint import TrainState
from .errors import DistillError
from .loader import Loader


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
