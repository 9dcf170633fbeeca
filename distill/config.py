"""What a distillation is asked to do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import DistillError as DistillError
from ..common.errors import DistillInterrupted as DistillInterrupted
from ..common.signals import StopFlag as StopFlag

OBJECTIVES = ("decoupled", "semi_coupled", "coupled", "decoder")
LOSS_REGIONS = ("all", "valid")
LABELS = ("teacher", "annotations")
PRECISIONS = ("auto", "float32", "bfloat16")

# What doesn't change what the student learns: where things lie, and how fast the machine gets there.
# The file of initial weights counts by its SHA-256, which the run's description adds.
_NOT_IDENTITY = frozenset(
    {"store", "images", "init", "out", "restart", "device", "workers", "compile", "checkpoint_seconds"}
)
# What only objectives that look at masks use; of another objective it says nothing.
OF_MASKS = frozenset(
    {"labels", "objects", "rounds", "boxes", "mse_weight", "focal_weight", "dice_weight", "iou_weight"}
)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """All options of one distillation, checked where they are made.

    `init` is a file of weights to start from (None: all are drawn from `seed`). `batch_size` is the effective
    batch of one optimizer step; `micro_batch` (None: by device and free memory) bounds memory, batch norms average
    over it, and random prompts are drawn for it. `warmup` is the share of all steps over which the rate rises
    linearly to `lr`, before it falls along a half cosine; a head that is trained has a tenth of the rate. `clip`
    bounds the norm of the gradient. `freeze_norm` is the share of all steps after which batch norms keep the
    statistics they have (1: never). `val_fraction` is a share of image contents, not of rows. `workers`
    counts decoding threads (None: by device and processors). `compile` hands the student to torch.compile.

    `objective` is one of OBJECTIVES. All but decoupled compare masks: `objects` of each image a step, taken from the
    teacher's masks or, with `labels` "annotations", from SA-1B's JSON files beside the images where they exist; asked
    for by a box (a share of `boxes`) or a point, and corrected by further points for `rounds` in all. Their loss is
    the sum of focal, dice and IoU loss by their weights, its mean over an image's objects and then over images, to
    which the decoupled loss is added times `mse_weight`.
    "decoder" trains the head alone, for the finished student that `init` names.

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
    objective: str = "decoupled"
    labels: str = "teacher"
    objects: int = 8
    rounds: int = 2
    boxes: float = 0.25
    mse_weight: float = 0.0
    focal_weight: float = 20.0
    dice_weight: float = 1.0
    iou_weight: float = 1.0
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
        for name in ("epochs", "batch_size", "micro_batch", "workers", "objects", "rounds"):
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
        for name in ("mse_weight", "focal_weight", "dice_weight", "iou_weight"):
            value = getattr(self, name)
            _require(0 <= value < float("inf"), name, value, "0 or more")
        _require(0 <= self.boxes <= 1, "boxes", self.boxes, "a share of all objects, from 0 to 1")
        _require(self.objective in OBJECTIVES, "objective", self.objective, ", ".join(OBJECTIVES))
        _require(self.labels in LABELS, "labels", self.labels, " or ".join(LABELS))
        self._check_objective()
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more")
        _require(self.loss_region in LOSS_REGIONS, "loss_region", self.loss_region, " or ".join(LOSS_REGIONS))
        _require(self.precision in PRECISIONS, "precision", self.precision, ", ".join(PRECISIONS))

    def _check_objective(self) -> None:
        if self.objective == "decoupled":
            given = [name for name in sorted(OF_MASKS) if getattr(self, name) != _default(name)]
            if given:
                raise DistillError(
                    f"{given[0].replace('_', ' ')} is {getattr(self, given[0])!r}, but the decoupled objective looks "
                    "at no masks: choose another --objective, or leave it out"
                )
        if self.objective == "decoder" and self.init is None:
            raise DistillError(
                "the decoder objective finetunes the head of a finished student: name its run or file with --init"
            )
        if self.objective != "decoupled" and not (self.focal_weight or self.dice_weight):
            raise DistillError("focal weight and dice weight are both 0: nothing says what a mask should be")
        if self.objective == "decoder" and self.mse_weight:
            raise DistillError("mse weight must be 0 where the encoder isn't trained: it changes nothing")

    def to_json(self) -> dict[str, Any]:
        """Every option as plain JSON values."""
        values = dataclasses.asdict(self)
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}

    def identity(self) -> dict[str, Any]:
        """The options that decide what the student learns; a run goes on only with the same ones."""
        left_out = _NOT_IDENTITY
        if self.objective == "decoupled":
            left_out |= OF_MASKS | {"objective"}  # as runs had it that were begun before there were others
        return {name: v for name, v in self.to_json().items() if name not in left_out}


def _default(name: str) -> object:
    return DistillConfig.__dataclass_fields__[name].default


def _require(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise DistillError(f"{name.replace('_', ' ')} must be {wanted}; it is {value!r}")
