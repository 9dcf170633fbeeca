"""Options of a distillation and of the students' cost table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from operator import not_
from pathlib import Path
from typing import Any, Literal

from ..common.config import (
    AUTO_PRECISIONS,
    device_option,
    label_masks_option,
    moved_images_option,
    must_be,
    option,
    paths_from_text,
    precision_option,
    require,
)

# For `mobilesam.distill`, whose stub can only name modules of this room.
from ..common.errors import DistillError as DistillError
from ..common.errors import DistillInterrupted as DistillInterrupted
from ..common.signals import StopFlag as StopFlag
from .recipe import DEFAULT_RECIPE, FIRST_RECIPE, LOSS_REGIONS, LOSSES, RECIPES, Recipe

OBJECTIVES = ("decoupled", "semi_coupled", "coupled", "decoder")
LABELS = ("teacher", "annotations")
BATCH_SIZE = 8
"""Images per optimizer step where there are enough images; `expectations.py` takes less where they are few."""
AUTO = "auto"
"""Value of `epochs` for as many as make enough optimizer steps."""


def parse_epochs(text: str) -> int | str:
    """Parse the command line's value of `--epochs`; ValueError if it is neither a whole number nor auto."""
    if text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError("give a number of passes over the images, or auto") from None


MASK_FIELDS = frozenset(
    {"labels", "objects", "rounds", "boxes", "mse_weight", "focal_weight", "dice_weight", "iou_weight"}
)
"""Options of the objectives that compare masks; the decoupled objective refuses them."""

# Options that don't change what the student learns: places of files, and speed.
# The run's description adds the SHA-256 of the files of initial weights and labels instead of their paths.
_NOT_IDENTITY = frozenset(
    {
        "store",
        "images",
        "coco",
        "label_masks",
        "init",
        "out",
        "restart",
        "device",
        "workers",
        "compile",
        "checkpoint_seconds",
    }
)


EMBEDDING_LOSS_FIELDS = ("loss", "loss_region")
"""Options of the embeddings' loss, which an objective that compares masks has with `mse_weight` only."""

