"""Recipes: settings of the optimizer, the schedule and the loss by name; docs/RECIPE.md compares them.

A recipe holds what a run learns with, apart from student, images, batch and epochs. Options such as `--lr` replace
single settings of it.
"""

from __future__ import annotations

from dataclasses import dataclass

LOSSES = ("mse", "root", "mse_cosine", "huber")
LOSS_REGIONS = ("all", "valid")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training."""

    summary: str
    """One line for the table of recipes."""
    optimizer: str = "adamw"
    """"adamw", or "muon" for the weights of linear layers and convolutions (`optimizer.Muon`)."""
    lr: float = 1e-3
    """Peak learning rate; with Muon, that of its matrices."""
    adamw_lr_share: float = 1.0
    """Learning rate of the weights that AdamW updates beside Muon, relative to `lr`."""
    head_lr_share: float = 0.1
    """Learning rate of a trained head, relative to `lr`: it starts from the teacher's fully trained weights."""
    weight_decay: float = 5e-4
    decay_vectors: bool = False
    """Decay the weights of norms and all biases, too."""
    schedule: str = "cosine"
    """"cosine" (half a cosine to 0), "linear" (to 0), "constant", or "halving" (half the rate in each epoch)."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises linearly."""
    clip: float | None = 1.0
    """Largest norm of the gradient; None doesn't limit it."""
    freeze_norm: float = 1.0
    """Share of the steps after which the statistics of batch norms are frozen; 1: never."""
    neck_start: float | None = None
    """Start the neck's last norm at the teacher's mean and this share of its deviation, by channel; None: at 0 and 1,
    as torch does."""
    teacher_answers: bool = False
    """Objectives of masks: compare with the teacher's answers to the student's prompts (`loss/masks.py`), where no
    annotation gives the mask."""
    loss: str = "mse"
    """One of `LOSSES`; see `loss/decoupled.py`."""
    loss_region: str = "all"
    """Cells of the embedding in the loss: "all", or only the "valid" ones."""


RECIPES: dict[str, Recipe] = {
    "mobilesam-2026": Recipe(
        summary="the best that was measured; Muon, plain MSE",
        optimizer="muon",
        lr=3e-3,
        adamw_lr_share=20 / 3,
        head_lr_share=1 / 30,
        schedule="linear",
        freeze_norm=0.5,
        neck_start=0.2,
        teacher_answers=True,
    ),
    "mobilesam-2023": Recipe(
        summary="the default of version 0.1: AdamW, plain MSE, batch norms frozen halfway",
        freeze_norm=0.5,
    ),
    "mobilesam-pytorch": Recipe(
        summary="MobileSAM-pytorch: AdamW, root of the squared error, the rate halved in each epoch",
        decay_vectors=True,
        schedule="halving",
        warmup=0.0,
        clip=None,
        loss="root",
    ),
    "edgesam": Recipe(
        summary="EdgeSAM's first stage: AdamW, MSE without padding; half of the steps warm up",
        lr=0.1 * 8 / 512,  # its 0.1 is for a batch of 512, and scaled by the batch
        weight_decay=0.01,
        warmup=0.5,
        clip=5.0,
        loss_region="valid",
    ),
    "efficientsam3": Recipe(
        summary="EfficientSAM3's first stage: AdamW, squared error and cosine without padding",
        weight_decay=0.01,
        warmup=0.1,
        clip=5.0,
        loss="mse_cosine",
        loss_region="valid",
    ),
    "nanosam": Recipe(
        summary="NanoSAM: Adam at a constant rate, Huber loss",
        lr=3e-4,
        weight_decay=0.0,
        schedule="constant",
        warmup=0.0,
        clip=None,
        loss="huber",
    ),
}
"""All recipes by name, the default first. A recipe keeps its settings for ever: runs are known by its name."""

DEFAULT_RECIPE = next(iter(RECIPES))
FIRST_RECIPE = "mobilesam-2023"
"""Recipe of the runs from before there were recipes."""
