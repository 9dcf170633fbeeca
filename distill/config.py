"""What a distillation is asked to do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DistillError

LOSS_REGIONS = ("all", "valid")
PRECISIONS = ("auto", "float32", "bfloat16")

# What doesn't change what the student learns: where things lie, and how fast the machine gets there.
# The file of initial weights counts by its SHA-256, which the run's description adds.
_NOT_IDENTITY = frozenset(
    {"store", "images", "init", "out", "restart", "device", "workers", "compile", "checkpoint_seconds"}
)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """All options of one distillation, checked where they are made.

    `init` is a file of weights to start from (None: all are drawn from `seed`). `batch_size` is the effective
    batch of one optimizer step; `micro_batch` (None: by device and free memory) only bounds memory. `warmup` is
    the share of all steps over which the rate rises linearly to `lr`, before it falls along a half cosine.
    `clip` bounds the norm of the gradient. `freeze_norm` is the share of all steps after which batch norms keep
    the statistics they have (1: never). `val_fraction` is a share of image contents, not of rows. `workers`
    counts decoding threads (None: by device and processors). `compile` hands the student to torch.compile.

    Raises DistillError when a value is outside its range.
    """

    store: Path = Path("store.zarr")
    images: Path | None = None
    student: str = "tiny_vit"
    init: Path | None = None
    epochs: int = 8
    batch_size: int = 8
    micro_batch: int | None = None
    lr: float = 1e-3
    weight_decay: float = 5e-4
    warmup: float = 0.05
    clip: float = 1.0
    freeze_norm: float = 0.5
    seed: int = 0
    val_fraction: float = 0.05
    loss_region: str = "all"
    precision: str = "auto"
    device: str = "auto"
    workers: int | None = None
    compile: bool = False
    checkpoint_seconds: float = 300.0
    restart: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("store", "images", "init", "out"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, Path(value))
        for name in ("epochs", "batch_size", "micro_batch", "workers"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        if self.micro_batch is not None:
            wanted = f"at most the batch size, {self.batch_size}"
            _require(self.micro_batch <= self.batch_size, "micro_batch", self.micro_batch, wanted)
        for name in ("lr", "clip", "checkpoint_seconds"):
            value = getattr(self, name)
            _require(0 < value < float("inf"), name, value, "above 0")
        _require(0 <= self.weight_decay < float("inf"), "weight_decay", self.weight_decay, "0 or more")
        _require(0 <= self.warmup < 1, "warmup", self.warmup, "a share of all steps, from 0 to below 1")
        wanted = "a share of all steps, from 0 to 1"
        _require(0 <= self.freeze_norm <= 1, "freeze_norm", self.freeze_norm, wanted)
        _require(
            0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1, both excluded"
        )
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more")
        _require(self.loss_region in LOSS_REGIONS, "loss_region", self.loss_region, " or ".join(LOSS_REGIONS))
        _require(self.precision in PRECISIONS, "precision", self.precision, ", ".join(PRECISIONS))

    def to_json(self) -> dict[str, Any]:
        """Every option as plain JSON values."""
        values = dataclasses.asdict(self)
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}

    def identity(self) -> dict[str, Any]:
        """The options that decide what the student learns; a run goes on only with the same ones."""
        return {name: v for name, v in self.to_json().items() if name not in _NOT_IDENTITY}


def _require(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise DistillError(f"{name.replace('_', ' ')} must be {wanted}; it is {value!r}")
