"""Train vit_nano, encoder and head together, on generated pictures at several resolutions.

    python -m examples.vit_nano.train --work nano --until 1150 --sizes 128
    python -m examples.vit_nano.train --work nano --until 1850 --sizes 256
    python -m examples.vit_nano.train --work nano --until 3950 --sizes 256 --final-lr 3.04e-4
    python -m examples.vit_nano.train --work nano --until 5100 --sizes 256 --final-lr 1.2e-4
    python -m examples.vit_nano.train --work nano --until 6200 --sizes 256 512 1024 --final-lr 0
    python -m examples.vit_nano.train --work nano --save sam/vit_nano.safetensors

Each command resumes where the last one ended or was stopped; a new folder may --start from saved weights. The
learning rate changes linearly from its present value to --final-lr; the saved weights are a moving average. Loss and
prompts are those of `mobilesam distill --objective coupled`. Nothing else should run beside it: its threads wait for
each other, and take twice as long on busy cores.

    python examples/generate_pictures.py --out held-out --seed 2 --side 256
    mobilesam evaluate --images held-out --teacher vit_nano --model nano=vit_nano --image-size 256

measures the masks of the package's weights (picked and best of three) on pictures that were not trained on.

Two short stages come first, without which a new head predicts empty masks for hundreds of steps: the encoder alone
learns similar embeddings for cells of one object, then the head alone learns to read them. The encoder's loss remains
a term of the last stage's.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from examples.vit_nano.muon import Muon
from examples.vit_nano.pictures import (
    HELD_OUT_SEED,
    SEED,
    Pictures,
    Sample,
    held_out_pictures,
    training_pictures,
)
from mobilesam.distill.data.labels import mask_side
from mobilesam.distill.loss.coupled import valid_pixels
from mobilesam.distill.loss.masks import MaskLoss, MaskLossWeights, PromptedObjects
from mobilesam.sam.allocator import keep_freed_memory
from mobilesam.sam.modeling.head import SamHead
from mobilesam.sam.modeling.vit import fit_positions
from mobilesam.sam.photos.preprocess import normalize_and_pad
from mobilesam.sam.registry import TEACHERS

NANO = TEACHERS["vit_nano"]

# (pictures, objects of each) in one step by image size in pixels, and the relative frequency of the sizes.
BATCHES = {128: (16, 6), 256: (8, 5), 512: (3, 5), 1024: (1, 6)}
SHARES = {128: 0.5, 256: 0.7, 512: 0.2, 1024: 0.1}
TWO_ROUNDS = 0.1
"""Share of the steps in which a correction follows the first prompt."""
FOCAL = 5.0
"""Weight of the focal loss, with dice 1. SAM has 20; here objects are small and 20 leads to empty masks."""
CONTRASTIVE = 0.5
"""Weight of the contrastive loss in the coupled stage, which supervises every cell."""
ENCODER_STEPS, HEAD_STEPS = 250, 300
ATTENTION_GAIN = 4.0
SHARPNESS = 10.0
LR, WARMUP_STEPS, WEIGHT_DECAY, CLIP = 5e-4, 50, 0.02, 1.0
MUON_LR = 5.0
"""Muon's learning rate as a multiple of AdamW's."""
AVERAGE = 0.998


def collate(samples: list[Sample], side: int) -> tuple[Tensor, PromptedObjects, Tensor]:
    """Return normalised pixels (B, 3, S, S), the chosen objects of all samples, and segments int64 (B, M, M)."""
    sizes_B2 = torch.tensor([sample.size for sample in samples])
    pixels_BCHW = normalize_and_pad(torch.from_numpy(np.stack([s.canvas_HWC for s in samples])), sizes_B2)
    valid_BMM = valid_pixels(sizes_B2, side, mask_side(side))
    segments_BMM = torch.from_numpy(np.stack([s.segments_MM for s in samples])).long()
    image_P = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(s.chosen) for s in samples]))
    numbers_P = torch.tensor([number for s in samples for number in s.chosen])
    objects = PromptedObjects(
        masks_PMM=segments_BMM[image_P] == numbers_P[:, None, None],
        image_P=image_P,
        valid_BMM=valid_BMM,
        weight_P=torch.ones(len(image_P)),
    )
    return pixels_BCHW, objects, segments_BMM


def contrastive_loss(emb_BCHW: Tensor, segments_BMM: Tensor, valid_BMM: Tensor) -> Tensor:
    """Return the supervised contrastive loss over cosines between cells of the same and of other segments.

    A cell belongs to the segment of most of its pixels. Source: arXiv 2004.11362, equation 3 (L_in).
    """
    size = segments_BMM.shape[-1] // emb_BCHW.shape[-1]
    cells_BL = (
        segments_BMM.unfold(1, size, size).unfold(2, size, size).flatten(3).mode(dim=3).values.flatten(1)
    )
    valid_BL = F.avg_pool2d(valid_BMM[:, None].float(), size).flatten(1) > 0.5
    unit_BLC = F.normalize(emb_BCHW.flatten(2).transpose(1, 2), dim=2)
    cosine_BLL = SHARPNESS * unit_BLC @ unit_BLC.transpose(1, 2)
    others_BLL = valid_BL[:, None, :] & ~torch.eye(cells_BL.shape[1], dtype=torch.bool)
    own_BLL = (cells_BL[:, :, None] == cells_BL[:, None, :]) & others_BLL
    own_BL, others_BL = (
        torch.logsumexp(cosine_BLL.masked_fill(~pairs_BLL, -1e4), dim=2)
        for pairs_BLL in (own_BLL, others_BLL)
    )
    counted_BL = own_BLL.any(dim=2) & valid_BL
    return ((others_BL - own_BL) * counted_BL).sum() / counted_BL.sum()


Stage = Literal["encoder", "head", "coupled"]


def stage_of(step: int) -> tuple[Stage, int]:
    """Return the stage of a step, and the first step of that stage."""
    if step < ENCODER_STEPS:
        return "encoder", 0
    if step < ENCODER_STEPS + HEAD_STEPS:
        return "head", ENCODER_STEPS
    return "coupled", ENCODER_STEPS + HEAD_STEPS


class Sam(nn.Module):
    """Encoder and head of one image size; `forward` returns a stage's summed loss and the picked IoU."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_encoder = NANO.encoder.build(image_size)
        self.head = SamHead(image_size)

    def forward(
        self,
        stage: Stage,
        mask_loss: MaskLoss,
        batch: tuple[Tensor, PromptedObjects, Tensor],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        pixels_BCHW, objects, segments_BMM = batch
        emb_BCHW = self.image_encoder(pixels_BCHW)
        if stage == "encoder":
            loss = contrastive_loss(emb_BCHW, segments_BMM, objects.valid_BMM) * len(objects.image_P)
            return loss, loss.new_zeros(())
        if stage == "head":
            return mask_loss(self.head, emb_BCHW.detach(), objects, generator)
        loss, picked = mask_loss(self.head, emb_BCHW, objects, generator)
        contrastive = contrastive_loss(emb_BCHW, segments_BMM, objects.valid_BMM)
        return loss + CONTRASTIVE * contrastive * len(objects.image_P), picked


@torch.no_grad()
def tie_cross_attention(head: SamHead) -> None:
    """Initialise a new head's cross attention to attend to the place of a point instead of everywhere alike.

    Equal queries and keys get a high score when one matrix projects both.
    """
    transformer = head.mask_decoder.transformer
    layers = [
        (layer.cross_attn_token_to_image, layer.cross_attn_image_to_token) for layer in transformer.layers
    ]
    for attention in [*(each for pair in layers for each in pair), transformer.final_attn_token_to_image]:
        attention.q_proj.weight.mul_(ATTENTION_GAIN)
        attention.k_proj.weight.copy_(attention.q_proj.weight)


def call(
    sizes: dict[int, Sam], weights: dict[str, Tensor], side: int, *arguments: object
) -> tuple[Tensor, Tensor]:
    """Call `Sam.forward` at an image size, with position tables interpolated from the trained image size."""
    prefix = "image_encoder."
    encoder = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    fitted, _ = fit_positions(encoder, NANO.encoder, side)
    at_size = weights | {prefix + key: value for key, value in fitted.items()}
    return functional_call(sizes[side], at_size, arguments)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Return True for Muon's parameters: matrices that multiply activations, no tables of positions or tokens."""
    tables = ("rel_pos", "pos_embed", "point_embed", "token", "not_a_point", "no_mask")
    return parameter.ndim == 2 and not any(table in name for table in tables)


class Run:
    """Training state, kept in a folder."""

    def __init__(self, folder: Path, weights: Path | None = None, lr: float = LR) -> None:
        """Resume the folder's training if there is one; else start, from `weights` if given, with this rate."""
        self.folder = folder
        torch.manual_seed(SEED)
        self.sam = Sam(NANO.trained_image_size)
        nn.init.trunc_normal_(self.sam.image_encoder.pos_embed, std=0.02)
        tie_cross_attention(self.sam.head)
        named = list(self.sam.named_parameters())
        others = [parameter for name, parameter in named if not is_hidden_matrix(name, parameter)]
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98))
        self.muon = Muon(
            [parameter for name, parameter in named if is_hidden_matrix(name, parameter)], WEIGHT_DECAY
        )
        self.average = {key: value.detach().clone() for key, value in self.sam.state_dict().items()}
        self.step, self.lr = 0, lr
        if not self.path.exists() and weights is not None:
            self._start_from(weights)
        self.warm_from = self.step
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.sam.load_state_dict(state["sam"])
            self.adamw.load_state_dict(state["adamw"])
            self.muon.load_state_dict(state["muon"])
            self.average, self.step, self.lr = state["average"], state["step"], state["lr"]
            self.warm_from = state["warm_from"]

    def _start_from(self, weights: Path) -> None:
        with safe_open(weights, "pt") as file:
            self.step = int(file.metadata()["step"])
            for name, value in self.sam.state_dict().items():
                value.copy_(file.get_tensor(name.removeprefix("head.")))
                self.average[name].copy_(value)

    @property
    def path(self) -> Path:
        return self.folder / "state.pt"

    def save(self) -> None:
        state = {
            "sam": self.sam.state_dict(),
            "adamw": self.adamw.state_dict(),
            "muon": self.muon.state_dict(),
            "average": self.average,
            "step": self.step,
            "lr": self.lr,
            "warm_from": self.warm_from,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def update(self) -> None:
        """Take a step along the gradients, at the optimizers' rates."""
        nn.utils.clip_grad_norm_(self.sam.parameters(), CLIP)
        self.adamw.step()
        self.muon.step()
        self.sam.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(AVERAGE, self.step / (self.step + 10))
        for key, value in self.sam.state_dict().items():
            self.average[key].lerp_(value, 1 - keep)

    def set_rate(self) -> None:
        """Give the optimizers the learning rate, which rises over the first steps of a stage or a new start."""
        warm_steps = self.step - max(stage_of(self.step)[1], self.warm_from) + 1
        rate = self.lr * min(1, warm_steps / WARMUP_STEPS)
        for optimizer, gain in ((self.adamw, 1.0), (self.muon, MUON_LR)):
            for group in optimizer.param_groups:
                group["lr"] = rate * gain

    def weights(self) -> dict[str, Tensor]:
        return dict(self.sam.named_parameters()) | dict(self.sam.named_buffers())


def plan(step: int, sizes: list[int]) -> tuple[int, MaskLoss, torch.Generator]:
    """Return image size, loss and generator of a step; they depend only on its number."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    shares = torch.tensor([SHARES[size] for size in sizes])
    side = sizes[int(torch.multinomial(shares, 1, generator=generator))]
    rounds = 2 if float(torch.rand((), generator=generator)) < TWO_ROUNDS else 1
    return side, MaskLoss(rounds=rounds, weights=MaskLossWeights(focal=FOCAL)), generator


def samples_of(step: int, pictures: Pictures, generator: torch.Generator) -> list[Sample]:
    """Return the samples of a step: pictures in turn, each time with another orientation and other objects."""
    side = pictures.canvas_NHWC.shape[1]
    number, objects = BATCHES[side]
    rng = np.random.default_rng([SEED, step])
    places = (np.arange(number) + step * number) % len(pictures.canvas_NHWC)
    turns = torch.randint(8, (number,), generator=generator).tolist()
    return [
        pictures.sample(place, objects, rng, turn) for place, turn in zip(places.tolist(), turns, strict=True)
    ]


def train(run: Run, until: int, sizes: list[int], final_lr: float) -> None:
    pictures = {side: training_pictures(run.folder, side) for side in sizes}
    at_sizes = {side: Sam(side) for side in sizes}
    first, started_lr = run.step, run.lr
    log = (run.folder / "log.jsonl").open("a")
    start, window = time.monotonic(), {"loss": 0.0, "picked": 0.0, "objects": 0}
    for step in range(first, until):
        side, mask_loss, generator = plan(step, sizes)
        samples = samples_of(step, pictures[side], generator)
        stage, _ = stage_of(step)
        run.lr = started_lr + (final_lr - started_lr) * (step - first) / (until - first)
        run.set_rate()
        batch = collate(samples, side)
        objects = batch[1]
        loss, picked = call(at_sizes, run.weights(), side, stage, mask_loss, batch, generator)
        (loss / len(objects.image_P)).backward()
        run.update()
        window["loss"] += float(loss.detach())
        window["picked"] += float(picked)
        window["objects"] += len(objects.image_P)
        if run.step % 50 == 0 or run.step == until:
            line = {
                "step": run.step,
                "stage": stage,
                "lr": run.lr,
                "loss": window["loss"] / window["objects"],
                "picked_iou": window["picked"] / window["objects"],
                "seconds": round(time.monotonic() - start),
            }
            if run.step % 500 == 0 or run.step == until:
                line |= validate(run, at_sizes, sizes)
            print(json.dumps(line), flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()
            window = {"loss": 0.0, "picked": 0.0, "objects": 0}
            run.save()


@torch.no_grad()
def validate(run: Run, at_sizes: dict[int, Sam], sizes: list[int]) -> dict[str, float]:
    """Return the mean IoU of picked masks for one point, by the averaged weights on held-out pictures."""
    found = {}
    averaged = {key: nn.Parameter(value, requires_grad=False) for key, value in run.average.items()}
    for side in sizes:
        pictures, rng = held_out_pictures(side), np.random.default_rng(HELD_OUT_SEED)
        samples = [pictures.sample(index, 6, rng) for index in range(len(pictures.sizes_N2))]
        total, objects_seen = 0.0, 0
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        points = MaskLoss(rounds=1, boxes=0.0)
        for sample in samples:
            batch = collate([sample], side)
            _, picked = call(at_sizes, averaged, side, "coupled", points, batch, generator)
            total, objects_seen = total + float(picked), objects_seen + len(sample.chosen)
        found[f"held_out_picked_iou_{side}"] = total / objects_seen
    return found


def save(run: Run, path: Path) -> None:
    """Save the averaged weights in float16, keyed as in a SAM checkpoint."""
    state = {key.removeprefix("head."): value.half().contiguous() for key, value in run.average.items()}
    metadata = {"step": str(run.step), "seed": str(SEED), "image_size": str(NANO.trained_image_size)}
    save_file(state, path, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the training")
    parser.add_argument("--until", type=int, metavar="STEP")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256], choices=sorted(BATCHES), metavar="PX")
    parser.add_argument("--final-lr", type=float, default=LR, metavar="X")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the averaged weights")
    parser.add_argument("--start", type=Path, metavar="FILE", help="initial weights, as written by --save")
    options = parser.parse_args()
    keep_freed_memory()
    options.work.mkdir(parents=True, exist_ok=True)
    run = Run(options.work, options.start)
    if options.until is not None and options.until > run.step:
        train(run, options.until, options.sizes, options.final_lr)
    if options.save is not None:
        save(run, options.save)
        print(f"weights as of step {run.step} in {options.save}")


if __name__ == "__main__":
    main()