# Options that replace settings of the recipe.
_RECIPE_FIELDS = ("lr", "weight_decay", "warmup", "clip", "freeze_norm", "loss", "loss_region")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """All options of one distillation, checked on construction.

    The micro-batch size affects the result: batch norms average over a micro-batch, and prompts are drawn for each
    one. The loss of the objectives that compare masks is the weighted sum of focal, dice and IoU loss, averaged over
    an image's objects and then over images, plus the weighted embedding MSE of the decoupled objective.

    Raises:
        DistillError: a value is outside its range, or options contradict each other.
    """

    store: Path = option(Path("store.zarr"), help="Store that precompute made.")
    images: Path | None = moved_images_option()
    student: str = option(
        "tiny_vit",
        metavar="NAME",
        help="Student to train: tiny_vit, tiny_vit_11m, tiny_vit_21m, deit_tiny, repvit_m1_1, efficientvit_b1, "
        "mobilenetv4_conv_medium, or timm:NAME for one of timm.",
    )
    student_size: int | None = option(
        None,
        metavar="PX",
        help="Side of the student's input in pixels, a multiple of 16: phones pay by pixels "
        "[default: the store's image size]",
    )
    init: Path | None = option(
        None,
        metavar="FILE",
        help="Weights to start from: ImageNet's (files of timm or TinyViT), MobileSAM's or a student's "
        "[default: random weights drawn from --seed]",
    )
    epochs: int | Literal["auto"] = option(
        8,
        metavar="N|auto",
        parse=parse_epochs,
        text="8",
        help="Number of passes over the training images; auto makes as many steps as are enough to learn from.",
    )
    batch_size: int | None = option(
        None, metavar="B", help="Images per optimizer step [default: 8; 4 or 2 where images are few]"
    )
    micro_batch: int | None = option(
        None, metavar="M", help="Images in memory at once [default: as many as fit the free memory]"
    )
    recipe: str = option(
        DEFAULT_RECIPE,
        choices=tuple(RECIPES),
        help="Settings of optimizer, schedule and loss; mobilesam-2023 is the default of earlier versions, the "
        "others are those of other projects.",
    )
    lr: float | None = option(
        None,
        help="Peak learning rate; a mask decoder that is trained has a share of it [default: the recipe's]",
    )
    weight_decay: float | None = option(None, help="Weight decay [default: the recipe's]")
    warmup: float | None = option(
        None,
        help="Share of the steps over which the learning rate rises linearly [default: the recipe's]",
    )
    clip: float | None = None
    """Largest norm of the gradient; None: the recipe's."""
    freeze_norm: float | None = None
    """Share of all steps after which the statistics of batch norms are frozen; 1: never, None: the recipe's."""
    seed: int = option(0, help="Seed of initial weights, order of the images, and prompts.")
    val_fraction: float = option(
        0.05,
        help="Share of images held out for validation; the same ones for every seed.",
    )
    objective: str = option(
        "decoupled",
        choices=OBJECTIVES,
        help="Training objective: the embeddings (decoupled); the masks of SAM's decoder, which is frozen "
        "(semi_coupled) or trained too (coupled); or the decoder alone, for the student that --init names (decoder).",
    )
    labels: str | None = option(
        None,
        choices=LABELS,
        help="Source of the target masks: the teacher, or labels where they exist: SA-1B's JSON files beside the "
        "images, or those of --coco or --label-masks [default: teacher without these two]",
    )
    coco: Path | None = option(
        None,
        metavar="FILE.json",
        help="COCO instances file with the labels of the images, as evaluate reads it.",
    )
    label_masks: Path | None = label_masks_option()
    objects: int = option(8, metavar="N", help="Objects per image and step.")
    rounds: int = option(2, metavar="N", help="Prompts per object: the first one, then corrective points.")
    boxes: float = option(
        0.25, metavar="SHARE", help="Share of objects whose first prompt is a box; the others get a point."
    )
    mse_weight: float = option(0.0, help="Weight of the embedding MSE term.")
    focal_weight: float = option(20.0, help="Weight of the focal loss of the masks.")
    dice_weight: float = option(1.0, help="Weight of the dice loss of the masks.")
    iou_weight: float = option(1.0, help="Weight of the error of the predicted IoUs.")
    loss: str | None = option(
        None,
        choices=LOSSES,
        help="Error of the embedding: squared (mse), root of the squared error (root), squared and cosine "
        "(mse_cosine), or Huber's (huber) [default: the recipe's]",
    )
    loss_region: str | None = option(
        None,
        choices=LOSS_REGIONS,
        help="Cells of the embedding in the loss: all, or only the valid ones that show the image, not padding "
        "[default: the recipe's]",
    )
    precision: str = precision_option(
        "Precision of training; auto is bfloat16 where the hardware accelerates it."
    )
    device: str = device_option()
    workers: int | None = None
    """Decoding threads; None chooses by device and processors."""
    compile: bool = option(
        False, help="Compile the student with torch.compile: minutes at the start, then faster on GPUs."
    )
    checkpoint_seconds: float = 300.0
    """Seconds between checkpoints."""
    restart: bool = option(
        False,
        flag="--resume/--restart",
        parse=not_,
        text=True,
        help="Continue the run in its folder, or start over.",
    )
    out: Path | None = option(
        None, metavar="runs/NAME", help="Folder of the run [default: named after student, options and data]"
    )

    def __post_init__(self) -> None:
        paths_from_text(self, "store", "images", "coco", "label_masks", "init", "out")
        auto = isinstance(self.epochs, str) and self.epochs == AUTO
        self._require(
            auto or (isinstance(self.epochs, int) and self.epochs >= 1), "epochs", "at least 1, or auto"
        )
        for name in ("student_size", "batch_size", "micro_batch", "workers", "objects", "rounds"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "at least 1")
        if self.micro_batch is not None:
            largest = self.batch_size or BATCH_SIZE
            self._require(self.micro_batch <= largest, "micro_batch", f"at most the batch size, {largest}")
        self._require(self.recipe in RECIPES, "recipe", ", ".join(RECIPES))
        for name in ("lr", "clip", "checkpoint_seconds"):
            value = getattr(self, name)
            self._require(value is None or 0 < value < float("inf"), name, "above 0")
        for name in ("weight_decay", "mse_weight", "focal_weight", "dice_weight", "iou_weight"):
            value = getattr(self, name)
            self._require(value is None or 0 <= value < float("inf"), name, "0 or more")
        warmup, freeze_norm = self.resolved_recipe.warmup, self.resolved_recipe.freeze_norm
        self._require(0 <= warmup < 1, "warmup", "a share of all steps, from 0 to below 1")
        self._require(0 <= freeze_norm <= 1, "freeze_norm", "a share of all steps, from 0 to 1")
        self._require(0 < self.val_fraction < 1, "val_fraction", "between 0 and 1, both excluded")
        self._require(0 <= self.boxes <= 1, "boxes", "a share of all objects, from 0 to 1")
        self._require(self.objective in OBJECTIVES, "objective", ", ".join(OBJECTIVES))
        self._require(self.labels in (None, *LABELS), "labels", " or ".join(LABELS))
        self._check_label_source()
        self._check_objective()
        self._require(0 <= self.seed < 2**63, "seed", "0 or more")
        self._require(self.loss in (None, *LOSSES), "loss", ", ".join(LOSSES))
        self._require(self.loss_region in (None, *LOSS_REGIONS), "loss_region", " or ".join(LOSS_REGIONS))
        self._require(self.precision in AUTO_PRECISIONS, "precision", ", ".join(AUTO_PRECISIONS))

    def _require(self, good: bool, name: str, wanted: str) -> None:
        require(good, must_be(name, getattr(self, name), wanted), DistillError)

    @property
    def length(self) -> tuple[int, int]:
        """Epochs and batch size as numbers, which they are after `expectations.resolve_length`."""
        assert isinstance(self.epochs, int), "resolved before a run is described"
        assert self.batch_size is not None, "resolved before a run is described"
        return self.epochs, self.batch_size

    @property
    def resolved_recipe(self) -> Recipe:
        """Settings of the recipe, those replaced that options give."""
        recipe = RECIPES[self.recipe]
        given = {name: getattr(self, name) for name in _RECIPE_FIELDS}
        return dataclasses.replace(
            recipe, **{name: value for name, value in given.items() if value is not None}
        )

    @property
    def learns_from_labels(self) -> bool:
        """True if the target masks are labels where these exist, False if all are the teacher's."""
        return self.labels == "annotations" or (self.labels is None and self.label_source is not None)

    @property
    def label_source(self) -> Path | None:
        """COCO file or folder of masks with the labels; None for SA-1B's files beside the images, or the teacher."""
        return self.coco or self.label_masks

    def _check_label_source(self) -> None:
        if self.label_source is None:
            return
        name = "coco" if self.coco is not None else "label masks"
        if self.coco is not None and self.label_masks is not None:
            raise DistillError("coco and label masks are two sources of labels: leave out one of them")
        if self.objective == "decoupled":
            raise DistillError(
                f"{name} is {str(self.label_source)!r}, but the decoupled objective learns from no labels: choose "
                "--objective coupled, semi_coupled or decoder, or leave it out"
            )
        if self.labels == "teacher":
            raise DistillError(
                f"{name} is {str(self.label_source)!r}, but labels is 'teacher': leave out one of them"
            )

    def _check_objective(self) -> None:
        if self.objective == "decoupled":
            options, defaults = (
                self.to_json(),
                {field.name: field.default for field in dataclasses.fields(self)},
            )
            defaults["labels"] = "teacher"
            given = [name for name in sorted(MASK_FIELDS) if options[name] != defaults[name]]
            if given:
                raise DistillError(
                    f"{given[0].replace('_', ' ')} is {options[given[0]]!r}, but the decoupled objective "
                    "compares no masks: choose another --objective, or leave it out"
                )
        if self.objective == "decoder" and self.init is None:
            raise DistillError(
                "the decoder objective finetunes the head of a finished student: name its run or file with --init"
            )
        if self.objective != "decoupled" and not self.mse_weight:
            given = [name for name in EMBEDDING_LOSS_FIELDS if getattr(self, name) is not None]
            if given:
                name, value = given[0].replace("_", " "), getattr(self, given[0])
                mend = (
                    ": leave it out"
                    if self.objective == "decoder"
                    else " without --mse-weight: set that above 0, or leave it out"
                )
                raise DistillError(
                    f"{name} is {value!r}, but the {self.objective} objective compares no embeddings{mend}"
                )
        if self.objective != "decoupled" and not (self.focal_weight or self.dice_weight):
            raise DistillError(
                "focal weight and dice weight are both 0, so that nothing trains the masks: set one above 0"
            )
        if self.objective == "decoder" and self.mse_weight:
            raise DistillError(
                f"mse weight must be 0 for the decoder objective, which trains no encoder; it is {self.mse_weight!r}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return every option as a plain JSON value; `labels` and the recipe's settings as they apply."""
        recipe = self.resolved_recipe
        values = dataclasses.asdict(self) | {
            "labels": "annotations" if self.learns_from_labels else "teacher"
        }
        values |= {name: getattr(recipe, name) for name in _RECIPE_FIELDS}
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}

    def identity(self) -> dict[str, Any]:
        """Return the options that decide what the student learns; a run resumes only if they are the same."""
        left_out = _NOT_IDENTITY
        if self.objective == "decoupled":
            left_out |= MASK_FIELDS | {"objective"}  # runs from before there were other objectives lack these
        if self.recipe == FIRST_RECIPE:  # all runs from before there were recipes had this one
            left_out |= {"recipe"}
        if self.resolved_recipe.loss == "mse":
            left_out |= {"loss"}
        if self.student_size is None:
            left_out |= {"student_size"}  # as runs from before there was another size do
        return {name: v for name, v in self.to_json().items() if name not in left_out}


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Options of the table that `students_table` makes."""

    image_size: int = option(1024, metavar="PX", help="Side of SAM's square in pixels.")
    student_size: int | None = option(
        None, metavar="PX", help="Side of a smaller input of the students in pixels [default: half of it]"
    )
    device: str = device_option()
    precision: str = precision_option("Precision of the encoder's arithmetic.", default="float32")
