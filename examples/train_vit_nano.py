"""Trains vit_nano, encoder and head together, on generated pictures at several resolutions.

    python examples/train_vit_nano.py --work nano --until 3000 --sizes 256
    python examples/train_vit_nano.py --work nano --until 4000 --sizes 256 512 1024
    python examples/train_vit_nano.py --work nano --until 4500 --sizes 256 512 1024 --final-lr 0
    python examples/train_vit_nano.py --work nano --save weights.safetensors

Each command goes on where the last one ended (or was ended). The rate goes from where it is to --final-lr along a
straight line; the weights that are kept are a moving average. Loss, prompts and their rules are those of
`mobilesam distill --objective coupled`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from generate_pictures import generate
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from mobilesam.distill.labels import to_square_mask
from mobilesam.distill.mask_objectives import inside_square
from mobilesam.distill.mask_training import MaskTraining, Objects, mask_side
from mobilesam.sam.allocator import keep_freed_memory
from mobilesam.sam.head import SamHead
from mobilesam.sam.normalize import normalize_and_pad
from mobilesam.sam.vit import VITS, build_vit, fit_positions
from mobilesam.sam.vit_nano import STORED_IMAGE_SIZE

SEED = 1
HELD_OUT_SEED = 2
# Pictures and objects of each in one step, by image size in pixels, and how often a size comes up.
BATCHES = {256: (8, 4), 512: (3, 5), 1024: (1, 6)}
SHARES = {256: 0.7, 512: 0.2, 1024: 0.1}
TWO_ROUNDS = 0.2
"""Share of the steps in which a correction follows the first prompt."""
LR, WARMUP_STEPS, WEIGHT_DECAY, CLIP = 1e-3, 200, 0.02, 1.0
AVERAGE = 0.998
VALIDATION_PICTURES = 32


@dataclass(frozen=True)
class Sample:
    """canvas_HWC uint8 (S, S, 3), size (height, width), masks_KMM bool."""

    canvas_HWC: np.ndarray
    size: tuple[int, int]
    masks_KMM: np.ndarray


def make_sample(seed: int, index: int, side: int, objects: int) -> Sample:
    """A picture with up to `objects` of its objects, chosen at random; runs in a process of its own."""
    picture = generate(seed, index, side)
    height, width = picture.pixels_HWC.shape[:2]
    canvas_HWC = np.zeros((side, side, 3), np.uint8)
    canvas_HWC[:height, :width] = picture.pixels_HWC
    chosen = np.random.default_rng([seed, index]).permutation(len(picture.masks))[:objects]
    masks = [to_square_mask(picture.masks[i], mask_side(side)) for i in chosen]
    return Sample(canvas_HWC, (height, width), np.stack([mask for mask in masks if mask.any()]))


def collate(samples: list[Sample], side: int) -> tuple[Tensor, Objects]:
    """Normalised pixels (B, 3, S, S) and the objects of all samples."""
    sizes_B2 = torch.tensor([sample.size for sample in samples])
    pixels_BCHW = normalize_and_pad(torch.from_numpy(np.stack([s.canvas_HWC for s in samples])), sizes_B2)
    inside_BMM = inside_square(sizes_B2, side, mask_side(side))
    counts = torch.tensor([len(s.masks_KMM) for s in samples])
    masks = torch.from_numpy(np.concatenate([s.masks_KMM for s in samples]))
    image_P = torch.arange(len(samples)).repeat_interleave(counts)
    weight_P = torch.ones(len(masks))
    return pixels_BCHW, Objects(masks_PMM=masks, image_P=image_P, inside_BMM=inside_BMM, weight_P=weight_P)


class Sam(nn.Module):
    """Encoder and head of one image size; `forward` is the loss."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_encoder = build_vit("vit_nano", image_size)
        self.head = SamHead(image_size)

    def forward(
        self, training: MaskTraining, pixels: Tensor, objects: Objects, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return training.loss(self.head, self.image_encoder(pixels), objects, generator)


def call(
    sizes: dict[int, Sam], weights: dict[str, Tensor], side: int, *arguments: object
) -> tuple[Tensor, Tensor]:
    """`Sam.forward` at an image size, with weights whose positions are for STORED_IMAGE_SIZE."""
    prefix = "image_encoder."
    encoder = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    fitted, _ = fit_positions(encoder, VITS["vit_nano"], side)
    at_size = weights | {prefix + key: value for key, value in fitted.items()}
    return functional_call(sizes[side], at_size, arguments)


class Run:
    """The state of a training, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(SEED)
        self.sam = Sam(STORED_IMAGE_SIZE)
        nn.init.trunc_normal_(self.sam.image_encoder.pos_embed, std=0.02)
        decayed = [p for p in self.sam.parameters() if p.ndim > 1]
        others = [p for p in self.sam.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98))
        self.average = {key: value.detach().clone() for key, value in self.sam.state_dict().items()}
        self.step, self.lr = 0, LR
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.sam.load_state_dict(state["sam"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step, self.lr = state["average"], state["step"], state["lr"]

    @property
    def path(self) -> Path:
        return self.folder / "state.pt"

    def save(self) -> None:
        state = {
            "sam": self.sam.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "lr": self.lr,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def weights(self) -> dict[str, Tensor]:
        return dict(self.sam.named_parameters()) | dict(self.sam.named_buffers())


def plan(step: int, sizes: list[int]) -> tuple[int, MaskTraining, torch.Generator]:
    """What a step is made of; decided by its number alone."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    shares = torch.tensor([SHARES[size] for size in sizes])
    side = sizes[int(torch.multinomial(shares, 1, generator=generator))]
    rounds = 2 if float(torch.rand((), generator=generator)) < TWO_ROUNDS else 1
    return side, MaskTraining(rounds=rounds), generator


def batches(
    pool: ProcessPoolExecutor, steps: range, sizes: list[int]
) -> Iterator[tuple[int, MaskTraining, torch.Generator, list[Sample]]]:
    """The steps' batches, two of them made ahead."""
    waiting = []
    for step in [*steps, None, None]:
        if step is not None:
            side, training, generator = plan(step, sizes)
            pictures, objects = BATCHES[side]
            futures = [pool.submit(make_sample, SEED, step * 16 + i, side, objects) for i in range(pictures)]
            waiting.append((side, training, generator, futures))
        if (len(waiting) > 2 or step is None) and waiting:
            side, training, generator, futures = waiting.pop(0)
            yield side, training, generator, [future.result() for future in futures]


def train(run: Run, until: int, sizes: list[int], final_lr: float, pool: ProcessPoolExecutor) -> None:
    at_sizes = {side: Sam(side) for side in BATCHES}
    first, started_lr = run.step, run.lr
    log = (run.folder / "log.jsonl").open("a")
    start, window = time.monotonic(), {"loss": 0.0, "picked": 0.0, "objects": 0}
    for side, training, generator, samples in batches(pool, range(first, until), sizes):
        run.lr = started_lr + (final_lr - started_lr) * (run.step - first) / (until - first)
        for group in run.optimizer.param_groups:
            group["lr"] = run.lr * min(1, (run.step + 1) / WARMUP_STEPS)
        pixels, objects = collate(samples, side)
        loss, picked = call(at_sizes, run.weights(), side, training, pixels, objects, generator)
        (loss / len(objects.image_P)).backward()
        nn.utils.clip_grad_norm_(run.sam.parameters(), CLIP)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        keep = min(AVERAGE, run.step / (run.step + 10))
        for key, value in run.sam.state_dict().items():
            run.average[key].lerp_(value, 1 - keep)
        window["loss"] += float(loss.detach())
        window["picked"] += float(picked)
        window["objects"] += len(objects.image_P)
        if run.step % 50 == 0 or run.step == until:
            line = {
                "step": run.step,
                "lr": run.lr,
                "loss": window["loss"] / window["objects"],
                "picked_iou": window["picked"] / window["objects"],
                "seconds": round(time.monotonic() - start),
            }
            if run.step % 500 == 0 or run.step == until:
                line |= validate(run, at_sizes, sizes, pool)
            print(json.dumps(line), flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()
            window = {"loss": 0.0, "picked": 0.0, "objects": 0}
            run.save()


@torch.no_grad()
def validate(
    run: Run, at_sizes: dict[int, Sam], sizes: list[int], pool: ProcessPoolExecutor
) -> dict[str, float]:
    """The IoU of picked masks for one point, the averaged weights on held-out pictures."""
    found = {}
    averaged = {key: nn.Parameter(value, requires_grad=False) for key, value in run.average.items()}
    for side in sizes:
        pictures = VALIDATION_PICTURES * 256 // side
        futures = [pool.submit(make_sample, HELD_OUT_SEED, i, side, 6) for i in range(pictures)]
        samples = [future.result() for future in futures]
        total, objects_seen = 0.0, 0
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        for sample in samples:
            pixels, objects = collate([sample], side)
            points = MaskTraining(rounds=1, boxes=0.0)
            _, picked = call(at_sizes, averaged, side, points, pixels, objects, generator)
            total, objects_seen = total + float(picked), objects_seen + len(objects.image_P)
        found[f"held_out_picked_iou_{side}"] = total / objects_seen
    return found


def save(run: Run, path: Path) -> None:
    """The averaged weights in float16, keyed as in a SAM checkpoint."""
    state = {key.removeprefix("head."): value.half().contiguous() for key, value in run.average.items()}
    metadata = {"step": str(run.step), "seed": str(SEED), "image_size": str(STORED_IMAGE_SIZE)}
    save_file(state, path, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the training lies")
    parser.add_argument("--until", type=int, metavar="STEP")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256], choices=sorted(BATCHES), metavar="PX")
    parser.add_argument("--final-lr", type=float, default=LR, metavar="X")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the averaged weights")
    options = parser.parse_args()
    keep_freed_memory()
    options.work.mkdir(parents=True, exist_ok=True)
    run = Run(options.work)
    if options.until is not None and options.until > run.step:
        with ProcessPoolExecutor(1) as pool:
            train(run, options.until, options.sizes, options.final_lr, pool)
    if options.save is not None:
        save(run, options.save)
        print(f"weights as of step {run.step} in {options.save}")


if __name__ == "__main__":
    main()
