"""How far a run is, for whoever displays it."""

from __future__ import annotations

from dataclasses import dataclass


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
